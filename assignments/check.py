"""Checks your solutions. It knows the usual mistakes, and calls them by their names.

    python check.py setup --id YOUR_ID     is everything there? And the numbers of your own questions
    python check.py a1                     one assignment (a1 to a5), a few seconds
    python check.py all
    python check.py submit --id YOUR_ID    packs submission-YOUR_ID.zip, which you hand in

It needs torch and numpy. It compares with the outputs in expected.npz: those of the right solution, and those of each
mistake that it knows. Exit status: 0 if everything is right, 1 if not, 2 for a wrong command.
"""

import argparse
import csv
import importlib
import json
import platform
import re
import sys
import zipfile
import zlib

import numpy as np
import torch
from probes import FILES, HERE, Problem, explain, observe

POINTS = {
    "a1": dict(spike=3, surrogate=3, simulate=10, f_i_curve=4),
    "a2": dict(currents=8, clamp_dale=3, pv_som_currents=4),
    "a3": dict(fan_in=3, weight_mean=5, gain=4, poisson_gain=2, ei_init=4, initialize=2),
    "a4": dict(stabilize=10, scale_gradient=5, lateral_weights=5),
}
OF_A5 = {"results.csv": 10, "a5.png": 2, "sentences": 3}
QUESTIONS = dict(
    a1="smallest_current", a2="scaled_input", a3="gain_for_poisson", a4="gradient_without_ste", a5="silent_loss"
)
TOLERANCE = {"ei_init": 0.06}  # weights are drawn at random, and so are their statistics; all else is 1e-4


# ---- what is right, and what is a known mistake ----


def read(path=HERE / "expected.npz"):
    """expected.npz, or another file of the same kind, as a dict: function -> dict of

    inputs, right: lists of dicts of arrays, one for each case.
    wrong: for each known mistake (name, sentence, what it does in each case: a dict of arrays, or None).
    """
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    known = json.loads(arrays.pop("mistakes").tobytes())  # function -> list of [name, sentence]
    book = {function: dict(inputs=[], right=[], wrong=[(*m, []) for m in known[function]]) for function in known}
    cases = {}  # (function, case) -> in, right, wrong -> arrays by name
    for path, array in arrays.items():
        function, case, kind, name = path.split("/", 3) if path.count("/") > 2 else ("", "", "", "")
        cases.setdefault((function, case), dict(right={})).setdefault(kind, {})[name] = array
    for (function, _), case in cases.items():
        if function:
            entry = book[function]
            entry["inputs"].append(case["in"])
            entry["right"].append(case["right"])
            for i, mistake in enumerate(entry["wrong"]):
                runs = case["runs"][""][i]
                mistake[2].append({name: array[i] for name, array in case["wrong"].items()} if runs else None)
    return book


def differs(a, b, tolerance):
    """Where two arrays differ, relative to the size of b: a mask."""
    with np.errstate(invalid="ignore"):
        size = np.abs(b) + (np.median(np.abs(b[b != 0])) if (b != 0).any() else 1)
        return ~((np.abs(a - b) <= tolerance * size) | (a == b))


def first_difference(found, right, tolerance):
    """The first array in which two cases differ, by name; or None."""
    return next((key for key in right if differs(found[key], right[key], tolerance).any()), None)


def agreement(found, right, outcome, tolerance):
    """How well what was found is what a known mistake does: the number of arrays that agree, or 0.

    It is 0 unless the first difference from what is right is the same in each case. Text stands for what cannot be
    compared: an exception, a wrong shape.
    """
    agreeing = differing = 0
    for f, r, w in zip(found, right, outcome, strict=True):
        if isinstance(f, str) or w is None:
            if not (isinstance(f, str) and w is None):
                return 0
            continue
        key = first_difference(f, r, tolerance)
        if key != first_difference(w, r, tolerance) or (key and differs(f[key], w[key], tolerance).any()):
            return 0
        differing += key is not None
        agreeing += sum(not differs(f[k], w[k], tolerance).any() for k in r)
    return agreeing if differing else 0


def verdict(function, found, entry):
    """(right?, text, name of the mistake or None) for what `observe` has found."""
    tolerance = TOLERANCE.get(function, 1e-4)
    known = [(agreement(found, entry["right"], w[2], tolerance), w) for w in entry["wrong"]]
    best, (name, sentence, _) = max(known, key=lambda pair: pair[0], default=(0, ("", "", None)))
    called = f"{name}. {sentence}" if best else ""
    name = name if best else None
    for f in found:
        if isinstance(f, str):
            return False, f + (f" - {called}" if called else ""), name
    for case, (f, r) in enumerate(zip(found, entry["right"], strict=True)):
        key = first_difference(f, r, tolerance)
        if key:
            index = tuple(int(i) for i in np.argwhere(differs(f[key], r[key], tolerance))[0])
            place = key + (f"{list(index)}" if index else "")
            place += f" (time step {index[0]})" if function == "simulate" else ""
            where = f"First difference, case {case}: {place} is {f[key][index]:.6g}, not {r[key][index]:.6g}."
            return False, f"{called or 'wrong, and no mistake that I know.'} {where}", name
    return True, "right", None


# ---- A5: what results.csv shows ----

CONDITIONS, SEEDS = ("full", "eps=1e-8", "no STE", "no E-I Init"), (0, 1, 2, 3, 4)
COLUMNS = dict(condition=str, seed=int, steps=int, g_i=float, first_loss=float, lowest=float)
COLUMNS |= dict(by_epoch=lambda text: [float(a) for a in text.split()], test_accuracy=float)


def read_rows(path):
    """results.csv as a list of dicts; a Problem if it is not as `write_csv` writes it."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except FileNotFoundError:
        raise Problem("not done yet: there is no results.csv") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Problem(f"results.csv cannot be read: {error}") from None
    rows = []
    for i, line in enumerate(lines, 2):
        try:
            rows.append({name: kind(line[name]) for name, kind in COLUMNS.items()})
        except (KeyError, TypeError):
            raise Problem(f"results.csv, line {i}: the columns are to be {', '.join(COLUMNS)}") from None
        except ValueError as error:
            raise Problem(f"results.csv, line {i}: {error}") from None
        if not np.isfinite([v for k, v in rows[-1].items() if k not in ("condition", "by_epoch")]).all():
            raise Problem(f"results.csv, line {i}: a number is not finite")
        if not rows[-1]["by_epoch"]:
            raise Problem(f"results.csv, line {i}: by_epoch is empty")
    return rows


def first_gain(x):
    """g_I that E-I Init gives to the first layer for images x, (B, 8, 8), shown for two time steps each."""
    x = np.concatenate([x, x]).astype(np.float64) / 16
    return float(np.sqrt((x**2).mean() + x.var(0, ddof=1).mean()) / (3 * x.mean()))  # d = 9


def fault(rows, conditions=CONDITIONS, seeds=SEEDS, path=HERE / "expected.npz"):
    """What is wrong with an experiment: (name of the mistake or None, sentence); or None if nothing is."""
    wanted = [(condition, seed) for condition in conditions for seed in seeds]
    present = [(row["condition"], row["seed"]) for row in rows]
    for key in wanted:
        if present.count(key) != 1:
            return None, f"there are {present.count(key)} lines for condition {key[0]!r} and seed {key[1]}, not 1"
    rows = [row for row in rows if (row["condition"], row["seed"]) in wanted]
    with np.load(path) as file:
        x = file["digits/x"]
    measured = {s: first_gain(x[np.random.RandomState(1000 * s).permutation(1437)[:32]]) for s in seeds}
    of_test = [first_gain(x[1437:]), first_gain(x[1437 : 1437 + 32])]
    with_init = [row for row in rows if row["condition"] != "no E-I Init"]
    rest = [row for row in rows if row["condition"] == "no E-I Init"]

    def near(a, b):
        return abs(a - b) < 1e-3 * b

    if len({row["steps"] for row in rows}) > 1:
        few, many = (f(rows, key=lambda row: row["steps"]) for f in (min, max))
        return "unequal steps", (
            f"{few['condition']!r}, seed {few['seed']}, made {few['steps']} optimiser steps, {many['condition']!r}, "
            f"seed {many['seed']}, made {many['steps']}; networks that are compared need the same number"
        )
    if with_init and all(row["g_i"] == 1 for row in with_init):
        return (
            "E-I Init forgotten",
            "g_i is 1, as before E-I Init; call network.initialize with the first training batch",
        )
    if with_init and all(any(near(row["g_i"], g) for g in of_test) for row in with_init):
        return "initialised on test data", (
            f"g_i = {with_init[0]['g_i']:.4f} is what E-I Init gives for test images; nothing may be learned from "
            "these. E-I Init takes the first training batch"
        )
    for condition in conditions:
        losses = [row["first_loss"] for row in rows if row["condition"] == condition]
        if len(losses) > 1 and len(set(losses)) == 1 and condition != "no E-I Init":
            return "seed ignored", (
                f"under {condition!r} first_loss is {losses[0]:.6g} with every seed: the seed must decide about the "
                "weights and the order of the batches, else five runs are one"
            )
    odd = [row for row in with_init if not near(row["g_i"], measured[row["seed"]])]
    odd += [row for row in rest if row["g_i"] != 1]
    if odd:
        row = odd[0]
        right = measured[row["seed"]] if row in with_init else 1
        text = f"before the first step g_i of {row['condition']!r}, seed {row['seed']}, is {row['g_i']:.6g}"
        text += f", not {right:.6g}"
        if len(odd) < len(rows) and rows[0] not in odd:
            return "network reused", f"{text}: an earlier run has trained it; each run needs a new Network"
        return None, text
    for seed in seeds:
        pair = [row for row in with_init if row["seed"] == seed]
        for row in pair:
            if abs(row["first_loss"] - pair[0]["first_loss"]) > 2e-3:
                return "seeded once", (
                    f"with seed {seed}, first_loss is {pair[0]['first_loss']:.6g} under {pair[0]['condition']!r}, but "
                    f"{row['first_loss']:.6g} under {row['condition']!r}: both should start with the same weights, so "
                    "call torch.manual_seed(seed) in each run"
                )
    low = min(rows, key=lambda row: row["lowest"])
    if low["lowest"] < 0:
        text = f"a weight or gain of {low['condition']!r}, seed {low['seed']}, ends at {low['lowest']:.3g}; Dale's law "
        text += "allows nothing below 0: call clamp_dale for each layer after each step"
        last_step = 0.005  # of the optimiser, at most, where gradients are stable; without a clamp it goes further
        if min([row["lowest"] for row in rows if row["condition"] == "full"], default=-1) < -last_step:
            return "no clamp", text
        return "clamp before the step", text + ", not before"
    for row in rows:
        for a in (*row["by_epoch"], row["test_accuracy"]):
            if not 0 <= a <= 1 or abs(a * 360 - round(a * 360)) > 0.02:
                text = f"{a:.6g} of {row['condition']!r}, seed {row['seed']}, is no share of the 360 test images"
                if 0 <= a <= 1 and abs(a * 1437 - round(a * 1437)) < 0.1:
                    return "training accuracy reported", text + ", but of the 1437 training images"
                return None, text
    for row in rows:
        if row["test_accuracy"] != row["by_epoch"][-1]:
            text = (
                f"{row['condition']!r}, seed {row['seed']}: test_accuracy is {row['test_accuracy']:.6g}, by_epoch ends "
            )
            text += f"with {row['by_epoch'][-1]:.6g}"
            if all(row["test_accuracy"] == max(row["by_epoch"]) for row in rows):
                return (
                    "best epoch reported",
                    text + ": who chooses the best epoch by the test images reports too high a number",
                )
            return None, text
    return None


# ---- the command line ----


def own_numbers(student):
    """The numbers of one student's questions, from crc32 of the id: a dict of dicts."""
    r = np.random.RandomState(zlib.crc32(student.encode()))
    matrix = [[round(float(v), 2) for v in row] for row in r.choice(np.arange(0.15, 2, 0.05), (2, 3), replace=False)]
    zeros = r.permutation(6)[: 1 + r.randint(3)]
    for i in zeros:
        matrix[i // 3][i % 3] = 0.0
    return dict(
        a1=dict(tau=int(r.randint(2, 9)), theta=r.randint(2, 9) / 4, T=int(r.randint(3, 9))),
        a2=dict(v=r.randint(-40, 41) / 16 + 0.03125, c=int(r.randint(2, 9))),
        a3={"lambda": r.randint(1, 40) / 20, "d": int(r.randint(20, 600))},
        a4=dict(I_div=matrix, c=r.randint(1, 20) / 10),
        a5=dict(classes=int(r.randint(3, 200))),
    )


def load(a):
    """The student's module, or a Problem."""
    try:
        return importlib.import_module(FILES[a])
    except (Exception, SystemExit) as error:
        raise Problem(explain(error, HERE)) from None


def judged(rows, conditions=CONDITIONS, seeds=SEEDS):
    """(right?, text, name of the mistake or None) for the rows of an experiment, or for a text in their place."""
    if isinstance(rows, str):
        return False, rows, None
    found = fault(rows, conditions, seeds)
    return (True, "right", None) if found is None else (False, ". ".join(filter(None, found)), found[0])


def of_a5(answers, folder=HERE):
    """(part, right?, text, name of the mistake or None) for what A5 leaves in a folder."""
    try:
        rows = read_rows(folder / "results.csv")
    except Problem as problem:
        rows = str(problem)
    png = folder / "a5.png"
    drawn = png.exists() and png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    sentences = answers.get("sentences") or []
    n = sum(isinstance(s, str) and len(s.split()) >= 5 for s in sentences)
    read = "five, to be read by your lecturer" if n == 5 else f"not done yet: {n} of 5 are written"
    return [
        ("results.csv", *judged(rows)),
        ("a5.png", drawn, "right" if drawn else "not done yet: there is no PNG file a5.png", None),
        ("sentences", n == 5, read, None),
    ]


def results(a, book):
    """(part, points, right?, text) for each part of an assignment."""
    try:
        module = load(a)
    except Problem as problem:
        return [(part, points, False, str(problem)) for part, points in POINTS.get(a, OF_A5).items()]
    answers = getattr(module, "ANSWERS", {})
    if a == "a5":
        parts = [(part, OF_A5[part], right, text) for part, right, text, _ in of_a5(answers)]
    else:
        parts = []
        for name, points in POINTS[a].items():
            right, text, _ = verdict(name, observe(name, module, book[name]["inputs"]), book[name])
            parts.append((name, points, right, text))
    answer = answers.get(QUESTIONS[a])
    given = isinstance(answer, int | float)
    text = f"{answer}, which is compared when it is graded" if given else "not done yet: a number in ANSWERS"
    return [*parts, (QUESTIONS[a], 0, given, text)]


def check(names):
    """Prints what is right and what is not. Returns the exit status."""
    book, total, possible, right = read(), 0, 0, True
    for a in names:
        print(f"{FILES[a]}.py")
        for part, points, good, text in results(a, book):
            got = points if good else 0
            total, possible, right = total + got, possible + points, right and good
            print(f"  {got:2}/{points:<2}  {part}: {text}" if points else f"  -      {part}: {text}")
    print(f"{total} of {possible} points; the question of each assignment, 2 points, is graded later")
    return 0 if right else 1


def setup(student):
    print(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    missing = [name for name in (*(f"{f}.py" for f in FILES.values()), "expected.npz") if not (HERE / name).exists()]
    if missing:
        print(f"missing in {HERE}: {', '.join(missing)}; copy it from what you were given")
        return 1
    print(f"{len(read())} functions to write, in {HERE}")
    if student:
        print(f"The numbers of your questions, {student}:")
        for a, numbers in own_numbers(student).items():
            print(f"  {a}  " + ", ".join(f"{name} = {value}" for name, value in numbers.items()))
    else:
        print("For the numbers of your questions: python check.py setup --id YOUR_ID")
    return 0


def submit(student):
    path = HERE / f"submission-{student}.zip"
    names = [name for name in (*(f"{f}.py" for f in FILES.values()), "results.csv", "a5.png") if (HERE / name).exists()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.write(HERE / name, name)
    print(f"wrote {path} with {', '.join(names)}")
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description="Checks your solutions of the assignments.", allow_abbrev=False)
    parser.add_argument("what", choices=[*FILES, "all", "setup", "submit"])
    parser.add_argument("--id", help="your student id, as your lecturer writes it")
    args = parser.parse_args(argv)
    if args.id is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", args.id):
        parser.error(f"--id is made of letters, digits, - and _, not {args.id!a}")
    torch.set_num_threads(1)
    if args.what == "setup":
        return setup(args.id)
    if args.what == "submit":
        if args.id is None:
            parser.error("submit needs --id YOUR_ID")
        return submit(args.id)
    return check(list(FILES) if args.what == "all" else [args.what])


def any_console():
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a console that cannot show every letter


if __name__ == "__main__":
    any_console()
    sys.exit(main())
