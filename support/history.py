"""Reading runs for figures: what is in their files, whether two were made alike, and which there are in a folder."""

import csv
import json
from operator import itemgetter
from pathlib import Path

import numpy as np

from support import data
from support.measure import BINS
from support.recipes import FULL, WHAT, parse, quoted, settings
from support.runs import BEST, Run, holds_run, saved

# Settings that a kind of network has of its own, or not at all.
OWN = ("lr", "weight_decay", "warmup_epochs", "warmup_from", "clip_norm")
LACKS = dict(ei=(), bn=("ei_ratio",), plain=("ei_ratio",), dann=("tau", "threshold", "alpha", "T"))


def read(run, name, take):
    """take(what is in a CSV or JSON file of a run). One that is missing or damaged is a ValueError of one line."""
    try:
        with open(run.folder / name, encoding="utf-8") as file:
            found = json.load(file) if name.endswith("json") else list(csv.DictReader(file))
            if not found and file.tell():
                raise ValueError("there is nothing in it")
            return take(found)
    except FileNotFoundError:
        reason = f"{run.folder} has no {name}"
    except Exception as error:  # a damaged file fails in many ways
        reason = f"{run.folder / name} is damaged ({type(error).__name__}: {error})"
    again = f"python train.py --resume {run.quoted} writes it"
    if not saved(run.folder):
        again = "there is no checkpoint to write it again, or it has no history: its network was trained elsewhere"
    raise ValueError(f"{reason}: {again}")


def outcome(run):
    """What became of a run, in words, and its `metrics`."""
    return read(run, "result.json", lambda result: result["outcome"].strip()), metrics(run)


def metrics(run):
    """metrics.csv: a dict of numbers for each epoch. The list is empty if the first epoch was not finite."""

    def numbers(row):
        found = {key: float(row[key]) for key in ("train_loss", "test_loss", "test_accuracy")}
        if not np.isfinite(list(found.values())).all():
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


def data_of(run):
    """What a run remembers of its data, see `data.identity`."""
    if not (run.folder / "result.json").exists():  # an epoch has ended, but not the training
        return run.load(BEST)["data"]
    parts = ("classes", "shape", "train", "test")
    return read(run, "result.json", lambda result: {part: result["data"][part] for part in parts})


def differing(run, other):
    """What must be equal in two runs that are set side by side, and is not: names of settings, or "images"; a list.

    Kinds of network may differ in what each has of its own, e.g. the learning rate. So may ablations and seeds.
    """
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
        self.folder, self.found, one = Path(args.runs), [], holds_run(args.runs)
        self.given = {key: vars(args)[key] for key in settings(parse([])) if vars(args)[key] is not None}
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
        """The run with these settings, else those of the paper's method; if nothing is said, the only run there is."""
        if len(self.found) == 1 and not wanted:
            return self.found[0]
        method = {key: self.given.get(key, value) for key, value in FULL.items()} | wanted
        fitting = [run for run in self.found if method.items() <= run.config.items()]
        if not fitting:
            said = " ".join(f"{key}={value}" for key, value in (self.given | method).items())
            out = quoted(self.folder.parent if holds_run(self.folder) else self.folder)
            how = f"python reproduce.py --out {out}, with the options of the others"
            raise ValueError(f"{self.folder} has no run with {said}: {how}")
        best = max(fitting, key=lambda run: sum(run.config[key] == value for key, value in WHAT.items()))
        if len(fitting) > 1:
            print(f"of {len(fitting)} such runs {best.folder} is drawn, which has most of the paper's settings")
        return best
