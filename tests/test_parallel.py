"""Two processes that train together, compared with one on the same global batch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from support import parallel
from support.runs import Run

# A narrow VGG-8 and few digits, so that the time goes into starting the processes.
PROGRAM = """
import sys, model, train
from support import data
model.PLANS["vgg8"] = [8, "P", 8, "P", 16, "P", 16, "P", 16, "P"]
whole = data.load("digits")
few = data.Dataset(whole.train_x[:96], whole.train_y[:96], whole.test_x[:40], whole.test_y[:40], 10, augment=None)
data.load = lambda *_, **__: few
sys.exit(train.main(sys.argv[1:]))
"""
OPTIONS = ["--T", "2", "--epochs", "2", "--batch-size", "16", "--lr", "0.01"]


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(n, *arguments):
        command = [sys.executable]
        if n > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        environment = os.environ | dict(PYTHONPATH=str(Path(train.__file__).parent), OMP_NUM_THREADS="1")
        command += [tmp_path / "program.py", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        )

    return start


def test_two_processes_train_as_one(program, tmp_path):
    one, two = (program(n, *OPTIONS, "--out", f"r{n}") for n in (1, 2))
    for process in (one, two):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert out.count("epoch   1") == 1  # the first process speaks for both
    a, b = (Run(tmp_path / f"r{n}").load() for n in (1, 2))
    assert a["step"] == b["step"] == 12
    for key, expected in a["model"].items():
        torch.testing.assert_close(b["model"][key], expected, rtol=1e-3, atol=1e-5)
        if not key.endswith("b_e"):
            assert (b["model"][key] >= 0).all()  # Dale's law
    for row, expected in zip(b["history"], a["history"], strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
        assert row["train_accuracy"] == pytest.approx(expected["train_accuracy"], abs=0.02)
        assert row["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-3)
    assert json.loads((tmp_path / "r2" / "result.json").read_text())["epochs"] == 2


def test_stopped_and_resumed_together(program, tmp_path):
    long = [*OPTIONS, "--epochs", "40", "--out", "r"]
    process = program(2, *long)
    deadline = time.time() + 120
    while not (tmp_path / "r" / "metrics.csv").exists() or (tmp_path / "r" / "metrics.csv").read_text().count("\n") < 2:
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    state = Run(tmp_path / "r").load()
    assert 6 <= state["step"] < 240
    process = program(2, "--resume", "r")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert Run(tmp_path / "r").load()["step"] == 240


def test_a_batch_that_cannot_be_shared(program, tmp_path):
    process = program(2, "--batch-size", "15", "--out", "r")
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and err.count("error: a batch of 15 cannot be shared by 2 processes") == 1
    assert not (tmp_path / "r").exists()


def test_the_shares_of_a_batch_and_their_sum(monkeypatch):
    x = torch.arange(10)
    assert torch.equal(parallel.share(x), x) and torch.equal(parallel.total(x.clone()), x)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world", lambda: 3)
        parts.append(parallel.share(x))
    assert torch.equal(torch.cat(parts).sort().values, x) and [len(p) for p in parts] == [4, 3, 3]
