"""The run folder: what a training writes, so that it can be stopped and goes on where it was.

    checkpoint.pt       the whole state of the training, at the end of an epoch or where it was stopped
    checkpoint.prev.pt  the one before, for when that one turns out to be damaged
    best.pt             the network of the epoch with the best test accuracy
    config.json         every setting, and a fingerprint of the equations with which the run was begun
    metrics.csv         a line an epoch
    histograms.json     how I_int and u of each layer are distributed (`measure.histograms`), at the start and after
                        each epoch
    result.json         the outcome, when the run has ended
    .lock               held by the process that trains; the system frees it when that process ends, however it ends

Every file is written under another name and then renamed, so that at any moment each is either the old or the new one,
whole. Ctrl-C, SIGTERM and a closed terminal lose nothing; after a power cut or a kill the training goes on from the
last epoch that it had finished. Random numbers are drawn from generators seeded by (seed, step), so nothing else has to
be restored, and on a CPU a resumed run ends with the same bits as one that was never stopped.
"""

import ast
import contextlib
import csv
import hashlib
import io
import json
import os
import time
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import baselines
import ei_init
import ei_prop
import inhibition
import lif
import model as networks
from support import data, recipes
from support.fast import normal_form

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "checkpoint.prev.pt", "best.pt"
# What these files hold at least.
PARTS = {CHECKPOINT: ("model", "optimizer", "step", "sums", "history", "histograms", "config", "data")}
PARTS |= {PREVIOUS: PARTS[CHECKPOINT], BEST: ("model", "epoch", "accuracy", "config", "data")}


def replace(source, target):
    """`os.replace`, tried again for a second where another program (a virus scanner) holds the file for a moment."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.05)
    os.replace(source, target)


def write_atomically(path, content):
    """Writes bytes to a file so that it is never seen half written; what was there stays if that fails.

    Raises:
        OSError: a full disk, a folder that cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; what was there before is intact") from None


def equations():
    """A fingerprint of each concept file, {"lif.py": "..."}: without comments, docstrings, layout and demonstration."""
    found = {}
    for module in (lif, ei_prop, inhibition, ei_init, baselines, networks):
        path = Path(module.__file__)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]  # if __name__ == "__main__"
        found[path.name] = hashlib.sha256(repr(normal_form(tree)).encode()).hexdigest()[:12]
    return found


class Taken(ValueError):
    """The folder holds a run already, or another process trains in it."""


class Run:
    """A run folder.

    `Run.create` makes a new one, and `lock` goes on with one that is there: both keep it from other processes until
    `close`. `Run(folder)` alone reads, also while another process trains.

    Attributes:
        folder, config: its path and its settings.
        data: what is remembered of its data, see `data.identity`.

    Raises:
        ValueError, OSError: no such run, or one that is damaged or in use.
    """

    def __init__(self, folder, config=None):
        self.folder, self.data, self._lock, self._made = Path(folder).expanduser(), None, None, False
        self.quoted, self.after_epoch = recipes.quoted(self.folder), None  # a function of the history
        self.equations = equations()
        self.config = self._read_config() if config is None else config

    def _read_config(self):
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            self.equations = config.pop("equations", {})
        except FileNotFoundError:
            if not saved(self.folder):
                raise ValueError(f"{self.folder} is not a run folder: it has no config.json") from None
            config = self.load()["config"]
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): mend it, or delete it if there is a {CHECKPOINT}, which holds the "
                "settings too"
            ) from None
        known = recipes.settings(recipes.parse([]))
        odd = [key for key in known.keys() ^ config.keys()]
        odd += [k for k, v in known.items() if k in config and k != "eps" and not isinstance(config[k], like(v))]
        if odd:
            raise ValueError(f"{path} is of another version of the program, or damaged: see its {min(odd)!r}")
        return config

    @classmethod
    def create(cls, folder, config, choose=False):
        """A new run, locked. The first `save` puts `config` into its folder too.

        Args:
            choose: where there is a run in the folder, or another process, take the first of folder-2, folder-3, ...
                that is free. Else that is a ValueError.
        """
        folder, n = Path(folder).expanduser(), 1
        while True:
            run = cls(folder if n == 1 else f"{folder}-{n}", config)
            run._made = not run.folder.exists()
            try:
                run.folder.mkdir(parents=True, exist_ok=True)
                run.lock()
                if holds_run(run.folder):
                    run.close()
                    again = f"go on with --resume {run.quoted}, or choose another --out"
                    raise Taken(f"{run.folder} already holds a run: {again}")
                return run
            except Taken:
                if not choose:
                    raise
                n += 1
            except OSError as error:
                raise OSError(f"cannot make the run folder {run.folder}: {error.strerror}") from None

    def lock(self):
        """Keeps the folder from other processes until `close`, or until the process is gone."""
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            self._lock = None
            raise Taken(f"{self.folder} is in use: another process trains in it; wait for its end") from None
        except NotImplementedError:  # a file system without locks
            pass

    def close(self):
        """Lets go of the folder. A new one in which nothing was saved disappears."""
        if self._lock:
            self._lock.release()
            self._lock = None
            with contextlib.suppress(OSError):  # it holds something
                if self._made and not holds_run(self.folder):
                    (self.folder / ".lock").unlink(missing_ok=True)
                    self.folder.rmdir()

    def settings(self, given, free=("data_root",)):
        """The settings, where `given` may not contradict them but in what is free (data may have moved).

        Args:
            given: what is asked for now, by name; None is nothing.

        Raises:
            ValueError: `given` contradicts the settings.
        """
        asked = {key: value for key, value in given.items() if value is not None and key in self.config}
        for key, value in asked.items():
            if key not in free and value != self.config[key]:
                raise ValueError(f"{self.folder} was made with {key}={self.config[key]}, not {value}")
        return self.config | {key: value for key, value in asked.items() if key in free}

    def say_other_equations(self):
        """One line if the concept files are not those with which the run was begun."""
        now = equations()
        if other := [file for file in now if self.equations.get(file, now[file]) != now[file]]:
            print(f"other equations than those with which {self.folder} was begun: {', '.join(other)} changed since")

    def save(self, state):
        """Writes the state of the training, keeping the one before, and the tables that follow from it."""
        if not self._lock:  # not the first of several processes
            return
        path = self.folder / CHECKPOINT
        content = packed(state | dict(config=self.config, data=self.data))
        if path.exists():
            replace(path, self.folder / PREVIOUS)
        write_atomically(path, content)
        self.write_tables(state["history"], state["histograms"])

    def write_tables(self, history, histograms):
        """Writes metrics.csv, histograms.json and config.json. A result.json of fewer epochs goes."""
        if not self._lock:
            return
        (self.folder / "result.json").unlink(missing_ok=True)
        text = io.StringIO()
        if history:
            writer = csv.DictWriter(text, history[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
        write_atomically(self.folder / "metrics.csv", text.getvalue().encode())
        write_atomically(self.folder / "histograms.json", json.dumps(histograms).encode() + b"\n")
        write_atomically(self.folder / "config.json", as_json(self.config | dict(equations=self.equations)))

    def keep_best(self, model, epoch, accuracy):
        """Writes best.pt."""
        if self._lock:
            best = dict(model=model.state_dict(), epoch=epoch, accuracy=accuracy, config=self.config, data=self.data)
            write_atomically(self.folder / BEST, packed(best))

    def keep_trained(self, model, accuracy):
        """Writes the folder of a network that was trained elsewhere: it has no history and no checkpoint."""
        self.keep_best(model, 0, accuracy)
        write_atomically(self.folder / "config.json", as_json(self.config | dict(equations=self.equations)))

    def load(self, name=CHECKPOINT):
        """What is in checkpoint.pt, or in the one before if that is damaged; or in best.pt. Tensors are on the CPU.

        Raises:
            ValueError: no such file is intact, or it is of something else. Nothing in it is executed.
        """
        try:
            return self._read(name)
        except ValueError as error:
            if name == BEST or not (self.folder / PREVIOUS).exists():
                raise
            state = self._read(PREVIOUS)
            print(f"{error}; the one before is used, of step {state['step']}")
            return state

    def _read(self, name):
        path = self.folder / name
        if not path.exists():
            reason = f"no epoch has ended: --resume {self.quoted}" if saved(self.folder) else "it was not saved here"
            raise ValueError(f"{self.folder} has no {name}: {reason}")
        try:
            with zipfile.ZipFile(path) as archive:  # its checksums
                if archive.testzip():
                    raise ValueError("its checksum is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
            missing = [key for key in PARTS[name] if key not in state]
        except Exception as error:  # a foreign file fails in many ways
            pointer = path.read_bytes().startswith(b"version https://git-lfs")
            said = "it is a Git LFS pointer, so run git lfs pull" if pointer else str(error).partition("\n")[0][:200]
            raise ValueError(f"{path} is damaged or not a checkpoint of this version: {said}") from None
        if missing:
            raise ValueError(f"{path} is damaged or not a checkpoint of this version: it has no {missing[0]!r}")
        for key, value in (getattr(self, "config", None) or {}).items():
            if key not in ("data_root", "epochs") and value != state["config"].get(key):
                raise ValueError(
                    f"{path} belongs to another training than config.json says: it was saved with "
                    f"{key}={state['config'].get(key)}, not {value}"
                )
        return state

    def check_data(self, known, dataset, other_frames=False, other_data=False):
        """Refuses to test a network on other data than those of its training, unless that is asked for.

        Args:
            known: what the run remembers of its data, see `data.identity`.
            other_frames: the data are recordings in another number of frames, so that the samples differ in any case.
            other_data: it is asked for; then a line says what differs.
        """
        now, but = data.identity(dataset), ("train", "test", "shape") if other_frames else ("train",)
        if len(known["classes"]) != len(now["classes"]):
            raise ValueError(
                f"the network of {self.folder} tells {len(known['classes'])} classes apart, but these data have "
                f"{len(now['classes'])}"
            )
        different = data.differences(known, now, but)
        if different and not other_data:
            raise ValueError(
                f"these data are not those of {self.folder}: {different}; to test on them, add --other-data"
            )
        if different:
            print(f"other data than those of the training: {different}")

    def finish(self, history, chance, broken=None, given_up=False):
        """Writes result.json and says how the run ended.

        Args:
            history: a dict for each epoch.
            chance: the accuracy of guessing.
            broken: the layer that was not finite, if the training ended by that.
            given_up: the training was cut off, because it was at chance.
        """
        accuracies = [row["test_accuracy"] for row in history]
        seconds = sum(row["seconds"] for row in history)
        result = dict(outcome=outcome(accuracies, chance, nonfinite=broken is not None))
        result |= dict(first_nonfinite_layer=broken) if broken else {}
        result |= dict(given_up=True) if given_up else {}
        last = ""
        if history:
            best = max(history, key=lambda row: row["test_accuracy"])
            result |= dict(test_accuracy=accuracies[-1], best_test_accuracy=best["test_accuracy"])
            result |= dict(best_epoch=best["epoch"], epochs=len(history), train_seconds=round(seconds, 1))
            last = f", test accuracy {accuracies[-1]:.2%}, best {best['test_accuracy']:.2%} (chosen on the test set)"
        result |= dict(torch=torch.__version__, config=self.config, data=self.data)
        if self._lock:
            write_atomically(self.folder / "result.json", as_json(result))
        cut = f", given up after {len(history)} epochs at chance" if given_up else ""
        print(f"{result['outcome']}{last}{cut}, {seconds:.0f} s of training")
        print(f"run folder: {self.folder}   its figures: python visualize.py all {self.quoted}")


def like(value):
    """The types that a setting may have in place of this value."""
    return (int, float) if type(value) in (int, float) else type(value)


def as_json(value):
    return (json.dumps(value, indent=2) + "\n").encode()


def packed(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def saved(folder):
    """Whether a folder holds a checkpoint."""
    return any((Path(folder) / name).exists() for name in (CHECKPOINT, PREVIOUS))


def holds_run(folder):
    """Whether there is a run in a folder, or what is left of one."""
    return saved(folder) or (Path(folder) / "config.json").exists()


def restore(module, state, path):
    """Loads a state dict into a network or an optimiser; one that does not fit is a ValueError that names `path`."""
    try:
        if isinstance(module, torch.optim.Optimizer):
            now, then = module.state_dict()["param_groups"], state["param_groups"]
            if [group.keys() for group in now] != [group.keys() for group in then]:
                raise ValueError("it was trained with another optimiser")
        module.load_state_dict(state)
        for p, values in getattr(module, "state", {}).items():  # an optimiser's
            shapes = {v.shape for v in values.values() if isinstance(v, torch.Tensor) and v.dim()}
            if shapes - {p.shape}:
                raise ValueError(f"the optimiser's state is of {shapes}, the parameter of {p.shape}")
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{path} belongs to another network or optimiser than its config.json and the program, as it is now, say: "
            f"{reason}"
        ) from None


def differing(run, other):
    """What must be equal in two trainings that are set side by side, and is not: a list of names of settings."""
    same = ["data", "arch", "plan", "width", "image_size", "epochs", "batch_size", "augment"]
    same += ["T"] * ("dann" not in (run.config["kind"], other.config["kind"]))  # DANN has no time
    found = [key for key in same if run.config.get(key) != other.config.get(key)]
    ours, theirs = run.load(BEST)["data"], other.load(BEST)["data"]
    return found + ["images"] * bool(not found and data.differences(ours, theirs))


def load_data_and_model(config, device):
    """The dataset and the network of a run's settings, on the device. The network is not initialised yet."""
    dataset = data.load(config["data"], config["data_root"], config["image_size"], device, config["T"])
    torch.manual_seed(config["seed"])
    names = ("T", "image_size", "width", *networks.NEURON_OPTIONS, *networks.CIRCUIT_OPTIONS["ei"])
    options = {name: config[name] for name in names} | dict(kind=config["kind"], plan=recipes.plan_of(config))
    model = networks.build(config["arch"], dataset.in_channels, dataset.n_classes, **options)
    return dataset, model.to(device)


def prepare(config, dataset, model):
    """E-I Init with the first training batch, once, before the first step. A control keeps its |Kaiming| weights."""
    if config["init"] == "ei":
        ei_init.initialize(model, data.first_batch(config, dataset)[0])


def outcome(accuracies, chance, nonfinite=False):
    """What became of a run, in the words of the paper's table on epsilon.

    Args:
        accuracies: test accuracy in [0, 1] after each epoch.
        chance: the accuracy of guessing, in [0, 1].
        nonfinite: the training ended, in the epoch after these, because a value became infinite or NaN.

    Returns:
        "failed to converge": never above twice chance (or, where chance is more than a third, halfway from chance to
        1). "collapsed (epoch N)": it was, and from epoch N (counted from 1) on stayed at most at 1.5 times chance, or
        became non-finite in epoch N. Else "converged".
    """
    if not any(a > min(2 * chance, (1 + chance) / 2) for a in accuracies):
        return "failed to converge"
    low = len(accuracies)
    while low and accuracies[low - 1] <= min(1.5 * chance, (1 + chance) / 2):
        low -= 1
    if low < len(accuracies) or nonfinite:
        return f"collapsed (epoch {low + 1})"
    return "converged"
