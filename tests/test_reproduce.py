"""All runs one after another: which there are, going on where it was, what cannot be trained, the table."""

import json
import signal

import pytest
import torch
from trainings import STEPS, TINY, fails, load, stop_at

import reproduce
import visualize
from support import data
from support.runs import Run

EI, BN, PLAIN = (f"digits-mlp-{kind}-width0.1-seed0" for kind in ("ei", "bn", "plain"))


def main(*arguments):
    return reproduce.main([*TINY, *map(str, arguments)])


def refused(capsys, *arguments):
    return fails(capsys, *arguments, command=main)


@pytest.fixture(autouse=True)
def drawn(tmp_path, monkeypatch):
    """What `visualize.py` was called with; here it draws nothing."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(visualize, "main", lambda argv: calls.append(argv) or 0, raising=False)
    monkeypatch.setitem(reproduce.SUITES, "paper", [dict(kind=kind) for kind in ("plain", "ei", "bn")])
    return calls


def result(tmp_path, name):
    return json.loads((tmp_path / "runs" / name / "result.json").read_text())


def test_it_goes_on_where_it_was_and_skips_what_is_finished(drawn, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3 * STEPS + STEPS + 1)  # in the second epoch of the second run
        assert main() == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "s an epoch; 8 epochs left in all, about 0 minutes" in out and "--resume" in out and "run 3" not in out
    assert not drawn and not (tmp_path / "runs" / "table.md").exists() and Run(f"runs/{EI}").load()["step"] == 7
    assert main() == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 1 and f"run 3 of 3: {BN}" in out and "; 4 epochs left in all" in out
    lines = (tmp_path / "runs" / "table.md").read_text().splitlines()
    assert lines[0].startswith("| network") and len([line for line in lines if "mlp" in line]) == 3
    assert any("mlp plain | 0.1 | 0 | 3/3 |" in line for line in lines) and lines[2] in out
    assert drawn[0][:2] == ["all", "runs"] and "--width=0.1" in drawn[0]
    for file in tmp_path.glob("runs/*/checkpoint*.pt"):  # large, and of no use to a finished run
        file.unlink()
    assert main("--no-figures") == 0
    assert capsys.readouterr().out.count("finished before") == 3 and len(drawn) == 1


@pytest.mark.parametrize("how", ["in use", "damaged", "other settings", "no memory"])
def test_a_run_that_cannot_be_trained_leaves_the_rest(how, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(reproduce.SUITES, "paper", [dict(kind="ei")])
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        main()
    monkeypatch.setitem(reproduce.SUITES, "paper", [dict(kind=kind) for kind in ("plain", "ei", "bn")])
    run, options = Run(f"runs/{EI}"), []
    if how == "in use":  # by another sweep
        run.lock()
    elif how == "damaged":
        for name in ("checkpoint.pt", "checkpoint.prev.pt"):
            (run.folder / name).write_bytes(b"x")
    elif how == "other settings":
        options = ["--lr", "0.02"]
    else:
        original = reproduce.train.header
        monkeypatch.setattr(reproduce.train, "header", lambda *a: original(*a) if a[0]["kind"] != "ei" else too_large())
    capsys.readouterr()
    assert main(*options) == 2
    out = capsys.readouterr().out
    words = {"in use": "in use: another", "damaged": "cannot be used", "other settings": "was made with lr=0.01, not"}
    last = out.splitlines()[-1]
    assert last.startswith(f"not trained: {EI}: ") and words.get(how, "out of memory") in last
    assert all(result(tmp_path, name)["epochs"] == 3 for name in (PLAIN, BN))
    table = (tmp_path / "runs" / "table.md").read_text()
    assert "mlp plain" in table and "mlp bn" in table and "mlp ei" not in table


def too_large():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_run_at_chance_is_given_up_and_the_table_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce.train, "evaluate", lambda *_: (0.7, 0.1, [0.1] * 3))
    assert main("--give-up", "--no-figures") == 0
    assert result(tmp_path, EI)["epochs"] == 1 and result(tmp_path, EI)["given_up"]
    assert (tmp_path / "runs" / "table.md").read_text().count("1/3") == 3
    assert "given up at chance" in (tmp_path / "runs" / "table.md").read_text()
    capsys.readouterr()
    assert main("--no-figures") == 0 and capsys.readouterr().out.count(", given up at chance\n") == 3


def test_runs_on_other_data_do_not_stand_in_one_table(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(reproduce.SUITES, "paper", [dict(kind="plain")])
    assert main() == 0
    monkeypatch.setitem(reproduce.SUITES, "paper", [dict(kind="plain"), dict(kind="bn")])
    for options in ([], ["--seed", "1"]):  # the second has no finished run of its own there
        said = refused(capsys, "--data-root", "./other", *options)
        assert "which is finished: the training set has other contents" in said and "choose another --out" in said
    assert len(list(tmp_path.glob("runs/*/"))) == 1
    frames = [
        data.Dataset(x, torch.arange(4) % 2, x, torch.arange(4) % 2, 2) for x in torch.ones(2, 4, 3, 2, 8, 8).byte()
    ]
    known = dict(config=dict(data="dvs-gesture"), data=data.identity(frames[0]))
    frames[1].train_x += 1
    config = dict(data="dvs-gesture", data_root="here", image_size=8, T=3)
    for T, other in ((3, False), (2, False), (3, True)):  # two frames of the same recordings are others in any case
        monkeypatch.setattr(
            data,
            "load",
            lambda *_, T=T, i=int(other): data.Dataset(
                *(x[:, :T] if x.dim() > 1 else x for x in vars(frames[i]).values() if isinstance(x, torch.Tensor)), 2
            ),
        )
        if other:
            with pytest.raises(ValueError, match="the data in here are not those of run"):
                reproduce.check_data(config, dict(run=known))
        else:
            reproduce.check_data(config, dict(run=known))


def test_a_damaged_result_is_written_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(reproduce.SUITES, "paper", [dict(kind="plain")])
    assert main() == 0
    path = tmp_path / "runs" / PLAIN / "result.json"
    whole = path.read_text()
    texts = ["{", "[]", whole[:-40], whole.replace('"train_seconds": ', '"train_seconds": "x", "was": ')]
    for text in texts + [whole.replace(f'"{key}"', '"x"') for key in ("classes", "config", "width", "test_accuracy")]:
        path.write_text(text)
        assert main() == 0 and f"{path.relative_to(tmp_path)} is damaged" in capsys.readouterr().out
        assert json.loads(path.read_text()) == json.loads(whole)
    for file in path.parent.glob("checkpoint*.pt"):
        file.unlink()
    path.write_text("{")
    assert main() == 2 and "there is no runs" in capsys.readouterr().out.splitlines()[-1]


def test_the_authors_numbers_stand_beside_cifar10_only():
    config = reproduce.plan(reproduce.parse(["--data", "cifar10"]))[1]
    known = dict(outcome="converged", given_up=False, config=config)
    for train, classes, number in (
        ("50000", reproduce.CIFAR10, 87.03),
        ("45000", reproduce.CIFAR10, "-"),
        ("50000", ["a"], "-"),
    ):
        found = dict(train=f"{train} samples", classes=classes)
        assert reproduce.row_of(known | dict(data=found))[-1] == number
    assert reproduce.row_of(known | dict(data=found, config=config | dict(ste=False)))[-1] == "-"


def test_which_runs_there_are(monkeypatch):
    monkeypatch.undo()

    def names(*arguments):
        return [reproduce.recipes.run_name(config) for config in reproduce.plan(reproduce.parse(arguments))]

    assert len(names()) == 12 and names()[0] == "digits-vgg8-ei-seed0"
    assert len(set(names("--seeds", "3"))) == 12 + 2 * 3
    assert len(names("--suite", "rivals", "--seeds", "2")) == 6
    both = names("--suite", "paper", "depth")
    assert len(both) == len(set(both)) == 12 + 8 and "digits-vgg19-bn-seed0" in both
    wide = reproduce.plan(reproduce.parse(["--width", "0.5", "--epochs", "20", "--data", "folder"]))
    assert all(config["width"] == 0.5 and config["epochs"] == 20 for config in wide)
    assert {config["lr"] for config in wide} == {0.002, 0.1, 0.02}  # each has the recipe of its own kind


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "depth"], "chooses --arch itself"),
        (["--kind", "ei"], "chooses --kind itself"),
        (["--suite", "rivals", "--eps", "1e-6"], "the run {'kind': 'bn'}: --eps, --no-ste"),
        (["--batch-size", "49"], "larger than the training set"),
        (["--out", __file__], "is no folder"),
        (["--out", "~nobody-of-this-name/x"], "home directory"),
        (["--seeds", "2", "--seed", "1"], "leave --seed out"),
        (["--seeds", "0"], "at least 1"),
        (["--suite", "none"], "none"),
    ],
)
def test_bad_input(arguments, words, capsys, tmp_path):
    if "--batch-size" in arguments:  # found in each run
        assert main(*arguments) == 2 and capsys.readouterr().out.count(words) == 6
    else:
        assert words in refused(capsys, "--out", "new", *arguments)
        assert not (tmp_path / "new").exists()
