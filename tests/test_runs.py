import errno
import json
import os
import pickle
import signal

import pytest
import torch
from torch import nn

from support import runs
from support.progress import StopRequest
from support.recipes import run_name
from support.runs import Run, bad_part, outcome, restore

ROW = dict(epoch=1, test_accuracy=0.5, seconds=2.5)
STATE = dict(
    model={"w": torch.arange(6.0)}, optimizer={"state": {}}, step=3, epoch_sums=[0.5, 1.0], history=[ROW], best=[]
)
DATA = dict(classes=["a", "b"], shape=[1, 2, 2], train="4 samples", test="2 samples")
STATE |= dict(histograms=[], epoch_seconds=1.5, data=DATA)
KEPT = [".lock", "checkpoint.pt", "config.json", "histograms.json", "metrics.csv"]


def create(folder, config, **options):
    run = Run.create(folder, config, **options)
    run.data = DATA
    return run


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def forge(path, state):
    """A file with a right checksum, whatever is in it."""
    path.write_bytes(runs._sealed(state))


def test_a_run_folder_round_trip(tmp_path):
    run = create(tmp_path / "r", dict(arch="vgg8"))
    run.save(STATE)
    again = Run(tmp_path / "r")
    assert again.config == dict(arch="vgg8")
    state = again.load()
    assert torch.equal(state.pop("model")["w"], STATE["model"]["w"])
    assert state == {k: v for k, v in STATE.items() if k != "model"} | dict(config=dict(arch="vgg8"))
    assert (tmp_path / "r" / "metrics.csv").read_text() == "epoch,test_accuracy,seconds\n1,0.5,2.5\n"
    assert names(run.folder) == KEPT
    run.save(STATE | dict(step=4))
    run.finish([ROW], n_classes=4)
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["outcome"] == "failed to converge" and result["best_epoch"] == 1 and result["config"] == run.config
    assert names(run.folder) == sorted([*KEPT, "checkpoint.prev.pt", "result.json"])


def test_the_best_epoch_is_kept(tmp_path, capsys):
    run, network, history = create(tmp_path / "r", {}), nn.Linear(1, 1), []
    for epoch, accuracy in enumerate([0.2, 0.7, 0.7, 0.4], 1):
        nn.init.constant_(network.weight, epoch)
        history.append(dict(epoch=epoch, test_accuracy=accuracy, seconds=1.0))
        run.keep_best(network, history[-1])
        run.save(STATE | dict(model=network.state_dict(), history=history))
        best = Run(run.folder).load("best.pt")
        assert best["epoch"] == best["model"]["weight"].item() == min(epoch, 2)
    assert best["accuracy"] == 0.7 and run.load()["model"]["weight"].item() == 4
    run.finish(history, n_classes=10)
    assert "converged, test accuracy 40.00%, best 70.00%, 4 s of training\n" in capsys.readouterr().out
    result = json.loads((run.folder / "result.json").read_text())
    assert [result[key] for key in ("test_accuracy", "best_test_accuracy", "best_epoch")] == [0.4, 0.7, 2]


def chosen(folder):
    run = create(folder, {}, choose=True)
    run.close()
    return run.folder


def test_an_existing_run_is_never_overwritten(tmp_path):
    run = create(tmp_path / "r", dict(arch="vgg11"))
    run.close()
    assert not (tmp_path / "r").exists()  # nothing was saved, so nothing is lost
    assert chosen(tmp_path / "r") == tmp_path / "r"
    create(tmp_path / "r", {}).save(STATE)
    with pytest.raises(ValueError, match="already holds a run"):
        create(tmp_path / "r", {})
    assert chosen(tmp_path / "r") == tmp_path / "r-2" and not (tmp_path / "r-2").exists()
    (tmp_path / "r-2").mkdir()
    (tmp_path / "r-2" / "config.json").touch()
    assert chosen(tmp_path / "r") == tmp_path / "r-3"
    (tmp_path / "r-3").mkdir()
    (tmp_path / "r-3" / "checkpoint.prev.pt").touch()  # the rest of one is not written over either
    with pytest.raises(ValueError, match="already holds a run"):
        create(tmp_path / "r-3", {})
    assert chosen(tmp_path / "r") == tmp_path / "r-4"


def test_two_trainings_that_start_at_once_take_two_folders(tmp_path):
    first = create(tmp_path / "r", {}, choose=True)
    second = create(tmp_path / "r", {}, choose=True)  # nothing is saved in the first one yet
    assert [first.folder.name, second.folder.name] == ["r", "r-2"]
    first.save(STATE)
    second.close()
    assert names(tmp_path) == ["r"]
    with pytest.raises(ValueError, match="in use"):
        Run(tmp_path / "r").resume()
    first.close()  # also while the object is still there
    assert Run(tmp_path / "r").resume()["step"] == 3


@pytest.mark.parametrize("times", [2, 1000])
def test_a_file_that_a_scanner_holds_for_a_moment(times, tmp_path, monkeypatch):
    run, original, calls = create(tmp_path / "r", {}), os.replace, []

    def held(source, target):
        calls.append(target)
        if len(calls) <= times:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        original(source, target)

    monkeypatch.setattr(os, "replace", held)
    if times > 100:
        with pytest.raises(OSError, match="cannot write"):
            run.save(STATE)
        return
    run.save(STATE)
    assert Run(tmp_path / "r").load()["step"] == 3


def test_without_fcntl_the_lock_is_windows_own(tmp_path, monkeypatch):
    held = []

    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(file, mode, size):
            if os.fstat(file).st_ino in held:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            held.append(os.fstat(file).st_ino)

    monkeypatch.setattr(runs, "fcntl", None)
    monkeypatch.setattr(runs, "msvcrt", Msvcrt)
    first, second = (create(tmp_path / "r", {}, choose=True) for _ in range(2))
    assert (first.folder.name, second.folder.name) == ("r", "r-2")
    monkeypatch.setattr(runs, "msvcrt", None)  # neither: nothing is locked, and it works all the same
    first.close()
    create(tmp_path / "s", {}).save(STATE)
    assert Run(tmp_path / "s").resume()["step"] == 3


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_was_there_survives_a_full_disk(tmp_path, monkeypatch, call):
    """Whichever of the writes of a `save` is the one for which there is no space."""
    run = create(tmp_path / "r", {})
    run.keep_best(nn.Linear(2, 2), ROW)
    run.save(STATE)
    original, writes, failing = getattr(os, call), 0, 0

    def full(*args):
        nonlocal writes
        writes += 1
        if writes == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(os, call, full)
    for failing in range(1, 5 + (call == "replace")):
        writes = 0
        with pytest.raises(OSError, match=r"cannot write .*: No space left .* intact"):
            run.save(STATE | dict(step=3 + failing))
        assert 3 <= Run(run.folder).load()["step"] <= 3 + failing
        assert Run(run.folder).load("best.pt")["epoch"] == 1
        assert (run.folder / "metrics.csv").read_text().count("\n") == 2
        assert not list((tmp_path / "r").glob("*.tmp")) and not list((tmp_path / "r").glob(".*.tmp"))
    last, writes, failing = failing, 0, 0
    run.save(STATE | dict(step=9))
    assert writes == last and run.load()["step"] == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
@pytest.mark.parametrize("renames", range(6))
def test_killed_before_any_of_the_renames(tmp_path, renames):
    """A save renames the old checkpoint, the new one, best.pt and two more: a kill between any two is harmless."""
    run = create(tmp_path / "r", dict(lr=1.0))
    run.save(STATE)
    pid = os.fork()
    if pid == 0:
        original, left = os.replace, renames

        def replace(*args):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            original(*args)

        os.replace = replace
        run.keep_best(nn.Linear(2, 2), ROW)
        run.save(STATE | dict(step=4))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) == (renames < 5)
    del run
    run = Run(tmp_path / "r")
    assert run.resume()["step"] == (3 if renames < 2 else 4)
    assert run.load()["step"] == (3 if renames < 2 else 4) and bool(run.best) == (renames >= 2)
    run.save(STATE | dict(step=5))
    assert run.load()["step"] == 5 and names(run.folder)[:1] == [".lock"]


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        raw = b""
    elif how == "longer":
        raw += b"x"
    else:
        raw[len(raw) * how // 100] ^= 1  # a bit, so many per cent into the file
    path.write_bytes(raw)


HOW = ["truncated", "empty", "longer", 0, 10, 50, 80, 97, 99]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(tmp_path, how, capsys):
    run = create(tmp_path / "r", {})
    run.save(STATE)
    damage(run.folder / "checkpoint.pt", how)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged .* checksum"):
        run.load()  # there is none before
    run.save(STATE | dict(step=4))
    run.save(STATE | dict(step=5))
    damage(run.folder / "checkpoint.pt", how)
    del run
    run = Run(tmp_path / "r")
    assert run.load()["step"] == 4
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "checkpoint.pt is damaged" in out and "the one before is used, of step 4" in out
    assert run.resume()["step"] == 4 and not (run.folder / "checkpoint.prev.pt").exists()
    capsys.readouterr()
    assert run.load()["step"] == 4 and not capsys.readouterr().out  # the folder is whole again


@pytest.mark.parametrize("how", [*HOW, "missing"])
def test_best_and_settings_are_recovered_from_the_checkpoint(tmp_path, how, capsys):
    run = create(tmp_path / "r", dict(arch="vgg8", lr=0.5))
    run.keep_best(nn.Linear(2, 2), ROW)
    run.save(STATE)
    before = {name: (run.folder / name).read_bytes() for name in ("best.pt", "config.json", "metrics.csv")}
    for name in before:
        (run.folder / name).unlink() if how == "missing" else damage(run.folder / name, how)
    if isinstance(how, int) or how == "longer":
        (run.folder / "config.json").write_bytes(b"{" + before["config.json"])  # or it might still be JSON
    del run
    run = Run(tmp_path / "r")
    assert run.config == dict(arch="vgg8", lr=0.5) and run.load("best.pt")["epoch"] == 1
    out = capsys.readouterr().out
    assert "settings in the checkpoint are used" in out and "copy in the checkpoint is used" in out
    run.resume()
    assert before == {name: (run.folder / name).read_bytes() for name in before}


def test_settings_that_were_changed_are_refused(tmp_path):
    create(tmp_path / "r", dict(lr=0.5, data_root="here")).save(STATE)
    (tmp_path / "r" / "config.json").write_text(json.dumps(dict(lr=0.25, data_root="there")))
    with pytest.raises(ValueError, match=r"saved with lr=0\.5, not 0\.25"):
        Run(tmp_path / "r").load()
    (tmp_path / "r" / "config.json").write_text("{}")  # nor may the recipe fill in what was left out
    with pytest.raises(ValueError, match=r"saved with lr=0\.5, not None"):
        Run(tmp_path / "r").load()
    (tmp_path / "r" / "config.json").write_text(json.dumps(dict(lr=0.5, data_root="there")))  # data may move
    assert Run(tmp_path / "r").load()["step"] == 3


def test_a_folder_is_trained_in_by_one_at_a_time(tmp_path):
    run = create(tmp_path / "r", {})
    run.save(STATE)
    other = Run(tmp_path / "r")  # to read it is allowed
    assert other.load()["step"] == 3
    with pytest.raises(ValueError, match="in use"):
        other.resume()
    with pytest.raises(ValueError, match="in use"):
        create(tmp_path / "r", {})
    del run
    assert other.resume()["step"] == 3


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["pickle", "checkpoint", "sealed"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, kind):
    run = create(tmp_path / "r", {})
    bomb, path = Malicious(), tmp_path / "r" / "checkpoint.pt"
    bomb.target = tmp_path / "ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif kind == "checkpoint":
        torch.save(STATE | dict(model=bomb), path)
    else:
        forge(path, STATE | dict(model=bomb))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        run.load()
    assert not (tmp_path / "ran").exists()


def test_other_contents_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Run(tmp_path)
    for text in ("{ half", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="cannot be read"):
            Run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint\.pt"):
        Run(tmp_path).load()
    forge(tmp_path / "checkpoint.pt", dict(model={}, step=1))
    with pytest.raises(ValueError, match="optimizer is missing"):
        Run(tmp_path).load()


def test_bad_part_names_the_part():
    kind = dict(a=int, b=[dict(c=float)], d=(float, float))
    good = dict(a=1, b=[dict(c=1, more=2), dict(c=0.5)], d=[1.0, 2], e=None)
    assert bad_part(good, kind) is None and bad_part(good | dict(b=[]), kind) is None
    bad = (
        dict(a="1"),
        dict(a=1.5),
        dict(b={}),
        dict(b=[dict(c="x")]),
        dict(b=[dict()]),
        dict(d=[1.0]),
        dict(d=[1.0, ""]),
    )
    assert [bad_part(good | b, kind) for b in bad] == ["a", "a", "b", "c", "c", "d", "d"]
    assert bad_part([], kind) == "it"


def test_an_optimizer_takes_only_what_fits():
    network = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    momentum = {i: dict(momentum_buffer=torch.ones_like(p)) for i, p in enumerate(network.parameters())}
    restore(optimizer, dict(state=momentum, param_groups=[dict(lr="?")]), "file")
    assert optimizer.state[network.weight]["momentum_buffer"].sum() == 6 and optimizer.param_groups[0]["lr"] == 0.1
    for bad in ({0: dict(momentum_buffer=torch.ones(2))}, {0: 1}, {7: momentum[0]}, {0: dict(momentum_buffer="x")}):
        with pytest.raises(ValueError, match="file belongs to another network"):
            restore(optimizer, dict(state=bad), "file")


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
    config |= dict(ei_ratio=4, tau=2.0, threshold=1.0, alpha=4.0, width=1.0)
    assert run_name(config) == "digits-vgg8-ei-seed0"
    config |= dict(eps=1e-6, ste=False, grad_scaling=False, init="kaiming")
    assert run_name(config) == "digits-vgg8-ei-eps1e-06-noste-noscaling-kaiming-seed0"
    config |= dict(ei_ratio=8, tau=3.0, width=0.5, eps="adaptive", ste=True, grad_scaling=True, init="ei")
    assert run_name(config) == "digits-vgg8-ei-width0.5-eiratio8-tau3-seed0"
    assert run_name(config | dict(plan="8-P")) == "digits-vgg8-ei-plan8-P-width0.5-eiratio8-tau3-seed0"
