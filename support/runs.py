"""The run folder: what a training writes, so that it can be stopped at any moment and goes on where it was. A reader of
the paper may skip this file.

    checkpoint.pt       the whole state of the training; all the others are written again from it when a run is resumed
    checkpoint.prev.pt  the one before, for when that one turns out to be damaged
    config.json         every setting, written once, after the first checkpoint
    best.pt             parameters of the epoch with the best test accuracy
    metrics.csv         a line an epoch
    histograms.json     how I_int and u of each layer are distributed (`measure.histograms`), at the start and after
                        each epoch
    result.json         the outcome, when the run has ended
    .lock               held by the process that trains; the system frees it when that process ends, however it ends

Every file is written under another name, brought to the disk and then renamed, so that at any moment each is either the
old or the new one, whole; the .pt files end in a SHA-256 of what precedes it. Random numbers are drawn from generators
seeded by (seed, step), so the state of a training is its parameters, the optimiser's, and a few counts; nothing else
has to be restored, and on a CPU a resumed run ends with the same bits as one that was never stopped.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import weakref
from pathlib import Path

import torch

from ei_init import initialize
from model import build
from support import data, recipes
from support.console import first_line, quoted, replace
from support.recipes import option, parse, settings

fcntl = msvcrt = None
try:
    import fcntl
except ImportError:  # Windows
    with contextlib.suppress(ImportError):
        import msvcrt

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "checkpoint.prev.pt", "best.pt"
SEAL = hashlib.sha256().digest_size  # bytes
# What the files must hold, and may hold more of; see `bad_part`.
DATA = {"classes": [str], "shape": [int], "train": str, "test": str}  # see `data.identity`
BEST_STATE = {"model": dict, "epoch": int, "accuracy": float, "config": dict, "data": DATA}
ROW = {"epoch": int, "test_accuracy": float, "seconds": float}
STATE = {"model": dict, "optimizer": {"state": dict}, "step": int, "epoch_sums": (float, float), "history": [ROW]}
STATE |= {"epoch_seconds": float, "histograms": list, "config": dict, "data": DATA}
STATE |= {"best": [BEST_STATE]}  # empty before the first epoch's end


def bad_part(value, kind, name="it"):
    """The name of the first part of `value` that is not of its kind; None if all are.

    A kind is a type (float: any number), a dict of kinds, a list of one kind for all elements, or a tuple of kinds for
    a list of that length.
    """
    if isinstance(kind, dict):
        parts = [(value.get(k), of, k) for k, of in kind.items()] if isinstance(value, dict) else None
    elif isinstance(kind, list):
        parts = [(v, kind[0], name) for v in value] if isinstance(value, list) else None
    elif isinstance(kind, tuple):
        fits = isinstance(value, list) and len(value) == len(kind)
        parts = [(v, of, name) for v, of in zip(value, kind, strict=True)] if fits else None
    else:
        parts = [] if isinstance(value, (int, float) if kind is float else kind) else None
    return name if parts is None else next(filter(None, (bad_part(*part) for part in parts)), None)


def write_atomically(path, data, previous=None):
    """Writes bytes to a file so that it is never seen half written; what was there stays if that fails.

    Args:
        previous: a path to which the old file is moved, rather than being replaced.

    Raises:
        OSError: a full disk, a folder that cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            replace(path, previous)
        replace(temporary, path)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        raise OSError(f"cannot write {path}: {error.strerror}; what was there before is intact") from None


class Taken(ValueError):
    """The folder holds a run already, or another process trains in it."""


class Run:
    """A run folder.

    `Run.create` makes a new one and `resume` goes on with one that is there: both lock it, for as long as the object
    lives. `Run(folder)` alone reads, also while another process trains.

    Args:
        folder: its path.

    Raises:
        ValueError, OSError: no such run, or one that is damaged beyond repair, or in use.
    """

    def __init__(self, folder, config=None):
        self.folder, self.best = Path(folder).expanduser(), []
        self.quoted = quoted(self.folder)
        self.config = config  # as config.json has it
        self.writes = self.new = False  # a process that has not locked the folder does not write
        self.unwritten = False  # whether that is still to be written, or again
        self.data = None  # what is remembered of them, see `data.identity`
        self.after_epoch = None  # a function of the history, called when an epoch is saved
        if config is None:
            self.config = self._read_config()

    def _read_config(self):
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it holds no settings")
            return config
        except (OSError, ValueError, RecursionError) as error:
            missing = isinstance(error, FileNotFoundError)
            reason = f"{path} cannot be read: {first_line(error)}"
        try:
            config = self.load()["config"]
        except ValueError:
            reason = f"{self.folder} is not a run folder: it has no config.json" if missing else reason
            raise ValueError(reason) from None
        print(f"{reason}; the settings in the checkpoint are used")
        self.unwritten = True
        return config

    @classmethod
    def create(cls, folder, config, choose=False):
        """A new run, locked. The first `save` puts `config` into its folder too.

        Args:
            choose: where there is a run in the folder, or another process, take the first of folder-2, folder-3, ...
                that is free. Else that is a ValueError.
        """
        folder = Path(folder).expanduser()
        n, candidate = 1, folder
        while True:
            try:
                return cls._claim(candidate, config)
            except Taken:
                if not choose:
                    raise
                n += 1
                candidate = Path(f"{folder}-{n}")

    @classmethod
    def _claim(cls, folder, config):
        new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the run folder {folder}: {error.strerror}") from None
        run = cls(folder, json.loads(_json(config)))
        run.lock()
        if holds_run(folder):
            run.close()
            raise Taken(f"{folder} already holds a run: go on with --resume {run.quoted}, or choose another --out")
        run.unwritten, run.new = True, new
        return run

    def lock(self):
        """Keeps the folder from other processes until `close`, or until this object or the process is gone."""
        file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        self._unlock = weakref.finalize(self, os.close, file)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt:
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            self._unlock()
            raise Taken(f"{self.folder} is in use: another process trains in it; wait for its end") from None
        except OSError:  # a file system without locks
            pass
        self.writes = True  # only now

    def close(self):
        """Lets go of the folder. A new one in which nothing was saved disappears."""
        if not self.writes:
            return
        self._unlock()
        self.writes = False
        if self.new and not holds_run(self.folder):
            with contextlib.suppress(OSError):
                (self.folder / ".lock").unlink()
                self.folder.rmdir()

    def settings(self, given, free=("data_root",)):
        """The settings of an existing run, checked as those of the command line are.

        Args:
            given: what is asked for now, by name; None is nothing. It may not contradict the settings.
            free: names for which it may, and counts. Data may have moved.

        Raises:
            ValueError: config.json is damaged or of another version, or `given` contradicts it.
        """
        path = self.folder / "config.json"
        try:
            if unknown := self.config.keys() - settings(parse([])):
                raise ValueError(f"there is no setting {min(unknown)!r}")
            config = settings(parse([option(*item) for item in self.config.items()]))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged or of another version of the program: {error}; correct it, or delete it if there "
                f"is a {CHECKPOINT}, which holds the settings too"
            ) from None
        for key, value in given.items():
            if value is not None and key in config and key not in free and value != config[key]:
                raise ValueError(f"{self.folder} was made with {key}={config[key]}, not {value}")
        return config | {key: given[key] for key in free if given.get(key) is not None}

    def keep_best(self, model, row):
        """Remembers the network if this epoch's row of the history has the best test accuracy so far."""
        if not self.best or row["test_accuracy"] > self.best[0]["accuracy"]:
            copy = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}
            self.best = [dict(model=copy, epoch=row["epoch"], accuracy=row["test_accuracy"])]
            self.best[0] |= dict(config=self.config, data=self.data)

    def save(self, state):
        """Writes checkpoint.pt, keeping the one before, then what follows from it: best.pt if new, and the rest."""
        if not self.writes:
            return
        state = state | dict(config=self.config, best=self.best)
        write_atomically(self.folder / CHECKPOINT, _sealed(state), self.folder / PREVIOUS)
        self._derive(state, new=self.best and self.best[0]["epoch"] == len(state["history"]))

    def _derive(self, state, new):
        if self.unwritten:
            write_atomically(self.folder / "config.json", _json(self.config))
            (self.folder / "result.json").unlink(missing_ok=True)  # of fewer epochs
            self.unwritten = False
        if new:
            write_atomically(self.folder / BEST, _sealed(self.best[0]))
        history, text = state["history"], io.StringIO()
        if history:
            writer = csv.DictWriter(text, history[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
        write_atomically(self.folder / "metrics.csv", text.getvalue().encode())
        write_atomically(self.folder / "histograms.json", json.dumps(state["histograms"]).encode() + b"\n")

    def keep_trained(self, model, accuracy):
        """Writes the folder of a network that was trained elsewhere: it has no history and no checkpoint."""
        self.keep_best(model, dict(epoch=0, test_accuracy=accuracy))
        write_atomically(self.folder / BEST, _sealed(self.best[0]))
        write_atomically(self.folder / "config.json", _json(self.config))

    def resume(self):
        """Locks the folder, makes it whole, and returns the newest state that is intact."""
        self.lock()
        name, state = self._newest()
        if name == PREVIOUS:  # or the next save would put the damaged one in its place
            replace(self.folder / PREVIOUS, self.folder / CHECKPOINT)
        print(f"{self.folder} goes on at step {state['step']}, with {len(state['history'])} epochs behind it")
        self.best, self.data = state["best"], state["data"]
        if state["config"].get("epochs") != self.config.get("epochs"):  # it was killed when it was made longer
            self.extend(state["config"].get("epochs"))
        self._derive(state, new=self.best)
        return state

    def extend(self, epochs):
        """Another number of epochs; it is written with the next save. The run is not finished then."""
        self.config = self.config | dict(epochs=epochs)
        self.unwritten = True

    def load(self, name=CHECKPOINT):
        """The state in checkpoint.pt, or the one before if that is damaged; or what is, or should be, in best.pt.

        Tensors are on the CPU. Nothing in the file is executed. What is used in place of a damaged file is printed.

        Raises:
            ValueError: no such file is intact (their checksums are compared), or it is of something else.
        """
        if name == CHECKPOINT:
            return self._newest()[1]
        try:
            return self._read(name, BEST_STATE)
        except ValueError as error:
            try:
                state = self._newest()[1]["best"][0]
            except ValueError:
                raise error from None
            except IndexError:
                ended = (self.folder / "result.json").exists()
                reason = "the training broke off" if ended else f"no epoch has ended: --resume {self.quoted}"
                raise ValueError(f"{self.folder} has no {name}: {reason}") from None
            print(f"{error}; the copy in the checkpoint is used")
            return state

    def _newest(self):
        """(name, state) of checkpoint.pt, or of the one before it."""
        try:
            return CHECKPOINT, self._read(CHECKPOINT, STATE)
        except ValueError as error:
            try:
                state = self._read(PREVIOUS, STATE)
            except ValueError:
                raise error from None
            print(f"{error}; the one before is used, of step {state['step']}")
            return PREVIOUS, state

    def _read(self, name, kind):
        path = self.folder / name
        foreign = f"{path} is damaged or not a checkpoint of this version"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(
                f"{self.folder} has no {name}: nothing was saved yet, it was deleted, or the network was trained "
                "elsewhere"
            ) from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        content = memoryview(raw)[:-SEAL]
        if hashlib.sha256(content).digest() != raw[-SEAL:]:
            raise ValueError(f"{foreign}: its checksum is wrong")
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # a foreign pickle fails in many ways, and is refused here too
            raise ValueError(f"{foreign}: {first_line(error)}") from None
        if part := bad_part(state, kind):
            raise ValueError(f"{foreign}: {part} is missing in it or not what it should be")
        for key, value in state["config"].items() if self.config is not None else ():
            if key not in ("data_root", "epochs") and value != self.config.get(key):
                raise ValueError(
                    f"{path} belongs to another network or training than config.json says: it was saved with "
                    f"{key}={value}, not {self.config.get(key)}"
                )
        return state

    def finish(self, history, n_classes, broken=None, given_up=False):
        """Writes result.json and says how the run ended.

        Args:
            history: a dict for each epoch.
            n_classes: chance is 1 / n_classes.
            broken: the layer that was not finite, if the training ended by that.
            given_up: the training was cut off, because it was at chance.
        """
        accuracies = [row["test_accuracy"] for row in history]
        seconds = sum(row["seconds"] for row in history)
        result = dict(outcome=outcome(accuracies, n_classes, nonfinite=broken is not None))
        if broken:
            result["first_nonfinite_layer"] = broken
        if given_up:
            result["given_up"] = True
        if history:
            best = max(history, key=lambda row: row["test_accuracy"])
            result |= dict(test_accuracy=accuracies[-1], best_test_accuracy=best["test_accuracy"])
            result |= dict(best_epoch=best["epoch"], epochs=len(history), train_seconds=round(seconds, 1))
        result |= dict(torch=torch.__version__, config=self.config, data=self.data)
        if self.writes:
            write_atomically(self.folder / "result.json", _json(result))
        last = f", test accuracy {accuracies[-1]:.2%}, best {best['test_accuracy']:.2%}" if history else ""
        cut = f", given up after {len(history)} epochs at chance" if given_up else ""
        print(f"{result['outcome']}{last}{cut}, {seconds:.0f} s of training")
        print(f"run folder: {self.folder}   its figures: python visualize.py all {self.quoted}")


def _json(value):
    return (json.dumps(value, indent=2) + "\n").encode()


def _sealed(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    return buffer.getbuffer()


def restore(module, state, path):
    """Loads a state dict into a network or an optimiser; one that does not fit is a ValueError that names `path`."""
    try:
        if isinstance(module, torch.optim.Optimizer):  # its settings are the run's; only what was computed is restored
            parameters = dict(enumerate(p for group in module.param_groups for p in group["params"]))
            values = state["state"]  # none of a parameter that has had no gradient
            tensors = [(value["momentum_buffer"], parameters[i]) for i, value in values.items()]
            state = module.state_dict() | dict(state=values)
        else:
            tensors = [(state[name], expected) for name, expected in module.state_dict().items() if name in state]
        for tensor, expected in tensors:
            if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
                raise ValueError(f"{tensor.dtype} of {(*tensor.shape,)} for {expected.dtype} of {(*expected.shape,)}")
        module.load_state_dict(state)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{path} belongs to another network than its config.json and the program, as it is now, say: {reason}"
        ) from None


def saved(folder):
    """Whether a folder holds a checkpoint."""
    return any((Path(folder) / name).exists() for name in (CHECKPOINT, PREVIOUS))


def holds_run(folder):
    """Whether there is a run in a folder, or what is left of one."""
    return saved(folder) or (Path(folder) / "config.json").exists()


def load_data_and_model(config, device):
    """The dataset and the network of a run's settings, on the device. The network is not initialised yet."""
    dataset = data.load(config["data"], config["data_root"], config["image_size"], device, config["T"])
    torch.manual_seed(config["seed"])
    options = ("T", "image_size", "width", "tau", "threshold", "alpha", "ei_ratio", "eps", "ste", "grad_scaling")
    options = {name: config[name] for name in options} | dict(kind=config["model"], plan=recipes.plan_of(config))
    model = build(config["arch"], dataset.in_channels, dataset.n_classes, **options)
    return dataset, model.to(device)


def prepare(config, dataset, model):
    """E-I Init with the first training batch, once, before the first step. A control keeps its |Kaiming| weights."""
    if config["init"] == "ei":
        initialize(model, data.first_batch(config, dataset)[0])


def reopen(given, folder, free=("data_root",)):
    """An existing run and its settings; an option given that contradicts them, other than the free ones, is refused."""
    run = Run(folder)
    return run, run.settings(given, free)


def outcome(accuracies, n_classes, nonfinite=False):
    """What became of a run, in the words of the paper's table on epsilon.

    Args:
        accuracies: test accuracy in [0, 1] after each epoch.
        n_classes: chance is 1 / n_classes.
        nonfinite: the training ended, in the epoch after these, because a value became infinite or NaN.

    Returns:
        "failed to converge": never above twice chance (of two classes, halfway from chance to 1). "collapsed (epoch
        N)": it was, and from epoch N (counted from 1) on stayed at most at 1.5 times chance, or became non-finite in
        epoch N. Else "converged".
    """
    chance = 1 / n_classes
    if not any(a > min(2 * chance, (1 + chance) / 2) for a in accuracies):
        return "failed to converge"
    low = len(accuracies)
    while accuracies[low - 1] <= 1.5 * chance:
        low -= 1
    if low < len(accuracies) or nonfinite:
        return f"collapsed (epoch {low + 1})"
    return "converged"
