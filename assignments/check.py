"""Checks your solutions. It knows the usual mistakes, and calls them by their names.

    python check.py setup --id YOUR_ID     is everything there? And the numbers of your own questions
    python check.py a1                     one assignment (a1 to a5), a few seconds
    python check.py all
    python check.py submit --id YOUR_ID    packs submission-YOUR_ID.zip, which you hand in, and says what is not done

It needs torch and numpy. It compares with the outputs in expected.npz: those of the right solution, and those of each
mistake that it knows. Exit status: 0 if everything is right, 1 if not, 2 for a wrong command.
"""

import argparse
import importlib
import itertools
import json
import platform
import re
import sys
import types
import zipfile
import zlib
from importlib.util import find_spec

try:
    import numpy as np
    import torch
except ImportError as error:
    print(f"{error}: pip install torch numpy matplotlib", file=sys.stderr)
    sys.exit(2)
from ablation import experiment, look_at_table, verdict_of
from probes import FILES, HERE, USES, Problem, explain, observe

POINTS = {
    "a1": dict(spike=3, surrogate=3, simulate=10, f_i_curve=4),
    "a2": dict(currents=8, clamp_dale=3, pv_som_currents=4),
    "a3": dict(fan_in=3, weight_mean=5, gain=4, poisson_gain=2, ei_init=4, initialize=2),
    "a4": dict(stabilize=10, scale_gradient=5, lateral_weights=5),
    "a5": {"experiment": 5, "results.csv": 5, "a5.png": 2, "sentences": 3},
}
QUESTIONS = "smallest_current scaled_input gain_for_poisson gradient_without_ste silent_loss"
QUESTIONS = dict(zip(FILES, QUESTIONS.split(), strict=True))  # the key in the ANSWERS of each
ID = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,39}"
HAND_IN = [*(f"{file}.py" for file in FILES.values()), "results.csv", "a5.png"]
BROKEN = {}  # only when it is graded: assignments whose files do not run -> why


def read(path=HERE / "expected.npz"):
    """expected.npz as a dict: function -> dict of

    inputs, right: lists of dicts, one for each case.
    given: names of earlier functions, joined by "+" -> what is right with stand-ins for these, as `right`.
    wrong: for each known mistake [name, sentence, what it does in each case: a dict, or text].
    """
    with np.load(path) as file:
        book = json.loads(file["book"].tobytes())
    for entry in book.values():
        for mistake in entry["wrong"]:  # of which only what differs is in the file
            pairs = zip(entry["right"], mistake[2], strict=True)
            mistake[2] = [w if isinstance(w, str) else r | w for r, w in pairs]
    return book


def differs(a, b, key=""):
    """Where two arrays of this name differ, relative to the size of b: a mask.

    Weights are drawn at random, and so are their statistics: these may differ by 6 %.
    """
    random = key.startswith(("mean of", "standard deviation of", "share of"))
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        finite, size = np.abs(b[np.isfinite(b) & (b != 0)]), np.abs(b)
        if random:
            size = size + 1e-3 * size.max()
        elif not key.startswith("stabilize"):  # its values may be as small as they like
            size = size + (np.median(finite) if finite.size else 1)
        close = np.isfinite(b) & (np.abs(a - b) <= (0.06 if random else 1e-4) * size)
        return ~(close | (a == b))


def same(a, b, key):
    return np.shape(a[key]) == np.shape(b[key]) and not differs(a[key], b[key], key).any()


def plain(text):
    """What `observe` says, without the place; of an exception its kind alone, for torch changes its words."""
    text = re.sub(r"^\S+\.py, line \d+: ", "", text) if isinstance(text, str) else ""
    kind = re.match(r"\w+(Error|Exception|Exit|Interrupt|Iteration)\b", text)
    return kind[0] if kind else text


def agreement(found, right, outcome):
    """How well what was found is what a known mistake does: the number of arrays that agree, or 0.

    Text, in place of arrays that cannot be compared, must be the same; of an exception the kind. Code numbers must
    agree: where they are not those of the right solution, they say the kind of the mistake, and this is enough. Else
    all values must agree; and where all values are right, all gradients. (One mistake is written in several ways, of
    which the gradients differ.)
    """
    texts = [pair for pair in zip(found, outcome, strict=True) if any(isinstance(case, str) for case in pair)]
    if len(texts) == len(found) or any(plain(f) != plain(w) for f, w in texts):
        return 0
    cases = [case for case in zip(found, right, outcome, strict=True) if isinstance(case[0], dict)]
    rows = [(key, same(f, r, key), same(f, w, key)) for f, r, w in cases for key in r]  # name, right?, agrees?
    kinds = [row for row in rows if row[0][0] == "~"]
    if not all(agrees for _, _, agrees in kinds) or (not texts and all(good for _, good, _ in rows)):
        return 0
    if all(good for _, good, _ in kinds):
        gradients_alone = all("dL/" in key for key, good, _ in rows if not good)
        if not all(agrees for key, _, agrees in rows if gradients_alone or "dL/" not in key):
            return 0
    return sum(agrees for _, _, agrees in rows) + len(texts)


def verdict(function, found, entry, right):
    """(right?, text, name of the mistake or None) for what `observe` has found, and for what is right."""
    known = [(agreement(found, right, outcome), name, text) for name, text, outcome in entry["wrong"]]
    best, name, called = max(known, key=lambda k: k[0], default=(0, None, None))
    name, called = (name, f"{name}. {called}") if best else (None, "")
    for case, (f, r) in enumerate(zip(found, right, strict=True)):
        given = entry["inputs"][case]
        numbers = ", ".join(f"{k} = {v}" for k, v in given.items() if not isinstance(v, list) and k != "seed")
        where = f"case {case} ({numbers})".replace(" ()", "")
        if isinstance(f, str):
            return False, f + (f" - {called}" if called else f", {where}" * (case > 0)), name
        for key in (key for key in r if key[0] != "~" and not same(f, r, key)):
            text = f"{called or 'wrong, and no mistake that I know.'} First difference, {where}: {key}"
            index = tuple(int(i) for i in np.argwhere(differs(f[key], r[key], key))[0])
            if index:
                text += f" at {list(index)}" + f" (time step {index[0]})" * (function == "simulate")
            for k in {"u", "current", "currents", "i_div", "w", "w_ei", f"p_{key}"} & set(given):
                if np.shape(given[k]) == np.shape(r[key]):
                    text += f", where {k.removeprefix('p_')} is {np.array(given[k])[index]:.6g}"
            yours, right = np.asarray(f[key])[index], np.asarray(r[key])[index]
            return False, f"{text}: yours is {yours:.6g}, right is {right:.6g}.", name
    return True, "right", None


def verdicts(a, book, look):
    """(part, points, right?, text, mistake) for each function of an assignment. look: a function of its name and of the
    names that are replaced: what `observe` finds."""
    wrong = {}
    for name, points in POINTS[a].items():
        suspects, entry, right = [other for other in USES.get(name, ()) if other in wrong], book[name], False
        groups = [group for n in range(len(suspects), 0, -1) for group in itertools.combinations(suspects, n)]
        for group in groups:
            right = right or verdict(name, look(name, group), entry, entry["given"]["+".join(group)])[0]
        text, mistake = f"right, with a stand-in for `{'`, `'.join(suspects)}`, whose mistakes cost nothing here", None
        if not right:
            known = dict(wrong=[]) if suspects else {}  # what an earlier mistake does has no name here
            right, text, mistake = verdict(name, look(name, ()), entry | known, entry["right"])
        if not right:
            follows = suspects and not mistake and text not in wrong.values()
            wrong[name] = text
            text += f" (This may follow from `{'`, `'.join(suspects)}`.)" if follows else ""
        yield name, points, right, text, mistake


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
    """The student's module, or a Problem. A5 imports a1 to a4: what fails there shall not cost the points of A5."""
    if a in BROKEN:
        raise Problem(BROKEN[a])
    for earlier in list(FILES)[:4] if a == "a5" else ():
        try:
            module = load(earlier)
        except Problem:
            module = sys.modules[FILES[earlier]] = types.ModuleType(FILES[earlier])
        for name in POINTS[earlier]:
            if not hasattr(module, name):  # a text is no function, which is what the check of a1 to a4 says
                setattr(module, name, "missing")
    try:
        return importlib.import_module(FILES[a])
    except (Exception, SystemExit) as error:
        raise Problem(explain(error)) from None
    finally:  # what a file changes for all others is changed back
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


def answers_of(given, a):
    """What ANSWERS hold, whatever a student has made of them: value, a float or None; text; sentences, a list."""
    answer, sentences = (given.get(k) if isinstance(given, dict) else None for k in (QUESTIONS[a], "sentences"))
    try:
        text = "" if answer is None else str(answer)[:60].encode(errors="backslashreplace").decode()
        value = float("nan" if isinstance(answer, bool | str | bytes | None) else answer)
    except Exception:  # no number, or an object that fails
        text, value = type(answer).__name__, float("nan")
    sentences = [s[:2000] for s in sentences[:20] if isinstance(s, str)] if isinstance(sentences, list | tuple) else []
    return dict(value=value if abs(value) < 1e300 else None, text=text, sentences=sentences)


def results(a, book, look, answers, files, others_right=True):
    """(part, points, right?, text, name of the mistake or None) for each part of an assignment. look: see `verdicts`.
    answers: see `answers_of`. files: name -> bytes, of results.csv and a5.png, if they are there."""
    if a != "a5":
        yield from verdicts(a, book, look)
        return
    n, png = sum(len(text.split()) >= 5 for text in answers["sentences"]), files.get("a5.png", b"")
    drawn = png.startswith(b"\x89PNG\r\n\x1a\n")
    found = [look("experiment", ()), verdict_of(look_at_table, files.get("results.csv"), others_right)]
    found += [(drawn, "right" if drawn else "not done yet: there is no PNG file a5.png", None)]
    found += [(n >= 5, f"{n} of 5 are written" + ("; your lecturer reads them" if n >= 5 else ""), None)]
    yield from ((*part, *verdict) for part, verdict in zip(POINTS[a].items(), found, strict=True))


def own_results(a, book):
    """The same for the files in this folder, and for the student's answer."""
    try:
        module, broken = load(a), None
    except Problem as problem:
        module, broken = None, f"{FILES[a]}.py cannot be imported: {problem}"
    answers = answers_of(getattr(module, "ANSWERS", None), a)

    def look(part, group):
        if part == "experiment":
            return (False, broken, None) if broken else experiment(module)[:3]
        return [broken] * len(book[part]["inputs"]) if broken else observe(part, module, book[part]["inputs"], group)

    files = {name: (HERE / name).read_bytes() for name in HAND_IN[5:] if (HERE / name).is_file()}
    yield from results(a, book, look, answers, files)
    text = f"{answers['text']}, which is compared when it is graded; it may be off by 1 %"
    if answers["value"] is None:
        text = f"{answers['text']!r} is no number" if answers["text"] else "not done yet"
    yield QUESTIONS[a], 0, answers["value"] is not None, text, None


def check(names, all_parts=True):
    """Prints what is right and what is not, or the latter alone. Returns the exit status."""
    book, total, possible, right = read(), 0, 0, True
    for a in names:
        print(f"{FILES[a]}.py")
        for part, points, good, text, _ in own_results(a, book):  # printed at once: an endless loop shows where it is
            got = points if good else 0
            total, possible, right = total + got, possible + points, right and good
            if all_parts or not good:
                print(f"  {got:2}/{points:<2}  {part}: {text}" if points else f"  -      {part}: {text}", flush=True)
    print(f"{total} of {possible} points; the other 10 points, 2 for the question of each assignment, are given later")
    return 0 if right else 1


def setup(student):
    print(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    gone = [name for name in HAND_IN[:5] if not (HERE / name).is_file()]
    print(f"There is no {', '.join(gone)} in {HERE}" if gone else f"Everything is there, in {HERE}")
    if not find_spec("matplotlib"):
        print("For the plot of A5, later: pip install matplotlib")
    print(f"The numbers of your questions, {student or 'with --id YOUR_ID'}:")
    for a, numbers in own_numbers(student).items() if student else ():
        print(f"  {a}  " + ", ".join(f"{name} = {value}" for name, value in numbers.items()))
    return 1 if gone else 0


def submit(student):
    path = HERE / f"submission-{student}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as file:
        file.writestr("id.txt", student)
        for name in (name for name in HAND_IN if (HERE / name).is_file()):
            file.write(HERE / name, name)
    print(f"wrote {path}\nIt was made for the numbers of {student}: those of python check.py setup --id {student}")
    print("You can hand it in. Below each file stands what is not right in it, or not done:", flush=True)
    check(list(FILES), all_parts=False)
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description="Checks your solutions of the assignments.", allow_abbrev=False)
    parser.add_argument("what", choices=[*FILES, "all", "setup", "submit"])
    parser.add_argument("--id", help="your student id, as your lecturer writes it")
    args = parser.parse_args(argv)
    if args.id is not None and (not re.fullmatch(ID, args.id) or args.id == "YOUR_ID"):
        parser.error(f"--id is your own id: letters, digits, _ and - (not first), at most 40, not {args.id!a}")
    if args.what == "submit" and args.id is None:
        parser.error("submit needs --id YOUR_ID")
    for name in ("expected.npz", "digits.npz"):
        if not zipfile.is_zipfile(HERE / name):
            parser.error(f"{HERE / name} is missing or damaged: copy it from what you were given")
    torch.set_num_threads(1)  # for functions as small as these, more threads are slower
    if args.what in ("setup", "submit"):
        return setup(args.id) if args.what == "setup" else submit(args.id)
    return check(list(FILES) if args.what == "all" else [args.what])


def on_any_console(main):
    """Runs a program on a console that may not show every letter; what is wrong with a file is one line, status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        print("error:", f"{e.filename}: {e.strerror}" if getattr(e, "filename", 0) else e, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    on_any_console(main)
