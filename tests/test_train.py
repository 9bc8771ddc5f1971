"""The command line, from start to end, on a folder of a few small images."""

import csv
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak
import torch
from PIL import Image

import train
from support import data, progress, recipes
from support.runs import Run

TRAIN = Path(train.__file__)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return soak.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def options(images):
    return ["--arch", "vgg8", "--data", "folder", "--data-root", str(images), "--batch-size", "4", "--T", "2"]


def run_and_fail(capsys, *arguments):
    """The one line on stderr with which the command ends, its exit status being 2."""
    try:
        status = train.main([str(a) for a in arguments])
    except SystemExit as exit:  # argparse
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2, out + err
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err
    return err


def parameters(folder):
    return Run(folder).load()["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_run_folder_and_what_is_printed(options, tmp_path, capsys):
    assert train.main([*options, "--epochs", "2", "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    for word in (
        "cpu",
        "folder: 24 training",
        "vgg8 ei",
        "excitatory",
        "inhibitory",
        "parameters",
        "batch_size=4",
        "lr=0.002",
    ):
        assert word in out
    assert "firing rates" in out and str(tmp_path / "r") in out.splitlines()[-1]
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["lr"] == 0.002 and config["batch_size"] == 4 and config["warmup_epochs"] == pytest.approx(2 / 30)
    with open(tmp_path / "r" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"] and "rate_5" in rows[0] and "rate_6" not in rows[0]
    assert all(math.isfinite(float(v)) for row in rows for v in row.values())
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["outcome"] in ("converged", "failed to converge") and result["epochs"] == 2
    assert result["test_accuracy"] == float(rows[1]["test_accuracy"])
    assert (tmp_path / "r" / "best.pt").exists()
    best = max(rows, key=lambda row: float(row["test_accuracy"]))
    assert train.main(["--eval", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert f"test accuracy {float(best['test_accuracy']):.2%}, loss {float(best['test_loss']):.4f}" in out
    assert out.count("firing rates") == 1


def test_eval_counts_costs_beside_bn_snn_and_at_other_time_steps(finished, options, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "folder-vgg8-ei-seed0"
    shutil.copytree(finished, folder)
    assert train.main(["--eval", str(folder), "--T", "3"]) == 0
    out = capsys.readouterr().out
    assert "T=3" in out and "accumulates" in out and "no BN-SNN with a finished epoch" in out
    bn = tmp_path / "folder-vgg8-bn-seed0"
    (bn / "best.pt").parent.mkdir()
    (bn / "checkpoint.pt").touch()  # its first epoch is not over
    assert train.main(["--eval", str(folder)]) == 0 and "no BN-SNN with a finished epoch" in capsys.readouterr().out
    shutil.rmtree(bn)
    other = shutil.copytree(folder, bn) / "config.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | dict(epochs=7)))
    assert train.main(["--eval", str(folder)]) == 0
    assert "folder-vgg8-bn-seed0, was made with other epochs: not compared" in capsys.readouterr().out
    shutil.rmtree(bn)
    monkeypatch.chdir(folder)
    assert train.main([*options, "--model", "bn", "--epochs", "1", "--out", str(bn)]) == 0
    capsys.readouterr()
    assert train.main(["--eval", "."]) == 0
    out = capsys.readouterr().out
    assert out.count("accumulates") == 2 and str(bn) in out and "T=2" in out
    assert "was made with arch=vgg8, not vgg11" in run_and_fail(capsys, "--eval", folder, "--arch", "vgg11")


@pytest.mark.parametrize("kind", ["bn", "plain"])
def test_baselines_train(kind, options, tmp_path):
    assert train.main([*options, "--model", kind, "--epochs", "1", "--out", str(tmp_path / "r")]) == 0


def test_the_same_seed_gives_the_same_run(options, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert train.main([*options, "--epochs", "1", "--seed", seed, "--out", str(tmp_path / name)]) == 0
    a, b, c = (parameters(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)


def test_recording_histograms_changes_no_result(options, tmp_path, monkeypatch):
    assert train.main([*options, "--epochs", "2", "--out", str(tmp_path / "with")]) == 0
    recorded = json.loads((tmp_path / "with" / "histograms.json").read_text())
    assert len(recorded) == 3 and len(recorded[0]) == 5
    neurons = [64 * 32 * 32, 128 * 16 * 16, 256 * 8 * 8, 512 * 4 * 4, 512 * 2 * 2]
    for epoch in recorded:
        for layer, n in zip(epoch, neurons, strict=True):
            assert sum(layer["i_int"]) == sum(layer["u"]) == n * 6 * 2  # test images, time steps
    monkeypatch.setattr(progress, "histograms", lambda *_: [])
    assert train.main([*options, "--epochs", "2", "--out", str(tmp_path / "without")]) == 0
    assert same(parameters(tmp_path / "with"), parameters(tmp_path / "without"))


def start(arguments, folder):
    return subprocess.Popen(
        [sys.executable, TRAIN, *arguments, "--out", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait_for_epoch(folder, epoch, process):
    metrics = folder / "metrics.csv"
    while not metrics.exists() or metrics.read_text().count("\n") < epoch + 1:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    options = ["--data", "folder", "--data-root", str(images), "--batch-size", "4", "--T", "2", "--epochs", "4"]
    assert train.main([*options, "--out", str(folder)]) == 0
    return parameters(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="it sends signals")
@pytest.mark.parametrize("epoch, how", [(1, getattr(signal, "SIGKILL", 9)), (2, signal.SIGINT)])
def test_killed_and_resumed_ends_bit_identical(epoch, how, options, undisturbed, tmp_path, capsys):
    """The program itself and the whole VGG-8; test_survival has the other ways to end, with a narrow one."""
    process = start([*options, "--epochs", "4"], tmp_path / "r")
    wait_for_epoch(tmp_path / "r", epoch, process)
    time.sleep(0.15)  # into the next epoch
    process.send_signal(how)
    status = process.wait()
    assert status == (-how if how == signal.SIGKILL else 128 + how)
    assert not (tmp_path / "r" / "result.json").exists()
    step = Run(tmp_path / "r").load()["step"]
    assert step >= epoch * 6
    assert train.main(["--resume", str(tmp_path / "r")]) == 0
    assert same(parameters(tmp_path / "r"), undisturbed)
    assert (tmp_path / "r" / "metrics.csv").read_text().count("\n") == 5


def test_an_epoch_lasts_as_long_as_its_parts(options, tmp_path, monkeypatch):
    def clamp_and_stop(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return clamp(model)

    clamp, resume = train.clamp_dale, Run.resume
    monkeypatch.setattr(train, "clamp_dale", clamp_and_stop)
    assert train.main([*options, "--epochs", "1", "--out", str(tmp_path / "r")]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    state = Run(tmp_path / "r").load()
    assert state["step"] == 1 and state["epoch_seconds"] > 0
    monkeypatch.setattr(Run, "resume", lambda run: resume(run) | dict(epoch_seconds=1000.0))
    assert train.main(["--resume", str(tmp_path / "r")]) == 0
    (row,) = csv.DictReader((tmp_path / "r" / "metrics.csv").open())
    assert 1000 < float(row["seconds"]) < 1500


def test_resuming_a_finished_run_changes_nothing(options, tmp_path):
    train.main([*options, "--epochs", "1", "--out", str(tmp_path / "r")])
    before, result = parameters(tmp_path / "r"), (tmp_path / "r" / "result.json").read_text()
    assert train.main(["--resume", str(tmp_path / "r")]) == 0
    assert same(before, parameters(tmp_path / "r")) and result == (tmp_path / "r" / "result.json").read_text()


def test_resuming_with_other_data_is_refused(options, tmp_path, capsys, monkeypatch):
    root = soak.make_images(tmp_path / "images")
    options = [*options, "--data-root", str(root), "--epochs", "2", "--out", str(tmp_path / "r")]
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: (signal.raise_signal(signal.SIGTERM), evaluate(*a))[1])
    assert train.main(options) == 128 + signal.SIGTERM
    monkeypatch.undo()
    (root / "train" / "lower").rename(root / "train" / "zebra")  # the same images, the other way round
    (root / "test" / "lower").rename(root / "test" / "zebra")
    assert "are not those with which" in run_and_fail(capsys, "--resume", tmp_path / "r")
    root.rename(tmp_path / "moved")
    for split in ("train", "test"):
        (tmp_path / "moved" / split / "zebra").rename(tmp_path / "moved" / split / "lower")
    assert train.main(["--resume", str(tmp_path / "r"), "--data-root", str(tmp_path / "moved")]) == 0


def test_a_loss_that_is_not_finite_names_the_layer(options, tmp_path, capsys, monkeypatch):
    def poison(model, batch):
        with torch.no_grad():
            model.encoder.stages[2].circuit.b_e[0] = float("nan")  # as a comparison, u >= theta is False: silence

    monkeypatch.setattr("support.runs.initialize", poison)
    assert train.main([*options, "--epochs", "2", "--out", str(tmp_path / "r")]) == 0
    assert "encoder.stages.2.circuit" in capsys.readouterr().out
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["outcome"] == "failed to converge" and result["first_nonfinite_layer"] == "encoder.stages.2.circuit"
    assert "has no best.pt: the training broke off" in run_and_fail(capsys, "--eval", tmp_path / "r")


def test_the_recipe_follows_data_arch_and_model():
    def of(*arguments):
        return recipes.settings(recipes.parse(arguments))

    assert of()["arch"] == "vgg8" and of()["data"] == "digits" and of()["T"] == 4
    cifar = of("--data", "cifar10")
    assert (cifar["lr"], cifar["warmup_epochs"], cifar["epochs"], cifar["batch_size"]) == (0.002, 10, 300, 128)
    deep = of("--data", "cifar100", "--arch", "vgg16")
    assert (deep["lr"], deep["warmup_epochs"], deep["weight_decay"]) == (0.001, 30, 5e-4)
    bn = of("--data", "cifar10", "--model", "bn")
    assert (bn["lr"], bn["warmup_epochs"], bn["weight_decay"]) == (0.1, 0, 1e-4)
    short = of("--data", "cifar10", "--epochs", "30")
    assert short["warmup_epochs"] == pytest.approx(1)
    assert of("--data", "cifar10", "--epochs", "30", "--warmup-epochs", "7", "--lr", "0.5")["warmup_epochs"] == 7


def test_learning_rate_warms_up_and_anneals():
    config = dict(lr=0.002, warmup_epochs=1, warmup_from=1e-7, epochs=5)
    rates = [train.learning_rate(config, step, 100) for step in range(501)]
    assert rates[0] == 1e-7 and rates[50] == pytest.approx(0.001, rel=1e-3) and rates[100] == 0.002
    assert rates[300] == pytest.approx(0.001) and rates[500] == pytest.approx(0, abs=1e-12)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_every_sample_is_drawn_once_an_epoch():
    dataset = data.load("digits")
    config = dict(seed=1, batch_size=32)
    order = data.epoch_order(config, dataset, 0)
    assert order.shape == (44, 32) and len(order.unique()) == 44 * 32
    assert not torch.equal(order, data.epoch_order(config, dataset, 1))
    assert torch.equal(order, data.epoch_order(config, dataset, 0))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--arch", "vgg9"], "vgg9"),
        (["--data", "mnisst"], "mnisst"),
        (["--model", "ln"], "ln"),
        (["--T", "0"], "at least 1"),
        (["--epochs", "0"], "at least 1"),
        (["--epochs", "1.5"], "whole number"),
        (["--batch-size", "-3"], "at least 1"),
        (["--model", "dann", "--no-ste"], "of --model ei only"),
        (["--model", "bn", "--eps", "1e-6"], "of --model ei only"),
        (["--model", "dann", "--tau", "3"], "spiking neurons"),
        (["--model", "bn", "--ei-ratio", "8"], "E-I circuits"),
        (["--tau", "0.5"], "at least 1"),
        (["--threshold", "0"], "positive number"),
        (["--alpha", "-1"], "positive number"),
        (["--ei-ratio", "0"], "at least 1"),
        (["--width", "0"], "0.001 to 100"),
        (["--batch-size", "1438"], "larger than the training set of 1437"),
        (["--lr", "0"], "positive number"),
        (["--lr", "nan"], "positive number"),
        (["--lr", "fast"], "positive number"),
        (["--eps", "-1e-6"], "adaptive"),
        (["--eps", "0"], "adaptive"),
        (["--eps", "small"], "adaptive"),
        (["--device", "abacus"], "abacus"),
        (["--image-size", "16"], "too small"),
        (["--seed", "-1"], "at least 0"),
        (["--frobnicate"], "frobnicate"),
        (["--data", "folder", "--data-root", "/nowhere/at/all"], "no folder"),
        (["--resume", "/nowhere/at/all"], "not a run folder"),
        (["--eval", "/nowhere/at/all"], "not a run folder"),
        (["--resume", "a", "--eval", "b"], "one of them"),
        (["--resume", "a", "--out", "b"], "one of them"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in run_and_fail(capsys, *arguments)
    assert not list(tmp_path.iterdir())  # and leaves nothing behind


def test_an_unwritable_out(options, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot make the run folder" in run_and_fail(capsys, *options, "--out", tmp_path / "file" / "r")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(sys.platform == "win32", reason="it limits the size of files")
def test_a_full_disk_damages_nothing(options, tmp_path, capsys, monkeypatch):
    assert train.main([*options, "--epochs", "1", "--out", str(tmp_path / "r")]) == 0
    before = {f.name: f.read_bytes() for f in (tmp_path / "r").iterdir()}
    limited = "import resource, signal, sys, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(train.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", limited, *options, "--epochs", "1", "--out", str(tmp_path / "full")],
        cwd=TRAIN.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "r").iterdir()}


def test_a_silent_first_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "augment", lambda x, generator: x)  # cutout puts noise where nothing is
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (32, 32)).save(tmp_path / split / name / f"{i}.png")
    arguments = ["--data", "folder", "--data-root", tmp_path, "--batch-size", "4", "--out", tmp_path / "r"]
    err = run_and_fail(capsys, *arguments)
    assert "encoder.stages.0.circuit" in err and "silent" in err
    for image in tmp_path.glob("*/*/*.png"):
        Image.effect_noise((32, 32), 64).save(image)
    assert train.main([*map(str, arguments), "--epochs", "1"]) == 0  # what failed is not in its way


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    options = ["--data", "folder", "--data-root", str(images), "--batch-size", "4", "--T", "2", "--epochs", "1"]
    assert train.main([*options, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name, option", [("checkpoint.pt", "--resume"), ("best.pt", "--eval")])
def test_foreign_and_damaged_checkpoints(name, option, finished, tmp_path, capsys):
    folder = tmp_path / "r"
    folder.mkdir()
    config = (finished / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config)
    assert f"has no {name}" in run_and_fail(capsys, option, folder)
    intact = (finished / name).read_bytes()
    (folder / name).write_bytes(intact[: len(intact) // 2])
    assert "damaged" in run_and_fail(capsys, option, folder)
    (folder / name).write_bytes(intact)
    (folder / "config.json").write_bytes(config.replace(b"vgg8", b"vgg11"))
    assert "belongs to another network" in run_and_fail(capsys, option, folder)
    (folder / "config.json").write_bytes(config)
    assert "was made with arch=vgg8, not vgg16" in run_and_fail(capsys, option, folder, "--arch", "vgg16")

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert "damaged or not a checkpoint" in run_and_fail(capsys, option, folder)
    assert not (tmp_path / "ran").exists()


def test_as_a_program_it_prints_one_line_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, TRAIN, "--data", "cifar10", "--data-root", "/dev/null/x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_first_network_learns_the_digits(tmp_path):
    """The recipe of the MLP, as it is, in some seconds."""
    assert train.main(["--arch", "mlp", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] >= 0.93
