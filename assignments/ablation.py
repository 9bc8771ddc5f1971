"""What `check.py` sees in the results of A5. Students need not read this file."""

import csv

import numpy as np
from probes import HERE, Problem, explain

CONDITIONS, SEEDS, EPOCHS = ("full", "eps=1e-8", "no STE", "no E-I Init"), (0, 1, 2, 3, 4), 5
N_TRAIN, N_TEST, BATCH = 1437, 360, 32
N_BATCHES = N_TRAIN // BATCH  # of an epoch
COLUMNS = dict(condition=str, seed=int, steps=int, g_i=float, first_weight=float, first_loss=float, lowest=float)
COLUMNS |= dict(by_epoch=lambda text: [float(a) for a in text.split()], test_accuracy=float)


def rows_of(lines, source):
    """The lines of an experiment, dicts of text, as dicts of numbers; a Problem names what is wrong in which line."""
    rows = []
    for i, line in enumerate(lines, 2 if source == "results.csv" else 1):
        place = f"{source}, line {i}"
        if missing := [name for name in COLUMNS if line.get(name) is None]:
            semicolons = (
                " It has semicolons, as some tables save it: let write_csv write it." if ";" in str(line) else ""
            )
            raise Problem(f"{place}: there is no {missing[0]}; the columns are {', '.join(COLUMNS)}.{semicolons}")
        row = {}
        for name, kind in COLUMNS.items():
            try:
                row[name] = kind(line[name])
            except ValueError:
                raise Problem(f"{place}: {name} is {line[name][:40]!r}, which is no number") from None
            numbers = [] if kind is str else np.atleast_1d(row[name]).tolist()
            if not all(abs(n) < 1e12 for n in numbers):
                raise Problem(f"{place}: {name} is {line[name][:40]}, and it should be a number of usual size")
        if not row["by_epoch"]:
            raise Problem(f"{place}: by_epoch is empty")
        rows.append(row)
    return rows


def read_lines(path):
    """results.csv as a list of dicts of text; a Problem if it is none."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise Problem("not done yet: there is no results.csv") from None
    except (OSError, UnicodeError, csv.Error):
        raise Problem("results.csv cannot be read as text; let write_csv write it") from None


def experiment(module, conditions, seeds, epochs):
    """What a student's experiment returns, as the lines that would stand in results.csv; or a text that says what is
    wrong with it."""
    try:
        if not callable(getattr(module, "experiment", None)):
            return "the file has no such function"
        rows = module.experiment(tuple(conditions), tuple(seeds), epochs)
        if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
            return f"it returns {type(rows).__name__}, not a list of dicts"
        lines = [{str(name): str(value) for name, value in row.items()} for row in rows]
        for row, line in zip(rows, lines, strict=True):
            if "by_epoch" in row:
                line["by_epoch"] = " ".join(str(float(a)) for a in row["by_epoch"])
        return lines
    except (Exception, SystemExit) as error:
        return explain(error, HERE)


def first_layer(x):
    """What E-I Init gives to the first layer for images x, (B, 8, 8), shown for two time steps each: g_I and m."""
    x = np.concatenate([x, x]).astype(np.float64) / 16
    square, var, d = (x**2).mean(), x.var(0, ddof=1).mean(), 9
    return np.sqrt(square + var) / (np.sqrt(d) * x.mean()), np.sqrt(var / (d * (square + var)))


def near(a, b):
    """Whether two numbers are the same but for rounding in float32."""
    return abs(a - b) <= 5e-5 * abs(b)


def fault(rows, conditions=CONDITIONS, seeds=SEEDS, epochs=EPOCHS):
    """What is wrong with an experiment: (name of the mistake or None, sentence); or None if nothing is."""
    wanted = [(condition, seed) for condition in conditions for seed in seeds]
    present = [(row["condition"], row["seed"]) for row in rows]
    for key in wanted:
        if present.count(key) != 1:
            return None, f"There are {present.count(key)} lines for {key[0]!r}, seed {key[1]}, and there should be 1."
    rows = [row for row in rows if (row["condition"], row["seed"]) in wanted]
    conditions, seeds = tuple(conditions), tuple(seeds)
    for find in (of_steps, of_start, of_clamp, of_accuracy):
        if found := find(rows, conditions, seeds, epochs):
            return found
    return None


def of_steps(rows, conditions, seeds, epochs):
    few, many = (f(rows, key=lambda row: row["steps"]) for f in (min, max))
    if few["steps"] != many["steps"]:
        return "unequal steps", (
            f"{few['condition']!r}, seed {few['seed']}, made {few['steps']} optimiser steps, {many['condition']!r}, "
            f"seed {many['seed']}, made {many['steps']}. Networks that are compared need the same number."
        )
    right = N_BATCHES * epochs
    if few["steps"] != right or any(len(row["by_epoch"]) != epochs for row in rows):
        return None, (
            f"Each run made {few['steps']} optimiser steps, and by_epoch has {len(rows[0]['by_epoch'])} accuracies. "
            f"With {epochs} epochs there should be {right} steps and {epochs} accuracies."
        )
    return None


def of_start(rows, conditions, seeds, epochs):
    """g_i, first_weight and first_loss show what a run started from."""
    with np.load(HERE / "digits.npz") as file:
        x = file["x"]
    firsts = {s: first_layer(x[np.random.RandomState(1000 * s).permutation(N_TRAIN)[:BATCH]]) for s in seeds}
    gains = {seed: g for seed, (g, _) in firsts.items()}
    with_init = [row for row in rows if row["condition"] != "no E-I Init"]
    without = [row for row in rows if row["condition"] == "no E-I Init"]

    def text(row, right):
        return (
            f"Before the first step g_i of {row['condition']!r}, seed {row['seed']}, is {row['g_i']:.6g}, and it "
            f"should be {right:.6g}."
        )

    test = [first_layer(x[N_TRAIN:])[0], first_layer(x[N_TRAIN : N_TRAIN + BATCH])[0]]
    for row in with_init:
        right = gains[row["seed"]]
        if near(row["g_i"], right):
            continue
        if row["g_i"] == 1:
            twins = [r for r in without if r["seed"] == row["seed"]]
            if all(abs(r["first_loss"] - row["first_loss"]) < 1e-5 for r in twins):
                return "E-I Init forgotten", text(
                    row, right
                ) + " Call network.initialize with the first training batch."
            return None, text(row, right) + " Read it after E-I Init."
        if any(near(row["g_i"], g) for g in test):
            return "initialised on test data", (
                text(row, right) + " It belongs to the test images, from which nothing may be learned."
            )
        if near(row["g_i"], first_layer(x[:N_TRAIN])[0]):
            return "initialised on the whole training set", text(row, right) + " E-I Init takes the first batch."
        if any(near(row["g_i"], g) for g in gains.values()):
            return "seed ignored", text(row, right) + " It belongs to the batches of another seed."
        if row is not rows[0] and near(rows[0]["g_i"], gains.get(rows[0]["seed"], 0)):
            return "network reused", text(row, right) + " An earlier run has trained it: each run needs a new Network."
        return None, text(row, right)
    for row in without:
        if row["g_i"] != 1:
            if near(row["g_i"], gains[row["seed"]]):
                return "E-I Init under every condition", text(row, 1) + " 'no E-I Init' leaves E-I Init out."
            return "network reused", text(row, 1) + " An earlier run has changed it: each run needs a new Network."
    means = {seed: m for seed, (_, m) in firsts.items()}
    if len(seeds) > 1:
        for condition in conditions:  # divided by its mean m, a weight shows what was drawn
            unit = dict.fromkeys(seeds, 1) if condition == "no E-I Init" else means
            drawn = [row["first_weight"] / unit[row["seed"]] for row in rows if row["condition"] == condition]
            if all(near(a, drawn[0]) for a in drawn):
                return "seed ignored", (
                    f"Under {condition!r} the first weight is the same draw with every seed. The seed decides about "
                    "the weights too: call torch.manual_seed(seed) before you make the network."
                )
    for seed in seeds:
        pair = [row for row in with_init if row["seed"] == seed]
        for row in pair:
            if not near(row["first_weight"], pair[0]["first_weight"]):
                return "seeded once", (
                    f"With seed {seed}, the first weight is {pair[0]['first_weight']:.6g} under "
                    f"{pair[0]['condition']!r}, but {row['first_weight']:.6g} under {row['condition']!r}. Both should "
                    "start from the same weights: call torch.manual_seed(seed) in each run, before the network is made."
                )
            if abs(row["first_loss"] - pair[0]["first_loss"]) > 2e-3:
                return None, (
                    f"With seed {seed}, first_loss is {pair[0]['first_loss']:.6g} under {pair[0]['condition']!r}, but "
                    f"{row['first_loss']:.6g} under {row['condition']!r}. Before the first step they are the same."
                )
    return None


def of_clamp(rows, conditions, seeds, epochs):
    low = min(rows, key=lambda row: row["lowest"])
    if low["lowest"] >= 0:
        return None
    text = f"A weight or gain of {low['condition']!r}, seed {low['seed']}, falls to {low['lowest']:.3g}. "
    text += "By Dale's law none is below 0: call clamp_dale for each layer after each step of the optimiser"
    one_step = 0.005  # where gradients are stable, a step takes no weight further below 0; several steps do
    if min((row["lowest"] for row in rows if row["condition"] == "full"), default=-1) < -one_step:
        return "no clamp", text + "."
    return "clamp before the step", text + ", not before it."


def of_accuracy(rows, conditions, seeds, epochs):
    for row in rows:
        where = f"{row['condition']!r}, seed {row['seed']}"
        for a in (*row["by_epoch"], row["test_accuracy"]):
            if 0 <= a <= 1 and abs(a * N_TEST - round(a * N_TEST)) < 1e-3:
                continue
            if 0 <= a <= 1 and abs(a * N_TRAIN - round(a * N_TRAIN)) < 1e-3:
                return "training accuracy reported", (
                    f"{a:.6g} of {where} is a share of the {N_TRAIN} training images, not of the {N_TEST} test images."
                )
            return None, f"{a:.6g} of {where} is no share of the {N_TEST} test images. Do not round it; no percent."
    for row in rows:
        if row["test_accuracy"] != row["by_epoch"][-1]:
            text = (
                f"{row['condition']!r}, seed {row['seed']}: test_accuracy is {row['test_accuracy']:.6g}, but by_epoch "
            )
            text += f"ends with {row['by_epoch'][-1]:.6g}."
            if all(row["test_accuracy"] == max(row["by_epoch"]) for row in rows):
                return "best epoch reported", text + " The best epoch, chosen by the test images, is too good a number."
            return None, text
    if epochs == EPOCHS:
        full = {row["seed"]: row["by_epoch"] for row in rows if row["condition"] == "full"}
        best = max(max(accuracies) for accuracies in full.values())
        if best < 0.5:
            return None, f"Under 'full' no accuracy is above {best:.3g}. Does the optimiser make its steps?"
        for condition in ("eps=1e-8", "no E-I Init"):
            if all(row["by_epoch"] == full[row["seed"]] for row in rows if row["condition"] == condition):
                return "condition ignored", f"Under {condition!r} every accuracy is the same as under 'full'."
    return None


def judged(lines, source="results.csv", conditions=CONDITIONS, seeds=SEEDS, epochs=EPOCHS):
    """(right?, text, name of the mistake or None) for the lines of an experiment, or for what was said instead."""
    try:
        rows = rows_of(lines, source) if isinstance(lines, list) else None
    except Problem as problem:
        return False, str(problem), None
    if rows is None:
        return False, str(lines), None
    found = fault(rows, conditions, seeds, epochs)
    return (True, "right", None) if found is None else (False, ". ".join(filter(None, found)), found[0])
