"""All runs one after another: which there are, going on where it was, what cannot be trained, the table."""

import json
import signal

import pytest
import torch
from test_train import STEPS, TINY, fails, load, result, stop_at

import reproduce
import visualize
from support import data
from support.runs import Run

EI, BN, PLAIN = (f"digits-mlp-{kind}-width0.1-seed0" for kind in ("ei", "bn", "plain"))


def main(*arguments):
    return reproduce.main([*TINY, *map(str, arguments)])


@pytest.fixture(autouse=True)
def drawn(tmp_path, monkeypatch):
    """What `visualize.py` was called with; here it draws nothing."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(visualize, "main", lambda argv: calls.append(argv) or 0, raising=False)
    monkeypatch.setitem(reproduce.SUITES, "paper", [dict(kind=kind) for kind in ("plain", "ei", "bn")])
    return calls


def test_it_goes_on_where_it_was_and_skips_what_is_finished(drawn, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3 * STEPS + STEPS + 1)  # in the second epoch of the second run
        assert main() == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "run 2 of 3, with 6 epochs left in all: " in out and "run 3" not in out and "the same command goes on" in out
    assert not drawn and not (tmp_path / "runs" / "table.md").exists() and Run(f"runs/{EI}").load()["step"] == 7
    assert main() == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 1 and f"run 3 of 3, with 3 epochs left in all: {BN}" in out
    lines = (tmp_path / "runs" / "table.md").read_text().splitlines()
    assert sum("mlp" in line for line in lines) == 3 and lines[2] in out
    assert any("| mlp plain batch_size=8 T=2 | 0.1 | 0 | 3/3 |" in line for line in lines)
    assert drawn[0][:2] == ["all", "runs"] and "--width=0.1" in drawn[0]
    for file in tmp_path.glob("runs/*/checkpoint*.pt"):  # large, and of no use to a finished run
        file.unlink()
    assert main("--no-figures") == 0
    assert capsys.readouterr().out.count("finished before") == 3 and len(drawn) == 1


@pytest.mark.parametrize("how", ["in use: another", "cannot be used", "was made with lr=0.01, not", "out of memory"])
def test_a_run_that_cannot_be_trained_leaves_the_rest(how, tmp_path, capsys, monkeypatch):
    def full(config, *_):
        if config["kind"] == "ei":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setitem(reproduce.SUITES, "paper", [dict(kind="ei")])
        stop_at(patch, 2)
        main()
    run = Run(f"runs/{EI}")
    if how.startswith("in use"):  # by another sweep
        run.lock()
    elif how.startswith("cannot"):
        for name in ("checkpoint.pt", "checkpoint.prev.pt"):
            (run.folder / name).write_bytes(b"x")
    elif how.startswith("out"):
        monkeypatch.setattr(reproduce.train, "header", full)
    capsys.readouterr()
    assert main(*["--lr", "0.02"] * how.startswith("was")) == 2
    last, table = capsys.readouterr().out.splitlines()[-1], (tmp_path / "runs" / "table.md").read_text()
    assert last.startswith(f"not trained: {EI}: ") and how in last
    assert all(result(f"runs/{name}")["epochs"] == 3 for name in (PLAIN, BN))
    assert "mlp plain" in table and "mlp bn" in table and "mlp ei" not in table


def test_a_run_at_chance_is_given_up_and_the_table_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce.train, "evaluate", lambda *_: (0.7, 0.1, [0.1] * 3))
    assert main("--give-up") == 0 and result(f"runs/{EI}")["epochs"] == 1
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table.count("1/3") == table.count("given up at chance") == 3
    assert main() == 0 and capsys.readouterr().out.count(", given up at chance\n") == 3


def test_finished_runs_their_data_and_a_damaged_result(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(reproduce.SUITES, "paper", [dict(kind="plain")])
    assert main() == 0
    for options in ([], ["--seed", "1"]):  # the second has no finished run of its own there
        said = fails(capsys, "--data-root", "./other", *options, command=main)
        assert "which is finished: the training set has other contents" in said and "choose another --out" in said
    path = tmp_path / "runs" / PLAIN / "result.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | dict(data=result(path.parent)["data"] | dict(shape=[1, 9, 9]))))
    assert main("--data-root", "./other") == 0  # other sizes, or other frames of the same recordings
    for text in (
        "{",
        "[]",
        whole[:-40],
        *(whole.replace(f'"{key}"', '"x"') for key in ("classes", "width", "outcome")),
    ):
        path.write_text(text)
        assert main() == 0 and f"{path.relative_to(tmp_path)} is damaged" in capsys.readouterr().out
        assert path.read_text() == whole  # it is written again
    for file in path.parent.glob("checkpoint*.pt"):
        file.unlink()
    path.write_text(whole.replace('"given_up": false,', ""))  # of an earlier version
    assert main() == 0 and "finished before" in capsys.readouterr().out and '"given_up"' not in path.read_text()
    path.write_text("{")
    assert main() == 2 and "there is no runs" in capsys.readouterr().out.splitlines()[-1]


def test_a_row_of_the_table():
    """It names what differs from the recipe; the authors' numbers stand beside CIFAR-10 only."""
    config = reproduce.plan(reproduce.parse(["--data", "cifar10"]))[1]
    for n, classes, own, name in (
        (5, reproduce.CIFAR10, dict(precision="bf16", width=0.5), "vgg8 ei data=cifar10 bf16"),
        (5, reproduce.CIFAR10, dict(ste=False, tau=3.0), "vgg8 ei no STE tau=3 data=cifar10"),
        (4, reproduce.CIFAR10, dict(augment="none"), "vgg8 ei data=cifar10 augment=none"),
        (5, [], dict(lr=1 / 3), "vgg8 ei data=cifar10 lr=0.333333"),
    ):
        found = dict(outcome="converged", given_up=False, data=dict(train=f"{n}0000 samples", classes=classes))
        cells = reproduce.row_of(found | dict(config=config | own))
        assert cells[0] == name and cells[-1] == (87.03 if "width" in own else "-")


def test_which_runs_there_are(monkeypatch):
    monkeypatch.undo()

    def runs(arguments):
        return reproduce.plan(reproduce.parse(arguments.split()))

    names = [reproduce.recipes.run_name(config) for config in runs("--suite paper depth")]
    assert len(runs("")) == 12 and names[0] == "digits-vgg8-ei-seed0" and "digits-vgg19-bn-seed0" in names
    assert [len(runs(f"--seeds 3 --suite {s}")) for s in ("paper", "rivals", "homeostasis")] == [18, 9, 3]
    assert len(names) == 12 + 2 * len(reproduce.ARCHS[2:]) and len(runs("--suite paper rivals")) == 12  # each once
    with pytest.raises(ValueError, match=r"^--seeds is for the suites"):
        runs("--suite depth --seeds 2")
    wide = runs("--width 0.5 --epochs 20 --data folder")
    assert all(config["width"] == 0.5 and config["epochs"] == 20 for config in wide)
    assert {config["lr"] for config in wide} == {0.002, 0.1, 0.02}  # each has the recipe of its own kind


BAD = """--suite depth: chooses --arch itself; --kind ei: chooses --kind itself; --seeds 2 --seed 1: leave --seed out
--suite rivals --eps 1e-6: the run {'kind'; --out ~nobody-of-this-name/x: home directory; --seeds 0: at least 1
--precision bf16 --plain: leave it or --precision"""


@pytest.mark.parametrize("arguments, words", [case.split(": ") for case in BAD.replace("\n", "; ").split("; ")])
def test_bad_input(arguments, words, capsys, tmp_path):
    assert words in fails(capsys, "--out", "new", *arguments.split(), command=main)
    assert not list(tmp_path.iterdir())
