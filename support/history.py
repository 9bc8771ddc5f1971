"""Reading finished runs, for figures that need them. A reader of the paper may skip this file.

`trained_runs` finds the runs in a folder, `pick` chooses one of them by its settings, `networks_of` makes its networks.
If a run is missing, the message names the command that makes it.
"""

import copy
import csv
import json
from pathlib import Path

import numpy as np

from model import KINDS, circuits
from support import data
from support.console import quoted
from support.fast import accelerate
from support.measure import BINS
from support.parallel import pick_device
from support.recipes import COLUMNS, FULL, WHAT, option, parse, settings
from support.runs import BEST, CHECKPOINT, bad_part, holds_run, load_data_and_model, prepare, reopen, restore, saved

BEFORE, ANEW, AFTER = "at initialisation", "E-I Init with these data", "after training"

# By these settings runs are chosen in a folder that has several. Not every kind of network has each of the last four.
CHOICES = ("data", "arch", "plan", "seed", "width", "ei_ratio", "tau", "threshold", "alpha")
LACKS = dict(bn=("ei_ratio",), plain=("ei_ratio",), dann=("tau", "threshold", "alpha"))


class Missing(ValueError):
    """A run that a figure needs is not there. The message says how to get one."""


class Trained:
    """A run to draw from.

    Attributes:
        run, folder: the `Run` and its folder.
        config: its settings.
    """

    def __init__(self, folder, data_root=None):
        self.run, self.config = reopen(dict(data_root=data_root), folder)
        self.folder = self.run.folder

    def has(self, key):
        """Whether this kind of network has a setting at all: BN-SNN has no interneurons, DANN no membrane."""
        return key not in LACKS.get(self.config["kind"], ())

    def unusual(self):
        """The number of epochs, and what else of the training is not as the table of recipes has it: a dict."""
        same = [option(key, self.config[key]) for key in (*WHAT, "epochs")]
        usual = settings(parse(same))
        return {key: self.config[key] for key in COLUMNS if key == "epochs" or self.config[key] != usual[key]}

    def elsewhere(self):
        """Whether the network was trained by another program."""
        return (self.folder / BEST).exists() and not saved(self.folder) and self.run.load(BEST)["epoch"] == 0

    def _read(self, name, reader):
        resume = f"python train.py --resume {self.run.quoted}"
        try:
            with open(self.folder / name, encoding="utf-8") as file:
                return reader(file)
        except FileNotFoundError:
            if self.elsewhere():
                raise Missing(f"{self.folder} has no history: its network was trained elsewhere") from None
            if not saved(self.folder):
                raise Missing(f"{self.folder} has no {name}, nor a checkpoint to make it from") from None
            raise Missing(f"{self.folder} is not finished: {resume}") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.folder / name} cannot be read ({said}): {resume} writes it again") from None

    def metrics(self):
        """metrics.csv: a dict of numbers for each epoch. The list is empty if the first epoch was not finite."""
        needed = dict(epoch=int, train_loss=float, test_loss=float, test_accuracy=float)

        def read(file):
            return [{key: kind(row[key]) for key, kind in needed.items()} for row in csv.DictReader(file)]

        return self._read("metrics.csv", read)

    def result(self):
        """Outcome, best epoch and best accuracy from result.json. The last two are None if there was no epoch."""

        def read(file):
            result = dict(best_epoch=0, best_test_accuracy=0.0) | json.load(file)
            if part := bad_part(result, dict(outcome=str, best_epoch=int, best_test_accuracy=float)):
                raise ValueError(f"{part} is missing or not what it should be")
            if result["best_epoch"] == 0:
                return result["outcome"], None, None
            return result["outcome"], result["best_epoch"], result["best_test_accuracy"]

        return self._read("result.json", read)

    def histograms(self):
        """histograms.json as an array of counts: (epochs + 1, layers, 2, bins). The 2 are I_int and u."""

        def read(file):
            counts = []
            for epoch in json.load(file):
                counts.append([(layer["i_int"], layer["u"]) for layer in epoch])
            counts = np.array(counts, dtype=float)
            if counts.ndim != 4 or counts.shape[3] != BINS["n"]:
                raise ValueError("not of this version")
            return counts

        return self._read("histograms.json", read)


def all_runs(folder, data_root):
    """Every run in a folder of runs, or the one that the folder is."""
    if holds_run(folder):
        return [Trained(folder, data_root)]
    runs = []
    for path in sorted(filter(holds_run, folder.glob("*/"))):
        try:
            runs.append(Trained(path, data_root))
        except ValueError as error:
            print(f"left out: {error}")
    return runs


def choice(key, asked, runs, folder):
    """The value of a setting that the runs to draw from have: what is asked for, or what they have, or the paper's.

    Raises:
        ValueError: they have several values, the paper's is not among them, and none is asked for.
    """
    there = {run.config[key] for run in runs if run.has(key)}
    if asked is not None:
        return asked
    if len(there) == 1:
        return there.pop()
    if there and WHAT[key] not in there:
        values = ", ".join(str(value) for value in sorted(there))
        name = key.replace("_", "-")
        raise ValueError(f"{folder} has runs of several kinds, {key}: {values}. Choose one with --{name}")
    return WHAT[key]


def trained_runs(args):
    """The runs in the folder `args.runs`, or the one that it is: of one network, dataset and seed.

    What is asked for by `args` decides. Else, where there is a choice: VGG-8, the digits, seed 0, and the paper's width
    and neurons.

    Raises:
        Missing: there is none.
        ValueError: see `choice`; or a single run that cannot be read.
    """
    folder = Path(args.runs)
    runs, wanted = all_runs(folder, args.data_root), {}
    for key in CHOICES:
        wanted[key] = choice(key, getattr(args, key), runs, folder)
        runs = [run for run in runs if not run.has(key) or run.config[key] == wanted[key]]
    options = {key: value for key, value in wanted.items() if value != WHAT[key]}
    if runs:
        options.update(runs[0].unusual())
    root = runs[0].config["data_root"] if runs else args.data_root
    if root and root != WHAT["data_root"]:
        options["data_root"] = root
    out = folder.resolve().parent if holds_run(folder) else folder
    if out.resolve() != Path("runs").resolve():
        options["out"] = out
    command = ["python reproduce.py"]
    command += [f"--{key.replace('_', '-')} {quoted(value)}" for key, value in options.items()]
    if not runs:
        raise Missing(f"{folder} has no such run in it: {' '.join(command)}")
    place = f"in {folder}: {' '.join(command)}"
    if holds_run(folder):
        place = f"in {folder}, which is one run; this figure compares several. First: {' '.join(command)}"
    for run in runs:
        run.place = place  # where the others are or will be, for messages
    return runs


def pick(runs, **wanted):
    """The run with these settings, and with those of the paper's method where nothing else is said.

    If there is one run only and nothing is said, it is that run, whatever its settings.
    """
    if len(runs) == 1 and not wanted:
        return runs[0]
    method = {**FULL, **wanted}
    found = [run for run in runs if all(run.config[key] == value for key, value in method.items())]
    if not found:
        said = " ".join(f"{key}={value}" for key, value in wanted.items())
        said = f"{said} and otherwise the paper's method" if said else "the paper's method"
        raise Missing(f"no run with {said} {runs[0].place}")
    if len(found) > 1:
        print(f"{found[0].folder} is drawn, not {', '.join(str(run.folder) for run in found[1:])}")
    return found[0]


def usual_settings(args, shown=None):
    """The paper's method, with data, network and neurons of the runs if there are any, or else those asked for.

    Args:
        shown: names of the networks that are drawn, where it is not the runs' own.
    """
    try:
        configs = [run.config for run in trained_runs(args)]
        config = min(configs, key=lambda c: KINDS.index(c["model"]))  # an E-I SNN if there is one
        keys = [*CHOICES, "data_root", "image_size", "batch_size"]
        keys += ["T"] * (config["kind"] != "dann")  # DANN has no time
        given = {key: config[key] for key in keys}
    except Missing:
        given = {key: getattr(args, key) for key in (*CHOICES, "data_root")}
    options = [option(key, value) for key, value in given.items() if value is not None]
    config = settings(parse(options))
    shown = shown or " ".join(filter(None, (config["arch"], config["plan"])))
    print(f"an E-I network, {shown}, with" + " {data}, T={T}, width {width:g}, seed {seed}".format(**config))
    return config


def networks_of(run, fast=True, end=False):
    """The dataset of a run, and its network at initialisation and after training: a dict.

    The initialisation is drawn again from the run's seed. On another kind of device it is another draw. Of a network
    that was trained elsewhere it is E-I Init with these data. fast: with the fused forms of `support/fast.py`, else
    with the plain equations. end: as the training left it, where that is kept, else at its best epoch.

    Raises:
        ValueError: the data are not those of the run. With a network that was trained elsewhere any are taken.
    """
    name = CHECKPOINT if end and saved(run.folder) else BEST
    state, elsewhere = run.run.load(name), run.elsewhere()
    dataset, before = load_data_and_model(run.config, pick_device())
    if elsewhere:
        print(f"{run.folder}: trained elsewhere, so '{ANEW}' is not what it started from")
    elif different := data.differences(state["data"], data.identity(dataset)):
        raise ValueError(
            f"these data are not those of {run.folder}: {different}; say with --data-root where its own are"
        )
    prepare(run.config, dataset, before)
    if fast:
        accelerate(before, data.first_batch(run.config, dataset)[0])
    after = copy.deepcopy(before)
    restore(after, state["model"], run.folder / name)
    return dataset, {ANEW if elsewhere else BEFORE: before.eval(), AFTER: after.eval()}


def with_circuits(network):
    """The network, if it has E-I circuits."""
    if not circuits(network):
        raise Missing("this network has no E-I circuits: draw it from a run with --model ei")
    return network
