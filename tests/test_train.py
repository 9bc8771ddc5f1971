"""The command line from start to end, on a few digits with a narrow MLP: training, resuming, testing, refusing."""

import csv
import io
import json
import math
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import train
import visualize
from model import build
from support import data, recipes, runs
from support.runs import Run

WHOLE = data.load("digits", image_size=8)
TINY = ["--arch", "mlp", "--width", "0.1", "--T", "2", "--batch-size", "8", "--epochs", "3", "--device", "cpu"]
STEPS = 6  # an epoch


def digits(first, first_test):
    """48 of scikit-learn's digits for training and 20 for testing, 8x8 pixels."""
    train, test = slice(first, first + 48), slice(first_test, first_test + 20)
    return data.Dataset(WHOLE.train_x[train], WHOLE.train_y[train], WHOLE.test_x[test], WHOLE.test_y[test], 10)


FEW = digits(0, 0)
PLACES = {"./data": FEW, "./moved": FEW, "./other": digits(48, 0), "./untested": digits(0, 20)}
PLACES["./three"] = data.Dataset(FEW.train_x, FEW.train_y % 3, FEW.test_x, FEW.test_y % 3, 3)


def load(name, root, *_):
    """In place of `data.load`, which would read all digits: those of this folder."""
    return PLACES[root]


def main(*arguments):
    return train.main([str(argument) for argument in arguments])


def fails(capsys, *arguments, command=main):
    """The one line on stderr with which a command ends, its exit status being 2."""
    capsys.readouterr()
    assert command(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def stop_at(monkeypatch, call, function="train_step", how=signal.SIGTERM):
    """Has a function of train.py raise a signal in one of its calls, counted from 1."""
    original, count = getattr(train, function), [0]

    def stopping(*arguments, **options):
        count[0] += 1
        if count[0] == call:
            signal.raise_signal(how)
        return original(*arguments, **options)

    monkeypatch.setattr(train, function, stopping)


def end(folder):
    """All of a run's end that must not depend on how often it was stopped, tensors as bytes."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items() if key != "seconds"}
        return [plain(part) for part in value] if isinstance(value, list | tuple) else value

    run = Run(folder)
    rows = [line.split(",") for line in (run.folder / "metrics.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    return [plain(run.load()), plain(run.load("best.pt")), [row[:seconds] + row[seconds + 1 :] for row in rows]]


def result(folder):
    return json.loads(Path(folder, "result.json").read_text())


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load)


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "digits-mlp-ei-width0.1-seed0"
    assert main(*TINY, "--out", folder) == 0
    return folder


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped after the second step of its second epoch."""
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS + 2)
        assert main(*TINY, "--out", "r") == 128 + signal.SIGTERM
    return tmp_path / "r"


def rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


@pytest.fixture
def learner():
    """A network, its optimiser, and a batch."""
    model = build("mlp", 1, 10, 2, image_size=8, width=0.1)
    runs.prepare(dict(init="ei", seed=0, batch_size=8), FEW, model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    return model, sgd, data.to_input(FEW.train_x[:8]), FEW.train_y[:8]


def test_a_step_goes_down_the_gradient_and_keeps_dales_law(learner):
    model, _, x, y = learner
    logits = model(x)
    cross_entropy(logits, y).backward()
    expected = {name: p.detach() - 0.1 * (p.grad + 5e-4 * p.detach()) for name, p in model.named_parameters()}
    loss, accuracy, finite = train.train_step(*learner)
    assert loss == cross_entropy(logits, y) and accuracy == (logits.argmax(1) == y).float().mean() and finite
    for name, p in model.named_parameters():
        bound = expected[name] if name.endswith("b_e") else expected[name].clamp(min=0)
        torch.testing.assert_close(p.detach(), bound)
    train.train_step(*learner, clip_norm=1e-3)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_with_a_number_that_is_not_finite_changes_nothing(where, bad, learner):
    model, sgd, *_ = learner
    assert train.train_step(*learner)[2]
    before = [(p.detach().clone(), sgd.state[p]["momentum_buffer"].clone()) for p in model.parameters()]
    if where == "gradient":
        model.encoder.stages[1].circuit.w_ie.register_hook(lambda g: g.index_fill(1, torch.tensor([3]), bad))
    else:
        model.readout.register_forward_hook(lambda module, args, out: out + bad)
    assert not train.train_step(*learner, clip_norm=1.0)[2]
    for p, (values, momentum) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, values) and torch.equal(sgd.state[p]["momentum_buffer"], momentum) and not p.grad.any()


def test_learning_rate_warms_up_and_anneals():
    config = dict(lr=0.002, warmup_epochs=1, warmup_from=1e-7, epochs=5)
    rates = [train.learning_rate(config, step, 100) for step in range(501)]
    assert [rates[i] for i in (0, 50, 100, 300, 500)] == pytest.approx([1e-7, 1e-3, 2e-3, 1e-3, 0], rel=1e-3, abs=1e-12)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_the_run_folder_and_what_is_printed(finished, capsys):
    assert main(*TINY, "--out", "again") == 0
    out = capsys.readouterr().out
    for word in ("cpu", "digits: 48 training", "mlp ei", "inhibitory", "batch_size=8", "lr=0.01"):
        assert word in out
    assert out.count("\nepoch ") == 3 and "firing rates" in out and "again" in out.splitlines()[-1]
    assert main(*TINY, "--seed", "1", "--out", "other") == 0
    assert end("again") == end(finished) != end("other")  # the same settings, the same bits
    table, state = rows(finished), Run(finished).load()
    recorded, sgd = state["histograms"], state["optimizer"]["param_groups"]
    assert [row["epoch"] for row in table] == ["1", "2", "3"] and list(table[0])[-1] == "rate_3"
    assert result(finished)["epochs"] == 3 and result(finished)["test_accuracy"] == float(table[2]["test_accuracy"])
    assert len(recorded) == 4 and len(recorded[0]) == 3 and sgd[0]["momentum"] == 0.9  # before and after epochs; layers
    assert recorded[3][2].sum(1).tolist() == [30 * 20 * 2] * 2  # neurons, test images, time steps
    best = max(table, key=lambda row: float(row["test_accuracy"]))
    capsys.readouterr()
    assert main("--eval", finished) == 0
    assert f"{float(best['test_accuracy']):.2%}, loss {float(best['test_loss']):.4f}, T=2" in capsys.readouterr().out


HOW = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
MOMENTS = [("train_step", 2), ("evaluate", 1), ("train_step", STEPS), ("train_step", 1)]


def adamw(parameters, **_):
    """A student's own optimiser: two groups with different rates, the second a tenth of the first."""
    weights = list(parameters)
    groups = [dict(params=weights[::2], lr=0.01), dict(params=weights[1::2], lr=0.001, weight_decay=0.1)]
    return torch.optim.AdamW(groups, fused=True)


@pytest.mark.parametrize("what", ["ei", "bn", "plain", "dann", "homeostasis", "adamw"])
def test_stopped_and_resumed_ends_with_the_same_bits(what, tmp_path, monkeypatch, capsys):
    arguments = [*TINY, "--kind", what.replace("adamw", "ei")]
    arguments[4:6] = [] if what == "dann" else arguments[4:6]  # it has no --T
    rates, original = [], train.train_step

    def note(network, optimizer, *rest):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return original(network, optimizer, *rest)

    monkeypatch.setattr(train, "train_step", note)
    if what == "adamw":
        monkeypatch.setattr(torch.optim, "SGD", adamw)
    assert main(*arguments, "--out", "calm") == 0
    command, steps = [*arguments, "--out", "r"], []
    for (function, call), how in zip(MOMENTS, HOW, strict=False):  # in an epoch, between two, in the last step of one
        with monkeypatch.context() as patch:
            stop_at(patch, call, function, how)
            assert main(*command) == 128 + how
        assert "stopped and saved; go on with: python train.py --resume r" in capsys.readouterr().out
        command = ["--resume", "r"]
        steps.append(Run("r").load()["step"])
        assert not (tmp_path / "r" / "result.json").exists()
    assert steps == [2, STEPS, 2 * STEPS, 2 * STEPS + 1][: len(HOW)]
    assert main("--resume", "r") == 0 and end("r") == end("calm")
    same = [result(name) | dict(train_seconds=0) for name in ("r", "calm")]
    assert same[0] == same[1] and len(rates) == 6 * STEPS and rates[: 3 * STEPS] == rates[3 * STEPS :]
    expected = [train.learning_rate(Run("r").config, step, STEPS) for step in range(3 * STEPS)]
    assert [rate[0] for rate in rates[: 3 * STEPS]] == pytest.approx(expected)  # of every group, by its own rate
    assert all(rate[1:] == ([] if what != "adamw" else [pytest.approx(rate[0] / 10)]) for rate in rates)


def test_resuming_a_finished_run_ends_at_once_and_changes_nothing(finished, monkeypatch):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    monkeypatch.setattr(train, "train_step", None)
    for _ in range(2):
        assert main("--resume", finished) == 0
        assert {file.name: file.read_bytes() for file in finished.iterdir()} == before
        (finished / "result.json").unlink()  # what was lost is written again
        (finished / "metrics.csv").write_text("half of a li")


def test_a_longer_schedule(finished, monkeypatch, capsys):
    stop_at(monkeypatch, 1)
    assert main("--resume", finished, "--epochs", 5) == 128 + signal.SIGTERM
    assert not (finished / "result.json").exists()  # that of three epochs
    assert main("--resume", finished) == 0 and main("--eval", finished) == 0
    assert result(finished)["epochs"] == result(finished)["config"]["epochs"] == len(rows(finished)) == 5
    assert float(rows(finished)[4]["lr"]) == train.learning_rate(Run(finished).config, 5 * STEPS - 1, STEPS)
    assert "has 5 epochs behind it" in fails(capsys, "--resume", finished, "--epochs", 4)


def test_an_error_of_the_system_is_said_without_its_number(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert " cannot be used (" in (said := fails(capsys, *TINY, "--out", tmp_path / "file" / "r"))
    assert "Errno" not in said and said.endswith("mend that, or give another path\n")


@pytest.mark.parametrize("epochs, compiled", [(5000 // STEPS, False), (5000 // STEPS + 1, True)])
def test_a_long_training_is_compiled(epochs, compiled, monkeypatch, capsys, tmp_path):
    def accelerate(model, compiled):
        raise ValueError(f"compiled: {compiled}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "accelerate", accelerate)
    assert f"compiled: {compiled}" in fails(capsys, *TINY, "--epochs", epochs)


REFUSED = {
    "other data": (["--data-root", "./other"], "the training set has other contents"),
    "other network": ([], "is of another network or optimiser"),
    "other optimiser": ([], "it was trained with another optimiser"),
    "other order": ([], "is of another network or optimiser"),
    "too few epochs": (["--epochs", "1"], "--epochs 1 is too few"),
    "contradiction": (["--lr", "0.5"], "was made with lr=0.01, not 0.5"),
    "in use": ([], "in use: another process"),
    "damaged": ([], "checkpoint.prev.pt cannot be used"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_resume_writes_nothing(what, stopped, monkeypatch, capsys):
    (options, words), sgd = REFUSED[what], torch.optim.SGD

    def contents():
        kept = [file for file in stopped.iterdir() if file.name != ".lock"]  # some versions of filelock touch it
        return [(f.name, f.read_bytes(), f.stat().st_mtime_ns) for f in kept], stopped.stat().st_mtime_ns

    other, files = Run(stopped), [stopped / name for name in ("checkpoint.pt", "checkpoint.prev.pt")]
    with monkeypatch.context() as patch:
        if what == "other network":
            patch.setitem(runs.networks.PLANS, "mlp", [400, 500, 300])
        elif what == "other optimiser":
            patch.setattr(torch.optim, "SGD", lambda parameters, **_: torch.optim.Adam(parameters))
        elif what == "other order":
            patch.setattr(torch.optim, "SGD", lambda parameters, **how: sgd([*parameters][::-1], **how))
        elif what == "in use":
            other.lock()
        intact = [file.read_bytes() for file in files]
        if what == "damaged":
            for file in files:
                file.write_bytes(b"x")
        before = contents()
        assert words in fails(capsys, "--resume", stopped, *options)
        assert contents() == before
        other.close()
    for file, raw in zip(files, intact, strict=True):
        file.write_bytes(raw)
    assert main("--resume", stopped) == 0  # in the same process: the lock is free


def test_data_that_moved(stopped, capsys):
    assert main("--resume", stopped, "--data-root", "./moved") == 0
    assert Run(stopped).config["data_root"] == "./moved" and main("--eval", stopped) == 0
    assert "the test set has other contents" in fails(capsys, "--eval", stopped, "--data-root", "./untested")
    assert main("--eval", stopped, "--data-root", "./untested", "--other-data") == 0
    assert "other data than those of the training: the test set" in capsys.readouterr().out
    said = fails(capsys, "--eval", stopped, "--data-root", "./three", "--other-data")
    assert "the classes have other names" in said


def test_after_an_error_the_run_is_free_in_the_same_session(stopped, monkeypatch, tmp_path):
    kept = []
    for function in ("accelerate", "evaluate"):
        with monkeypatch.context() as patch:
            patch.setattr(train, function, None)
            for command in (["--resume", stopped], [*TINY, "--out", "new"]):
                with pytest.raises(TypeError) as error:
                    main(*command)
                kept.append(error)  # as a notebook keeps it, with all that its frames hold
        assert (tmp_path / "new").exists() == (function == "evaluate")  # before, nothing was saved
    assert main("--resume", stopped) == main("--resume", "new") == 0


BAD = """--arch vgg9: vgg9; --kind ln: ln; --T 0: at least 1; --epochs 1.5: whole number; --lr nan: positive
--batch-size -3: at least 1; --kind dann --no-ste: leave it out; --kind bn --eps 1e-6: leave it out
--kind dann --tau 3: has no --tau; --kind bn --ei-ratio 8: has no --ei-ratio; --eps small: adaptive
--threshold 0: positive number; --width 0: 0.001 to 100; --batch-size 49: larger than the training set of 48
--warmup-epochs 10 --epochs 2: longer than the training; --device=: cannot be used; --plan x,8: list of layer sizes
--seed -1: at least 0; --kind dann --T 4: has no --T; --precision bf16 --plain: give --precision float32
--out ~nobody-of-this-name/x: home directory; --frobnicate: frobnicate; --resume nowhere: nowhere is not a run folder
--eval=: not a run folder; --resume a --eval b: one of them; --resume a --out b: one of them; --out file/r: Not a dir
--device abacus: abacus; --tau 0.5: at least 1; --device meta: cannot be used; --out file: is no folder"""


@pytest.mark.parametrize("arguments, words", [case.split(": ") for case in BAD.replace("\n", "; ").split("; ")])
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, words, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert words in fails(capsys, *arguments.split())
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


POISON = {  # the layer that is named, and how it comes to have such a number
    "encoder.stages.1.circuit.w_ee (its gradient)": lambda layer, _: layer.w_ee.register_hook(lambda g: g * math.inf),
    "encoder.stages.1.circuit": lambda layer, _: layer.b_e.data.fill_(math.nan),  # u < theta: no spike, a finite loss
    "readout": lambda _, readout: readout.register_forward_hook(lambda module, args, out: out * math.inf),
}


@pytest.mark.parametrize("layer", [*POISON, None])  # None: a rate that is far too large
def test_a_number_that_is_not_finite_ends_the_training(layer, monkeypatch, capsys, tmp_path):
    original, calls = train.train_step, []

    def poison(network, *arguments):
        calls.append(network)
        if layer and len(calls) == STEPS + 2:
            POISON[layer](network.encoder.stages[1].circuit, network.readout)
        return original(network, *arguments)

    monkeypatch.setattr(train, "train_step", poison)
    assert main(*TINY, "--out", "r", *([] if layer else ["--lr", "1e20", "--warmup-epochs", "0"])) == 0
    found, out = result("r"), capsys.readouterr().out
    assert found["outcome"] == "failed to converge"
    assert all(value.isfinite().all() for value in Run("r").load()["model"].values())
    if layer:
        assert f"epoch 2: a number is not finite; first layer with such values: {layer}\n" in out
        assert found["epochs"] == 1 and found["first_nonfinite_layer"] == layer


@pytest.mark.parametrize("kind, said", [("ei", "not finite: the circuit"), ("bn", "such values: encoder.stages.0")])
def test_input_that_is_not_finite(kind, said, monkeypatch, capsys):
    def batch(config, dataset, indices, step, original=data.training_batch):
        x, y = original(config, dataset, indices, step)
        return torch.where(torch.tensor(step == 1), math.nan, x), y

    monkeypatch.setattr(data, "training_batch", batch)
    assert main(*TINY, "--kind", kind, "--out", "r") == (2 if kind == "ei" else 0)
    assert said in "".join(capsys.readouterr())
    assert all(value.isfinite().all() for value in Run("r").load()["model"].values())
    assert "there is no r/best.pt" in fails(capsys, "--eval", "r")


def test_a_parameter_that_overflows_in_the_last_step_is_not_saved(monkeypatch, tmp_path):
    def overflow(model, *_):
        model.encoder.stages[0].circuit.b_e.data[0] = math.inf
        return 1.0, 0.5, [0.1] * 3

    monkeypatch.setattr(train, "evaluate", overflow)
    assert main(*TINY, "--out", "r") == 0
    assert result("r")["first_nonfinite_layer"] == "encoder.stages.0.circuit"
    assert Run("r").load()["step"] == 0 and not (tmp_path / "r" / "best.pt").exists()


@pytest.mark.parametrize("accuracy, outcome", [(0.8, "failed to converge"), (0.95, "converged")])
def test_chance_is_the_share_of_the_commonest_class(accuracy, outcome, monkeypatch, tmp_path, capsys):
    y = torch.tensor([0] * 16 + [1, 1, 2, 2])
    monkeypatch.setitem(PLACES, "./data", data.Dataset(FEW.train_x, FEW.train_y % 3, FEW.test_x, y, 3))
    monkeypatch.setattr(train, "evaluate", lambda *_: (0.7, accuracy, [0.1] * 3))
    assert main(*TINY, "--give-up", "--out", "r") == 0
    found = result("r")
    assert found["outcome"] == outcome and found["epochs"] == (1 if outcome.startswith("failed") else 3)
    assert found["given_up"] == ("given up after 1 epochs at chance" in capsys.readouterr().out) == (accuracy == 0.8)
    assert main("--resume", "r") == 0 and result("r")["epochs"] == 3  # the rest of it


def test_eval_beside_bn_snn(finished, tmp_path, capsys):
    def beside(*options):
        capsys.readouterr()
        assert main("--eval", finished, *options) == 0
        return capsys.readouterr().out

    bn = tmp_path / "digits-mlp-bn-width0.1-seed0"
    out = beside("--T", "3")
    assert "no BN-SNN with a finished epoch beside it" in out and "T=3" in out
    assert main(*TINY, "--kind", "bn", "--out", bn) == 0  # with another learning rate: that of its own recipe
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("settings"))
    assert " lr=0.1 " in said and " tau=2 " in said and "ei_ratio" not in said and " eps=" not in said
    out = beside("--kind", "ei", "--T", "3")
    assert out.count("accumulates") == 2 and "beside it, BN-SNN, with lr=0.1, " in out and out.count("T=3") == 2
    (bn / "best.pt").write_bytes(b"x")
    assert beside().splitlines()[-1].startswith("the BN-SNN beside it is not compared: ")
    for option, value in dict(epochs=1, data_root="./other", T=1, batch_size=6, width=0.2, plan=20).items():
        shutil.rmtree(bn)
        assert main(*TINY, "--kind", "bn", f"--{option.replace('_', '-')}={value}", "--out", bn) == 0
        last, words = beside().splitlines()[-1], option.replace("data_root", "images")
        assert last == f"the BN-SNN beside it, {bn}, was made with other {words}: not compared"


def test_bfloat16_is_remembered_and_is_not_for_the_plain_equations(capsys):
    run = "runs/digits-mlp-ei-width0.1-bf16-seed0"
    assert main(*TINY, "--precision", "bf16") == 0 and Run(run).config["precision"] == "bf16"
    for how in ("--eval", "--resume"):
        assert "--plain is for float32: leave it out" in fails(capsys, how, run, "--plain")
    said = []
    for options in ([], ["--precision", "float32"], ["--precision", "float32", "--plain"]):
        assert main("--eval", run, *options) == 0
        said.append(capsys.readouterr().out.splitlines()[0])
    assert said[0] != said[1]


@pytest.mark.parametrize("line, words", [("a, b = 'xyz'", "to unpack (expected 2"), ("F.dropout(x, p=2)", "between 0")])
def test_an_error_in_a_changed_line_names_its_place(line, words, monkeypatch, capsys):
    code = compile(f"def edited(*_):\n    {line}", str(Path(train.__file__).with_name("lif.py")), "exec")
    exec(code, scope := dict(F=torch.nn.functional, x=torch.ones(1)))
    monkeypatch.setattr(train, "evaluate", scope["edited"])
    assert re.search(f"{re.escape(words)}.* \\(lif.py, line 2\\)\n$", fails(capsys, *TINY, "--out", "r"))


@pytest.mark.parametrize("command", [(train.main, "--resume"), (train.main, "--eval"), (visualize.main, "weights")])
def test_other_equations_are_named(command, finished, capsys):
    path, (program, *option) = finished / "config.json", command
    known = json.loads(path.read_text())
    for entry in (known["equations"], known["equations"] | {"inhibition.py": "0123456789ab"}):
        path.write_text(json.dumps(known | dict(equations=entry)))
        for _ in range(2):  # a resumed run still knows with which it was begun
            capsys.readouterr()
            assert program([*option, str(finished)]) == 0
            lines = [line for line in capsys.readouterr().out.splitlines() if "other equations" in line]
            assert [": inhibition.py changed since" in line for line in lines] == [True] * (entry != known["equations"])


def test_the_process_is_as_before(monkeypatch):
    def state():
        return [signal.getsignal(how) for how in HOW], sys.stdout, sys.stderr, torch.get_rng_state().tolist()

    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--out", "r"])
    before = state()
    with pytest.raises(SystemExit) as left:  # as `%run train.py` and `python -i train.py` have it
        runpy.run_path(train.__file__, run_name="__main__")
    assert left.value.code == main("--resume", "r") == main("--eval", "r") == 0 and main("--frobnicate") == 2
    assert state() == before and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C works


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, 2, how=signal.SIGHUP)
        assert main(*TINY, "--out", "r") == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "pipe"), OSError(28, "full"), ValueError("closed"), None])
def test_printing_never_decides(error, monkeypatch, tmp_path):
    class Broken(io.StringIO):
        def write(self, text):
            raise error

    stream, raw = Broken() if error else None, io.BytesIO()  # None: no console, as with pythonw
    monkeypatch.setattr(sys, "stderr", stream)
    for stdout in (stream, io.TextIOWrapper(raw, encoding="ascii")):  # or one that cannot write every letter
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(*TINY, "--out", "r" if stdout is stream else "\u00fc") == 0 and sys.stdout is stdout
    assert (tmp_path / "r" / "result.json").exists() and b"run folder: \\xfc" in raw.getvalue()


def test_the_recipe_follows_data_arch_and_kind_and_the_name_says_what_is_ablated():
    def of(arguments):
        return recipes.settings(recipes.parse(arguments.split()))

    for arguments, expected in {
        "": dict(arch="vgg8", data="digits", T=4),
        "--data cifar10": dict(lr=0.002, warmup_epochs=10, epochs=300, batch_size=128),
        "--data cifar100 --arch vgg16": dict(lr=0.001, warmup_epochs=30, weight_decay=5e-4),
        "--data cifar10 --kind bn": dict(lr=0.1, warmup_epochs=0, weight_decay=1e-4),
        "--data cifar10 --epochs 30": dict(warmup_epochs=1),
    }.items():
        assert expected.items() <= of(arguments).items()
    ablated = of("--eps 1e-6 --no-ste --no-grad-scaling --init kaiming --ei-ratio 8 --width 0.5 --plan 8-P")
    name = "digits-vgg8-ei-plan8-P-width0.5-eps1e-06-noste-noscaling-kaiming-eiratio8-seed0"
    assert recipes.run_name(ablated) == name
