"""For the lecturer: makes expected.npz and the handout, and grades what was handed in.

    python lecturer.py freeze            writes expected.npz anew, after a change of the repository or of mistakes.py
    python lecturer.py handout DIR       a folder for the students, which needs torch and numpy only
    python lecturer.py solve DIR         the same folder, solved
    python lecturer.py grade DIR         grades every zip file in DIR: grades.csv, mistakes.csv, remarks/

What is right is what the repository does: `reference.py` calls it. A submission is graded on new inputs, of other
sizes. It runs in a process of its own with a time limit. That is no protection against a program that wants to do harm:
grade on an account or in a container that holds nothing else.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the modules of the repository

import check  # noqa: E402
from grading import FUNCTIONS, STUBS, grade  # noqa: E402
from mistakes import MISTAKES  # noqa: E402
from probes import FILES, observe  # noqa: E402
from reference import REFERENCE  # noqa: E402

GIVEN = ["check.py", "probes.py", "ablation.py", "expected.npz", "digits.npz"]


# ---- what they are asked, and what the known mistakes do ----


def cases(seed):
    """Inputs of each function, function -> list of dicts of arrays. Sizes depend on the seed, too."""
    r = np.random.RandomState(seed)

    def some(*shape):  # positive, different numbers
        return r.permutation(np.linspace(0.1, 2, int(np.prod(shape)))).reshape(shape).astype(np.float32)

    def weights(*shape):  # of the loss, whose gradient is compared
        return r.normal(size=shape).astype(np.float32)

    def sparse(*shape):  # with zeros, and a silent position or sample
        x = some(*shape) * (r.rand(*shape) < 0.6)
        x[..., r.randint(shape[-1])] = 0
        return x.astype(np.float32)

    def dyadic(low, high, shape):  # multiples of 1/64: with tau = 2 and 4 the potentials are exact in float32
        return (r.randint(64 * low, 64 * high, shape) / 64).astype(np.float32)

    def neuron(tau, threshold, alpha, *shape):
        current = dyadic(-1, 3, (8, *shape))
        current[0, ..., :4] = threshold  # exactly at the threshold
        return dict(current=current, tau=tau, threshold=threshold, alpha=alpha, weights=weights(8, *shape))

    def circuit(n_in, n_e, cells):
        """`cells`: parameters of each population, by name: (rows, columns) or (rows,)."""
        x = sparse(2, n_in, r.randint(2, 4))
        p = {f"p_{name}": some(*shape) for name, shape in (dict(w_ee=(n_e, n_in)) | cells).items()}
        p |= dict(p_g_e=some(n_e), p_b_e=weights(n_e))
        return dict(x=x, weights=weights(len(x), n_e, x.shape[2])) | p

    def pv(n_in, n_e, n_i):
        return circuit(n_in, n_e, dict(w_ie=(n_i, n_in), w_ei=(n_e, n_i), g_i=(n_i,)))

    def pv_som(n_in, n_e, n_s, n_p):
        cells = dict(w_se=(n_s, n_in), w_es=(n_e, n_s), w_pe=(n_p, n_in), w_ep=(n_e, n_p), g_p=(n_p,))
        return circuit(n_in, n_e, cells)

    def clamped(n_in, n_e, n_i, readout=False):
        shapes = dict(p_w_ee=(n_e, n_in), p_w_ie=(n_i, n_in), p_w_ei=(n_e, n_i))
        shapes |= {} if readout else dict(p_g_i=(n_i,), p_g_e=(n_e,), p_b_e=(n_e,))
        return {name: weights(*shape) - 0.2 for name, shape in shapes.items()}

    def activity(*shape):
        return dict(x=sparse(*shape), d=int(r.randint(20, 400)))

    def drawn(n_e, n_i, *shape, readout=False):
        return dict(n_e=n_e, n_i=n_i, k=5, x=sparse(*shape), readout=readout, seed=seed)

    def divisors(shape, eps, ste):
        i_div = sparse(*shape)
        i_div[r.randint(1, shape[0])] = 0  # a silent sample
        i_div[0, 0, 0] = 1e-7  # small, but not 0
        return dict(i_div=i_div, eps=eps, ste=ste, weights=weights(*shape))

    n, e = r.randint(5, 9), 4 * r.randint(2, 4)
    neurons = dict(u=r.permutation(np.arange(-8, 25) / 8).astype(np.float32), threshold=1.5)
    grid = dict(u=neurons["u"].reshape(3, 11))
    constant = dict(currents=np.append(dyadic(0, 3, n), [0.5, 1]).astype(np.float32))
    found = dict(
        spike=[neurons, grid | dict(threshold=0.5)],
        surrogate=[neurons | dict(alpha=4.0), grid | dict(threshold=0.5, alpha=2.0)],
        simulate=[neuron(4.0, 1.0, 4.0, n), neuron(2.0, 1.5, 2.0, 2, n)],
        f_i_curve=[constant | dict(tau=2.0, threshold=1.0, steps=16), constant | dict(tau=4.0, threshold=1.5, steps=8)],
        currents=[pv(e, e, e // 4), pv(n + 8, e, e // 2)],
        clamp_dale=[clamped(n, e, 3), clamped(n, e, 2, readout=True)],
        pv_som_currents=[pv_som(e, e, e // 4, e // 2), pv_som(n + 8, e, e // 2, e // 4)],
        fan_in=[dict(w=some(5, n)), dict(w=some(4, n, 3, 3))],
        weight_mean=[activity(3, n), activity(4, 2, 5, n)],
        gain=[activity(3, n), activity(4, 2, 5, n)],
        poisson_gain=[
            dict(rate=r.randint(1, 20) / 20, d=100),
            dict(rate=r.randint(21, 60) / 20, d=int(r.randint(20, 99))),
        ],
        ei_init=[drawn(320, 480, 3, 6, 9, n), drawn(240, 360, 3, 120, readout=True)],
        initialize=[dict(n_layers=3, x=sparse(3, n))],
        stabilize=[
            divisors((3, 4, n), "adaptive", True),
            divisors((4, 3, 2, n), "adaptive", False),
            divisors((2, 3, n), 0.25, True),
        ],
        scale_gradient=[dict(w=weights(3, n), factor=0.125, weights=weights(3, n))],
        lateral_weights=[dict(w_ei=some(e, 3), fan_in=int(r.randint(20, 99)), weights=weights(e, 3))],
    )
    return {name: [{k: np.asarray(v) for k, v in case.items()} for case in several] for name, several in found.items()}


def sections():
    """The text of `solutions.py` by assignment."""
    text = (HERE / "solutions.py").read_text(encoding="utf-8")
    parts = re.split(r"# ---- (\w+)\.py\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def student(a, edits=()):
    """The file of a student who has solved assignment `a`, with some changes of the solution: its text."""
    solution = sections()[FILES[a]]
    for old, new in dict(edits).items():
        if old not in solution:
            raise ValueError(f"{a}: the solution has no {old!r}")
        solution = solution.replace(old, new)
    stub, main, end = (HERE / f"{FILES[a]}.py").read_text(encoding="utf-8").partition('\n\nif __name__ == "__main__":')
    return stub + solution.rstrip() + "\n" + main + end


def module(text):
    """A text as a module."""
    made = types.ModuleType("student")
    made.__file__ = str(HERE / "student.py")
    exec(compile(text, "student", "exec"), made.__dict__)
    return made


def compile_book(seed):
    """What `check.read` reads from a file, made anew from the repository and `mistakes.py`."""
    book = {}
    for name, inputs in cases(seed).items():
        right = observe(name, REFERENCE, inputs)
        for outcome in right:
            if isinstance(outcome, str):
                raise ValueError(f"the reference of {name} cannot be compared: {outcome}")
        book[name] = dict(inputs=inputs, right=right, wrong=[])
    for a, mistakes in MISTAKES.items():
        for title, sentence, ways in mistakes:
            for edits in ways:
                made = module(student(a, edits))
                for name in check.POINTS[a]:
                    entry = book[name]
                    outcome = [None if isinstance(f, str) else f for f in observe(name, made, entry["inputs"])]
                    pairs = zip(outcome, entry["right"], strict=True)
                    if any(o is None or check.first_difference(o, r) for o, r in pairs):
                        entry["wrong"].append((title, sentence, outcome))
    return book


def write(book, path, outputs=True):
    """A book as a file that `check.read` reads; without `outputs` only what is asked."""
    known = {name: [w[:2] for w in entry["wrong"]] if outputs else [] for name, entry in book.items()}
    arrays = dict(mistakes=np.frombuffer(json.dumps(known).encode(), np.uint8))
    for name, entry in book.items():
        for i, (inputs, right) in enumerate(zip(entry["inputs"], entry["right"], strict=True)):
            arrays |= {f"{name}/{i}/in/{key}": value for key, value in inputs.items()}
            if not outputs:
                continue
            outcomes = [wrong[2][i] for wrong in entry["wrong"]]
            arrays[f"{name}/{i}/runs/"] = np.array([outcome is not None for outcome in outcomes], bool)
            for key, value in right.items():
                arrays[f"{name}/{i}/right/{key}"] = value
                stacked = [value if outcome is None else outcome[key] for outcome in outcomes]
                arrays[f"{name}/{i}/wrong/{key}"] = np.array(stacked, value.dtype)
    np.savez_compressed(path, **arrays)


def freeze():
    from sklearn.datasets import load_digits

    write(compile_book(seed=1), HERE / "expected.npz")
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.data))
    x, y = digits.images[order].astype(np.uint8), digits.target[order].astype(np.uint8)
    np.savez_compressed(HERE / "digits.npz", x=x, y=y)
    print(f"wrote expected.npz, {(HERE / 'expected.npz').stat().st_size / 1000:.0f} kB, and digits.npz")


def handout(folder):
    """Copies what students get. A stub that is solved is not given away."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: choose a new or an empty folder")
    for a, points in FUNCTIONS.items():
        stub = module((HERE / f"{FILES[a]}.py").read_text(encoding="utf-8"))
        for name, case in cases(1).items():
            if name in points and observe(name, stub, case[:1]) != ["not done yet"]:
                raise ValueError(f"{FILES[a]}.py is no stub: {name} is solved in it; restore the file first")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*GIVEN, *STUBS):
        shutil.copyfile(HERE / name, folder / name)
    page = (HERE / "README.md").read_text(encoding="utf-8").split("\n## For the lecturer")[0]
    (folder / "README.md").write_text(page, encoding="utf-8")
    print(f"wrote {len(GIVEN) + len(STUBS) + 1} files to {folder}")


def solve(folder):
    """The handout, solved."""
    handout(folder)
    for a, file in FILES.items():
        (folder / f"{file}.py").write_text(student(a), encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description="For the lecturer.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("freeze", help="write expected.npz anew")
    commands.add_parser("handout", help="make the students' folder").add_argument("folder", type=Path)
    commands.add_parser("solve", help="make the same folder, solved").add_argument("folder", type=Path)
    command = commands.add_parser("grade", help="grade every submission in a folder")
    command.add_argument("folder", type=Path)
    command.add_argument("--seconds", type=float, default=60, help="time limit of a process (60)")
    command.add_argument("--seed", type=int, help="of the hidden inputs (a new one each time)")
    args = parser.parse_args(argv)
    try:
        if args.command == "freeze":
            freeze()
        elif args.command == "handout":
            handout(args.folder)
        elif args.command == "solve":
            solve(args.folder)
        else:
            seed = int.from_bytes(os.urandom(3), "big") if args.seed is None else args.seed
            print(f"inputs drawn with --seed {seed}")
            book = compile_book(seed)
            with tempfile.TemporaryDirectory() as folder:
                write(book, Path(folder) / "questions.npz", outputs=False)
                grade(args.folder, args.seconds, book, Path(folder) / "questions.npz")
    except (OSError, ValueError) as error:
        print(f"lecturer.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    check.any_console()
    sys.exit(main())
