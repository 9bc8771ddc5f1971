"""Checks your solutions. It knows the usual mistakes, and calls them by their names.

    python check.py setup --id YOUR_ID     is everything there? And the numbers of your own questions
    python check.py a1                     one assignment (a1 to a5), a few seconds
    python check.py all
    python check.py submit --id YOUR_ID    packs submission-YOUR_ID.zip, which you hand in

It needs torch and numpy. It compares with the outputs in expected.npz: those of the right solution, and those of each
mistake that it knows. Exit status: 0 if everything is right, 1 if not, 2 for a wrong command.
"""

import argparse
import importlib
import json
import platform
import re
import sys
import zipfile
import zlib
from importlib.util import find_spec

try:
    import numpy as np
    import torch
except ImportError as error:
    print(f"{error}: pip install torch numpy matplotlib", file=sys.stderr)
    sys.exit(2)
from ablation import experiment, judged, read_lines
from probes import FILES, HERE, Problem, explain, observe

POINTS = {
    "a1": dict(spike=3, surrogate=3, simulate=10, f_i_curve=4),
    "a2": dict(currents=8, clamp_dale=3, pv_som_currents=4),
    "a3": dict(fan_in=3, weight_mean=5, gain=4, poisson_gain=2, ei_init=4, initialize=2),
    "a4": dict(stabilize=10, scale_gradient=5, lateral_weights=5),
    "a5": {"experiment": 5, "results.csv": 5, "a5.png": 2, "sentences": 3},
}
SHORT = dict(conditions=("full", "no STE", "no E-I Init"), seeds=(7, 8), epochs=1)  # an experiment for a quick look
ID = r"[A-Za-z0-9_-]{1,40}"
HAND_IN = [*(f"{file}.py" for file in FILES.values()), "results.csv", "a5.png"]
QUESTIONS = dict(
    a1="smallest_current", a2="scaled_input", a3="gain_for_poisson", a4="gradient_without_ste", a5="silent_loss"
)


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


def differs(a, b, key=""):
    """Where two arrays of this name differ, relative to the size of b: a mask.

    Weights are drawn at random, and so are their statistics: these may differ by 6 %.
    """
    random = key.startswith(("mean of", "standard deviation of", "share of"))
    with np.errstate(invalid="ignore"):
        finite = np.abs(b[np.isfinite(b) & (b != 0)])
        size = np.abs(b) + 1e-3 * np.abs(b).max() if random else np.abs(b) + (np.median(finite) if finite.size else 1)
        close = np.isfinite(b) & (np.abs(a - b) <= (0.06 if random else 1e-4) * size)
        return ~(close | (a == b))


def first_difference(found, right):
    """The first array in which two cases differ, by name; or None."""
    return next((key for key in right if differs(found[key], right[key], key).any()), None)


def agreement(found, right, outcome):
    """How well what was found is what a known mistake does: the number of arrays that agree, or 0.

    It is 0 unless in each case all values agree, and the first gradient that is not right. (One mistake is written in
    several ways, and the other gradients may differ.) Text stands for what cannot be compared: an exception, a shape.
    """
    agreeing = differing = 0
    for f, r, w in zip(found, right, outcome, strict=True):
        if isinstance(f, str) or w is None:
            if not (isinstance(f, str) and w is None):
                return 0
            continue
        same = {key for key in r if not differs(f[key], w[key], key).any()}
        first = first_difference(f, r)
        if first != first_difference(w, r) or any(k not in same and (k == first or "dL/" not in k) for k in r):
            return 0
        differing += first is not None
        agreeing += len(same)
    return agreeing if differing else 0


def verdict(function, found, entry):
    """(right?, text, name of the mistake or None) for what `observe` has found."""
    known = [(agreement(found, entry["right"], w[2]), w) for w in entry["wrong"]]
    best, (name, sentence, _) = max(known, key=lambda pair: pair[0], default=(0, ("", "", None)))
    called = f"{name}. {sentence}" if best else ""
    name = name if best else None
    for f in found:
        if isinstance(f, str):
            return False, f + (f" - {called}" if called else ""), name
    for case, (f, r) in enumerate(zip(found, entry["right"], strict=True)):
        key = first_difference(f, r)
        if key:
            index = tuple(int(i) for i in np.argwhere(differs(f[key], r[key], key))[0])
            place = key + (f" at {list(index)}" if index else "")
            place += f" (time step {index[0]})" if function == "simulate" else ""
            where = (
                f"First difference, case {case}: {place}: yours is {f[key][index]:.6g}, right is {r[key][index]:.6g}."
            )
            return False, f"{called or 'wrong, and no mistake that I know.'} {where}", name
    return True, "right", None


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


def answers_of(module):
    """The ANSWERS of a student's module: a dict, whatever the student has made of it."""
    answers = getattr(module, "ANSWERS", None)
    return answers if isinstance(answers, dict) else {}


def a_number(answer):
    """Whether an answer is a number; a yes, a text or NaN is none."""
    return isinstance(answer, int | float) and not isinstance(answer, bool) and abs(answer) < 1e300


def of_a5(answers, folder=HERE):
    """(part, right?, text, name of the mistake or None) for what A5 leaves in a folder."""
    try:
        lines = read_lines(folder / "results.csv")
    except Problem as problem:
        lines = str(problem)
    yield "results.csv", *judged(lines)
    try:
        drawn = (folder / "a5.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    except OSError:
        drawn = False
    yield "a5.png", drawn, "right" if drawn else "not done yet: there is no PNG file a5.png", None
    given = answers.get("sentences")
    n = (
        sum(isinstance(s, str) and len(s.split()) >= 5 for s in given if given)
        if isinstance(given, list | tuple)
        else 0
    )
    yield "sentences", n >= 5, "your lecturer reads them" if n >= 5 else f"not done yet: {n} of 5 are written", None


def results(a, book):
    """(part, points, right?, text) for each part of an assignment, one after the other."""
    try:
        module = load(a)
    except Problem as problem:
        for part, points in POINTS[a].items():
            yield part, points, False, f"{FILES[a]}.py cannot be imported: {problem}"
        return
    answers = answers_of(module)
    if a == "a5":
        right, text, _ = judged(experiment(module, **SHORT), "run", **SHORT)
        yield "experiment", POINTS[a]["experiment"], right, text
        for part, right, text, _ in of_a5(answers):
            yield part, POINTS[a][part], right, text
    else:
        for name, points in POINTS[a].items():
            right, text, _ = verdict(name, observe(name, module, book[name]["inputs"]), book[name])
            yield name, points, right, text
    answer = answers.get(QUESTIONS[a])
    text = f"{answer}, which is compared when it is graded"
    if not a_number(answer):
        text = "not done yet" if answer is None else f"{answer!r:.40} is no number"
    yield QUESTIONS[a], 0, a_number(answer), text


def check(names):
    """Prints what is right and what is not. Returns the exit status."""
    if not has("expected.npz") or not has("digits.npz"):
        print(f"expected.npz or digits.npz is missing in {HERE}: copy it from what you were given", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # for functions as small as these, more threads are slower
    book, total, possible, right = read(), 0, 0, True
    for a in names:
        print(f"{FILES[a]}.py")
        for part, points, good, text in results(a, book):  # printed one by one: a loop without end shows where it is
            got = points if good else 0
            total, possible, right = total + got, possible + points, right and good
            print(f"  {got:2}/{points:<2}  {part}: {text}" if points else f"  -      {part}: {text}", flush=True)
    print(f"{total} of {possible} points; the other 10 points, 2 for the question of each assignment, are given later")
    return 0 if right else 1


def setup(student):
    print(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    wrong = [f"there is no {name} in {HERE}" for name in (*HAND_IN[:5], "expected.npz", "digits.npz") if not has(name)]
    wrong += ["Python 3.10 or later is needed"] * (sys.version_info < (3, 10))
    print("\n".join(wrong) if wrong else f"Everything is there: {len(read())} functions to write, in {HERE}")
    if not find_spec("matplotlib"):
        print("For the plot of A5, later: pip install matplotlib")
    if student:
        print(f"The numbers of your questions, {student}:")
        for a, numbers in own_numbers(student).items():
            print(f"  {a}  " + ", ".join(f"{name} = {value}" for name, value in numbers.items()))
    else:
        print("For the numbers of your questions: python check.py setup --id YOUR_ID")
    return 1 if wrong else 0


def has(name):
    return (HERE / name).is_file()


def submit(student):
    path = HERE / f"submission-{student}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("id.txt", student)
        for name in filter(has, HAND_IN):
            file.write(HERE / name, name)
    missing = [name for name in HAND_IN if not has(name)]
    print(f"wrote {path}" + (f", without {', '.join(missing)}: not done yet" if missing else ""))
    print("It was made for the numbers of", student, "- they are those of: python check.py setup --id", student)
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description="Checks your solutions of the assignments.", allow_abbrev=False)
    parser.add_argument("what", choices=[*FILES, "all", "setup", "submit"])
    parser.add_argument("--id", help="your student id, as your lecturer writes it")
    args = parser.parse_args(argv)
    if args.id is not None and not re.fullmatch(ID, args.id):
        parser.error(f"--id is made of letters, digits, - and _, not {args.id!a}")
    if args.what == "setup":
        return setup(args.id)
    if args.what == "submit":
        if args.id is None:
            parser.error("submit needs --id YOUR_ID")
        return submit(args.id)
    return check(list(FILES) if args.what == "all" else [args.what])


def any_console():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a console that cannot show every letter


if __name__ == "__main__":
    any_console()
    sys.exit(main())
