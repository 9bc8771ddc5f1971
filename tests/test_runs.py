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

from support import data, recipes, runs
from support.runs import Run, differing, equations, outcome, restore

CONFIG = recipes.settings(recipes.parse(["--arch", "mlp", "--epochs", "2"]))
ROW = dict(epoch=1, test_accuracy=0.5, seconds=2.5)
STATE = dict(model={"w": torch.arange(6.0)}, optimizer={"state": {}}, step=3, sums=[0.5, 1.0, 3.0], seconds=1.5)
STATE |= dict(history=[ROW], histograms=[])
DATA = dict(classes=["a", "b"], shape=[1, 2, 2], train="4 samples", test="2 samples")
KEPT = [".lock", "checkpoint.pt", "config.json", "histograms.json", "metrics.csv"]


def create(folder, **options):
    run = Run.create(folder, dict(CONFIG), **options)
    run.data = DATA
    return run


@pytest.fixture
def run(tmp_path):
    """A run with a checkpoint, that of step 3, and the one before, of step 2."""
    run = create(tmp_path / "r")
    run.keep_best(nn.Linear(1, 1), 1, 0.5)
    run.save(STATE | dict(step=2))
    run.save(STATE)
    return run


def names(folder):
    return sorted(file.name for file in folder.iterdir())


# ---- what is written


def test_a_run_folder_round_trip(tmp_path):
    run = create(tmp_path / "r")
    run.save(STATE)
    assert names(run.folder) == KEPT
    again = Run(tmp_path / "r")
    assert again.config == CONFIG and again.equations == equations()
    state = again.load()
    assert torch.equal(state.pop("model")["w"], STATE["model"]["w"])
    assert state == {k: v for k, v in STATE.items() if k != "model"} | dict(config=CONFIG, data=DATA)
    assert (tmp_path / "r" / "metrics.csv").read_text() == "epoch,test_accuracy,seconds\n1,0.5,2.5\n"
    run.save(STATE | dict(step=4))
    run.finish([ROW], chance=0.25)
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["outcome"] == "failed to converge" and result["best_epoch"] == 1 and result["config"] == run.config
    assert names(run.folder) == sorted([*KEPT, "checkpoint.prev.pt", "result.json"])


def test_the_best_epoch_and_how_it_ended(tmp_path, capsys):
    run, network = create(tmp_path / "r"), nn.Linear(1, 1)
    nn.init.constant_(network.weight, 7)
    run.keep_best(network, 2, 0.7)
    best = Run(run.folder).load("best.pt")
    assert (best["epoch"], best["accuracy"], best["model"]["weight"].item()) == (2, 0.7, 7)
    run.finish([dict(epoch=i + 1, test_accuracy=a, seconds=1.0) for i, a in enumerate([0.2, 0.7, 0.7, 0.4])], 0.1)
    assert "converged, test accuracy 40.00%, best 70.00% (chosen on the test set), 4 s" in capsys.readouterr().out
    result = json.loads((run.folder / "result.json").read_text())
    assert [result[key] for key in ("test_accuracy", "best_test_accuracy", "best_epoch")] == [0.4, 0.7, 2]


@pytest.mark.parametrize(
    "accuracies, chance, nonfinite, expected",
    [
        ([0.1, 0.15, 0.2], 0.1, False, "failed to converge"),  # never above twice chance
        ([], 0.1, True, "failed to converge"),
        ([0.8, 0.8], 0.8, False, "failed to converge"),  # always the commonest class
        ([0.85, 0.92], 0.8, False, "converged"),
        ([0.1, 0.5, 0.9], 0.1, False, "converged"),
        ([0.5, 0.1, 0.6], 0.1, False, "converged"),  # a dip that it came back from
        ([0.3, 0.5, 0.15, 0.1], 0.1, False, "collapsed (epoch 3)"),
        ([0.5, 0.12, 0.6, 0.1], 0.1, False, "collapsed (epoch 4)"),
        ([0.95, 0.8], 0.8, False, "collapsed (epoch 2)"),
        ([0.5, 0.6], 0.1, True, "collapsed (epoch 3)"),
        ([0.5, 0.17], 0.1, False, "converged"),  # low, but above 1.5 times chance
    ],
)
def test_outcome(accuracies, chance, nonfinite, expected):
    assert outcome(accuracies, chance, nonfinite) == expected


# ---- whose the folder is


def chosen(folder):
    run = create(folder, choose=True)
    run.close()
    return run.folder


def test_an_existing_run_is_never_overwritten(tmp_path):
    create(tmp_path / "r").close()
    assert not (tmp_path / "r").exists()  # nothing was saved, so nothing is lost
    assert chosen(tmp_path / "r") == tmp_path / "r"
    create(tmp_path / "r").save(STATE)
    with pytest.raises(ValueError, match=r"in use|already holds a run"):
        create(tmp_path / "r")
    assert chosen(tmp_path / "r") == tmp_path / "r-2" and not (tmp_path / "r-2").exists()
    for name, kept in (("r-2", "config.json"), ("r-3", "checkpoint.prev.pt")):  # nor is the rest of one
        (tmp_path / name).mkdir()
        (tmp_path / name / kept).touch()
        with pytest.raises(ValueError, match="already holds a run"):
            create(tmp_path / name)
    (tmp_path / "r-4").mkdir()
    (tmp_path / "r-4" / "notes").touch()
    assert chosen(tmp_path / "r") == tmp_path / "r-4" and names(tmp_path / "r-4") == ["notes"]


def test_two_trainings_that_start_at_once_take_two_folders(tmp_path):
    first = create(tmp_path / "r", choose=True)
    second = create(tmp_path / "r", choose=True)  # nothing is saved in the first one yet
    assert [first.folder.name, second.folder.name] == ["r", "r-2"]
    first.save(STATE)
    second.close()
    assert names(tmp_path) == ["r"]
    other = Run(tmp_path / "r")
    assert other.load()["step"] == 3  # to read it is allowed
    with pytest.raises(ValueError, match="is in use: another process"):
        other.resume(CONFIG)
    other.close()
    with pytest.raises(ValueError, match="in use"):  # a refusal frees nothing
        create(tmp_path / "r")
    first.close()
    assert other.resume(CONFIG)["step"] == 3
    del other  # without `close`
    assert Run(tmp_path / "r").resume(CONFIG)["step"] == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks(error, tmp_path, monkeypatch):
    def refuse(_):
        raise error

    monkeypatch.setattr(runs.FileLock, "acquire", refuse)
    run = create(tmp_path / "r")
    run.save(STATE)
    run.close()
    assert Run(tmp_path / "r").resume(CONFIG)["step"] == 3


@pytest.mark.parametrize("times", [2, 1000])
def test_a_file_that_a_scanner_holds_for_a_moment(times, run, monkeypatch):
    original, calls = os.replace, []

    def held(source, target):
        calls.append(target)
        if len(calls) <= times:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        original(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(runs.time, "sleep", lambda _: None)
    if times > 100:
        with pytest.raises(OSError, match="cannot write"):
            run.save(STATE | dict(step=4))
    else:
        run.save(STATE | dict(step=4))
    assert run.load()["step"] == (3 if times > 100 else 4)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_was_there_survives_a_full_disk(call, run, monkeypatch, capsys):
    """Whichever of the writes of a `save` is the one for which there is no space."""
    original, writes, failing = getattr(os, call), 0, 0

    def full(*arguments):
        nonlocal writes
        writes += 1
        if writes == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(os, call, full)
    for failing in range(1, 5 + (call == "replace")):
        writes = 0
        with pytest.raises(OSError, match=r"cannot write .*: No space left .* intact"):
            run.save(STATE | dict(step=3 + failing))
        again = Run(run.folder)
        assert 3 <= again.load()["step"] <= 3 + failing and again.load("best.pt")["epoch"] == 1
        assert (run.folder / "metrics.csv").read_text().count("\n") == 2
        assert not [name for name in names(run.folder) if name.endswith(".tmp")]
    last, writes, failing = failing, 0, 0
    run.save(STATE | dict(step=9))
    assert writes == last and run.load()["step"] == 9  # all of them were tried


# ---- damaged files


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def damage(path, how):
    """Replaces a file by a damaged one, or by something else under its name."""
    raw = bytearray(path.read_bytes())
    ran = path.parent.parent / "ran"
    if how == "missing":
        return path.unlink()
    if how == "sealed bomb":
        return torch.save(STATE | dict(config=CONFIG, model=Malicious(ran)), path)
    if how == "flipped":
        raw[raw.index(b"PK", 4) // 2] ^= 1  # a bit of what the first checksum is of
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    others = {"truncated": raw[: len(raw) // 2], "empty": b"", "bomb": pickle.dumps(Malicious(ran)), "pointer": pointer}
    path.write_bytes(others.get(how, raw))


HOW = {"missing": "there is no", "pointer": "Git LFS pointer, not the file itself: run git lfs pull"}
HOW |= dict.fromkeys(["truncated", "empty", "flipped", "bomb", "sealed bomb"], "cannot be used (")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(run, how, capsys):
    damage(run.folder / "checkpoint.pt", how)
    run.close()
    run = Run(run.folder)
    assert run.resume(CONFIG)["step"] == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and HOW[how] in out and "checkpoint.pt" in out
    assert "; the one before is used, of step 2" in out
    before = (run.folder / "checkpoint.prev.pt").read_bytes()
    run.save(STATE | dict(step=4))
    assert (run.folder / "checkpoint.prev.pt").read_bytes() == before  # and does not give way to the damaged one
    run.save(STATE | dict(step=5))
    assert run.load()["step"] == 5 and run.load("checkpoint.prev.pt")["step"] == 4 and not capsys.readouterr().out
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        damage(run.folder / name, how)
    with pytest.raises(ValueError) as error:
        run.load()
    assert HOW[how] in str(error.value) and "\n" not in str(error.value)
    assert not (run.folder.parent / "ran").exists()


def test_no_flipped_bit_changes_a_number_unnoticed(run, capsys):
    path, noticed = run.folder / "checkpoint.pt", 0
    raw, good = path.read_bytes(), run.load()
    for i in range(0, len(raw), 11):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 4]) + raw[i + 1 :])
        state = Run(run.folder).load()
        if state["step"] == 2:
            noticed += 1
        else:  # padding, or a date
            assert torch.equal(state.pop("model")["w"], good["model"]["w"])
            assert state == {key: value for key, value in good.items() if key != "model"}
    assert noticed > len(raw) / 33


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_best_network(run, how):
    damage(run.folder / "best.pt", how)
    with pytest.raises(ValueError) as error:
        run.load("best.pt")
    assert HOW[how] in str(error.value) and ("--resume" in str(error.value)) == (how == "missing")


def test_one_file_is_not_another(run):
    shutil.copy(run.folder / "best.pt", run.folder / "checkpoint.prev.pt")
    shutil.copy(run.folder / "best.pt", run.folder / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.prev\.pt cannot be used .it is no checkpoint\.prev\.pt"):
        run.load()


@pytest.mark.parametrize("text", [None, "", "{ half", "[]", "null", "[" * 100_000, "{}", '{"epochs": "2"}', "\0\xff"])
def test_damaged_settings_are_those_in_the_checkpoint(text, run, capsys):
    path = run.folder / "config.json"
    path.unlink() if text is None else path.write_text(text, encoding="latin-1")
    again = Run(run.folder)
    assert again.config == CONFIG
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"{path} is damaged" in out and "the settings in the checkpoint are used" in out
    again.say_other_equations()  # nobody knows
    assert not capsys.readouterr().out
    run.save(STATE)
    assert Run(run.folder).config == CONFIG and not capsys.readouterr().out
    path.write_text("{ half")
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (run.folder / name).unlink()
    with pytest.raises(ValueError, match=r"is not a run folder: .*config\.json cannot be used"):
        Run(run.folder)


def change(run, **settings):
    path = run.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_settings_that_were_changed_are_refused(run, capsys):
    change(run, lr=0.25)
    with pytest.raises(ValueError, match=r"it was saved with lr=0\.01, but config\.json says 0\.25"):
        Run(run.folder).load()
    change(run, lr=0.01, data_root="there", epochs=9)  # data may move, and a training be made longer
    assert Run(run.folder).load()["step"] == 3
    for bad in (dict(epochs="9"), dict(epochs=None), dict(data_root=3)):
        change(run, **bad)
        assert Run(run.folder).config == CONFIG and "see its epochs and data_root" in capsys.readouterr().out
        change(run, epochs=2, data_root=".")


def test_what_is_given_may_not_contradict(run):
    given = dict(epochs=7, data_root=None, lr=0.01, T=None, out="x")
    assert run.settings(given, free=("data_root", "epochs")) == CONFIG | dict(epochs=7)
    with pytest.raises(ValueError, match="was made with epochs=2, not 7"):
        run.settings(given)


def test_an_optimizer_takes_only_what_fits():
    network = nn.Linear(2, 3)

    def sgd(*groups, **options):
        return torch.optim.SGD(groups or network.parameters(), lr=0.1, momentum=0.9, **options)

    trained = sgd()
    network(torch.ones(1, 2)).sum().backward()
    trained.step()
    again = sgd()
    restore(again, trained.state_dict(), "file")
    assert torch.equal(again.state[network.bias]["momentum_buffer"], trained.state[network.bias]["momentum_buffer"])
    others = [torch.optim.AdamW(network.parameters()), sgd(dict(params=[network.weight]), dict(params=[network.bias]))]
    others += [sgd(dict(params=[network.bias, network.weight]))]  # in another order
    for other in others:
        with pytest.raises(ValueError, match="file is of another network or optimiser than config"):
            restore(other, trained.state_dict(), "file")
    with pytest.raises(ValueError, match="file is of another network"):
        restore(nn.Linear(2, 2), network.state_dict(), "file")


# ---- what a run knows of its equations, and what two runs have equal


def test_only_what_is_computed_counts_as_an_equation(tmp_path, monkeypatch, run, capsys):
    here = Path(runs.networks.__file__).parent
    for name in equations():
        shutil.copy(here / name, tmp_path)
    before = equations()
    monkeypatch.setattr(runs.networks, "__file__", str(tmp_path / "model.py"))
    text = (tmp_path / "lif.py").read_text()
    reworded = re.sub('"""[^"]*"""', '"""Other words."""', text).replace("\n    ", "\n    # a comment\n\n    ")
    assert reworded.count("Other words") > 3
    (tmp_path / "lif.py").write_text(reworded + "\nif True:\n    print('another demonstration')\n")
    assert equations() == before
    run.say_other_equations()
    assert not capsys.readouterr().out
    (tmp_path / "lif.py").write_text(text.replace("1 - 1 / tau", "1 - 2 / tau"))
    model = (tmp_path / "model.py").read_text()
    (tmp_path / "model.py").write_text(model.replace("logits.mean(0)", "logits.sum(0)"))
    run.say_other_equations()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"with which {run.folder} was begun: lif.py, model.py changed since" in out
    for entry in ({}, [], "x", None, {"lif.py": before["lif.py"]} | {"other.py": "1"}):  # older, or damaged
        change(run, equations=entry)
        Run(run.folder).say_other_equations()
        assert ("lif.py changed" in capsys.readouterr().out) == (isinstance(entry, dict) and "lif.py" in entry)


def test_what_two_runs_must_have_equal(tmp_path):
    def made(**changed):
        arguments = dict(dict(arch="mlp", data="dvs-gesture"), **changed)
        known = arguments.pop("known", DATA)
        config = recipes.settings(recipes.parse([f"--{key}={value}" for key, value in arguments.items()]))
        run = Run.create(tmp_path / "r", config, choose=True)
        run.data = known
        run.keep_best(nn.Linear(1, 1), 1, 0.5)
        return run

    run = made()
    assert not differing(run, made(lr=0.5, kind="bn", seed=3)) and not differing(run, made(kind="dann"))
    for key, value in (("T", 3), ("epochs", 7), ("batch-size", 9), ("image-size", 20), ("width", 0.5), ("plan", "50")):
        assert differing(run, made(**{key: value})) == [key.replace("-", "_")]
    assert differing(run, made(data="digits", T=16))[0] == "data" and differing(run, made(arch="vgg8")) == ["arch"]
    assert differing(run, made(known=DATA | dict(train="4 others"))) == ["images"]
    assert data.differences(DATA, DATA) == ""
