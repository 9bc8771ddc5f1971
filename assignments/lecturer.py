"""For the lecturer: makes expected.npz and the handout, and grades what was handed in.

python lecturer.py freeze            writes expected.npz anew, after a change of solutions/ or mistakes.txt
python lecturer.py handout DIR       a folder for the students, which needs torch and numpy only
python lecturer.py solve DIR         the same folder, solved
python lecturer.py grade DIR         grades what was handed in, in DIR: grades.csv, mistakes.csv, remarks/
"""

import argparse
import ast
import itertools
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import check
import numpy as np
from ablation import CONDITIONS
from grading import grade
from probes import FILES, HERE, USES, observe

GIVEN = ["check.py", "probes.py", "ablation.py", "expected.npz", "digits.npz"]
FUNCTIONS = {a: points for a, points in check.POINTS.items() if a != "a5"}


def cases(seed):
    """Inputs of each function, function -> list of dicts of lists and numbers. Sizes depend on the seed, too."""
    r = np.random.RandomState(seed)

    def some(*shape):  # positive, different numbers
        return r.permutation(np.linspace(0.1, 2, int(np.prod(shape)))).reshape(shape).round(4)

    def weights(*shape):  # of the loss, whose gradient is compared
        return r.normal(size=shape).round(3)

    def sparse(*shape):  # with zeros, and a silent position or sample
        x = some(*shape) * (r.rand(*shape) < 0.6)
        x[..., r.randint(shape[-1])] = 0
        return x

    def dyadic(low, high, shape):  # multiples of 1/64: with tau = 2 and 4 the potentials are exact in float32
        return r.randint(64 * low, 64 * high, shape) / 64

    def neuron(*shape, **how):  # theta is 1 if it is not given
        current = dyadic(-1, 3, shape)
        current[0, ..., :4] = how.get("threshold", 1)  # exactly at the threshold
        current[0, ..., 4], current[2, ..., 0], current[3, ..., 1] = -0.5, -20, 12  # and far from it
        return dict(current=current, weights=weights(*shape)) | how

    def circuit(n_in, n_e, **cells):  # the shapes of the parameters of the interneurons
        x = sparse(2, n_in, 4) if n_in == 4 else some(2, n_in, 3) * (r.rand(2, n_in, 3) < 0.8)
        p = {f"p_{name}": some(*shape) for name, shape in dict(w_ee=(n_e, n_in), **cells).items()}
        p |= dict(p_g_e=some(n_e), p_b_e=weights(n_e))
        p["p_g_e"][0], p["p_b_e"][-1] = 40, -30  # large currents, too
        for name in {"p_w_ei", "p_w_es", "p_w_ep"} & set(p):  # so that I_EE - I_sub has both signs
            p[name] = (p[name] / p[name].shape[1]).round(4)
        loss = weights(2, n_e, x.shape[2])
        x[1, :, -1] *= 1e-9  # hardly any input: what is added to I_div shows here, and the gradient is rounding
        loss[1, :, -1] = 0
        return dict(x=x, weights=loss) | p

    def pv(n_in, n_e, n_i):
        return circuit(n_in, n_e, w_ie=(n_i, n_in), w_ei=(n_e, n_i), g_i=(n_i,))

    def pv_som(n_in, n_e, n_s, n_p):
        return circuit(n_in, n_e, w_se=(n_s, n_in), w_es=(n_e, n_s), w_pe=(n_p, n_in), w_ep=(n_e, n_p), g_p=(n_p,))

    def clamped(n_in, n_e, n_i, **gains):
        shapes = dict(w_ee=(n_e, n_in), w_ie=(n_i, n_in), w_ei=(n_e, n_i)) | gains  # a readout has no gains
        p = {f"p_{name}": weights(*shape) for name, shape in shapes.items()}
        for value in p.values():
            value.flat[:2] = -0.4, 1.7  # a value below 0 in each, and one above 1
        return p

    def activity(*shape):
        return dict(x=sparse(*shape), d=int(r.randint(20, 400)))

    def drawn(n_e, n_i, *shape, readout=False):
        return dict(n_e=n_e, n_i=n_i, k=5, x=sparse(*shape), readout=readout, seed=seed)

    def divisors(ste, *shape):
        i_div = 10 ** r.uniform(-12, 0, shape) * (r.rand(*shape) < 0.6)  # of any size
        i_div[..., 0], i_div[..., 1] = 0, 10 ** r.uniform(-3, 0, shape[:-1])
        i_div[r.randint(1, shape[0])] = 0  # a silent sample
        return dict(i_div=i_div, eps="adaptive", ste=ste, weights=weights(*shape))

    n, e = r.randint(5, 9), 4 * r.randint(2, 4)
    u, d, tested = (r.permutation(33) - 8) / 8, int(r.randint(20, 99)), dict(no_grad=True)  # as an accuracy is measured
    grid, rows = dict(u=u.reshape(3, 11), threshold=0.5), r.randint(5, 8)
    curve, rates = dict(currents=np.append(dyadic(0, 2, 10), [0.5, 1, 3, 4.5, 6, 7])), r.randint([1, 21], [20, 40]) / 20
    found = dict(
        spike=[dict(u=u, threshold=1.5), grid, grid | dict(dtype="float64"), dict(u=u)],
        surrogate=[dict(u=u, threshold=1.5, alpha=4.0), grid | dict(alpha=2.0), dict(u=u)],
        simulate=[neuron(8, 2, n, tau=4, threshold=1.5, alpha=3), neuron(6, 6, tau=2, threshold=0.5), neuron(7, 5)],
        f_i_curve=[curve | dict(tau=4.0, threshold=1.5, steps=16), curve | dict(tau=2.0, threshold=0.75, steps=24)],
        currents=[pv(4, 4, 4), pv(n + 8, e, e // 2)],
        clamp_dale=[clamped(n, e, 3, g_i=(3,), g_e=(e,), b_e=(e,)), clamped(n, e, 2)],
        pv_som_currents=[pv_som(4, 4, 4, 4), pv_som(n + 8, e, e // 2, e // 4)],
        fan_in=[dict(w=some(5, n)), dict(w=some(4, n, 3, 3))],
        weight_mean=[activity(3, n), activity(4, 2, 5, n)],
        gain=[activity(3, n), activity(4, 2, 5, n)],
        poisson_gain=[dict(rate=rates[0], d=100), dict(rate=rates[1], d=int(r.randint(20, 99)))],
        ei_init=[drawn(480, 320, 3, rows, 4, n), drawn(360, 240, 3, 40, readout=True)],
        initialize=[dict(n_layers=3, x=sparse(3, n)), dict(n_layers=1, x=sparse(3, n))],
        stabilize=[divisors(True, 4, 4, n), divisors(False, 4, 3, 2, n), divisors(True, 2, 3, n) | dict(eps=0.25)],
        scale_gradient=[dict(w=weights(3, n), factor=0.125, weights=weights(3, n)) | how for how in ({}, tested)],
        lateral_weights=[dict(w_ei=some(e, 3), fan_in=d, weights=weights(e, 3)) | how for how in ({}, tested)],
    )
    text = json.dumps(found, default=lambda array: array.tolist())
    return json.loads(text)


def mistakes():
    """(assignment, name, sentence, way) for each way in mistakes.txt: a dict, text of the solution -> new text."""
    texts, a, title, sentence = {}, "", "", ""

    def plain(text):
        return re.sub(r"\$[A-Z_]+", lambda name: texts[name[0]], text).replace("\\n", "\n").strip(" ")

    for line in (HERE / "mistakes.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            a = line[1:3]
        elif line.startswith("$"):
            name, _, text = line.partition(" = ")
            texts[name] = plain(text)
        elif line.startswith(" "):
            changes = [change.split(" =>") for change in line.split(" ;; ")]
            ways = [changes] if len(changes) > 1 else [[(changes[0][0], new)] for new in changes[0][1].split(" ||")]
            for way in ways:
                yield a, title, sentence, {plain(old): plain(new) for old, new in way}
        elif not line.startswith("#"):
            title, _, sentence = line.partition(": ")


def student(a, edits=()):
    """The file of a student who has solved assignment `a`, with changes, all at once: its text."""
    text, edits = (HERE / "solutions" / f"{FILES[a]}.py").read_text(encoding="utf-8"), dict(edits)
    for old in edits:
        if old not in text:
            raise ValueError(f"{a}: the solution has no {old!r}")
    return re.sub("|".join(map(re.escape, edits)), lambda found: edits[found[0]], text) if edits else text


def stub(a):
    """The file as students get it: without what they are to write."""
    text = student(a)
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if getattr(node, "name", "") in (*check.POINTS[a], "run", "plot"):
            lines[node.body[1].lineno - 1 : node.end_lineno] = ["    raise NotImplementedError"]  # after the docstring
    return "\n".join(lines) + "\n"


def module(text):
    """A text as a module."""
    made = types.ModuleType("student")
    made.__file__ = str(HERE / "student.py")
    exec(compile(text, "student", "exec"), made.__dict__)
    return made


def compile_book(seed):
    """What `check.read` reads from a file, made anew from solutions/ and mistakes.txt."""
    book, inputs, solved = {}, cases(seed), {a: module(student(a)) for a in FUNCTIONS}
    for a, name in ((a, name) for a, parts in FUNCTIONS.items() for name in parts):
        uses = USES.get(name, ())
        groups = [group for n in range(len(uses)) for group in itertools.combinations(uses, n + 1)]
        given = {"+".join(group): observe(name, solved[a], inputs[name], group) for group in groups}
        right = observe(name, solved[a], inputs[name])
        book[name] = dict(inputs=inputs[name], right=right, given=given, wrong=[])
    for a, title, sentence, way in mistakes():
        made = module(student(a, way))
        for name in FUNCTIONS[a]:
            codes = [getattr(m, name).__code__ for m in (made, solved[a])]
            if len({(code.co_code, repr(code.co_consts), code.co_names) for code in codes}) > 1:  # it is made here
                book[name]["wrong"].append([title, sentence, observe(name, made, inputs[name])])
    sys.path.insert(1, str(HERE / "solutions"))  # A5 imports the others
    how = [*CONDITIONS[seed % 2 : seed % 2 + 2], "no E-I Init"], [10 + seed % 10**5, 11 + seed % 10**5], 2
    book["experiment"] = dict(inputs=how, right=check.experiment(module(student("a5")), *how)[3])
    return book


def write(book, path):
    """A book as a file that `check.read` reads. Of a mistake only what differs is written."""

    def plain(case, right=None):
        if isinstance(case, str):
            return case
        text = json.dumps({k: v.tolist() for k, v in case.items() if right is None or not check.same(case, right, k)})
        return json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))

    entries = {}
    for name, entry in ((name, entry) for name, entry in book.items() if name != "experiment"):
        right = entry["right"]
        wrong = [[*w[:2], [plain(*pair) for pair in zip(w[2], right, strict=True)]] for w in entry["wrong"]]
        given = {names: [plain(case) for case in cases] for names, cases in entry["given"].items()}
        entries[name] = entry | dict(right=[plain(case) for case in right], given=given, wrong=wrong)
    np.savez_compressed(path, book=np.frombuffer(json.dumps(entries, separators=(",", ":")).encode(), np.uint8))


def handout(folder, text=stub):
    """Makes what students get; `solve` makes the same with solutions: text is `student`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: choose a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in GIVEN:
        shutil.copyfile(HERE / name, folder / name)
    for a, file in FILES.items():
        (folder / f"{file}.py").write_text(text(a), encoding="utf-8")
    page = (HERE / "README.md").read_text(encoding="utf-8").split("\n## For the lecturer")[0]
    (folder / "README.md").write_text(page, encoding="utf-8")
    print(f"wrote {len(list(folder.iterdir()))} files to {folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="For the lecturer.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("freeze", help="write expected.npz anew")
    commands.add_parser("handout", help="make the students' folder").add_argument("folder", type=Path)
    commands.add_parser("solve", help="make the same folder, solved").add_argument("folder", type=Path)
    command = commands.add_parser("grade", help="grade what was handed in; the same command goes on after a stop")
    command.add_argument("folder", type=Path)
    command.add_argument("--seconds", type=float, default=30, help="time limit of a function (30)")
    command.add_argument("--seed", type=int, help="of the hidden inputs (a new one each time)")
    command.add_argument("--user", help="run the submissions as this user (as root, on Linux and macOS)")
    args = parser.parse_args(argv)
    if not (0 < getattr(args, "seconds", 1) < 1e5 and 0 <= (getattr(args, "seed", 0) or 0) < 2**32):
        parser.error("--seconds is a positive number, and --seed is from 0 to 2^32 - 1")
    check.torch.set_num_threads(1)  # for functions as small as these, more threads are slower
    if args.command == "freeze":
        write(compile_book(seed=1), HERE / "expected.npz")
        print(f"wrote expected.npz, {(HERE / 'expected.npz').stat().st_size / 1000:.0f} kB")
    elif args.command == "grade":
        seed = int.from_bytes(os.urandom(3), "big") if args.seed is None else args.seed
        print(f"inputs drawn with --seed {seed}")
        grade(args.folder, lambda: compile_book(seed), args.seconds, args.user)
    else:
        handout(args.folder, stub if args.command == "handout" else student)


if __name__ == "__main__":
    check.on_any_console(main)
