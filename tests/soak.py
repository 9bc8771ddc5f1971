"""Soak test, run by hand: one training, killed at random moments, ends like one that was left alone.

    python tests/soak.py --kills 200

A narrow VGG-8 on a few small images, on the CPU; a process is forked from one that has imported PyTorch already, is
sent SIGKILL after a random time (while it starts, trains, tests or writes), and the next resumes. After one kill in ten
a random bit of a random file of the run folder is flipped as well. What is compared at the end: parameters, momentum,
best.pt, all bit by bit, and the metrics but for the seconds. Exit status 0 if they are equal.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import model
import train
from support.runs import Run

FORKS = multiprocessing.get_context("forkserver")  # processes that need not import PyTorch again
FORKS.set_forkserver_preload(["train"])
NARROW = [8, "P", 8, "P", 16, "P", 16, "P", 16, "P"]


def make_images(root, n_train=12, n_test=3, size=32):
    """Two classes, `n_train` training and `n_test` test images each: bright in the upper or in the lower half."""
    rng = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        for name in ("lower", "upper"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 80, (size, size, 3), dtype=np.uint8)
                pixels[slice(0, size // 2) if name == "upper" else slice(size // 2, size)] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def options(images, epochs):
    """Those of a short training."""
    of = ["--data", "folder", "--data-root", images, "--batch-size", 4, "--T", 2, "--device", "cpu", "--epochs", epochs]
    return [str(o) for o in of]


def _train(arguments, log, before):
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process would leave behind
    model.PLANS["vgg8"] = NARROW
    if before:
        before()
    sys.exit(train.main(arguments))


def start(arguments, log, before=None):
    """Starts `train.py arguments` with a narrow network in a process of its own; what it says goes to the file `log`.

    Args:
        before: a function of a module, called in the process first.
    """
    process = FORKS.Process(target=_train, args=([str(a) for a in arguments], str(log), before))
    process.start()
    return process


def outcome(folder):
    """All of a run's end that must not depend on how often it was stopped, tensors as bytes."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    run = Run(folder)
    metrics = (folder / "metrics.csv").read_text().splitlines()
    seconds = metrics[0].split(",").index("seconds")
    rows = [[v for i, v in enumerate(line.split(",")) if i != seconds] for line in metrics]
    return dict(checkpoint=plain(run.load()), best=plain(run.load("best.pt")), metrics=rows)


def flip_a_bit(folder, rng):
    """In a random file, if there are two checkpoints; not in config.json, where it may just make another setting."""
    if not (folder / "checkpoint.prev.pt").exists() or not (folder / "checkpoint.pt").exists():
        return None
    path = rng.choice([f for f in sorted(folder.iterdir()) if f.stat().st_size and f.name != "config.json"])
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return path.name


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--epochs", type=int, help="of the training (twice the kills)")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args()
    rng, epochs = random.Random(args.seed), args.epochs or max(2, 2 * args.kills)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        start(["--help"], root / "log").join()  # so that PyTorch is imported
        command = options(make_images(root / "images"), epochs)
        begin = time.perf_counter()
        calm = start([*command, "--out", root / "calm"], root / "log")
        while not (root / "calm" / "checkpoint.pt").exists() and calm.is_alive():
            time.sleep(0.001)
        first = time.perf_counter() - begin  # from the start to the first checkpoint
        calm.join()
        assert calm.exitcode == 0, (root / "log").read_text()
        epoch = (time.perf_counter() - begin - first) / epochs
        print(f"undisturbed: {epochs} epochs of {epoch:.3f} s, after {first:.3f} s to start", flush=True)

        folder, kills, flips, steps = root / "killed", 0, {}, set()
        while kills < args.kills:
            resume = (folder / "checkpoint.pt").exists() or (folder / "checkpoint.prev.pt").exists()
            if not resume and folder.exists():  # killed before anything was saved: nothing to lose
                folder.rename(root / f"nothing-{kills}")
            process = start(["--resume", folder] if resume else [*command, "--out", folder], root / "log")
            process.join(rng.uniform(0, first + 2 * epoch))
            process.kill()
            process.join()
            assert process.exitcode in (0, -9), (root / "log").read_text()[-3000:]
            if process.exitcode == 0:
                break
            kills += 1
            if resume:
                steps.add(Run(folder).load()["step"])
            if rng.random() < 0.1 and (name := flip_a_bit(folder, rng)):
                flips[name] = flips.get(name, 0) + 1
        last = start(["--resume", folder], root / "log")
        last.join()
        assert last.exitcode == 0, (root / "log").read_text()[-3000:]
        assert "Traceback" not in (root / "log").read_text(), (root / "log").read_text()
        print(f"{kills} kills, at {len(steps)} different steps; bits flipped: {flips or 'none'}")
        a, b = outcome(root / "calm"), outcome(folder)
        same = {k: a[k] == b[k] for k in a}
        print("equal to the undisturbed run:", ", ".join(f"{k} {'yes' if v else 'NO'}" for k, v in same.items()))
        return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
