"""Nothing goes wrong in silence: data that changed, odd folders and events, printing that fails, the process itself."""

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from PIL import Image

import train
import visualize
from support import console, data, events, parallel, progress
from support.measure import hooked
from support.runs import Run

HERE = Path(train.__file__).parent
TINY = ["--width", "0.05", "--T", "1", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture
def images(tmp_path):
    return soak.make_images(tmp_path / "images", n_train=4, n_test=2)


def main(*arguments):
    return train.main([str(a) for a in arguments])


def fails(capsys, *arguments):
    assert main(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def run(images, tmp_path):
    """A finished run of two epochs."""
    assert main(*TINY, "--data", "folder", "--data-root", images, "--epochs", 2, "--out", tmp_path / "r") == 0
    return tmp_path / "r"


# ---- a run knows its data


def test_a_renamed_class_is_named_and_tested_only_if_asked_for(run, images, capsys):
    assert main("--eval", run) == 0
    for split in ("train", "test"):
        (images / split / "lower").rename(images / split / "zebra")
    assert "'lower' was where 'upper' is now" in fails(capsys, "--eval", run)
    assert main("--eval", run, "--other-data") == 0
    assert "other data than those of the training: the classes have other names" in capsys.readouterr().out


def test_another_number_of_classes_is_the_cause(run, images, capsys):
    for split in ("train", "test"):
        shutil.copytree(images / split / "lower", images / split / "middle")
    for option in (["--eval", run], ["--eval", run, "--other-data"]):
        assert "tells 2 classes apart, but these data have 3" in fails(capsys, *option)
    assert "there were 2 classes, and now there are 3" in fails(capsys, "--resume", run)


def test_a_figure_of_a_run_is_drawn_with_its_own_data(run, images, tmp_path, capsys):
    figures = ["--out", str(tmp_path / "f")]
    assert visualize.main(["stabilizer", str(run), *figures]) == 0
    other = soak.make_images(tmp_path / "other", n_train=14)
    for figure in ("stabilizer", "gain"):
        assert visualize.main([figure, str(run), "--data-root", str(other), *figures]) == 2
        err = capsys.readouterr().err
        assert "the training set has other contents" in err and "--data-root" in err and err.count("\n") == 1
    few = soak.make_images(tmp_path / "few", n_train=1)
    for figure in ("stabilizer", "gradients"):  # of no run: the recipe's batch
        assert visualize.main([figure, "--data", "folder", "--width", "0.1", "--data-root", str(few), *figures]) == 2
        assert (
            "a batch of 128 is larger than the training set of 2: train with --batch-size 2 or less"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize("how", ["pixels", "order", "labels"])
def test_an_exchanged_test_set_is_noticed(how, run, images, capsys):
    file = images / "test" / "lower" / "0.png"
    if how == "pixels":  # another image with the same sum of pixels
        Image.fromarray(np.array(Image.open(file))[::-1].copy()).save(file)
    elif how == "order":
        file.rename(file.with_name("9.png"))
    else:
        file.rename(images / "test" / "upper" / "00.png")
    assert "the test set has other contents" in fails(capsys, "--resume", run)
    assert "the test set has other contents" in fails(capsys, "--eval", run)
    known = json.loads((run / "result.json").read_text())["data"]
    assert known["classes"] == ["lower", "upper"] and "4 samples" in known["test"] and known["shape"] == [3, 32, 32]


def test_the_cache_sees_contents_and_keeps_one_entry_a_shape(images):
    first = data.load("folder", images).train_x
    file = images / "train" / "lower" / "0.png"
    about = os.stat(file)
    (images / ".decoded-3x32x32-0123456789abcdef.pt").touch()  # of an earlier version
    pixels = np.array(Image.open(file))
    for shift in range(1, 200):  # other pixels in a file of the same size, with its old time
        buffer = io.BytesIO()
        Image.fromarray(np.roll(pixels, shift, 1)).save(buffer, "PNG")
        if len(buffer.getvalue()) <= about.st_size:
            break
    file.write_bytes(buffer.getvalue().ljust(about.st_size, b"\0"))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert os.stat(file).st_size == about.st_size
    again = data.load("folder", images).train_x
    assert not torch.equal(first[0], again[0]) and torch.equal(first[1:], again[1:])
    data.load("folder", images, image_size=40)
    assert sorted(f.name for f in images.glob(".decoded*")) == [".decoded-3x32x32.pt", ".decoded-3x40x40.pt"]


def test_a_longer_schedule(run, capsys):
    assert main("--resume", run, "--epochs", 4) == 0
    assert json.loads((run / "config.json").read_text())["epochs"] == 4
    result = json.loads((run / "result.json").read_text())
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert result["epochs"] == 4 and [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    config = Run(run).config
    assert float(rows[2]["lr"]) == train.learning_rate(config, 5, 2)  # on the cosine of four epochs
    assert main("--eval", run) == 0 and main("--resume", run) == 0
    shutil.copytree(run, run.with_name("copy"))
    assert "no folder" in fails(capsys, "--resume", run, "--epochs", 9, "--data-root", run / "nowhere")
    for name in ("result.json", "config.json", "checkpoint.pt"):  # nothing is lost by that
        assert (run / name).read_bytes() == (run.with_name("copy") / name).read_bytes()
    assert "4 epochs behind it: --epochs 3 is too few" in fails(capsys, "--resume", run, "--epochs", 3)
    assert "was made with lr=" in fails(capsys, "--resume", run, "--lr", 1)


# ---- events


def recording(n=300, p=(0, 1), seed=0):
    rng = np.random.default_rng(seed)
    found = np.zeros(n, dtype=[("x", int), ("y", int), ("t", float), ("p", int)])
    found["x"], found["y"] = rng.integers(0, 128, (2, n))
    found["t"], found["p"] = np.sort(rng.random(n)), rng.choice(p, n)
    return found


def test_events_are_put_right_where_it_is_unambiguous():
    good = recording()
    frames = events.count(good, 4)
    assert frames.shape == (4, 2, 128, 128) and frames.sum() == 300 and (frames.sum((1, 2, 3)) == 75).all()
    for frame, part in zip(frames, np.split(good, 4), strict=True):
        for event in part[:5]:
            assert frame[event["p"], event["y"], event["x"]] > 0
    signed = good.copy()
    signed["p"] = 2 * good["p"] - 1
    assert np.array_equal(events.count(signed, 4), frames)
    order = list(range(300))
    random.Random(0).shuffle(order)
    assert np.array_equal(events.count(good[order], 4), frames)
    many = np.repeat(recording(1), 200_000)  # more than 16 bits count
    assert events.count(many, 2).max() == 100_000


@pytest.mark.parametrize(
    "field, value, message",
    [("x", -1, "x of an event"), ("y", 128, "y of an event"), ("t", np.nan, "time"), ("p", 2, "polarities")],
)
def test_other_events_are_refused(field, value, message):
    bad = recording()
    bad[field][7] = value
    with pytest.raises(ValueError, match=message):
        events.count(bad, 4)
    with pytest.raises(ValueError, match="cannot make"):
        events.count(recording(3), 4)


# ---- a library leaves the process as it was


def test_the_process_is_as_before(images, tmp_path, capsys):
    def state():
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        return handlers, sys.stdout, sys.stderr, torch.get_rng_state().tolist(), list(warnings.filters)

    before = state()
    options = [*TINY, "--data", "folder", "--data-root", images, "--epochs", 1]
    assert main(*options, "--out", tmp_path / "r") == 0
    assert main("--frobnicate") == 2
    assert state() == before


def test_after_an_error_the_run_goes_on_in_the_same_session(images, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(train, "evaluate", broken)
    kept = None
    try:
        main(*TINY, "--data", "folder", "--data-root", images, "--epochs", 1, "--out", tmp_path / "r")
    except RuntimeError as error:
        kept = error  # as a notebook keeps it, with all that its frames hold
    monkeypatch.undo()
    assert kept is not None and main("--resume", tmp_path / "r") == 0


def test_a_start_that_fails_leaves_no_folder(images, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise ValueError("no")

    monkeypatch.setattr(train, "prepare", refuse)
    fails(capsys, *TINY, "--data", "folder", "--data-root", images, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_importing_changes_no_warnings():
    code = "import warnings, torch, sklearn.datasets, torchvision; n = list(warnings.filters)\n"
    code += "import train, visualize, reproduce; assert n == list(warnings.filters)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- printing never decides


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "pipe"), OSError(28, "full"), ValueError("closed")])
def test_a_stream_that_fails_costs_only_the_text(error, images, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    assert main(*TINY, "--data", "folder", "--data-root", images, "--epochs", 1, "--out", tmp_path / "r") == 0
    assert (tmp_path / "r" / "result.json").exists()


def test_without_streams_and_in_ascii():
    stream = console.Forgiving(None)
    assert stream.write("x") == 1 and not stream.isatty()
    raw = io.BytesIO()
    ascii_only = console.Forgiving(io.TextIOWrapper(raw, encoding="ascii"))
    ascii_only.write("runs/\u00fc\n")
    ascii_only.flush()
    assert raw.getvalue() == b"runs/\\xfc\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_as_a_program_with_a_full_disk_under_stdout_and_a_closed_stderr(images, tmp_path):
    command = f'"{sys.executable}" train.py {" ".join(TINY)} --data folder --data-root "{images}" --epochs 1'
    command += f' --out "{tmp_path}/\u00fc" >/dev/full 2>&-'
    environment = os.environ | dict(PYTHONIOENCODING="ascii")
    assert subprocess.run(command, shell=True, cwd=HERE, env=environment).returncode == 0
    assert (tmp_path / "\u00fc" / "result.json").exists()


def test_where_no_terminal_shows_the_bar_a_line_tells_how_far_it_is(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SAY_EVERY", -1)
    assert main(*TINY, "--data", "folder", "--data-root", images, "--epochs", 1, "--out", tmp_path / "r") == 0
    assert "epoch 1, step 1/2: loss" in capsys.readouterr().out


# ---- folders as people have them


def test_files_that_are_no_images_by_name_are_counted(images, capsys):
    expected = data.load("folder", images).train_x
    for name in ("Thumbs.db", "desktop.ini", "notes.txt"):
        (images / "train" / "lower" / name).write_text("x")
    hidden = images / "train" / "upper" / "more" / ".ipynb_checkpoints"
    hidden.mkdir(parents=True)
    shutil.copy(images / "train" / "upper" / "0.png", hidden / "0-checkpoint.png")
    capsys.readouterr()
    assert torch.equal(data.load("folder", images).train_x, expected)
    assert "3 files that are no images by their names" in capsys.readouterr().out


def test_links_are_followed_or_named(images, tmp_path):
    expected = data.load("folder", images).train_x
    (images / "train" / "lower").rename(tmp_path / "elsewhere")
    (images / "train" / "lower").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert torch.equal(data.load("folder", images).train_x, expected)
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert torch.equal(data.load("folder", images).train_x, expected)
    (images / "train" / "upper" / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match=r"gone\.png is a link to something that is not there"):
        data.load("folder", images)


def test_a_test_folder_without_labels_gives_way_to_val(images, capsys):
    (images / "test").rename(images / "val")
    expected = data.load("folder", images).test_x
    (images / "test").mkdir()
    Image.new("RGB", (4, 4)).save(images / "test" / "1.png")
    (images / "test" / "images").mkdir()  # as some competitions have it
    assert torch.equal(data.load("folder", images).test_x, expected)
    assert "has no class folders" in capsys.readouterr().out


def test_one_class_is_refused(images):
    for split in ("train", "test"):
        shutil.rmtree(images / split / "lower")
    with pytest.raises(ValueError, match="only one class folder, 'upper'"):
        data.load("folder", images)


def test_integer_tiffs_orientation_and_transparency(tmp_path):
    grey = np.linspace(0, 255, 1024).reshape(32, 32)

    def decoded(array, **how):
        Image.fromarray(array).save(tmp_path / "x", "TIFF", **how)
        return data._decode(tmp_path / "x", 32).float()

    eight, wide = decoded(grey.astype(np.uint8)), grey.astype(np.uint8).astype(np.int32) * 257
    assert (decoded(wide) - eight).abs().max() <= 1  # 16 bits in 32
    assert (decoded(grey.astype(np.uint8).astype(np.int32)) - eight).abs().max() <= 1  # 8 bits in 32
    for bad in (wide * 1000, -wide, wide // 17, (wide // 17).astype(np.uint16)):  # 12 bits are not clear either
        with pytest.raises(ValueError, match="pixels go"):
            decoded(bad)
    exif = Image.Exif()
    exif[274] = 3  # upside down
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "x.jpg", exif=exif, quality=95)
    assert (data._decode(tmp_path / "x.jpg", 32).float() - eight.flip(1, 2)).abs().mean() < 3
    Image.new("RGBA", (4, 4), (10, 200, 30, 0)).save(tmp_path / "x.png")
    assert data._decode(tmp_path / "x.png", 32)[:, 5, 5].tolist() == [10, 200, 30]  # as torchvision has it


# ---- Windows, macOS, several processes


def test_runs_without_fcntl_and_resource(images, tmp_path):
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import train\n"
    code += "sys.exit(train.main(sys.argv[1:]))"
    options = [*TINY, "--data", "folder", "--data-root", images, "--epochs", 1, "--out", tmp_path / "r"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, options)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_home_folder_in_a_path(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert main(*TINY, "--data", "folder", "--data-root", "~/images", "--epochs", 1, "--out", "~/r") == 0
    assert (tmp_path / "r" / "result.json").exists() and main("--eval", "~/r") == 0


def test_commands_are_quoted_for_the_shell_at_hand(monkeypatch):
    assert console.quoted("a b") == "'a b'"
    monkeypatch.setattr(console.os, "name", "nt")
    assert console.quoted("C:\\a b\\c") == '"C:\\a b\\c"'


def test_a_gpu_that_cannot_be_used_is_said_once(monkeypatch, capsys):
    def unavailable():
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    assert parallel.pick_device().type == "cpu"
    assert capsys.readouterr().out.count("the driver is too old") == 1


def test_the_process_group_is_gone_at_the_end(monkeypatch):
    for key, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(key, value)
    said = []
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, timeout: said.append((backend, timeout)))
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: said.append("gone"))
    with pytest.raises(KeyError), parallel.joined(torch.device("cpu")):
        raise KeyError
    assert said[0][0] == "gloo" and said[0][1].total_seconds() >= 3600 and said[1] == "gone"


def test_to_input_leaves_its_argument():
    x = torch.full((1, 1, 2, 2), 255.0)
    assert data.to_input(x).max() == 1 and x.min() == 255


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(train_x=torch.rand(4, 1, 2, 2)), "non-negative input"),
        (dict(train_x=torch.full((4, 1, 2, 2), 65535, dtype=torch.int64)), "0 to 255"),
        (dict(test_x=torch.zeros(0, 1, 2, 2).byte(), test_y=torch.zeros(0).long()), "test set is empty"),
        (dict(train_y=torch.tensor([0, 1, 2, 0])), "labels go from 0 to 2"),
        (dict(train_y=torch.tensor([0, 1])), "4 training images, but 2 labels"),
        (dict(classes=1), "only one class"),
    ],
)
def test_one_s_own_data_are_checked(change, message):
    x, y = torch.zeros(4, 1, 2, 2).byte(), torch.tensor([0, 1, 0, 1])
    good = dict(train_x=x, train_y=y, test_x=x, test_y=y, classes=2)
    data.Dataset(**good)
    with pytest.raises(ValueError, match=message):
        data.Dataset(**good | change)


def test_the_modes_of_all_modules_are_as_before():
    model = train.build("vgg8", width=0.1, T=1)
    model.encoder.stages[0].eval()
    before = [m.training for m in model.modules()]
    with hooked(model, []):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
