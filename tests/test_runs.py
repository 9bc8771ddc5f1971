"""The run folder: what is written, the lock, damaged files, a full disk, other equations."""

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from support import recipes, runs
from support.runs import Run, equations, outcome

CONFIG = recipes.settings(recipes.parse(["--arch", "mlp", "--epochs", "2"]))
ROW = dict(epoch=1, test_accuracy=0.5, seconds=2.5)
STATE = dict(model={"w": torch.arange(6.0)}, optimizer={"state": {}}, step=3, sums=[0.5, 1.0, 3.0], seconds=1.5)
STATE |= dict(history=[ROW], histograms=[])
KEPT = ".lock best.pt checkpoint.prev.pt checkpoint.pt config.json metrics.csv".split()


def create(folder, **options):
    return Run.create(folder, dict(CONFIG), **options)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a checkpoint, that of step 3, and the one before, of step 2."""
    monkeypatch.chdir(tmp_path)
    run, network = create(tmp_path / "r"), nn.Linear(6, 1)
    network.weight.data[0] = torch.arange(6.0)
    run.keep_best(network, 2, 0.7)
    run.save(STATE | dict(step=2))
    run.save(STATE)
    return run


def test_histograms_of_another_version_are_one_line(run):
    run.save(STATE | dict(histograms=[[dict(i_int=[1], u=[1])]]))
    with pytest.raises(ValueError, match="begun by another version"):
        runs.histograms(run)
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (run.folder / name).unlink()
    with pytest.raises(ValueError, match=r"^there is no .*checkpoint\.pt"):
        runs.histograms(run)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_run_folder_round_trip(run, capsys):
    assert names(run.folder) == KEPT
    again = Run(run.folder)
    assert again.config == CONFIG and again.equations == equations()
    best = again.load("best.pt")
    assert repr(again.load()) == repr(STATE | dict(config=CONFIG, data=None))
    assert (best["epoch"], best["accuracy"], best["model"]["weight"].sum()) == (2, 0.7, 15)
    assert (run.folder / "metrics.csv").read_text() == "epoch,test_accuracy,seconds\n1,0.5,2.5\n"
    run.finish([dict(epoch=i + 1, test_accuracy=a, seconds=1.0) for i, a in enumerate([0.2, 0.7, 0.7, 0.4])], 0.1)
    assert "converged, test accuracy 40.00%, best 70.00% (chosen on the test set), 4 s" in capsys.readouterr().out
    result = json.loads((run.folder / "result.json").read_text())
    assert [result[key] for key in ("test_accuracy", "best_test_accuracy", "best_epoch")] == [0.4, 0.7, 2]
    assert result["config"] == CONFIG and names(run.folder) == [*KEPT, "result.json"]
    run.save(STATE)
    assert names(run.folder) == KEPT  # a result of more epochs, or of fewer, does not survive
    assert [Run(path.parent) for path in Path(runs.__file__).parents[1].glob("results/**/config.json")]


def test_outcome():
    for accuracies, chance, expected in (
        ([0.1, 0.15, 0.2], 0.1, "failed to converge"),  # never above twice chance
        ([0.8, 0.8], 0.8, "failed to converge"),  # always the commonest class
        ([0.85, 0.92], 0.8, "converged"),
        ([0.5, 0.1, 0.17], 0.1, "converged"),  # low, but above 1.5 times chance
        ([0.5, 0.12, 0.6, 0.1], 0.1, "collapsed (epoch 4)"),
        ([0.95, 0.8], 0.8, "collapsed (epoch 2)"),
    ):
        assert outcome(accuracies, chance) == expected
    assert [outcome(a, 0.1, nonfinite=True) for a in ([0.5, 0.6], [])] == ["collapsed (epoch 3)", "failed to converge"]


def chosen(folder):
    run = create(folder, choose=True)
    run.close()
    return run.folder


def test_an_existing_run_is_never_overwritten(tmp_path):
    assert chosen(tmp_path / "r") == tmp_path / "r"
    assert not (tmp_path / "r").exists()  # nothing was saved, so nothing is lost
    create(tmp_path / "r").save(STATE)
    assert chosen(tmp_path / "r") == tmp_path / "r-2"
    for name, kept in (("r-2", "config.json"), ("r-3", "checkpoint.prev.pt")):  # nor is the rest of one
        (tmp_path / name).mkdir()
        (tmp_path / name / kept).touch()
        with pytest.raises(ValueError, match="already holds a run"):
            create(tmp_path / name)
    (tmp_path / "r-4").mkdir()
    (tmp_path / "r-4" / "notes").touch()
    assert chosen(tmp_path / "r") == tmp_path / "r-4" and names(tmp_path / "r-4") == ["notes"]


def test_a_folder_is_of_one_training_at_a_time(tmp_path):
    first = create(tmp_path / "r", choose=True)
    second = create(tmp_path / "r", choose=True)  # nothing is saved in the first one yet
    assert [first.folder.name, second.folder.name] == ["r", "r-2"]
    first.save(STATE)
    second.close()
    other = Run(tmp_path / "r")
    assert names(tmp_path) == ["r"] and other.load()["step"] == 3  # to read it is allowed
    for _ in range(2):  # a refusal frees nothing
        with pytest.raises(ValueError, match="is in use: another process"):
            other.resume(CONFIG)
        other.close()
    first.close()
    assert other.resume(CONFIG)["step"] == 3
    del other  # without `close`
    assert Run(tmp_path / "r").resume(CONFIG)["step"] == 3


@pytest.mark.parametrize("call, error", [("fsync", errno.ENOSPC), ("replace", errno.ENOSPC), ("replace", errno.EACCES)])
def test_what_was_there_survives_a_full_disk(call, error, run, monkeypatch):
    """Whichever of the writes of a `save` fails. A file that a virus scanner holds is tried again for a second."""
    original, writes, failing = getattr(os, call), 0, ()

    def full(*arguments):
        nonlocal writes
        writes += 1
        if writes in failing:
            raise OSError(error, os.strerror(error))
        return original(*arguments)

    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(runs.time, "sleep", lambda _: None)
    tries, all_writes = 21 if error == errno.EACCES else 1, 3 + (call == "replace")
    for i in range(1, 1 + all_writes):
        writes, failing = 0, range(i, i + tries)
        with pytest.raises(OSError, match=rf"cannot write .*: {os.strerror(error)}; what was there before is intact"):
            run.save(STATE | dict(step=3 + i))
        assert 3 <= Run(run.folder).load()["step"] <= 3 + i and run.load("best.pt")["epoch"] == 2
        assert names(run.folder) in (KEPT, [name for name in KEPT if name != "checkpoint.pt"])
    writes, failing = 0, range(2, 1 + tries)  # none, or not for a second
    run.save(STATE | dict(step=9))
    assert writes == all_writes + len(failing) and run.load()["step"] == 9


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def damage(path, how):
    """Replaces a file by a damaged one, or by something else under its name."""
    raw = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "another file":
        torch.save(dict(config=CONFIG) | dict.fromkeys(["optimizer"] * (path.name == "best.pt")), path)
    elif how == "bomb in a zip":
        torch.save(STATE | dict(config=CONFIG, model=Bomb()), path)
    else:
        flipped = raw.copy()
        flipped[raw.index(torch.arange(6.0).numpy().tobytes())] ^= 1  # of a weight: only a checksum can notice it
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        others = dict(truncated=raw[: len(raw) // 2], empty=b"", flipped=flipped, pointer=pointer)
        path.write_bytes(others.get(how, pickle.dumps(Bomb())))


HOW = dict(missing="there is no", pointer="is a Git LFS pointer, not the file itself: run git lfs pull)")
HOW |= dict.fromkeys(["truncated", "empty", "flipped", "bomb", "bomb in a zip", "another file"], "cannot be used (")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(run, how, capsys):
    damage(run.folder / "checkpoint.pt", how)
    run.close()
    run = Run(run.folder)
    assert run.resume(CONFIG)["step"] == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and HOW[how] in out and "checkpoint.pt" in out and "; the one before is used" in out
    run.save(STATE | dict(step=4))
    run.save(STATE | dict(step=5))
    assert run.load()["step"] == 5 and run.load("checkpoint.prev.pt")["step"] == 4 and not capsys.readouterr().out
    for name in ("checkpoint.pt", "checkpoint.prev.pt", "best.pt"):
        damage(run.folder / name, how)
    for name, last in (("checkpoint.pt", "checkpoint.prev.pt"), ("best.pt", "best.pt")):
        with pytest.raises(ValueError) as error:
            run.load(name)
        said = str(error.value)
        assert HOW[how] in said and "\n" not in said and (how == "missing" or last in said)
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", [None, "", "{ half", "[]", "null", "deep", "{}", "\0\xff", "T"])
def test_damaged_settings_are_those_in_the_checkpoint(text, run, capsys):
    path = run.folder / "config.json"
    text = {"deep": "[" * 100_000, "T": json.dumps(CONFIG | dict(T="4"))}.get(text, text)
    path.unlink() if text is None else path.write_text(text, encoding="latin-1")
    again = Run(run.folder)
    again.say_other_equations()  # nobody knows
    out = capsys.readouterr().out
    assert again.config == CONFIG and out.count("\n") == 1 and f"{path} cannot be read" in out
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (run.folder / name).unlink()
    with pytest.raises(ValueError, match=r"is not a run folder: .*config\.json cannot be read"):
        Run(run.folder)


def test_only_what_is_computed_counts_as_an_equation(tmp_path, monkeypatch, run, capsys):
    for name in equations():
        shutil.copy(Path(runs.networks.__file__).with_name(name), tmp_path)
    before = equations()
    monkeypatch.setattr(runs.networks, "__file__", str(tmp_path / "model.py"))
    text = (tmp_path / "lif.py").read_text()
    reworded = re.sub('"""[^"]*"""', '"""Other words."""', text).replace("\n    ", "\n    # a comment\n\n    ")
    assert reworded.count("Other words") > 3
    (tmp_path / "lif.py").write_text(reworded + "\nif __name__ == '__main__':\n    print('another demonstration')\n")
    run.say_other_equations()
    assert equations() == before and not capsys.readouterr().out
    for name, old, new in (("lif.py", "1 - 1 / tau", "1 - 2 / tau"), ("model.py", "logits.mean(0)", "logits.sum(0)")):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(old, new))
    run.say_other_equations()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"with which {run.folder} was begun: lif.py, model.py changed since" in out
    run.equations = {"other.py": "1"}  # of an older version
    run.say_other_equations()
    assert not capsys.readouterr().out
