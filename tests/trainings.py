"""What tests of trainings share: a few digits, a narrow MLP, the command line, and what two runs must have equal."""

import json
import signal
from pathlib import Path

import torch

import train
from support import data
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


def snapshot(folder):
    """Contents and times of all files of a folder, and its own time."""
    files = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    return files, folder.stat().st_mtime_ns


def result(folder):
    return json.loads(Path(folder, "result.json").read_text())
