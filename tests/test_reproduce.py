"""All runs one after another: which there are, going on where it was, the table."""

import json
import signal

import pytest
import soak
import torch

import reproduce
import train
import visualize
from support import data
from support.recipes import parse as train_options


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    images = soak.make_images(tmp_path_factory.mktemp("images"))
    of = ["--arch", "vgg8", "--width", "0.1", "--data", "folder", "--data-root", images, "--batch-size", 4, "--T", 2]
    return [str(o) for o in of]


def run_and_fail(capsys, *arguments):
    assert reproduce.main([str(a) for a in arguments]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_it_goes_on_where_it_was_and_skips_what_is_finished(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(reproduce.SUITES, "paper", [["--model", "plain"], ["--no-ste"], ["--eps", "1e-6"]])
    drawn = []
    monkeypatch.setattr(visualize, "main", lambda argv: drawn.append(argv) or 0)
    suite = [*options, "--epochs", "1", "--out", str(tmp_path)]
    evaluate = train.evaluate

    def stop_in_the_second_run(*arguments):
        if (tmp_path / "folder-vgg8-ei-width0.1-noste-seed0").exists():
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", stop_in_the_second_run)
    assert reproduce.main(suite) == 128 + signal.SIGTERM
    assert (tmp_path / "folder-vgg8-plain-width0.1-seed0" / "result.json").exists()
    assert not drawn and not (tmp_path / "table.md").exists()
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert "s an epoch; epochs left in all runs: 2, about 0 minutes at this pace" in capsys.readouterr().out
    assert reproduce.main(suite) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 1 and "run 3 of 3: folder-vgg8-ei-width0.1-eps1e-06-seed0" in out
    assert len(list(tmp_path.glob("*/result.json"))) == 3
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| network") and len([line for line in lines if "vgg8" in line]) == 3
    assert any("no STE | 0.1 | 0 | 1/1" in line for line in lines) and lines[2] in out
    assert drawn[0][:2] == ["all", str(tmp_path)] and "--width=0.1" in drawn[0]
    for file in tmp_path.glob("*/checkpoint*.pt"):  # large, and of no use to a finished run
        file.unlink()
    assert reproduce.main([*suite, "--no-figures"]) == 0
    assert capsys.readouterr().out.count("finished before") == 3 and len(drawn) == 1
    assert "was made with epochs=1, not 2" in run_and_fail(capsys, *suite[:-3], "2", *suite[-2:])


def test_a_run_at_chance_is_given_up_and_the_table_says_so(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(reproduce.SUITES, "paper", [["--model", "ei"]])
    monkeypatch.setattr(train, "evaluate", lambda *_: (0.7, 0.5, [0.1] * 5))
    suite = [*options, "--epochs", "4", "--out", str(tmp_path), "--no-figures"]
    assert reproduce.main([*suite, "--give-up"]) == 0
    result = json.loads((tmp_path / "folder-vgg8-ei-width0.1-seed0" / "result.json").read_text())
    assert result["epochs"] == 2 and result["given_up"] and result["outcome"] == "failed to converge"
    assert "2/4" in (tmp_path / "table.md").read_text() and "given up" in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    assert reproduce.main(suite) == 0
    assert "given up at chance; the rest of it: python train.py --resume" in capsys.readouterr().out


def test_the_pace_is_told_once_a_run_also_of_one_that_goes_on(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(reproduce.SUITES, "paper", [["--model", "plain"], ["--model", "bn"]])
    suite = [*options, "--epochs", "4", "--out", str(tmp_path), "--no-figures"]
    evaluate = train.evaluate

    def stop(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", stop)
    assert reproduce.main(suite) == 128 + signal.SIGTERM
    assert "epochs left in all runs: 7," in capsys.readouterr().out
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert reproduce.main(suite) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "epochs left in all" in line]
    assert len(told) == 2 and "runs: 6," in told[0] and "runs: 3," in told[1]


@pytest.fixture
def finished(options, tmp_path, monkeypatch):
    """A folder with one finished run, and the command that made it."""
    monkeypatch.setitem(reproduce.SUITES, "paper", [["--model", "plain"]])
    suite = [*options, "--epochs", "1", "--out", str(tmp_path / "runs"), "--no-figures"]
    assert reproduce.main(suite) == 0
    return tmp_path / "runs", suite


def test_runs_on_other_data_do_not_stand_in_one_table(finished, tmp_path, capsys, monkeypatch):
    folder, suite = finished
    other = soak.make_images(tmp_path / "other", n_train=14)
    moved = [*suite, "--data-root", str(other)]
    assert reproduce.main(moved) == 0  # nothing is to be trained
    monkeypatch.setitem(reproduce.SUITES, "paper", [["--model", "plain"], ["--model", "bn"]])
    for command in (moved, [*moved, "--seed", "1"]):  # the second has no finished run of its own there
        err = run_and_fail(capsys, *command)
        assert "seed0, which is finished: the training set has other contents" in err and "choose another --out" in err
    assert len(list(folder.glob("*/"))) == 1
    assert reproduce.main(suite) == 0
    assert len(list(folder.glob("*/result.json"))) == 2


def test_a_damaged_result_is_named_and_can_be_written_again(finished, capsys):
    folder, suite = finished
    (result,) = folder.glob("*/result.json")
    whole = result.read_text()
    for text in (
        *("{", '{"a": 1}', "[]", whole[:-40]),
        *(
            whole.replace(f'"{key}"', '"other"')
            for key in ("classes", "config", "width", "best_epoch", "test_accuracy")
        ),
        whole.replace('"train_seconds": ', '"train_seconds": "x", "was": '),
    ):
        result.write_text(text)
        err = run_and_fail(capsys, *suite)
        assert f"{result} is damaged" in err and "delete it, and it is written again" in err
    result.unlink()
    assert reproduce.main(suite) == 0
    assert json.loads(result.read_text()) == json.loads(whole)
    for file in result.parent.glob("checkpoint*.pt"):
        file.unlink()
    result.write_text("{")
    assert "there is no checkpoint" in run_and_fail(capsys, *suite)


def test_other_frames_of_the_same_recordings_are_the_same_data(monkeypatch):
    def load(name, root, image_size, device, T):
        frames = torch.full((4, T, 2, 8, 8), int(root), dtype=torch.uint8)
        return data.Dataset(frames, torch.arange(4) % 2, frames, torch.arange(4) % 2, ["a", root])

    monkeypatch.setattr(data, "load", load)
    config = dict(data="dvs-gesture", data_root="1", image_size=8, T=2)
    result = dict(config=config, data=data.identity(load(None, "1", 8, "cpu", 2)))
    reproduce.same_data(config, dict(run=result))
    reproduce.same_data(config | dict(T=1), dict(run=result))  # DANN
    reproduce.same_data(config | dict(data="digits", data_root="2"), dict(run=result))  # another dataset
    for T in (1, 2):
        with pytest.raises(ValueError, match="the data in 2 are not those of run"):
            reproduce.same_data(config | dict(T=T, data_root="2"), dict(run=result))


def test_the_authors_numbers_stand_beside_cifar10_only(finished):
    folder, _ = finished
    (path,) = folder.glob("*/result.json")
    result = json.loads(path.read_text())
    result["config"] |= dict(model="ei", data="folder", width=0.5)
    for train_set, classes, number in (
        ("50000 samples", reproduce.CIFAR10, "| 87.03 |"),
        ("45000 samples", reproduce.CIFAR10, "| - |"),
        ("50000 samples", ["lower", "upper"], "| - |"),
    ):
        result["data"] |= dict(train=train_set, classes=classes)
        path.write_text(json.dumps(result))
        assert reproduce.table(folder)[2].endswith(number)


def test_which_runs_there_are():
    def names(*arguments):
        return [reproduce.recipes.run_name(config) for config in reproduce.plan(reproduce.parse(arguments))]

    assert len(names()) == 12 and names()[0] == "digits-vgg8-ei-seed0"
    assert len(set(names("--seeds", "3"))) == 12 + 2 * 3
    assert len(names("--suite", "rivals", "--seeds", "2")) == 6
    both = names("--suite", "paper", "depth")
    assert len(both) == len(set(both)) == 12 + 8 and "digits-vgg19-bn-seed0" in both
    wide = reproduce.plan(reproduce.parse(["--width", "0.5", "--epochs", "20", "--data", "folder"]))
    assert all(c["width"] == 0.5 and c["epochs"] == 20 for c in wide)
    assert {c["lr"] for c in wide} == {0.002, 0.1, 0.02}  # each has the recipe of its own model
    assert all(train_options(o) for options in reproduce.SUITES.values() for o in options)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "depth", "--arch", "vgg8"], "chooses --arch itself"),
        (["--no-grad-scaling"], "chooses --grad-scaling itself"),
        (["--suite", "rivals", "--eps", "1e-6"], "the run --model bn: --eps, --no-ste"),
        (["--suite", "depth", "--plan", "16 P 32 P"], "--arch resnet18 takes none"),
        (["--out", __file__], "is a file, not a folder"),
        (["--out", ""], "it is empty"),
        (["--out", "~nobody-of-this-name/x"], "home directory"),
        (["--seeds", "2", "--seed", "1"], "leave --seed out"),
        (["--seeds", "0"], "at least 1"),
        (["--suite", "none"], "none"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, words, capsys, tmp_path):
    assert words in run_and_fail(capsys, *arguments, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
