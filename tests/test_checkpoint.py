import errno
import json
import os
import pickle
import signal

import pytest
import torch

import checkpoint
from checkpoint import Run, StopRequest, free_folder, outcome, run_name, write_atomically

STATE = dict(
    model={"w": torch.arange(6.0)},
    optimizer={},
    step=3,
    epoch_sums=[0.5, 1.0],
    history=[dict(epoch=1, loss=2.5)],
    histograms=[],
)


def test_a_run_folder_round_trip(tmp_path):
    run = Run.create(tmp_path / "r", dict(arch="vgg8"))
    run.save(STATE)
    again = Run(tmp_path / "r")
    assert again.config == dict(arch="vgg8")
    state = again.load()
    assert torch.equal(state.pop("model")["w"], STATE["model"]["w"])
    assert state == {k: v for k, v in STATE.items() if k != "model"}
    assert (tmp_path / "r" / "metrics.csv").read_text() == "epoch,loss\n1,2.5\n"
    run.write_result(dict(outcome="converged"))
    assert json.loads((tmp_path / "r" / "result.json").read_text()) == dict(outcome="converged")
    assert sorted(f.name for f in (tmp_path / "r").iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "histograms.json",
        "metrics.csv",
        "result.json",
    ]


def test_an_existing_run_is_never_overwritten(tmp_path):
    Run.create(tmp_path / "r", {})
    with pytest.raises(ValueError, match="already holds a run"):
        Run.create(tmp_path / "r", dict(arch="vgg11"))
    run = Run.create(tmp_path / "r", {})  # nothing was saved yet, so nothing is lost
    run.save(STATE)
    with pytest.raises(ValueError, match="already holds a run"):
        Run.create(tmp_path / "r", {})
    assert free_folder(tmp_path / "r") == tmp_path / "r-2"
    Run.create(tmp_path / "r-2", {})
    assert free_folder(tmp_path / "r") == tmp_path / "r-3"


def test_what_was_there_survives_a_full_disk(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "r", {})
    run.save(STATE)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt: No space left"):
        run.save(STATE | dict(step=4))
    assert run.load()["step"] == 3
    assert not list((tmp_path / "r").glob(".*"))


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomically(path, b"old")
    monkeypatch.setattr(checkpoint.Path, "replace", lambda *_: os._exit(0))  # killed just before the rename
    pid = os.fork()
    if pid == 0:
        write_atomically(path, b"new")
    os.waitpid(pid, 0)
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def damaged(run, how):
    path = run.folder / "checkpoint.pt"
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        raw = b""
    elif how == "flipped":
        at = raw.index(torch.arange(6.0).numpy().tobytes())
        raw[at + 5] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_checkpoint_is_noticed(tmp_path, how):
    run = Run.create(tmp_path / "r", {})
    run.save(STATE)
    damaged(run, how)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        run.load()


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, plain_pickle):
    run = Run.create(tmp_path / "r", {})
    bomb = Malicious()
    bomb.target = tmp_path / "ran"
    if plain_pickle:
        (tmp_path / "r" / "checkpoint.pt").write_bytes(pickle.dumps(bomb))
    else:
        torch.save(STATE | dict(model=bomb), tmp_path / "r" / "checkpoint.pt")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        run.load()
    assert not (tmp_path / "ran").exists()


def test_other_contents_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text("{ half")
    with pytest.raises(ValueError, match="cannot be read"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint\.pt"):
        Run(tmp_path).load()
    torch.save(dict(model={}, step=1), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="has no 'optimizer'"):
        Run(tmp_path).load()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_is_noted_and_the_handlers_restored(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # twice, as impatient people do
        assert stop.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    "accuracies, nonfinite, expected",
    [
        ([0.1, 0.15, 0.2], False, "failed to converge"),  # never above twice chance
        ([], True, "failed to converge"),
        ([0.1, 0.5, 0.9], False, "converged"),
        ([0.5, 0.1, 0.6], False, "converged"),  # a dip that it came back from
        ([0.3, 0.5, 0.15, 0.1], False, "collapsed (epoch 3)"),
        ([0.5, 0.12, 0.6, 0.1], False, "collapsed (epoch 4)"),
        ([0.5, 0.6], True, "collapsed (epoch 3)"),
        ([0.5, 0.17], False, "converged"),  # low, but above 1.5 times chance
    ],
)
def test_outcome(accuracies, nonfinite, expected):
    assert outcome(accuracies, 10, nonfinite) == expected


def test_run_name_says_what_is_ablated():
    config = dict(
        data="digits", arch="vgg8", model="ei", eps="adaptive", ste=True, grad_scaling=True, init="ei", seed=0
    )
    assert run_name(config) == "runs/digits-vgg8-ei-seed0"
    config |= dict(eps=1e-6, ste=False, grad_scaling=False, init="kaiming")
    assert run_name(config) == "runs/digits-vgg8-ei-eps1e-06-noste-noscaling-kaiming-seed0"
