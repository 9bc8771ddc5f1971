"""A training that is killed, stopped, damaged or short of disk ends, resumed, with the same bits as an undisturbed one.

Each training is a process of its own, see `soak.start`; on the CPU, with a narrow network.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak

from support.runs import Run

if sys.platform == "win32":
    pytest.skip("it sends signals and limits resources as POSIX systems do", allow_module_level=True)

EPOCHS = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return soak.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def options(images):
    return soak.options(images, EPOCHS)


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert finished([*options, "--out", folder], folder.with_suffix(".log")) == 0
    return folder


def finished(arguments, log, before=None):
    """The exit status of a training, at its end."""
    process = soak.start(arguments, log, before)
    process.join(60)
    assert not process.is_alive() and "Traceback" not in Path(log).read_text()
    return process.exitcode


def resume_and_compare(folder, undisturbed):
    """Goes on with a run to its end, which must be that of the undisturbed one; returns what was printed."""
    log = folder.with_suffix(".resumed")
    assert finished(["--resume", folder], log) == 0
    assert soak.outcome(folder) == soak.outcome(undisturbed)
    assert (folder / "result.json").exists() and not list(folder.glob(".*.tmp"))
    return log.read_text()


def kill_at(call):
    """SIGKILL in place of the rename, counted from the start of the process, whose number is in the environment."""

    def replace(*args):
        replace.left -= 1
        if replace.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    original, replace.left = os.replace, call
    os.replace = replace


class Before:
    """A function and its arguments, to be called in another process."""

    def __init__(self, function, *args):
        self.call = function, args

    def __call__(self):
        function, args = self.call
        function(*args)


@pytest.mark.parametrize("renames", range(1, 12))
def test_killed_at_each_rename(renames, options, undisturbed, tmp_path):
    """0 to 3 are of the state before the first step (checkpoint.pt, config.json, metrics.csv, histograms.json), 4 to 8
    of the first epoch (checkpoint.pt to checkpoint.prev.pt, checkpoint.pt, best.pt and the last two), then the second.
    """
    folder = tmp_path / "r"
    assert finished([*options, "--out", folder], tmp_path / "log", Before(kill_at, renames)) == -signal.SIGKILL
    resume_and_compare(folder, undisturbed)


def wait_for(folder, epoch, process):
    while not (folder / "metrics.csv").exists() or (folder / "metrics.csv").read_text().count("\n") < epoch + 1:
        assert process.is_alive()
        time.sleep(0.002)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_or_stopped_in_an_epoch(how, options, undisturbed, tmp_path):
    folder = tmp_path / "r"
    process = soak.start([*options, "--out", folder], tmp_path / "log", slow)
    wait_for(folder, 1, process)
    time.sleep(0.15)  # of the 0.6 s of an epoch
    os.kill(process.pid, how)
    process.join(20)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == (-how if how == signal.SIGKILL else 128 + how) and "Traceback" not in text
    step = Run(folder).load()["step"]
    assert step == 6 if how == signal.SIGKILL else 6 < step < 12 and "stopped and saved" in text
    resume_and_compare(folder, undisturbed)


def slow():
    import train

    original = train.clamp_dale  # once a step
    train.clamp_dale = lambda model: (time.sleep(0.1), original(model))[1]


def test_ctrl_c_twice(options, undisturbed, tmp_path):
    """Of the program itself: the first saves, the second, whenever it comes, does no harm."""
    narrow = "import model, runpy, sys, soak; model.PLANS['vgg8'] = soak.NARROW; sys.argv[0] = 'train.py';"
    narrow += "import test_survival; test_survival.slow_disk(); runpy.run_path('train.py', run_name='__main__')"
    path = os.pathsep.join([str(Path(soak.__file__).parent), str(Path(soak.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", narrow, *options, "--out", tmp_path / "r"],
        cwd=Path(soak.__file__).parents[1],
        env=os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "r" / "metrics.csv").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    while process.poll() is None:  # again and again until it is gone: in saving, after it, and as the interpreter ends
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    text = process.stdout.read()
    assert process.returncode == 130 and "Traceback" not in text and "KeyboardInterrupt" not in text, text
    assert Run(tmp_path / "r").load()["step"] < 24
    resume_and_compare(tmp_path / "r", undisturbed)


def slow_disk():
    original = os.fsync
    os.fsync = lambda file: (time.sleep(0.1), original(file))


def limit_files(n):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def full_after(writes):
    def fsync(file):
        fsync.left -= 1
        if fsync.left < 0:
            raise OSError(28, os.strerror(28))
        original(file)

    original, fsync.left = os.fsync, writes
    os.fsync = fsync


@pytest.mark.parametrize("writes", [5, 6, 7, 9])
def test_full_disk(writes, options, undisturbed, tmp_path):
    folder, log = tmp_path / "r", tmp_path / "log"
    assert finished([*options, "--out", folder], log, Before(full_after, writes)) == 2
    assert [line for line in log.read_text().splitlines() if line.startswith("error: cannot write")]
    assert finished(["--resume", folder], log, Before(limit_files, 1000)) == 2  # still full, and nothing gets worse
    resume_and_compare(folder, undisturbed)


@pytest.fixture
def killed(options, tmp_path):
    """The folder of a run that was killed in its third epoch."""
    assert finished([*options, "--out", tmp_path / "r"], tmp_path / "log", Before(kill_at, 16)) == -signal.SIGKILL
    return tmp_path / "r"


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "empty"])
def test_damaged_files(how, killed, undisturbed):
    for name in ("checkpoint.pt", "best.pt", "metrics.csv"):
        path = killed / name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 3] ^= 16
        path.write_bytes(dict(truncated=raw[: len(raw) // 2], flipped=raw, missing=b"", empty=b"")[how])
        if how == "missing":
            path.unlink()
    text = resume_and_compare(killed, undisturbed)
    assert "the one before is used" in text


def test_a_metrics_file_that_ends_in_the_middle_of_a_line(killed, undisturbed):
    text = (killed / "metrics.csv").read_text()
    (killed / "metrics.csv").write_text(text[:-20])
    resume_and_compare(killed, undisturbed)


def test_a_second_process_is_refused_and_does_no_harm(options, undisturbed, tmp_path):
    folder, log = tmp_path / "r", tmp_path / "log2"
    first = soak.start([*options, "--out", folder], tmp_path / "log", slow)
    wait_for(folder, 1, first)
    assert finished(["--resume", folder], log) == 2
    assert finished([*options, "--out", folder], log) == 2
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all("in use" in line for line in errors)
    assert finished(["--eval", folder], log) == 0  # which only reads
    assert first.is_alive()
    first.kill()
    first.join()
    resume_and_compare(folder, undisturbed)  # its lock went with it
