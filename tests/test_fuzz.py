"""Whatever comes from outside ends in success or in one clear line: never a traceback, a hang, or a stray file.

The cases are the same each time; FUZZ=10 in the environment makes ten times as many, other ones each time.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import sys
import zlib

import numpy as np
import pytest
import soak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import model
import train
from support import data, runs
from support.recipes import option, parse
from support.recipes import settings as settings_of
from support.runs import Run

if sys.platform == "win32":
    pytest.skip("it limits time and memory as POSIX systems do", allow_module_level=True)


import resource


def cases(n):
    return settings(
        max_examples=n * int(os.environ.get("FUZZ", 1)),
        derandomize="FUZZ" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def no_hang(seconds=30):
    def late(*_):
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder, but=()):
    """Names, sizes and times of all files below a folder, but for some names directly in it and for caches."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.relative_to(folder).parts[0] not in but)
    return [(f, f.stat().st_size, f.stat().st_mtime_ns) for f in files if not f.name.startswith(".decoded")]


def command(arguments):
    """Exit status and what was printed: 0, or 2 and one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), no_hang():
        status = train.main([str(a) for a in arguments])
    text = err.getvalue()
    assert status in (0, 2)
    if status == 2:
        assert text.startswith("error: ") and text.count("\n") == 1 and 12 < len(text) < 1100, text
    return status, text or out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a few images, a run that was stopped after the first of its two epochs, and how it would end."""
    place = tmp_path_factory.mktemp("fuzz")
    before, limit = dict(model.PLANS), resource.getrlimit(resource.RLIMIT_AS)
    model.PLANS["vgg8"] = [4, "P", 4, "P", 4, "P", 4, "P", 4, "P"]
    resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30, limit[1]))  # of the address space, so that no case takes it all
    with contextlib.chdir(place) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        soak.make_images(place / "images", n_train=4, n_test=1)
        options = soak.options(place / "images", 2)
        assert train.main([*options, "--out", str(place / "calm")]) == 0
        original, saves = Run.save, []

        def save(run, state):
            original(run, state)
            saves.append(state)
            if len(saves) == 2:
                raise KeyboardInterrupt

        Run.save = save
        try:
            assert train.main([*options, "--out", str(place / "stopped")]) == 130
        finally:
            Run.save = original
        yield place
    resource.setrlimit(resource.RLIMIT_AS, limit)
    model.PLANS.update(before)


# ---- the command line

WILD = ["", " ", "0", "-1", "-0", "1e-400", "1e400", "-1e-6", "nan", "-inf", "\u0661", "1_0", "0x10", "1.5", "9" * 5000]
WILD += ["vgg8", "None", "adaptive", "--", "-", "--seed", "\0", "a\nb", "é\udcff", "../..", "/dev/null", "%s", "1e30"]
WILD = st.sampled_from(WILD) | st.text(max_size=8)
NUMBERS = ["--T", "--epochs", "--batch-size", "--lr", "--weight-decay", "--warmup-epochs", "--warmup-from"]
NUMBERS += ["--width", "--ei-ratio", "--tau", "--threshold", "--alpha"]
OTHERS = ["--image-size", "--seed", "--eps", "--arch", "--model", "--init", "--device", "--data-root", "--eval"]
FLAGS = ["--no-ste", "--grad-scaling", "--no-grad-scaling"]
USUAL = {
    "--T": "1", "--epochs": "1", "--batch-size": "4", "--image-size": "32", "--lr": "0.1", "--weight-decay": "1e30",
    "--model": "bn", "--init": "kaiming", "--seed": "2147483647", "--eps": "1e-8", "--warmup-epochs": "1e30",
    "--warmup-from": "1e30", "--arch": "vgg8", "--device": "cpu", "--width": "0.5", "--ei-ratio": "3", "--tau": "1",
    "--threshold": "0.1", "--alpha": "1e-3",
}  # fmt: skip
HUGE = {
    "--tau": "1e30",
    "--threshold": "1e30",
    "--alpha": "1e30",
    "--ei-ratio": "1000000",
    "--T": "1000000",
    "--image-size": "1000000",
    "--lr": "1e30",
    "--eps": "1e30",
    "--device": "meta",
}
DEVICES = ["cpu:7", "cuda:99", "mps", "xla", "xpu", "hpu", "vulkan", "mkldnn", "privateuseone", "cuda:-1", "cpu:x", ""]


@cases(100)
@given(st.lists(WILD | st.sampled_from([*NUMBERS, *OTHERS, *FLAGS, "--resume", "--out", "--data"]), max_size=6))
def test_words_of_a_command_line(words):
    try:
        config = settings_of(parse(words))
    except ValueError:
        return
    assert settings_of(parse([option(*item) for item in config.items()])) == config


@cases(120)
@given(st.data())
def test_values_on_the_command_line(place, draw):
    names = draw.draw(st.lists(st.sampled_from([*NUMBERS, *OTHERS]), unique=True, max_size=4))
    arguments = {"--data": "folder", "--data-root": place / "images", "--epochs": 1, "--batch-size": 4}
    for name in names:
        values = [st.just(values[name]) for values in (USUAL, HUGE) if name in values] + [WILD]
        values += [st.sampled_from(DEVICES)] if name == "--device" else []
        arguments[name] = draw.draw(st.one_of(values))
    arguments["--out"] = place / "new"
    before = tree(place, but=["new"])
    command([f"{k}={v}" for k, v in arguments.items()] + draw.draw(st.lists(st.sampled_from(FLAGS), max_size=1)))
    assert tree(place, but=["new"]) == before
    shutil.rmtree(place / "new", ignore_errors=True)


@pytest.mark.parametrize("option", ["--resume", "--eval"])
def test_an_empty_name_is_no_run(place, option):
    assert "not a run folder" in command([option, ""])[1]  # and not a new one


# ---- image folders

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"]
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "ICO", "EPS", "PDF"]


def huge_header(width, height):
    """A PNG of a few bytes that says it is of any size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@st.composite
def image_files(draw):
    """Bytes of an image file of some kind, perhaps damaged, or of something else."""
    kind = draw(st.sampled_from(["huge", "bytes", "animated", *["image"] * 6]))
    if kind == "huge":
        return huge_header(
            *draw(st.tuples(*[st.sampled_from([0, 1, 9_000, 14_000, 60_000, 2**31 - 1, 2**32 - 1])] * 2))
        )
    if kind == "bytes":
        return draw(st.binary(max_size=50))
    buffer, size = io.BytesIO(), draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    if kind == "animated":
        frames = [Image.new("P", size, i) for i in range(3)]
        frames[0].save(
            buffer, draw(st.sampled_from(["GIF", "PNG", "WEBP", "TIFF"])), save_all=True, append_images=frames
        )
    else:
        try:
            Image.new(draw(st.sampled_from(MODES)), size).save(buffer, draw(st.sampled_from(FORMATS)))
        except (OSError, ValueError):  # not every format holds every mode
            return b""
    return draw(damaged(buffer.getvalue()))


@st.composite
def damaged(draw, raw):
    """These bytes, or cut off, or with some changed, or with some put in between."""
    how = draw(st.sampled_from(["cut", "changed", "inserted", "other", "intact"]))
    if how == "intact" or not raw:
        return raw
    at = draw(st.integers(0, len(raw) - 1))
    if how == "cut":
        return raw[:at]
    if how == "other":
        return draw(st.sampled_from([b"", b"\0" * 100, b"PK\x03\x04", b"\x80\x04.", b"{}", b"null", raw * 2]))
    new = draw(st.binary(min_size=1, max_size=8))
    return raw[:at] + new + raw[at + (len(new) if how == "changed" else 0) :]


@cases(150)
@given(file=image_files(), name=st.sampled_from(["x.png", "x.jpg", "x", "x.eps", "é.gif", "-x"]))
def test_image_files(tmp_path_factory, file, name):
    root = tmp_path_factory.getbasetemp() / "folder"
    shutil.rmtree(root, ignore_errors=True)
    for split in ("train", "test"):
        for kind in "ab":
            (root / split / kind).mkdir(parents=True)
            Image.new("L", (1, 1)).save(root / split / kind / "x.png")
    (root / "train" / "a" / "x.png").unlink()
    (root / "train" / "a" / name).write_bytes(file)
    before = tree(root)
    with no_hang():
        try:
            x = data.load("folder", root).train_x
        except ValueError as error:
            assert name in str(error)
        else:
            assert x.shape == (2, 3, 32, 32) and file
    assert tree(root) == before


@pytest.mark.parametrize("width, height", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_huge_header_is_refused(tmp_path, width, height):
    (tmp_path / "x.png").write_bytes(huge_header(width, height))
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image"):
        data._decode(tmp_path / "x.png", 32)


def test_modes_are_decoded_to_the_same_intensities(tmp_path):
    grey = np.linspace(0, 255, 1024).reshape(32, 32).astype(np.uint8)
    expected = np.broadcast_to(grey, (3, 32, 32)).astype(int)
    sources = {mode: Image.fromarray(grey).convert("RGB").convert(mode) for mode in ("L", "RGB", "RGBA", "CMYK")}
    for mode, kind in {"I;16": np.uint16, "I": np.int32}.items():
        sources[mode] = Image.fromarray(grey.astype(kind) * 257)
    palette = Image.fromarray(grey)
    palette.putpalette(bytes(v for i in range(256) for v in (i, i, i)))
    sources["P"] = palette
    for mode, image in sources.items():
        assert image.mode == mode
        image.save(tmp_path / "x", "TIFF")
        assert abs(data._decode(tmp_path / "x", 32).numpy().astype(int) - expected).max() <= 1, mode
    palette.save(tmp_path / "x", "GIF", save_all=True, append_images=[Image.new("L", (32, 32), 9)])
    assert abs(data._decode(tmp_path / "x", 32).numpy().astype(int) - expected).max() <= 1  # the first of the two
    Image.new("RGB", (1, 1), (3, 2, 1)).save(tmp_path / "x", "PNG")
    assert data._decode(tmp_path / "x", 32)[:, 7, 9].tolist() == [3, 2, 1]
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x", "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        data._decode(tmp_path / "x", 32)


# ---- run folders

FILES = ["checkpoint.pt", "checkpoint.prev.pt", "best.pt", "metrics.csv", "config.json", "result.json", ".lock"]


@contextlib.contextmanager
def copy_of_the_run(place):
    """A copy in which no case harms the next, and beside which nothing is written."""
    folder = place / "r"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "stopped", folder)
    before = tree(place, but=["r"])
    yield folder
    assert tree(place, but=["r"]) == before


@cases(120)
@given(st.data())
def test_bytes_of_a_run_folder(place, draw):
    """One damaged file, other than config.json, costs nothing: the run ends as it would have."""
    name, option = draw.draw(st.sampled_from(FILES)), draw.draw(st.sampled_from(["--resume", "--resume", "--eval"]))
    with copy_of_the_run(place) as folder:
        raw = (folder / name).read_bytes() if (folder / name).exists() else b"some"
        (folder / name).write_bytes(draw.draw(damaged(raw)))
        status, text = command([option, folder])
        if name != "config.json":
            assert status == 0, text
        if status == 0 and option == "--resume":
            assert soak.outcome(folder) == soak.outcome(place / "calm")


SCALARS = st.sampled_from([None, True, False, -1, 0, 1, 2, 10**30, -(10**30), 0.5, 1e300, -0.5, "", "adaptive", "a\nb"])
SCALARS |= st.sampled_from([float("nan"), float("inf"), "\0", "\ud800", "4", "/", "x" * 10_000])
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=2))


@cases(120)
@given(st.data())
def test_settings_of_a_run_folder(place, draw):
    """Also when the checkpoint agrees with them."""
    with copy_of_the_run(place) as folder:
        config, state = json.loads((folder / "config.json").read_text()), Run(folder).load()
        for _ in range(draw.draw(st.integers(1, 2))):
            key = draw.draw(st.sampled_from([*config, "help", "resume", "", "new key"]))
            config[key] = draw.draw(VALUES)
            if key != "epochs" and draw.draw(st.integers(0, 4)) == 0:  # the recipe's 300 would take a while
                del config[key]
        (folder / "config.json").write_text(json.dumps(config))
        if draw.draw(st.booleans()):
            (folder / "checkpoint.pt").write_bytes(runs._sealed(state | dict(config=config)))
            (folder / "best.pt").unlink()
        command([draw.draw(st.sampled_from(["--resume", "--eval"])), folder])


@cases(150)
@given(st.data())
def test_structure_of_a_checkpoint(place, draw):
    """A part of it, however deep, is replaced or left out, and the checksum is right."""
    with copy_of_the_run(place) as folder:
        name = draw.draw(st.sampled_from(["checkpoint.pt"] * 3 + ["best.pt"]))
        state = node = Run(folder).load(name)
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw.draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw.draw(st.integers(0, 3)):
                node = node[key]
                continue
            how = draw.draw(st.sampled_from(["value", "value", "left out", "shape", "kind"]))
            if how == "left out":
                del node[key]
            elif hasattr(node[key], "shape") and how in ("shape", "kind"):
                node[key] = node[key].flatten()[:1] if how == "shape" else node[key].to(complex)
            else:
                node[key] = draw.draw(VALUES.filter(lambda v: v not in (10**30, -(10**30))))
            break
        try:
            (folder / name).write_bytes(runs._sealed(state))
        except UnicodeEncodeError:  # there is no such file
            return
        if name == "checkpoint.pt" and draw.draw(st.booleans()):
            (folder / "checkpoint.prev.pt").unlink()
        command(["--eval" if name == "best.pt" else "--resume", folder])
