"""The command line from start to end, on a few digits with a narrow MLP: training, resuming, testing, refusing."""

import csv
import io
import json
import math
import os
import runpy
import shutil
import signal
import sys
import threading

import pytest
import torch
from torch import nn
from trainings import FEW, PLACES, STEPS, TINY, end, fails, load, main, snapshot, stop_at

import train
from model import build
from support import data, parallel, progress, recipes, runs
from support.runs import Run


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A finished run that nothing disturbed. It is not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "calm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load)
        assert main(*TINY, "--out", folder) == 0
    return folder


@pytest.fixture
def finished(calm, tmp_path):
    return shutil.copytree(calm, tmp_path / "digits-mlp-ei-width0.1-seed0")


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped after the second step of its second epoch."""
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS + 2)
        assert main(*TINY, "--out", tmp_path / "r") == 128 + signal.SIGTERM
    return tmp_path / "r"


def result(folder):
    return json.loads((folder / "result.json").read_text())


# ---- one step


def step(model, x, y, optimizer=torch.optim.SGD, **options):
    how = dict(lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    sgd = optimizer(model.parameters(), **how)
    return [train.train_step(model, sgd, x, y, **options), sgd]


def batch(model):
    x, y = data.to_input(FEW.train_x[:8]), FEW.train_y[:8]
    runs.prepare(dict(init="ei", seed=0, batch_size=8), FEW, model)
    return x, y


def test_a_step_goes_down_the_gradient_and_keeps_dales_law():
    model = build("mlp", 1, 10, 2, image_size=8, width=0.1)
    x, y = batch(model)
    logits = model(x)
    nn.functional.cross_entropy(logits, y).backward()
    expected = {name: p - 0.1 * (p.grad + 5e-4 * p) for name, p in model.named_parameters()}
    (loss, accuracy, finite), sgd = step(model, x, y)
    assert loss == nn.functional.cross_entropy(logits, y) and accuracy == (logits.argmax(1) == y).float().mean()
    assert finite and not loss.requires_grad and len(sgd.state) == len(expected)
    for name, p in model.named_parameters():
        bound = expected[name] if name.endswith("b_e") else expected[name].clamp(min=0)
        torch.testing.assert_close(p.detach(), bound.detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_with_a_number_that_is_not_finite_changes_nothing(where, bad):
    model = build("mlp", 1, 10, 2, kind="bn" if where == "loss" else "ei", image_size=8, width=0.1)
    x, y = batch(model) if where == "gradient" else (data.to_input(FEW.train_x[:8]), FEW.train_y[:8])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    assert train.train_step(model, sgd, x, y)[2]
    parameters = [p.detach().clone() for p in model.parameters()]
    momentum = [sgd.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    if where == "gradient":
        next(model.parameters()).register_hook(lambda g: g.index_fill(1, torch.tensor([3]), bad))
    else:
        model.readout.register_forward_hook(lambda module, args, out: out + bad)
    assert not train.train_step(model, sgd, x, y, clip_norm=1.0)[2]
    for p, before, buffer in zip(model.parameters(), parameters, momentum, strict=True):
        assert torch.equal(p, before) and torch.equal(sgd.state[p]["momentum_buffer"], buffer)
        assert not p.grad.any()


def test_gradients_are_guarded_and_clipped():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert train.guard_gradients(torch.tensor(1.0), layer) and layer.weight.grad.tolist() == [[3, 4]]
    assert not train.guard_gradients(torch.tensor(math.nan), layer) and layer.weight.grad.tolist() == [[0, 0]]
    model = build("mlp", 1, 10, 2, image_size=8, width=0.1)
    step(model, *batch(model), clip_norm=1e-3)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_warms_up_and_anneals():
    config = dict(lr=0.002, warmup_epochs=1, warmup_from=1e-7, epochs=5)
    rates = [train.learning_rate(config, step, 100) for step in range(501)]
    assert rates[0] == 1e-7 and rates[50] == pytest.approx(0.001, rel=1e-3) and rates[100] == 0.002
    assert rates[300] == pytest.approx(0.001) and rates[500] == pytest.approx(0, abs=1e-12)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)


# ---- a whole training


def test_the_run_folder_and_what_is_printed(finished, capsys, tmp_path):
    assert main(*TINY, "--out", "again") == 0
    out = capsys.readouterr().out
    for word in ("cpu", "digits: 48 training", "mlp ei", "excitatory", "parameters", "batch_size=8", "lr=0.01"):
        assert word in out
    assert out.count("\nepoch ") == 3 and "firing rates" in out and "again" in out.splitlines()[-1]
    assert end(tmp_path / "again") == end(finished)  # the same settings, the same bits
    config = json.loads((finished / "config.json").read_text())
    assert config["lr"] == 0.01 and config["batch_size"] == 8 and config["warmup_epochs"] == pytest.approx(3 / 30)
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and "rate_3" in rows[0] and "rate_4" not in rows[0]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert result(finished)["epochs"] == 3 and result(finished)["test_accuracy"] == float(rows[2]["test_accuracy"])
    best = max(rows, key=lambda row: float(row["test_accuracy"]))
    assert main("--eval", finished) == 0
    out = capsys.readouterr().out
    assert f"test accuracy {float(best['test_accuracy']):.2%}, loss {float(best['test_loss']):.4f}, T=2" in out
    assert main(*TINY, "--seed", "1", "--out", "other") == 0
    assert end(tmp_path / "other") != end(finished)


def test_recording_histograms_changes_no_result(finished, tmp_path, monkeypatch):
    recorded = json.loads((finished / "histograms.json").read_text())
    assert len(recorded) == 4 and len(recorded[0]) == 3
    for layers in recorded:
        for layer, n in zip(layers, (50, 50, 30), strict=True):
            assert sum(layer["i_int"]) == sum(layer["u"]) == n * 20 * 2  # test images, time steps
    monkeypatch.setattr(progress, "histograms", lambda *_: [])
    assert main(*TINY, "--out", "without") == 0
    with_, without = end(finished), end(tmp_path / "without")
    assert with_[0].pop("histograms") != without[0].pop("histograms") and with_ == without


HOW = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def adamw(parameters, **_):
    """A student's own optimiser: two groups with different rates, the second a tenth of the first."""
    weights = list(parameters)
    groups = [dict(params=weights[::2], lr=0.01), dict(params=weights[1::2], lr=0.001, weight_decay=0.1)]
    return torch.optim.AdamW(groups, fused=True)


@pytest.mark.parametrize("what", ["ei", "bn", "plain", "dann", "adamw"])
def test_stopped_and_resumed_ends_with_the_same_bits(what, tmp_path, monkeypatch, capsys):
    arguments = [*TINY, "--kind", what] if what != "dann" else [*TINY[:4], *TINY[6:], "--kind", "dann"]
    if what == "adamw":
        arguments = TINY
        monkeypatch.setattr(torch.optim, "SGD", adamw)
    assert main(*arguments, "--out", "calm") == 0
    command, moments = [*arguments, "--out", "r"], []
    for function, call in (("train_step", 2), ("evaluate", 1), ("train_step", STEPS), ("train_step", 1)):
        with monkeypatch.context() as patch:  # in an epoch, between two, in the last step of one, in the first
            stop_at(patch, call, function=function, how=HOW[len(moments) % len(HOW)])
            assert main(*command) == 128 + HOW[len(moments) % len(HOW)]
        assert "stopped and saved; go on with: python train.py --resume r" in capsys.readouterr().out
        moments.append(Run("r").load()["step"])
        command = ["--resume", "r"]
        assert not (tmp_path / "r" / "result.json").exists()
    assert moments == [2, STEPS, 2 * STEPS, 2 * STEPS + 1]
    assert main("--resume", "r") == 0
    assert end(tmp_path / "r") == end(tmp_path / "calm")
    different = result(tmp_path / "r") | dict(train_seconds=0), result(tmp_path / "calm") | dict(train_seconds=0)
    assert different[0] == different[1]


def test_every_group_of_an_optimiser_follows_the_schedule(monkeypatch):
    rates, original = [], train.train_step

    def note(network, optimizer, *arguments):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return original(network, optimizer, *arguments)

    monkeypatch.setattr(torch.optim, "SGD", adamw)
    monkeypatch.setattr(train, "train_step", note)
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS + 2)
        main(*TINY, "--out", "r")
    assert main("--resume", "r") == 0 and len(rates) == 3 * STEPS
    expected = [train.learning_rate(Run("r").config, step, STEPS) for step in range(3 * STEPS)]
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert [rate for _, rate in rates] == pytest.approx([rate / 10 for rate in expected])


def test_an_epoch_lasts_as_long_as_its_parts(stopped, monkeypatch):
    state = Run(stopped).load()
    assert state["seconds"] > 0
    monkeypatch.setattr(Run, "load", lambda run: state | dict(seconds=1000.0))
    assert main("--resume", stopped) == 0
    seconds = [float(row["seconds"]) for row in csv.DictReader((stopped / "metrics.csv").open())]
    assert seconds[0] < 100 and 1000 < seconds[1] < 1500 and seconds[2] < 100


def test_resuming_a_finished_run_ends_at_once_and_changes_nothing(finished, monkeypatch, capsys):
    before = snapshot(finished)[0]
    monkeypatch.setattr(train, "train_step", None)
    assert main("--resume", finished) == 0
    assert {name: raw for name, (raw, _) in snapshot(finished)[0].items()} == {k: raw for k, (raw, _) in before.items()}
    assert "goes on at step 18, with 3 epochs behind it" in capsys.readouterr().out
    (finished / "result.json").unlink()
    (finished / "metrics.csv").write_text("half of a li")
    assert main("--resume", finished) == 0  # which writes again what was lost
    assert {name: raw for name, (raw, _) in snapshot(finished)[0].items()} == {k: raw for k, (raw, _) in before.items()}


def test_a_longer_schedule(finished, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert main("--resume", finished, "--epochs", 5) == 128 + signal.SIGTERM
    assert not (finished / "result.json").exists()  # that of three epochs
    assert main("--resume", finished) == 0
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert result(finished)["epochs"] == result(finished)["config"]["epochs"] == len(rows) == 5
    last = train.learning_rate(Run(finished).config, 5 * STEPS - 1, STEPS)
    assert float(rows[4]["lr"]) == last and main("--eval", finished) == 0
    assert "has 5 epochs behind it" in fails(capsys, "--resume", finished, "--epochs", 4)


# ---- what is refused


def other_network(patch):
    patch.setitem(runs.networks.PLANS, "mlp", [400, 500, 300])


def other_optimiser(patch):
    patch.setattr(torch.optim, "SGD", lambda parameters, **_: torch.optim.Adam(parameters))


REFUSED = {
    "other data": (["--data-root", "./other"], "the training set has other contents"),
    "other test set": (["--data-root", "./untested"], "the test set has other contents"),
    "other network": ([], "is of another network or optimiser"),
    "other optimiser": ([], "it was trained with another optimiser"),
    "too few epochs": (["--epochs", "1"], "--epochs 1 is too few"),
    "contradiction": (["--lr", "0.5"], "was made with lr=0.01, not 0.5"),
    "other kind": (["--kind", "bn"], "was made with kind=ei, not bn"),
    "in use": ([], "in use: another process"),
    "damaged": ([], "checkpoint.pt cannot be used"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_resume_writes_nothing(what, stopped, monkeypatch, capsys):
    options, words = REFUSED[what]
    with monkeypatch.context() as patch:
        if what in ("other network", "other optimiser"):
            globals()[what.replace(" ", "_")](patch)
        if what == "damaged":
            (stopped / "checkpoint.prev.pt").unlink()
            (stopped / "checkpoint.pt").write_bytes((stopped / "checkpoint.pt").read_bytes()[:-9])
        other = Run(stopped)
        if what == "in use":
            other.lock()
        before = snapshot(stopped)
        assert words in fails(capsys, "--resume", stopped, *options)
        assert snapshot(stopped) == before
        other.close()
    if what != "damaged":
        assert main("--resume", stopped) == 0  # in the same process: the lock is free


def test_data_that_moved(stopped, capsys):
    assert main("--resume", stopped, "--data-root", "./moved") == 0
    assert Run(stopped).config["data_root"] == "./moved" and main("--eval", stopped) == 0
    assert "the test set has other contents" in fails(capsys, "--eval", stopped, "--data-root", "./untested")
    assert main("--eval", stopped, "--data-root", "./untested", "--other-data") == 0
    assert "other data than those of the training: the test set" in capsys.readouterr().out
    PLACES["./three"] = data.Dataset(FEW.train_x, FEW.train_y % 3, FEW.test_x, FEW.test_y % 3, 3)
    for option in ([], ["--other-data"]):
        said = fails(capsys, "--eval", stopped, "--data-root", "./three", *option)
        assert "there were 10 classes, and now there are 3" in said


def test_a_warm_up_that_no_longer_fits(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        main(*TINY, "--warmup-epochs", "2", "--out", "r")
    assert "--epochs 1 is too few" in fails(capsys, "--resume", "r", "--epochs", 1)


@pytest.mark.parametrize("broken", ["evaluate", "accelerate"])
def test_after_an_error_the_run_is_free_in_the_same_session(broken, stopped, monkeypatch):
    def fail(*_):
        raise RuntimeError("an error of the program")

    with monkeypatch.context() as patch:
        patch.setattr(train, broken, fail)
        with pytest.raises(RuntimeError) as kept:  # as a notebook keeps it, with all that its frames hold
            main("--resume", stopped)
        with pytest.raises(RuntimeError):
            main(*TINY, "--out", "new")
    assert kept.traceback and main("--resume", stopped) == 0
    assert os.path.exists("new") == (broken == "evaluate")  # nothing was saved yet
    assert main(*TINY, "--out", "new") == (2 if broken == "evaluate" else 0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--arch", "vgg9"], "vgg9"),
        (["--data", "mnisst"], "mnisst"),
        (["--kind", "ln"], "ln"),
        (["--T", "0"], "at least 1"),
        (["--epochs", "1.5"], "whole number"),
        (["--batch-size", "-3"], "at least 1"),
        (["--kind", "dann", "--no-ste"], "of --kind ei only"),
        (["--kind", "bn", "--eps", "1e-6"], "of --kind ei only"),
        (["--kind", "dann", "--tau", "3"], "spiking neurons"),
        (["--kind", "bn", "--ei-ratio", "8"], "E-I circuits"),
        (["--tau", "0.5"], "at least 1"),
        (["--threshold", "0"], "positive number"),
        (["--width", "0"], "0.001 to 100"),
        (["--batch-size", "49"], "larger than the training set of 48"),
        (["--warmup-epochs", "10", "--epochs", "2"], "longer than the training"),
        (["--lr", "nan"], "positive number"),
        (["--eps", "-1e-6"], "adaptive"),
        (["--eps", "small"], "adaptive"),
        (["--device", "abacus"], "abacus"),
        (["--device", ""], "cannot be used"),
        (["--device", "meta"], "cannot be used"),
        (["--seed", "-1"], "at least 0"),
        (["--out", "~nobody-of-this-name/x"], "home directory"),
        (["--frobnicate"], "frobnicate"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        (["--eval", ""], "not a run folder"),
        (["--resume", "a", "--eval", "b"], "one of them"),
        (["--resume", "a", "--out", "b"], "one of them"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, words, capsys, tmp_path):
    assert words in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_in_the_way(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot make the run folder file/r: Not a directory" in fails(capsys, *TINY, "--out", "file/r")
    assert "is no folder" in fails(capsys, *TINY, "--out", "file")


# ---- numbers


def poisoned(what, monkeypatch):
    """Has something become NaN or infinite in the second step of the second epoch."""
    original, calls = train.train_step, [0]

    def poison(network, optimizer, x, y, *arguments):
        calls[0] += 1
        layer = network.encoder.stages[1].circuit
        if calls[0] == STEPS + 2:
            if what == "gradient":
                layer.w_ee.register_hook(lambda g: g * math.inf)
            elif what == "parameter":
                with torch.no_grad():
                    layer.b_e[0] = math.nan  # as a comparison, u >= theta is False: no spike, and a finite loss
            elif what == "loss":
                network.readout.register_forward_hook(lambda module, args, out: out * math.inf)
        return original(network, optimizer, x, y, *arguments)

    monkeypatch.setattr(train, "train_step", poison)


@pytest.mark.parametrize(
    "what, layer",
    [
        ("gradient", "encoder.stages.1.circuit.w_ee (its gradient)"),
        ("parameter", "encoder.stages.1.circuit"),
        ("loss", "readout"),
    ],
)
def test_a_number_that_is_not_finite_ends_the_training(what, layer, monkeypatch, capsys, tmp_path):
    poisoned(what, monkeypatch)
    assert main(*TINY, "--out", "r") == 0
    assert f"epoch 2: a number is not finite; first layer with such values: {layer}\n" in capsys.readouterr().out
    found = result(tmp_path / "r")
    assert found["epochs"] == 1 and found["first_nonfinite_layer"] == layer and found["outcome"] != "converged"
    for name in ("checkpoint.pt", "best.pt"):
        assert all(value.isfinite().all() for value in Run("r").load(name)["model"].values())
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["ei", "bn"])
def test_input_that_is_not_finite(kind, monkeypatch, capsys):
    original = data.training_batch

    def batch(config, dataset, indices, step):
        x, y = original(config, dataset, indices, step)
        return torch.where(torch.tensor(step == 1), math.nan, x), y

    monkeypatch.setattr(data, "training_batch", batch)
    if kind == "ei":
        assert "not finite" in fails(capsys, *TINY, "--out", "r")
    else:
        assert main(*TINY, "--kind", "bn", "--out", "r") == 0
        assert "number is not finite; first layer with such values: encoder.stages.0" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in Run("r").load()["model"].values())
    assert "there is no" in fails(capsys, "--eval", "r")


@pytest.mark.parametrize("lr", ["1e20", "1e30"])
def test_a_rate_that_is_far_too_large(lr, tmp_path, capsys):
    assert main(*TINY, "--lr", lr, "--warmup-epochs", "0", "--out", "r") == 0
    assert result(tmp_path / "r")["outcome"] == "failed to converge"
    assert all(value.isfinite().all() for value in Run("r").load()["model"].values())


def test_a_parameter_that_overflows_in_the_last_step_is_not_saved(monkeypatch, tmp_path):
    original = train.evaluate

    def overflow(model, *arguments):
        with torch.no_grad():
            model.encoder.stages[0].circuit.b_e[0] = math.inf
        return 1.0, *original(model, *arguments)[1:]

    monkeypatch.setattr(train, "evaluate", overflow)
    assert main(*TINY, "--out", "r") == 0
    assert result(tmp_path / "r")["first_nonfinite_layer"] == "encoder.stages.0.circuit"
    assert Run("r").load()["step"] == 0 and not (tmp_path / "r" / "best.pt").exists()


@pytest.mark.parametrize("accuracy, outcome", [(0.8, "failed to converge"), (0.95, "converged")])
def test_chance_is_the_share_of_the_commonest_class(accuracy, outcome, monkeypatch, tmp_path, capsys):
    y = torch.tensor([0] * 16 + [1, 1, 2, 2])
    monkeypatch.setitem(PLACES, "./data", data.Dataset(FEW.train_x, FEW.train_y % 3, FEW.test_x, y, 3))
    monkeypatch.setattr(train, "evaluate", lambda *_: (0.7, accuracy, [0.1] * 3))
    assert main(*TINY, "--give-up", "--out", "r") == 0
    found = result(tmp_path / "r")
    assert found["outcome"] == outcome and found["epochs"] == (1 if outcome.startswith("failed") else 3)
    assert found["given_up"] == ("given up after 1 epochs at chance" in capsys.readouterr().out) == (accuracy == 0.8)
    assert main("--resume", "r") == 0 and result(tmp_path / "r")["epochs"] == 3  # the rest of it


# ---- testing


def test_eval_beside_bn_snn(finished, tmp_path, capsys):
    def beside(*options):
        assert main("--eval", finished, *options) == 0
        return capsys.readouterr().out

    assert "no BN-SNN with a finished epoch beside it" in beside("--T", "3") and "T=3" in beside("--T", "3")
    bn = tmp_path / "digits-mlp-bn-width0.1-seed0"
    bn.mkdir()
    (bn / "checkpoint.pt").touch()  # its first epoch is not over
    assert "no BN-SNN with a finished epoch" in beside()
    shutil.rmtree(bn)
    assert main(*TINY, "--kind", "bn", "--out", bn) == 0  # with another learning rate: that of its own recipe
    capsys.readouterr()
    out = beside("--kind", "ei")
    assert out.count("accumulates") == 2 and "beside it, BN-SNN:" in out and out.count("T=2") == 2
    for options, words in ((["--epochs", 1], "epochs"), (["--data-root", "./other"], "images"), (["--T", 1], "T")):
        shutil.rmtree(bn)
        assert main(*TINY, "--kind", "bn", *options, "--out", bn) == 0
        capsys.readouterr()
        out = beside()
        assert out.count("accumulates") == 1
        assert out.splitlines()[-1] == f"the BN-SNN beside it, {bn}, was made with other {words}: not compared"
    (bn / "best.pt").write_bytes(b"x")
    (bn / "checkpoint.pt").write_bytes(b"x")
    out = beside()
    assert "the BN-SNN beside it is not compared: " in out.splitlines()[-1] and "best.pt" in out.splitlines()[-1]


@pytest.mark.parametrize("option", ["--resume", "--eval"])
def test_other_equations_are_named(option, finished, capsys):
    path = finished / "config.json"
    known = json.loads(path.read_text())
    assert main(option, finished) == 0 and "other equations" not in capsys.readouterr().out
    path.write_text(json.dumps(known | dict(equations=known["equations"] | {"inhibition.py": "0123456789ab"})))
    for _ in range(2):  # a resumed run still knows with which it was begun
        assert main(option, finished) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "other equations" in line]
        assert len(lines) == 1 and "inhibition.py changed since" in lines[0] and "lif.py" not in lines[0]


# ---- the process, before and after


def test_the_process_is_as_before(stopped, capsys):
    def state():
        return [signal.getsignal(how) for how in HOW], sys.stdout, sys.stderr, torch.get_rng_state().tolist()

    before = state()
    assert main("--resume", stopped) == 0 and main("--frobnicate") == 2 and main("--eval", stopped) == 0
    assert state() == before


def test_as_a_script_it_leaves_ctrl_c_working(monkeypatch):
    """As `%run train.py` and `python -i train.py` have it."""
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--out", "r"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(train.__file__, run_name="__main__")
    assert left.value.code == 0 and signal.getsignal(signal.SIGINT) is before is signal.default_int_handler


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_what_is_ignored_stays_ignored():
    """With nohup a closed terminal does not end the training."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with progress.stop_requests() as received:
            signal.raise_signal(signal.SIGHUP)
            assert not received and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # twice, as impatient people do
        assert received == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_in_a_thread_runs():
    found = []
    thread = threading.Thread(target=lambda: found.append(main(*TINY, "--out", "r")))
    thread.start()
    thread.join(60)
    assert found == [0] and main("--resume", "r") == 0


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "pipe"), OSError(28, "full"), ValueError("closed"), None])
def test_printing_never_decides(error, monkeypatch, tmp_path):
    stream = Broken(error) if error else None  # None: no console, as with pythonw
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(*TINY, "--out", "r") == 0
    assert sys.stdout is stream and (tmp_path / "r" / "result.json").exists()


def test_a_console_that_cannot_write_every_letter(monkeypatch, tmp_path):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(*TINY, "--out", "\u00fc") == 0
    assert b"run folder: \\xfc" in raw.getvalue() and (tmp_path / "\u00fc" / "result.json").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_ends_with_advice(error, monkeypatch, capsys):
    def command(_):
        raise error

    monkeypatch.setattr(train, "command", command)
    assert "not enough memory; take a smaller network" in fails(capsys)


# ---- settings


def of(*arguments):
    return recipes.settings(recipes.parse(arguments))


def test_the_recipe_follows_data_arch_and_kind():
    assert of()["arch"] == "vgg8" and of()["data"] == "digits" and of()["T"] == 4
    cifar = of("--data", "cifar10")
    assert (cifar["lr"], cifar["warmup_epochs"], cifar["epochs"], cifar["batch_size"]) == (0.002, 10, 300, 128)
    deep = of("--data", "cifar100", "--arch", "vgg16")
    assert (deep["lr"], deep["warmup_epochs"], deep["weight_decay"]) == (0.001, 30, 5e-4)
    bn = of("--data", "cifar10", "--kind", "bn")
    assert (bn["lr"], bn["warmup_epochs"], bn["weight_decay"]) == (0.1, 0, 1e-4)
    assert of("--data", "cifar10", "--epochs", "30")["warmup_epochs"] == pytest.approx(1)
    assert of("--data", "cifar10", "--epochs", "30", "--warmup-epochs", "7")["warmup_epochs"] == 7


def test_run_name_says_what_is_ablated():
    assert recipes.run_name(of()) == "digits-vgg8-ei-seed0"
    ablated = of("--eps", "1e-6", "--no-ste", "--no-grad-scaling", "--init", "kaiming")
    assert recipes.run_name(ablated) == "digits-vgg8-ei-eps1e-06-noste-noscaling-kaiming-seed0"
    changed = of("--ei-ratio", "8", "--tau", "3", "--width", "0.5", "--plan", "8 P")
    assert recipes.run_name(changed) == "digits-vgg8-ei-plan8-P-width0.5-eiratio8-tau3-seed0"


def test_every_sample_is_drawn_once_an_epoch():
    config = dict(seed=1, batch_size=7)
    order = data.epoch_order(config, FEW, 0)
    assert order.shape == (6, 7) and len(order.unique()) == 42
    assert not torch.equal(order, data.epoch_order(config, FEW, 1))
    assert torch.equal(order, data.epoch_order(config, FEW, 0))


def test_the_shares_of_a_batch_and_their_sum(monkeypatch):
    x = torch.arange(10)
    assert torch.equal(parallel.share(x), x) and torch.equal(parallel.total(x.clone()), x)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world", lambda: 3)
        parts.append(parallel.share(x))
    assert torch.equal(torch.cat(parts).sort().values, x) and [len(part) for part in parts] == [4, 3, 3]
