"""What several tests share: golden files, relative error, what a concept file prints."""

import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and SIGHUP under nohup:
if hasattr(signal, "SIGHUP"):  # a training would leave it so, and some tests send them
    signal.signal(signal.SIGHUP, lambda number, frame: None)
torch.set_num_threads(1)  # small networks are fastest so, and the other core is free


def golden(name):
    """The arrays of a golden file as tensors."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
        return {k: torch.as_tensor(arrays[k]) for k in arrays.files}


def relative_error(a, b):
    """Norm of the difference beside the norm of b."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def demonstration(capsys):
    """A function: what `python lif.py` and its like print."""

    def printed(file):
        runpy.run_path(str(Path(__file__).parents[1] / file), run_name="__main__")
        return capsys.readouterr().out

    return printed


@pytest.fixture(autouse=True)
def usual(monkeypatch):
    """Each test has the same random numbers. On a GPU nothing is compiled, which takes seconds, unless a test asks."""
    torch.manual_seed(0)
    monkeypatch.setattr("support.fast.KERNELS", {"cuda": {}})
