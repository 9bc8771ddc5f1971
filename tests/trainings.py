"""What tests of trainings share: a few digits, a narrow MLP, the command line, what two runs must have equal."""

import signal

import torch

import train
from support import data
from support.runs import Run

WHOLE = data.load("digits", image_size=8)
TINY = ["--arch", "mlp", "--width", "0.1", "--T", "2", "--batch-size", "8", "--epochs", "3", "--device", "cpu"]
STEPS = 6  # an epoch, of FEW


def digits(train=slice(0, 48), test=slice(0, 20)):
    """A few of scikit-learn's digits, 8x8 pixels."""
    return data.Dataset(WHOLE.train_x[train], WHOLE.train_y[train], WHOLE.test_x[test], WHOLE.test_y[test], 10)


FEW = digits()
PLACES = {"./data": FEW, "./moved": FEW, "./other": digits(slice(48, 96)), "./untested": digits(test=slice(20, 40))}


def load(name, root, *_):
    """In place of `data.load`, which would read 1,797 digits: those of this folder."""
    return PLACES[root]


def main(*arguments):
    return train.main([str(argument) for argument in arguments])


def fails(capsys, *arguments, command=main):
    """The one line on stderr with which a command ends, its exit status being 2."""
    capsys.readouterr()
    assert command(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def stop_at(monkeypatch, *calls, function="train_step", how=signal.SIGTERM):
    """Has a function of train.py raise a signal in these of its calls, counted from 1."""
    original, count = getattr(train, function), [0]

    def stopping(*arguments, **options):
        count[0] += 1
        if count[0] in calls:
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
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    return [plain(run.load()), plain(run.load("best.pt")), [row[:seconds] + row[seconds + 1 :] for row in rows]]


def snapshot(folder):
    """Contents and times of all files of a folder, and its own time."""
    files = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    return files, folder.stat().st_mtime_ns
