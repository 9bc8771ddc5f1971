"""The run folder: what a training writes, so that it can be stopped at any moment and goes on where it was.

    config.json     every setting, written once
    checkpoint.pt   the whole state of the training; all below but best.pt can be written again from it
    best.pt         parameters of the epoch with the best test accuracy
    metrics.csv     a line an epoch
    histograms.json counts of I_int and of the membrane potential by layer (`model.histograms`), before the training
                    and after each epoch
    result.json     the outcome, when the run has ended

Every file is written under another name, brought to the disk and then renamed, so that at any moment each is either the
old or the new one, whole. Random numbers are drawn from generators seeded by (seed, step), hence the state of a
training is its parameters, the optimiser's, and a few counts; nothing else has to be restored.
"""

import csv
import io
import json
import os
import signal
import zipfile
from pathlib import Path

import torch

STATE = {
    "model": dict,
    "optimizer": dict,
    "step": int,
    "epoch_sums": list,
    "history": list,
    "histograms": list,
}  # of checkpoint.pt
BEST = {"model": dict, "epoch": int, "accuracy": float}  # of best.pt


def write_atomically(path, data):
    """Writes bytes to a file so that it is never seen half written; what was there stays if that fails.

    Raises:
        OSError: a full disk, a folder that cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        raise OSError(f"cannot write {path}: {error.strerror}; what was there before is intact") from None


class Run:
    """A run folder.

    Args:
        folder: its path. `Run.create` makes a new one, `Run(folder)` opens one that is there.

    Raises:
        ValueError, OSError: no such run, or a damaged one.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.config = json.loads((self.folder / "config.json").read_text())
            if not isinstance(self.config, dict):
                raise ValueError("it holds no settings")
        except FileNotFoundError:
            raise ValueError(f"{folder} is not a run folder: it has no config.json") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder / 'config.json'} cannot be read: {error}") from None

    @classmethod
    def create(cls, folder, config):
        """A new folder that holds `config`. One that already holds a run is refused, unless it was stopped before it
        saved anything and had the same settings."""
        folder = Path(folder)
        if (folder / "checkpoint.pt").exists() or ((folder / "config.json").exists() and cls(folder).config != config):
            raise ValueError(f"{folder} already holds a run: go on with --resume {folder}, or choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the run folder {folder}: {error.strerror}") from None
        write_atomically(folder / "config.json", _json(config))
        return cls(folder)

    def save(self, state):
        """Writes checkpoint.pt, then metrics.csv and histograms.json from the history in it."""
        self._save("checkpoint.pt", state)
        self.write_history(state)

    def save_best(self, state):
        """Writes best.pt."""
        self._save("best.pt", state)

    def _save(self, name, state):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / name, buffer.getbuffer())

    def load(self, name="checkpoint.pt"):
        """The state in checkpoint.pt or best.pt, tensors on the CPU. Nothing in the file is executed.

        Raises:
            ValueError: the file is absent, truncated, changed (its checksums are compared), or of something else.
        """
        path = self.folder / name
        try:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged} is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ValueError(f"{self.folder} has no {name}: nothing was saved yet, or it is not a run folder") from None
        except Exception as error:  # a damaged file fails in many ways; a foreign pickle is refused here too
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path} is damaged or not a checkpoint of this project: {reason}") from None
        for key, kind in (STATE if name == "checkpoint.pt" else BEST).items():
            if not isinstance(state, dict) or not isinstance(state.get(key), kind):
                raise ValueError(f"{path} is not a checkpoint of this project: it has no {key!r}")
        return state

    def write_history(self, state):
        """Writes metrics.csv, a header and a line for each epoch's dict in the history, and histograms.json."""
        history, text = state["history"], io.StringIO()
        if history:
            writer = csv.DictWriter(text, history[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
        write_atomically(self.folder / "metrics.csv", text.getvalue().encode())
        write_atomically(self.folder / "histograms.json", json.dumps(state["histograms"]).encode() + b"\n")

    def write_result(self, result):
        """Writes result.json."""
        write_atomically(self.folder / "result.json", _json(result))


def _json(value):
    return (json.dumps(value, indent=2) + "\n").encode()


def restore(module, state, path):
    """Loads a state dict into a network or an optimiser; one that does not fit is a ValueError that names `path`."""
    try:
        module.load_state_dict(state)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} belongs to another network than its config.json says: {reason}") from None


def free_folder(folder):
    """`folder` if no run is there yet, else the first of folder-2, folder-3, ... without one."""
    n, candidate = 1, Path(folder)
    while (candidate / "config.json").exists():
        n += 1
        candidate = Path(f"{folder}-{n}")
    return candidate


def run_name(config):
    """runs/<data>-<arch>-<model>-<what is ablated>-seed<n>."""
    parts = [config["data"], config["arch"], config["model"]]
    parts += [f"eps{config['eps']:g}"] if config["eps"] != "adaptive" else []
    parts += ["noste"] * (not config["ste"]) + ["noscaling"] * (not config["grad_scaling"])
    parts += ["kaiming"] * (config["init"] == "kaiming" and config["model"] == "ei") + [f"seed{config['seed']}"]
    return "runs/" + "-".join(parts)


class StopRequest:
    """While it is open, Ctrl-C and SIGTERM only set `signal`, so that the training can save its state and end.

    with StopRequest() as stop: ... if stop.signal: save and leave
    """

    def __enter__(self):
        self.signal = None
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number, _):
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def outcome(accuracies, n_classes, nonfinite=False):
    """What became of a run, in the words of the paper's table on epsilon.

    Args:
        accuracies: test accuracy in [0, 1] after each epoch.
        n_classes: chance is 1 / n_classes.
        nonfinite: the training ended, in the epoch after these, because a value became infinite or NaN.

    Returns:
        "failed to converge": never above twice chance. "collapsed (epoch N)": it was, and from epoch N (counted from 1)
        on stayed at most at 1.5 times chance, or became non-finite in epoch N. Else "converged".
    """
    chance = 1 / n_classes
    if not any(a > 2 * chance for a in accuracies):
        return "failed to converge"
    low = len(accuracies)
    while accuracies[low - 1] <= 1.5 * chance:
        low -= 1
    if low < len(accuracies) or nonfinite:
        return f"collapsed (epoch {low + 1})"
    return "converged"
