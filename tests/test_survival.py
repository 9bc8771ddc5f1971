"""Trainings that are killed, stopped, damaged or short of disk, as processes of their own. Resumed, each ends with the
same bits as one that nothing disturbed. SOAK=200 in the environment tries ten times as many moments."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import STEPS, TINY, end, load, main, result

import train
from support import data, runs
from support.runs import Run

if sys.platform == "win32":
    pytest.skip("it sends signals and limits resources as POSIX systems do", allow_module_level=True)

pytestmark = pytest.mark.slow
FORKS = multiprocessing.get_context("forkserver")  # its processes need not import again what takes long
FORKS.set_forkserver_preload(["torchvision.datasets", "sklearn.datasets", "sklearn.model_selection", "pytest"])
SOAK = int(os.environ.get("SOAK", 20))


def _train(arguments, before):
    sys.stdout = sys.stderr = open("log", "w", buffering=1)
    torch.set_num_threads(1)
    data.load = load
    before[0](*before[1:])
    sys.exit(main(*arguments))


def start(*arguments, before=(str,)):
    """Starts `train.py arguments` in a process of its own. before: a function and its arguments, called there first."""
    process = FORKS.Process(target=_train, args=(arguments, before))
    process.start()
    return process


def ended(*arguments, before=(str,)):
    """The exit status of a training, at its end, and what it said."""
    process = start(*arguments, before=before)
    process.join(60)
    said = Path("log").read_text()
    assert not process.is_alive() and "Traceback" not in said, said
    return process.exitcode, said


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert ended(*TINY, "--out", "r")[0] == 0
    return end(folder / "r")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def slow(seconds):
    """Each step takes longer, so that a signal meets the middle of an epoch."""
    original = train.clamp_dale
    train.clamp_dale = lambda model: (time.sleep(seconds), original(model))


def wait_for_an_epoch(alive):
    while not os.path.exists("r/best.pt"):
        assert alive()
        time.sleep(0.01)


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
    """Three come before the first step. Then an epoch has two for best.pt, if it is better, and four for the others."""
    assert ended(*TINY, "--out", "r", before=(kill_at, renames))[0] == -signal.SIGKILL
    first, second = (float(row[calm[2][0].index("test_accuracy")]) for row in calm[2][1:3])
    assert Run("r").load()["step"] == STEPS * ((renames >= 7) + (renames >= 11 + 2 * (second > first)))
    assert ended("--resume", "r")[0] == 0 and end("r") == calm


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_middle_of_an_epoch(how, calm):
    process, killed = start(*TINY, "--out", "r", before=(slow, 1.0)), how == signal.SIGKILL
    wait_for_an_epoch(process.is_alive)
    for command in ([*TINY, "--out", "r"], ["--resume", "r"]) * killed:  # a second process does no harm
        status, said = ended(*command)
        assert status == 2 and said.count("\n") == 1 and "error: r is in use: another process" in said
    assert ended("--eval", "r")[0] == 0  # which only reads
    with pytest.raises(ProcessLookupError):  # it has ended
        while True:  # again and again: in a step, in saving, and as the interpreter ends
            os.kill(process.pid, how)
            time.sleep(0.02)
    process.join()
    step = Run("r").load()["step"]
    assert process.exitcode in (-how, 128 + how) and (step % STEPS == 0) == killed
    assert ended("--resume", "r")[0] == 0 and end("r") == calm  # the lock went with it


def go_on():
    return ["--resume", "r"] if runs.saved("r") else [*TINY, "--out", "r"]


def test_killed_many_times_and_damaged_now_and_then(calm):
    rng = random.Random(SOAK)
    for _ in range(SOAK):
        process = start(*go_on(), before=(slow, 0.02))
        process.join(rng.uniform(0, 0.6))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), Path("log").read_text()
        path = Path("r") / rng.choice(["checkpoint.pt", "metrics.csv", "config.json"])
        if process.exitcode == 0:
            shutil.rmtree("r")
        elif rng.random() < 0.3 and path.exists() and path.stat().st_size and os.path.exists("r/checkpoint.prev.pt"):
            raw = bytearray(path.read_bytes())
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            path.write_bytes(raw)
    assert ended(*go_on())[0] == 0 and end("r") == calm


PROGRAM = """import sys, time, train, test_train
from support import data
data.load, clamp = test_train.load, train.clamp_dale
train.clamp_dale = lambda model: (time.sleep({}), clamp(model))
sys.exit(train.main(sys.argv[1:]))"""


def program(*arguments, seconds=0, n=1, then=""):
    """The program on a few digits, a step takes so many seconds; with n > 1 by torchrun; then: more for the shell."""
    Path("program.py").write_text(PROGRAM.format(seconds))
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={n} " * (n > 1)
    command = f'exec "{sys.executable}" {torchrun}program.py {" ".join(arguments)} {then}'
    paths = os.pathsep.join([str(Path(train.__file__).parent), str(Path(__file__).parent)])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1")
    return subprocess.Popen(["bash", "-o", "pipefail", "-c", command], env=environment, **pipes)


@pytest.mark.parametrize("then", ["| head -n 1", ">/dev/full 2>&-"])
def test_nobody_reads(then, calm):
    process = program(*TINY, "--out", "r", then=then)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0 and not err and end("r") == calm


def test_two_processes_train_as_one_stop_and_resume_together(calm):
    process = program(*TINY, "--out", "r", n=2, seconds=0.2)
    wait_for_an_epoch(lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert STEPS <= Run("r").load()["step"] < 3 * STEPS
    process = program("--resume", "r", n=2)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and out.count("run folder: r") == 1, err  # the first process speaks for both
    state, expected = end("r")[0], calm[0]
    assert state["step"] == 3 * STEPS and result("r")["epochs"] == 3
    for name, raw in expected["model"].items():
        values, alone = (torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (state["model"][name], raw))
        torch.testing.assert_close(values, alone, rtol=1e-3, atol=1e-5)
    losses = [[row["train_loss"] for row in run["history"]] for run in (state, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_what_the_first_of_two_processes_refuses():
    process = program(*TINY, "--batch-size", "15", "--out", "r", n=2)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and err.count("a batch of 15 cannot be shared by 2 processes") == 1
    assert "the first process failed" in err and not os.path.exists("r")


WILD = "0 -1 1e-400 1e400 -1e-6 nan \u0661 0x10 1.5 %s vgg8 None adaptive - ../.. /dev/null 1e30 0.1 2 cuda:99 mps -inf"
WILD = [*WILD.split(), "", " ", "9" * 5000, "\0", "a\nb", "é\udcff"]
OPTIONS = "T epochs batch-size lr weight-decay warmup-epochs warmup-from width ei-ratio tau threshold alpha image-size"
OPTIONS = [*OPTIONS.split(), *"seed eps arch kind init device data-root eval resume clip-norm plan".split()]


def test_whatever_is_typed_ends_in_success_or_one_line(capsys, monkeypatch):
    rng = random.Random(SOAK)
    monkeypatch.setattr(data, "load", lambda name, root, *_: load(name, "./data"))
    for _ in range(10 * SOAK):
        typed = [f"--{option}={rng.choice(WILD)}" for option in rng.sample(OPTIONS, rng.randint(1, 3))]
        status, err = main(*TINY, "--epochs", 1, *typed, "--out", "r"), capsys.readouterr().err
        assert status == 0 or (status == 2 and err.startswith("error: ") and err.count("\n") == 1), (typed, err)
        shutil.rmtree("r", ignore_errors=True)


def test_the_first_network_learns_the_digits():
    """The recipe of the MLP, as it is, in some seconds."""
    assert main("--arch", "mlp", "--out", "r") == 0 and result("r")["test_accuracy"] >= 0.93
