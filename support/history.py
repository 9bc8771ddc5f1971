"""Reading runs for figures: which there are in a folder, what they wrote, and whether two of them were made alike."""

import csv
import json
import math
from operator import itemgetter
from pathlib import Path

import numpy as np

from support import data
from support.console import quoted
from support.measure import BINS
from support.recipes import COLUMNS, FULL, WHAT, option
from support.runs import BEST, Run, holds_run, saved

KIND = "model"  # the setting that says which kind of network it is
LACKS = dict(ei=(), bn=("ei_ratio",), plain=("ei_ratio",), dann=("tau", "threshold", "alpha", "T"))  # settings, by kind
CHOICES = [key for key in WHAT if key not in (*FULL, "data_root")]  # data, network, neurons, seed
ALIKE = ("epochs", "batch_size", "image_size", "T")  # of runs side by side, where they have it


def read(run, name, take):
    """take(what is in a CSV or JSON file of a run). A file that is missing or damaged is a ValueError of one line."""
    try:
        with open(run.folder / name, encoding="utf-8") as file:
            return take(json.load(file) if name.endswith("json") else list(csv.DictReader(file)))
    except FileNotFoundError:
        reason = f"{run.folder} has no {name}"
    except Exception as error:  # a damaged file fails in many ways
        reason = f"{run.folder / name} is damaged ({type(error).__name__}: {error})"
    advice = "there is no checkpoint to make it from, so it has no history: its network was trained elsewhere"
    raise ValueError(f"{reason}; {f'python train.py --resume {run.quoted} makes it' if saved(run.folder) else advice}")


def metrics(run):
    """metrics.csv: a dict of numbers for each epoch. The list is empty if the first epoch was not finite."""

    def numbers(row):
        found = {key: float(row[key]) for key in ("train_loss", "test_loss", "test_accuracy")}
        if not all(map(math.isfinite, found.values())):
            raise ValueError("a number is not finite")
        return dict(epoch=int(row["epoch"])) | found

    return read(run, "metrics.csv", lambda rows: [numbers(row) for row in rows])


def histograms(run):
    """histograms.json as an array of counts: (epochs + 1, layers, 2, bins). The 2 are I_int and u."""

    def counts(epochs):
        found = np.array([list(map(itemgetter("i_int", "u"), layers)) for layers in epochs], dtype=float)
        if found.shape[2:] != (2, BINS["n"]) or not np.isfinite(found).all():
            raise ValueError("not the counts of this version")
        return found

    return read(run, "histograms.json", counts)


def differing(run, other):
    """What was not made alike in two runs that are to stand side by side: "data" and names of settings; a list.

    Of two networks of one kind every setting of the recipe counts, else `ALIKE`.
    """
    kinds = run.config[KIND], other.config[KIND]
    lacking = {*LACKS[kinds[0]], *LACKS[kinds[1]]}
    keys = COLUMNS if kinds[0] == kinds[1] else ALIKE
    found = [key for key in keys if key not in lacking and run.config[key] != other.config[key]]
    mine, others = data_of(run), data_of(other)
    frames = "T" in lacking and mine["shape"] != others["shape"]  # other numbers of frames of the same recordings
    different = data.differences(mine, others, ("train", "test", "shape") if frames else ())
    return ["data"] * bool(different) + found


def data_of(run):
    """What a run remembers of its data, see `data.identity`."""
    if not (run.folder / "result.json").exists():
        return run.load(BEST)["data"]
    known = itemgetter("classes", "shape", "train", "test")
    return read(run, "result.json", lambda result: known(result["data"]) and result["data"])


class Runs:
    """The runs in a folder, or the one that it is.

    Args:
        folder: its path.
        given: settings by name; only runs with these are taken. Where several data, networks, seeds or neurons are
            there, and none is given: those with the paper's.
    """

    def __init__(self, folder, given):
        self.folder, self.found, one = Path(folder), [], holds_run(folder)
        for path in [folder] if one else filter(holds_run, sorted(self.folder.glob("*/"))):
            try:
                self.found.append(Run(path))
            except ValueError as error:
                if one:
                    raise
                print(f"left out: {error}")
        moved = {key: given.pop(key) for key in ("data_root",) if key in given}
        for run in self.found:
            run.config = WHAT | run.config | moved
        for key in [*given, *CHOICES]:
            having = [run for run in self.found if key not in LACKS[run.config[KIND]]]
            there, value = {run.config[key] for run in having}, given.get(key, WHAT.get(key))
            if key in given or len(there) > 1:
                if key not in given and value not in there:
                    values = ", ".join(map(str, sorted(there)))
                    raise ValueError(f"{folder} has runs of several kinds, {key}: {values}. Choose one with --{key}")
                self.found = [run for run in self.found if run not in having or run.config[key] == value]
        shown, out = given | moved, self.folder.parent if one else self.folder
        if self.found:
            config = self.found[0].config
            shown |= {key: config[key] for key in (*CHOICES, *ALIKE, "data_root") if key not in LACKS[config[KIND]]}
        options = [option(key, value) for key, value in shown.items() if value != WHAT.get(key) and key not in FULL]
        self.advice = " ".join(map(quoted, ["python", "reproduce.py", f"--out={out}", *options]))
        self.method = FULL | {key: value for key, value in given.items() if key in FULL}

    def pick(self, **wanted):
        """The run with these settings, and those of the paper's method where nothing else is said.

        If there is one run only and nothing is said, it is that run, whatever its settings.
        """
        if len(self.found) == 1 and not wanted:
            return self.found[0]
        method = self.method | wanted
        fitting = [run for run in self.found if method.items() <= run.config.items()]
        if not fitting:
            said = " ".join(f"{key}={value}" for key, value in method.items())
            raise ValueError(f"{self.folder} has no run with {said}: {self.advice}")
        if len(fitting) > 1:
            print(f"{fitting[0].folder} is drawn, not {', '.join(str(run.folder) for run in fitting[1:])}")
        return fitting[0]
