"""Trainings that are killed, stopped, damaged or short of disk, as processes of their own. Resumed, each ends with the
same bits as one that nothing disturbed.

SOAK=200 in the environment kills one training 200 times, at other moments each time, and tries as many damaged files.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm
from trainings import STEPS, TINY, end, load, snapshot

import train
from support import data, runs
from support.runs import Run

if sys.platform == "win32":
    pytest.skip("it sends signals and limits resources as POSIX systems do", allow_module_level=True)

pytestmark = pytest.mark.slow
HERE = Path(train.__file__).parent
FORKS = multiprocessing.get_context("forkserver")  # processes that need not import PyTorch again
FORKS.set_forkserver_preload(["train", "trainings"])
SOAK = int(os.environ.get("SOAK", 20))


def _train(arguments, log, before):
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process would leave behind
    data.load = load
    if before:
        before[0](*before[1:])
    sys.exit(train.main(arguments))


def start(*arguments, log="log", before=None):
    """Starts `train.py arguments` in a process of its own; what it says goes to a file. before: a function and its
    arguments, called there first."""
    process = FORKS.Process(target=_train, args=([str(a) for a in arguments], log, before))
    process.start()
    return process


def ended(*arguments, log="log", before=None):
    """The exit status of a training, at its end, and what it said."""
    Path(log).unlink(missing_ok=True)
    process = start(*arguments, log=log, before=before)
    process.join(60)
    said = Path(log).read_text()
    assert not process.is_alive() and "Traceback" not in said, said
    return process.exitcode, said


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "calm"
    assert ended(*TINY, "--out", folder, log=str(folder) + ".log")[0] == 0
    return end(folder)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def slow(seconds):
    """Each step takes longer, so that a signal meets the middle of an epoch."""
    original = train.clamp_dale
    train.clamp_dale = lambda model: (time.sleep(seconds), original(model))


def wait_for(folder, epoch, alive):
    metrics = Path(folder) / "metrics.csv"
    while not metrics.exists() or metrics.read_text().count("\n") < epoch + 1:
        assert alive()
        time.sleep(0.002)


# ---- killed and stopped


def kill_at(call):
    """SIGKILL in place of a rename, counted from 0."""
    original, left = os.replace, [call]

    def replace(*arguments):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    os.replace = replace


@pytest.mark.parametrize("renames", range(1, 14))
def test_killed_at_each_rename(renames, calm):
    """Four are of the state before the first step. Then an epoch has two for best.pt, if it is better, two for the
    checkpoint and the one before, and three for the tables."""
    assert ended(*TINY, "--out", "r", before=(kill_at, renames))[0] == -signal.SIGKILL
    step = Run("r").load()["step"]
    assert step == STEPS * ((renames >= 8) + (renames >= 13))
    assert ended("--resume", "r")[0] == 0
    assert end(Path("r")) == calm and not [name for name in os.listdir("r") if name.startswith(".check")]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_middle_of_an_epoch(how, calm):
    process = start(*TINY, "--out", "r", before=(slow, 0.1))
    wait_for("r", 1, process.is_alive)
    time.sleep(0.25)
    os.kill(process.pid, how)
    process.join(20)
    step, killed = Run("r").load()["step"], how == signal.SIGKILL
    assert process.exitcode == (-how if killed else 128 + how) and "Traceback" not in Path("log").read_text()
    assert step == STEPS if killed else STEPS < step < 2 * STEPS
    assert ended("--resume", "r")[0] == 0 and end(Path("r")) == calm


def program(*arguments, n=1, before="", **options):
    """The program itself, on a few digits; with n > 1 by torchrun."""
    Path("program.py").write_text(
        "import runpy, sys, time, train, trainings; from support import data; data.load = trainings.load\n"
        f"if __name__ == '__main__':\n    {before or 'pass'}\n    sys.exit(train.main(sys.argv[1:]))"
    )
    command = [sys.executable] if n == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={n}"] * (n > 1) + ["program.py", *arguments]
    paths = os.pathsep.join([str(HERE), str(HERE / "tests")])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen(command, env=os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1"), text=True, **pipes)


def test_ctrl_c_again_and_again(calm):
    process = program(
        *TINY, "--out", "r", before="s = train.clamp_dale; train.clamp_dale = lambda m: (time.sleep(0.1), s(m))"
    )
    wait_for("r", 1, lambda: process.poll() is None)
    while process.poll() is None:  # in saving, after it, and as the interpreter ends
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert process.returncode in (130, -signal.SIGINT)
    assert STEPS < Run("r").load()["step"] < 2 * STEPS
    assert ended("--resume", "r")[0] == 0 and end(Path("r")) == calm


def test_killed_many_times_and_damaged_now_and_then(calm):
    rng, kills, folder = random.Random(SOAK), 0, Path("r")
    while kills < SOAK:
        resume = runs.saved(folder)
        process = start(*(["--resume", "r"] if resume else [*TINY, "--out", "r"]), before=(slow, 0.02))
        process.join(rng.uniform(0, 0.6))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), Path("log").read_text()
        kills += 1
        if process.exitcode == 0:
            shutil.rmtree(folder)
        elif rng.random() < 0.2 and (folder / "checkpoint.prev.pt").exists() and (folder / "checkpoint.pt").exists():
            flip(rng.choice([file for file in sorted(folder.iterdir()) if file.name != "best.pt"]), rng)
    assert ended("--resume" if runs.saved(folder) else "--out", "r", *([] if runs.saved(folder) else TINY))[0] == 0
    assert "Traceback" not in Path("log").read_text() and end(folder) == calm


def flip(path, rng):
    raw = bytearray(path.read_bytes() or b"x")
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


# ---- disk, lock, streams


def limit_files(n):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def full_after(writes):
    original, left = os.fsync, [writes]

    def fsync(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, os.strerror(28))
        original(file)

    os.fsync = fsync


@pytest.mark.parametrize("writes", [5, 6, 7, 9])
def test_a_full_disk(writes, calm):
    status, said = ended(*TINY, "--out", "r", before=(full_after, writes))
    assert status == 2 and said.splitlines()[-1].startswith("error: cannot write r/") and "intact" in said
    before = snapshot(Path("r"))[0]["checkpoint.pt"]
    status, said = ended("--resume", "r", before=(limit_files, 1000))  # still full, and nothing gets worse
    assert status == 2 and "error: cannot write" in said and snapshot(Path("r"))[0]["checkpoint.pt"] == before
    assert ended("--resume", "r")[0] == 0 and end(Path("r")) == calm


def test_a_second_process_is_refused_and_does_no_harm(calm):
    first = start(*TINY, "--out", "r", before=(slow, 0.3))
    wait_for("r", 1, first.is_alive)
    for arguments in (["--resume", "r"], [*TINY, "--out", "r"]):
        status, said = ended(*arguments, log="second")
        assert status == 2 and said.count("\n") == 1 and "error: r is in use: another process" in said
    assert ended("--eval", "r", log="second")[0] == 0  # which only reads
    assert first.is_alive()
    first.kill()
    first.join()
    assert ended("--resume", "r")[0] == 0 and end(Path("r")) == calm  # its lock went with it


def test_a_forked_child_does_not_keep_the_lock():
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        Run.create("r", Run("calm", {}).config)  # locked
        child = os.fork()
        if child:
            os.write(writing, str(child).encode())
            os.kill(os.getpid(), signal.SIGKILL)  # without `close`
        time.sleep(60)
    os.waitpid(parent, 0)
    child = int(os.read(reading, 20))
    os.kill(child, 0)  # it lives
    run = Run.create("r", {})
    run.close()
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("where", ["| head -n 1", "> /dev/full", "2>&-", "<&- >&- 2>&-"])
def test_nobody_reads(where, calm):
    text = "import sys, train, trainings; from support import data; data.load = trainings.load; "
    text += "sys.exit(train.main(sys.argv[1:]))"
    paths = os.pathsep.join([str(HERE), str(HERE / "tests")])
    command = f'"{sys.executable}" -c "{text}" {" ".join(TINY)} --out r {where}'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=os.environ | dict(PYTHONPATH=paths), capture_output=True
    )
    assert done.returncode == 0 and end(Path("r")) == calm and b"Traceback" not in done.stderr, done.stderr
