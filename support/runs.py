"""The run folder: what a training writes, so that it can be stopped and goes on where it was.

    checkpoint.pt       the whole state of the training, at the end of an epoch or where it was stopped, with the
                        distributions of I_int and u (`measure.histograms`) at the start and after each epoch
    checkpoint.prev.pt  the one before, for when that one turns out to be damaged
    best.pt             the network of the epoch with the best test accuracy
    config.json         every setting, and a fingerprint of the equations with which the run was begun
    metrics.csv         a line an epoch
    result.json         the outcome, when the run has ended
    .lock               held by the process that trains; the system frees it when that process ends, however it ends

Every file is written under another name and then renamed, so it is the old or the new one, whole. Ctrl-C, SIGTERM and a
closed terminal lose nothing. A power cut or kill -9 loses the epoch in progress. Random numbers come from generators
seeded by (seed, step), so on a CPU a resumed run ends with the same bits as one that was never stopped."""

import ast
import csv
import io
import json
import os
import time
import zipfile
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

import ei_init
import model as networks
from support import data, explained, parallel, recipes
from support.fast import checksum, use_bfloat16
from support.recipes import FULL, LACKS, WHAT

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "checkpoint.prev.pt", "best.pt"


def replace(source, target):
    """`os.replace`, tried again for a second where another program (a virus scanner) holds the file for a moment."""
    for _ in range(20):
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.05)
    os.replace(source, target)


def write_atomically(path, content, keep=None):
    """Writes bytes to a file, all or none (an OSError). What was there is moved to the path `keep`, if any."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            replace(path, keep)
        replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; what was there before is intact") from None


def equations():
    """A fingerprint of each concept file, {"lif.py": "..."}: without comments, docstrings, layout and demonstration."""
    found = {}
    for name in ("lif.py", "ei_prop.py", "inhibition.py", "ei_init.py", "baselines.py", "homeostasis.py", "model.py"):
        tree = ast.parse(Path(networks.__file__).with_name(name).read_text(encoding="utf-8"))
        tree.body = [part for part in tree.body if not ast.unparse(part).startswith("if __name__ ==")]
        found[name] = checksum(tree)
    return found


class Run:
    """A run folder. `create` makes a new one and `resume` goes on with one: both keep it from other processes until
    `close`. `Run(folder)` alone reads, also while another process trains. ValueError, OSError: none, or a damaged one.
    folder, config, data: its path, its settings, and what is remembered of its data (`data.identity`)."""

    def __init__(self, folder, config=None):
        self.folder = Path(folder).expanduser()
        self.quoted = f'"{self.folder}"' if " " in str(self.folder) else str(self.folder)  # for commands to be typed
        self.data, self._lock, self.equations = None, None, {}
        self.config = self._read_config() if config is None else config

    def _read_config(self):
        path = self.folder / "config.json"
        try:
            config = json.loads(data.content_of(path))
            self.equations = dict(config.pop("equations", {}))
            return checked(config)
        except Exception as error:  # a damaged file fails in many ways
            if not saved(self.folder):
                raise ValueError(f"{self.folder} is not a run folder: {path} cannot be read ({error})") from None
            print(f"{path} cannot be read ({error}): the settings in the checkpoint are used")
            return self.load()["config"]

    @classmethod
    def create(cls, folder, config, choose=False):
        """A new run, locked. Where the folder holds one or is locked: a ValueError, or (choose) folder-2, ..."""
        for n in count(1):
            run = cls(folder if n == 1 else f"{folder}-{n}", config)
            run.folder.mkdir(parents=True, exist_ok=True)
            try:
                run.lock()
                if parallel.rank() or not holds_run(run.folder):
                    run.equations = equations()
                    return run
                run.close()
                resume = f"--resume {run.quoted}, or " * saved(run.folder)
                raise ValueError(f"{folder} already holds a run: {resume}choose another --out")
            except ValueError:
                if not choose:
                    raise

    def lock(self):
        """Keeps the folder from other processes until `close`, or until the process is gone."""
        if parallel.rank():  # with torchrun only the first process writes
            return
        self._lock = FileLock(self.folder / ".lock", timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            self._lock = None
            raise ValueError(f"{self.folder} is in use: another process trains in it; wait for its end") from None
        except (OSError, NotImplementedError):  # no locks here; if nothing can be written here, `save` says so
            pass

    def close(self):
        """Lets go of the folder. One in which nothing was saved disappears."""
        if self._lock:
            with suppress(OSError):  # it holds something else
                if not holds_run(self.folder):
                    (self.folder / ".lock").unlink(missing_ok=True)
                    self.folder.rmdir()
            self._lock.release()
            self._lock = None

    def resume(self, config):
        """Locks the folder and reads the state to go on with. `config`: the settings from now on."""
        self.lock()
        state = self.load()
        self.say_other_equations()
        self.config = config
        return state

    def settings(self, given, free=("data_root",)):
        """The settings, and what is `given` (None: not) of those that are `free`. A ValueError if others differ."""
        for key, value in self.config.items():
            if key not in free and (new := given.get(key)) not in (None, value):
                raise ValueError(f"{self.folder} was made with {key}={value}, not {new}: leave it out, or say the same")
        return self.config | {key: given[key] for key in free if given.get(key) is not None}

    def say_other_equations(self):
        """One line if the concept files are not those with which the run was begun, as far as it knows them."""
        if other := [file for file, now in equations().items() if self.equations.get(file, now) != now]:
            print(f"other equations than those with which {self.folder} was begun: {', '.join(other)} changed since")

    def _write(self, name, content, keep=None):
        """Writes bytes or a dict to a file of the folder, if this process holds the lock."""
        if not self._lock:
            return
        if name.endswith(".pt"):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            content = buffer.getbuffer()
        elif isinstance(content, dict):
            content = (json.dumps(content, indent=2) + "\n").encode()
        write_atomically(self.folder / name, content, keep and self.folder / keep)

    def save(self, state):
        """Writes the state of the training, keeping the one before, and the tables that follow from it."""
        self._write(CHECKPOINT, state | dict(config=self.config, data=self.data), keep=PREVIOUS)
        self.write_tables(state["history"])

    def write_tables(self, history):
        """Writes metrics.csv and config.json. A result.json of fewer epochs goes."""
        table = [list(history[0]), *(row.values() for row in history)] if history else []
        self._write("metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in table).encode())
        self._write("config.json", self.config | dict(equations=self.equations))
        if self._lock and len(history) < self.config["epochs"]:
            (self.folder / "result.json").unlink(missing_ok=True)

    def keep_best(self, model, epoch, accuracy):
        """Writes best.pt. A network that was trained elsewhere is of epoch 0; such a run has no more than that."""
        state = dict(model=model.state_dict(), epoch=epoch, accuracy=accuracy, config=self.config, data=self.data)
        self._write(BEST, state)
        self._write("config.json", self.config | dict(equations=self.equations))

    def load(self, name=CHECKPOINT):
        """What is in checkpoint.pt, or in the one before if that is damaged; or in best.pt. Tensors are on the CPU.
        ValueError: no such file is intact, or it is of something else. Nothing in it is executed."""
        path = self.folder / name
        try:
            content = data.content_of(path)
            if zipfile.ZipFile(io.BytesIO(content)).testzip():
                raise ValueError("its checksum is wrong")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            checked(state["config"])
            if ("optimizer" in state) == (name == BEST) or not {"model", "data"} <= state.keys():
                raise ValueError(f"it is no {name}")
            return state
        except FileNotFoundError:
            said = f"there is no {path}: it is written after an epoch, and not kept in results/"
        except Exception as error:  # a foreign file fails in many ways
            said = f"{path} cannot be used ({' '.join(str(error).split()).partition('. ')[0][:300]})"
        if name != CHECKPOINT or not (self.folder / PREVIOUS).exists():
            raise ValueError(said)
        print(f"{said}; the one before is used")
        return self.load(PREVIOUS)

    def finish(self, history, chance, broken=None, given_up=False):
        """Writes result.json and says how the run ended. broken: the layer that was not finite, if that ended it."""
        accuracies = [row["test_accuracy"] for row in history]
        said = outcome(accuracies, chance, nonfinite=broken is not None)
        result = dict(outcome=said, first_nonfinite_layer=broken, given_up=given_up)
        if broken:
            print(f"epoch {len(history) + 1}: a number is not finite; first layer with such values: {broken}")
        if history:
            best, seconds = max(history, key=lambda row: row["test_accuracy"]), sum(row["seconds"] for row in history)
            result |= dict(test_accuracy=accuracies[-1], best_test_accuracy=best["test_accuracy"])
            result |= dict(best_epoch=best["epoch"], epochs=len(history), train_seconds=round(seconds, 1))
            said += f", test accuracy {accuracies[-1]:.2%}, best {best['test_accuracy']:.2%} (chosen on the test set), "
            said += f"given up after {len(history)} epochs at chance, " * given_up + f"{seconds:.0f} s of training"
        self._write("result.json", result | dict(torch=torch.__version__, config=self.config, data=self.data))
        print(f"{said}\nrun folder: {self.folder}   its figures: python visualize.py all {self.quoted}")


def checked(config):
    """These settings. They are not those of a run of this version of the program: a ValueError."""
    usual = recipes.SETTINGS
    if odd := config.keys() ^ usual or {k for k, v in usual.items() if k != "eps" and type(v)(config[k]) != config[k]}:
        raise ValueError(f"damaged, or of another version: see its {min(odd)}")
    return config


def saved(folder):
    """Whether a folder holds a checkpoint."""
    return (Path(folder) / CHECKPOINT).exists() or (Path(folder) / PREVIOUS).exists()


def holds_run(folder):
    """Whether there is a run in a folder, or what is left of one."""
    return saved(folder) or (Path(folder) / "config.json").exists()


def fitting(optimizer):
    """What the state of an optimiser is of: its class, and the shapes of its parameters in each group."""
    return f"{type(optimizer).__name__} {[[tuple(p.shape) for p in g['params']] for g in optimizer.param_groups]}"


def restore(module, state, path):
    """Loads a state dict into a network or an optimiser; one that does not fit is a ValueError that names `path`."""
    with explained(f"{path} is of another network or optimiser than config.json and train.py"):
        if isinstance(module, torch.optim.Optimizer) and state.get("of", fitting(module)) != fitting(module):
            raise ValueError("it was trained with another optimiser")
        module.load_state_dict(state)


def load_data_and_model(config, device, plain=False):
    """The dataset and the network of a run's settings, on the device. The network is not initialised yet.
    plain: whether only plain equations will run. ValueError: these are in float32, and the settings say bf16."""
    if plain and config["precision"] == "bf16":
        raise ValueError("--plain is for float32: leave it out, or (but not with --resume) give --precision float32")
    how = (config["data_root"], config["image_size"], device, config["T"], config["augment"])
    dataset = data.load(config["data"], *how)
    torch.manual_seed(config["seed"])
    names = ("T", "image_size", "width", *networks.NEURON_OPTIONS, *networks.CIRCUIT_OPTIONS["ei"])
    plan = [int(word) if word.isdecimal() else word for word in config["plan"].split("-") if word]
    options = {name: config[name] for name in names} | dict(kind=config["kind"], plan=plan or None)
    model = networks.build(config["arch"], dataset.in_channels, dataset.n_classes, **options)
    model.to(device)
    if config["precision"] == "bf16":
        use_bfloat16(model)
    return dataset, model


def prepare(config, dataset, model):
    """E-I Init with the first training batch, once, before the first step. A control keeps its |Kaiming| weights."""
    if config["init"] == "ei":
        ei_init.initialize(model, data.first_batch(config, dataset)[0])


def outcome(accuracies, chance, nonfinite=False):
    """What became of a run with these test accuracies after each epoch, in the words of the paper's table on epsilon.
    "failed to converge": never above twice chance (or, where chance is more than a third, halfway from chance to 1).
    "collapsed (epoch N)": it was, and from epoch N on is at most 1.5 times chance, or `nonfinite`. Else "converged"."""
    if not any(a > min(2 * chance, (1 + chance) / 2) for a in accuracies):
        return "failed to converge"
    low = len(accuracies)
    while low and accuracies[low - 1] <= min(1.5 * chance, (1 + chance) / 2):
        low -= 1
    return f"collapsed (epoch {low + 1})" if low < len(accuracies) or nonfinite else "converged"


# Settings of which each kind of network has its own.
OWN = ("lr", "weight_decay", "warmup_epochs", "warmup_from", "clip_norm")


def read(run, name, take):
    """take(the text of a file of a run). One that is missing or damaged is a ValueError of one line."""
    with explained(f"{run.folder / name} is missing or damaged, --resume {run.quoted} writes it from a checkpoint"):
        return take(data.content_of(run.folder / name).decode())


def result_of(run):
    """What became of a run, in words, and its `metrics`."""
    return read(run, "result.json", lambda text: json.loads(text)["outcome"]), metrics(run)


def metrics(run):
    """metrics.csv: a dict of numbers for each epoch. The list is empty if the first epoch was not finite."""

    def numbers(text):
        rows, names = list(csv.DictReader(io.StringIO(text))), ("train_loss", "test_loss", "test_accuracy")
        found = [dict(epoch=int(row["epoch"])) | {name: float(row[name]) for name in names} for row in rows]
        if text and not (rows and np.isfinite([list(row.values()) for row in found]).all()):
            raise ValueError("there is nothing in it, or a number is not finite")
        return found

    return read(run, "metrics.csv", numbers)


def histograms(run):
    """The histograms in a run's checkpoint, of I_int and u, as an array of counts: (epochs + 1, layers, 2, bins)."""
    found = run.load()["histograms"]
    with explained(f"{run.folder} was begun by another version of the program, so there are no histograms"):
        return torch.stack(found).double().numpy()


def data_of(run):
    """What a run remembers of its data, see `data.identity`."""
    if not (run.folder / "result.json").exists():  # an epoch has ended, but not the training
        return run.load(BEST)["data"]
    return read(run, "result.json", lambda text: json.loads(text)["data"])


def differing(run, other):
    """What must be equal in two runs that are set side by side, and is not: names of settings, or "images"; a list.
    Kinds of network may differ in what each has of its own, e.g. the learning rate. So may ablations and seeds."""
    kinds = {run.config["kind"], other.config["kind"]}
    free = {*FULL, "data_root", "seed"}.union(*map(LACKS.get, kinds), OWN if len(kinds) == 2 else ())
    found = [key for key in run.config if key not in free and run.config[key] != other.config.get(key)]
    ours, theirs = data_of(run), data_of(other)
    other_frames = "T" in free and ours["shape"] != theirs["shape"]  # of the same recordings
    different = data.differences(ours, theirs, ("train", "test", "shape") if other_frames else ())
    return found or ["images"] * bool(different)


class Runs:
    """The runs in the folder `args.runs`, or the one that it is, which have the settings that are given in `args`."""

    def __init__(self, args):
        self.folder, self.found, self.said, one = Path(args.runs), [], [], holds_run(args.runs)
        self.given = {key: vars(args)[key] for key in recipes.SETTINGS if vars(args)[key] is not None}
        root = self.given.pop("data_root", None)
        for path in [self.folder] if one else sorted(filter(holds_run, self.folder.glob("*/"))):
            try:
                run = Run(path)
                run.config["data_root"] = root or run.config["data_root"]
                asked = {key: value for key, value in self.given.items() if key not in LACKS[run.config["kind"]]}
                self.found += [run] if asked.items() <= run.config.items() else []
            except ValueError as error:
                if one:
                    raise
                print(f"left out: {error}")

    def pick(self, **wanted):
        """The run with these settings, else the paper's; if none is said, the only one. Names other equations once."""
        lacks = LACKS[wanted.get("kind", self.given.get("kind", "ei"))]
        method = {key: self.given.get(key, value) for key, value in FULL.items() if key not in lacks} | wanted
        fitting = [run for run in self.found if method.items() <= run.config.items()]
        alone = len(self.found) == 1 and wanted.items() <= self.found[0].config.items()
        fitting = self.found if alone else fitting
        if not fitting:
            said = " ".join(f"{key}={value}" for key, value in (self.given | method).items())
            raise ValueError(f"{self.folder} has no run with {said}: reproduce.py trains it, with the others' options")
        best = max(fitting, key=lambda run: sum(run.config[key] == value for key, value in WHAT.items()))
        if best not in self.said:
            self.said.append(best)
            if len(fitting) > 1:
                print(f"of {len(fitting)} such runs {best.folder} is drawn, the nearest to the defaults")
            best.say_other_equations()
        return best
