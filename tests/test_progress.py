"""What happens beside the equations of a training: numbers that are not finite, threads, signals."""

import threading

import pytest
import torch
import torch.nn.functional as F
from test_runs import names

import train
from support import console, data, recipes
from support.measure import first_nonfinite
from support.progress import Progress, StopRequest
from support.runs import Run, prepare

CONFIG = recipes.settings(recipes.parse(["--T", "2", "--width", "0.1", "--epochs", "1", "--batch-size", "4"]))


def begin(tmp_path):
    """A training of a narrow VGG-8 before its first step."""
    whole = data.load("digits")
    dataset = data.Dataset(whole.train_x[:24], whole.train_y[:24], whole.test_x[:8], whole.test_y[:8], 10)
    torch.manual_seed(0)
    model = train.build("vgg8", 1, 10, T=2, width=0.1)
    prepare(CONFIG, dataset, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    return dataset, model, Progress(Run.create(tmp_path / "r", CONFIG), CONFIG, dataset, model, optimizer)


def step(model, progress, x, y):
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    progress.optimizer.zero_grad()
    loss.backward()
    progress.add(loss, logits, y)
    progress.optimizer.step()


@pytest.mark.parametrize("what", ["parameter", "input", "gradient"])
def test_a_number_that_is_not_finite_ends_the_training_with_finite_parameters(what, tmp_path):
    _, model, progress = begin(tmp_path)
    steps = 0
    for epoch in progress.epochs():
        for _, x, y in progress.batches(epoch):
            steps += 1
            if steps == 1 and what == "gradient":
                model.encoder.stages[6].circuit.w_ee.register_hook(lambda g: g * float("inf"))
            if steps == 1 and what == "input":  # at the very first step, when there is no momentum yet
                x[0, 0, 5, 5] = float("nan")
            if steps == 3 and what == "parameter":
                with torch.no_grad():
                    model.encoder.stages[4].circuit.w_ei[0, 0] = float("nan")
            step(model, progress, x, y)
        assert progress.interrupted
    where = dict(parameter="encoder.stages.4.circuit", input="encoder.stages.0.circuit")
    where["gradient"] = "encoder.stages.6.circuit.w_ee (its gradient)"
    assert steps == (3 if what == "parameter" else 1) and progress.broken == where[what]
    others = [
        p for name, p in model.named_parameters() if what != "parameter" or name != "encoder.stages.4.circuit.w_ei"
    ]
    assert all(p.isfinite().all() for p in others)
    assert all(s["momentum_buffer"].isfinite().all() for s in progress.optimizer.state.values())
    progress.finish()
    state = Run(tmp_path / "r").load()
    assert all(p.isfinite().all() for p in state["model"].values())


def test_a_parameter_that_overflows_in_the_last_step_is_not_saved(tmp_path):
    _, model, progress = begin(tmp_path)
    for epoch in progress.epochs():
        for _, x, y in progress.batches(epoch):
            step(model, progress, x, y)
        with torch.no_grad():
            model.readout.w_ee[0, 0] = float("inf")
        progress.end_epoch(0.1, 1.0, 0.5, [0.1] * 5)
    assert progress.broken == "readout" and not progress.history and "best.pt" not in names(tmp_path / "r")


def test_first_nonfinite_without_anything_is_the_loss(tmp_path):
    dataset, model, _ = begin(tmp_path)
    assert first_nonfinite(model, data.to_input(dataset.train_x[:4]), dataset.train_y[:4]) == "loss"


def test_a_training_in_a_thread_has_no_signals_and_runs(tmp_path):
    found = []

    def work():
        with StopRequest() as stop:
            found.append(stop.signal)
        options = ["--T", "1", "--width", "0.05", "--epochs", "1", "--batch-size", "700", "--out", str(tmp_path / "t")]
        found.append(train.main(options))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert found == [None, 0] and (tmp_path / "t" / "result.json").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_ends_with_advice(error, capsys):
    def command():
        raise error

    assert console.status(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: not enough memory; take a smaller network") and err.count("\n") == 1
