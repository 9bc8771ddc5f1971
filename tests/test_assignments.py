"""The course: its check, its known mistakes, its handout, and the grading of what is handed in."""

import inspect
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import check
import lecturer
import mistakes
import numpy as np
import probes
import pytest
from reference import REFERENCE

FOLDER = Path(__file__).parents[1] / "assignments"

BOOK = check.read()
CODE = {
    name: worth for points in check.POINTS.values() for name, worth in points.items()
}  # function -> points, of A1 to A4


def verdicts(module, functions, book=BOOK):
    found = {name: probes.observe(name, module, book[name]["inputs"]) for name in functions}
    return {name: check.verdict(name, f, book[name]) for name, f in found.items()}


def same_book(a, b):
    """Whether two books hold the same, up to rounding, and the random draws of ei_init up to their tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        tolerance = check.TOLERANCE.get(name, 1e-4)
        assert [w[:2] for w in a[name]["wrong"]] == [tuple(w[:2]) for w in b[name]["wrong"]], name
        sides = [(a[name][part], b[name][part]) for part in ("inputs", "right")]
        sides += [(v[2], w[2]) for v, w in zip(a[name]["wrong"], b[name]["wrong"], strict=True)]
        for ours, theirs in sides:
            for x, y in zip(ours, theirs, strict=True):
                assert (x is None) == (y is None) and (x is None or x.keys() == y.keys()), name
                for key in x or ():
                    if x[key].dtype.kind in "fiub":
                        assert not check.differs(x[key] * 1.0, y[key] * 1.0, tolerance).any(), (name, key)


def test_expected_is_what_freeze_writes_and_small():
    same_book(lecturer.compile_book(seed=1), BOOK)
    assert (FOLDER / "expected.npz").stat().st_size < 200_000


@pytest.mark.parametrize(
    "file, old, new",
    [("lif.py", "u >= threshold", "u > threshold"), ("ei_init.py", "p.fill_(1 / p.shape[1])", "p.fill_(1 / len(p))")],
)
def test_a_changed_repository_is_noticed(tmp_path, file, old, new):
    root = FOLDER.parent
    for path in root.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(FOLDER, tmp_path / "assignments", ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
    program = (
        "import sys; sys.path.insert(0, 'assignments'); import check, lecturer\n"
        "old, new = check.read(), lecturer.compile_book(1)\n"
        "print(*[n for n in old if any(check.first_difference(x, y, check.TOLERANCE.get(n, 1e-4))"
        " for x, y in zip(new[n]['right'], old[n]['right']))])"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.strip(), ran.stderr


def test_the_solution_gets_all_points_on_other_inputs_too():
    for book in (BOOK, lecturer.compile_book(seed=5), lecturer.compile_book(seed=6)):
        for a, functions in check.POINTS.items():
            for name, (right, text, _) in verdicts(lecturer.module(lecturer.student(a)), functions, book).items():
                assert right, (name, text)
    assert sum(CODE.values()) + sum(check.OF_A5.values()) + 2 * len(check.QUESTIONS) == 100
    assert sum(lecturer.PARTS.values()) == sum(check.OF_A5.values())


def test_signatures_agree():
    for a, functions in check.POINTS.items():
        stub = lecturer.module((FOLDER / f"{probes.FILES[a]}.py").read_text(encoding="utf-8"))
        solved = lecturer.module(lecturer.student(a))
        for name in functions:
            parameters = list(inspect.signature(getattr(stub, name)).parameters)
            assert parameters == list(inspect.signature(getattr(solved, name)).parameters), name
            reference = list(inspect.signature(getattr(REFERENCE, name)).parameters)
            assert parameters == [parameter for parameter in reference if parameter != "silent"], name


ALL = [(a, name, way) for a, several in mistakes.MISTAKES.items() for name, _, ways in several for way in ways]


@pytest.mark.parametrize("a, mistake, way", ALL, ids=[f"{a} {name}" for a, name, _ in ALL])
def test_a_known_mistake_is_called_by_its_name(a, mistake, way):
    for book in (BOOK, OTHER):
        found = verdicts(lecturer.module(lecturer.student(a, way)), check.POINTS[a], book)
        wrong = {name: (text, called) for name, (right, text, called) in found.items() if not right}
        assert wrong, mistake
        assert {called for _, called in wrong.values()} == {mistake}, wrong


OTHER = lecturer.compile_book(seed=2)


def test_there_are_ten_mistakes_for_each_assignment():
    for several in mistakes.MISTAKES.values():
        assert len({name for name, _, _ in several}) >= 10
    assert len(mistakes.ABLATION) >= 10


UNKNOWN = [  # errors that are not planted
    ("a1", "simulate", {"alpha * sigma * (1 - sigma)": "alpha * sigma * (1 - sigma) * 0.5"}),
    ("a1", "spike", {"(u >= threshold).to(u.dtype)": "(u >= threshold + 0.25).to(u.dtype)"}),
    ("a1", "simulate", {"(1 - 1 / tau) * (u - threshold": "(1 - 1 / tau) * (u + threshold"}),
    ("a1", "f_i_curve", {"s.mean(0)": "s[1:].mean(0)"}),
    ("a2", "currents", {"(i_ee - i_sub)": "(i_sub - i_ee)"}),
    ("a2", "currents", {'p["w_ie"] @ x': 'p["w_ie"] @ x + 0.1'}),
    ("a2", "clamp_dale", {"clamp_(min=0)": "clamp_(min=0.1)"}),
    ("a2", "pv_som_currents", {'p["w_se"] @ x': 'p["w_se"] @ (2 * x)'}),
    ("a3", "weight_mean", {"(var / (d * (square + var))) ** 0.5": "(var / (d * square)) ** 0.5"}),
    ("a3", "gain", {"(d**0.5 * mean)": "(d * mean) ** 0.5"}),
    ("a3", "poisson_gain", {"(2 + rate)": "(3 + rate)"}),
    ("a3", "ei_init", {'p["w_ei"].fill_(1 /': 'p["w_ei"].fill_(2 /'}),
    ("a4", "stabilize", {".amin(axes, keepdim=True)": ".amin(axes, keepdim=True) * 2"}),
    ("a4", "stabilize", {"i_div + eps": "i_div + 2 * eps"}),
    ("a4", "lateral_weights", {"1 / fan_in": "1 / (fan_in + 1)"}),
]


@pytest.mark.parametrize("a, function, way", UNKNOWN, ids=[f"{a} {name} {i}" for i, (a, name, _) in enumerate(UNKNOWN)])
def test_an_unknown_error_gets_no_name(a, function, way):
    right, text, called = verdicts(lecturer.module(lecturer.student(a, way)), [function])[function]
    assert not right and called is None, text
    assert "no mistake that I know" in text and "First difference" in text


OUTPUTS = [  # what is no output at all: text of a function, and what the check says
    ("a1", "spike", "    return None", "is None: is there a `return`?"),
    ("a1", "spike", "    return u.tolist()", "is a list, not a tensor"),
    ("a1", "spike", "    return u >= threshold", "is of type torch.bool, not torch.float32"),
    ("a1", "spike", "    return u[1:]", "has the shape"),
    ("a1", "spike", "    return u / 0 * 0", "is NaN at index [0]"),
    ("a1", "surrogate", "    u += 1\n    return u", "changes its input u in place"),
    ("a1", "simulate", "    current += 1\n    return current, current", "changes its input current in place"),
    ("a1", "simulate", "    return current", "not a pair (u, s)"),
    ("a1", "f_i_curve", "    return 1 / 0", "ZeroDivisionError: division by zero"),
    ("a2", "currents", "    return dict(i_ee=x)", "the dict has no i_ie"),
    ("a2", "currents", "    p['g_i'][0] = 0\n    return 1", "not a dict of currents"),
    ("a3", "gain", "    return 'much'", "is a str, not a number"),
    ("a3", "gain", "    return x", "not a single number"),
    ("a3", "initialize", "    init(*layers[0])", "it calls init with a function in place"),
    ("a4", "stabilize", "    raise SystemExit('bye')", "SystemExit: bye"),
]


@pytest.mark.parametrize("a, function, body, sentence", OUTPUTS, ids=[f"{o[1]} {i}" for i, o in enumerate(OUTPUTS)])
def test_what_cannot_be_compared_gets_one_sentence(a, function, body, sentence):
    made = lecturer.module(lecturer.student(a))
    parameters = ", ".join(inspect.signature(getattr(made, function)).parameters)
    exec(f"def {function}({parameters}):\n{body}\n", made.__dict__)
    right, text, _ = verdicts(made, [function])[function]
    assert not right and sentence in text and "\n" not in text and "Traceback" not in text


# ---- A5 ----


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A function: the rows of a short experiment with a network of solved assignments, with some changes of `run`."""
    for a in ("a1", "a2", "a3", "a4"):
        sys.modules[probes.FILES[a]] = lecturer.module(lecturer.student(a))
    conditions, seeds = ("full", "eps=1e-8"), (0, 1)

    def rows(edits=()):
        made = lecturer.module(lecturer.student("a5", edits))
        made.HERE = FOLDER
        whole = made.batches
        made.batches = lambda seed, epoch: whole(seed, epoch)[:6]
        found = made.experiment(conditions, seeds, epochs=4)
        path = tmp_path_factory.mktemp("a5") / "results.csv"
        made.write_csv(found, path)
        return check.judged(check.read_rows(path), conditions, seeds)

    yield rows
    for a in ("a1", "a2", "a3", "a4"):
        del sys.modules[probes.FILES[a]]


@pytest.mark.parametrize("mistake", mistakes.ABLATION)
def test_results_show_the_mistakes_of_an_experiment(experiment, mistake):
    right, text, called = experiment(mistakes.ABLATION[mistake])
    assert not right and called == mistake, text


def test_a_right_experiment_is_right(experiment):
    assert experiment() == (True, "right", None)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("condition,seed\nfull,0\n", "the columns are to be condition, seed, steps"),
        ("condition;seed;steps\nfull;0;1\n", "the columns are to be condition, seed, steps"),
        (",".join(check.COLUMNS) + "\nfull,0,1,1,x,0,0.1,0.1\n", "line 2: could not convert"),
        (",".join(check.COLUMNS) + "\nfull,0,1,1,nan,0,0.1,0.1\n", "line 2: a number is not finite"),
        (",".join(check.COLUMNS) + "\nfull,0,1,1,1,0,,0.1\n", "line 2: by_epoch is empty"),
        ("\0", "results.csv"),
    ],
)
def test_a_table_that_cannot_be_read_gets_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "results.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(probes.Problem, match=sentence):
        check.judged(check.read_rows(path))
        raise probes.Problem("results.csv was read")  # a table without a line


# ---- the handout ----


def run_check(folder, *arguments):
    """check.py in a folder, on an ASCII console, without fcntl and resource."""
    program = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "sys.modules['sklearn'] = sys.modules['matplotlib'] = sys.modules['lif'] = sys.modules['scipy'] = None\n"
        "import runpy; sys.argv[:1] = ['check.py']; sys.path[0] = '.'; runpy.run_path('check.py', run_name='__main__')"
    )
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "SYSTEMROOT": "", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "of \N{LATIN SMALL LETTER U WITH DIAERESIS}"
    lecturer.solve(folder)
    return folder


def test_handout(tmp_path, capsys):
    folder = tmp_path / "my course \N{LATIN SMALL LETTER U WITH DIAERESIS}"
    assert lecturer.main(["handout", str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{f}.py" for f in probes.FILES.values()} | {"README.md", "check.py", "probes.py", "expected.npz"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000
    assert "For the lecturer" not in (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("a*.py"):  # as an editor on Windows saves it
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    ran = run_check(folder, "all")
    assert ran.returncode == 1 and "Traceback" not in ran.stdout + ran.stderr, ran.stderr
    assert ran.stdout.count("not done yet") == len(CODE) + len(check.OF_A5) + len(check.QUESTIONS)
    assert lecturer.main(["handout", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_solved_stub_is_not_given_away(tmp_path, monkeypatch):
    copy = tmp_path / "assignments"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "a4_prop.py").write_text(lecturer.student("a4"), encoding="utf-8")
    monkeypatch.setattr(lecturer, "HERE", copy)
    with pytest.raises(ValueError, match=r"a4_prop.py is no stub: stabilize is solved"):
        lecturer.handout(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_setup_and_all_in_a_solved_handout(solved):
    ran = run_check(solved, "setup", "--id", "s-1")
    assert ran.returncode == 0 and "tau = " in ran.stdout
    ran = run_check(solved, "all")
    assert f"{sum(CODE.values())} of 90 points" in ran.stdout, ran.stdout + ran.stderr
    (solved / "a2_circuit.py").write_text("def currents(:\n", encoding="utf-8")
    ran = run_check(solved, "a2")
    assert "a2_circuit.py, line 1: SyntaxError" in ran.stdout and ran.returncode == 1
    (solved / "a2_circuit.py").write_text("\n\ndef currents(x, p, stabilize):\n    return x.foo\n", encoding="utf-8")
    ran = run_check(solved, "a2")
    assert "a2_circuit.py, line 4: AttributeError" in ran.stdout and "no such function" in ran.stdout
    (solved / "a2_circuit.py").write_text(lecturer.student("a2"), encoding="utf-8")


@pytest.mark.parametrize("arguments", [["a6"], [], ["submit"], ["submit", "--id", "../x"], ["setup", "--id", "a b"]])
def test_a_wrong_command_ends_with_2(monkeypatch, arguments):
    with pytest.raises(SystemExit, match="2"):
        check.main(arguments)


def test_own_numbers():
    many = [check.own_numbers(f"student{i}") for i in range(300)]
    assert len({str(numbers) for numbers in many}) == 300
    for numbers in many:
        for a in check.QUESTIONS:
            assert np.isfinite(lecturer.answer_of(a, numbers[a]))
        flat = [v for row in numbers["a4"]["I_div"] for v in row]
        positive = [v for v in flat if v]
        assert 0 < len(positive) < 6 and len(set(positive)) == len(positive)
        lent = numbers["a4"]["c"] * (1 + flat.count(0))  # its own gradient, and that of each zero
        assert lecturer.answer_of("a4", numbers["a4"]) == pytest.approx(lent)
        tau, theta, steps = numbers["a1"]["tau"], numbers["a1"]["theta"], numbers["a1"]["T"]
        current = lecturer.answer_of("a1", numbers["a1"])
        for factor, fires in ((1.001, True), (0.999, False)):
            u, reached = 0, False
            for _ in range(steps):
                u = (1 - 1 / tau) * u + factor * current
                reached |= u >= theta
            assert reached == fires


# ---- grading ----


def pack(path, files):
    with zipfile.ZipFile(path, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)


def test_grade(tmp_path, capsys):
    solution = {f"{file}.py": lecturer.student(a) for a, file in probes.FILES.items()}
    numbers, answered = check.own_numbers("good"), dict(solution)
    for a, key in check.QUESTIONS.items():
        line = f"\nANSWERS[{key!r}] = {lecturer.answer_of(a, numbers[a])}\n"
        answered[f"{probes.FILES[a]}.py"] += line
    answered["a5_ablation.py"] += "\nANSWERS['sentences'] = ['This is a long enough sentence.'] * 5\n"
    pack(tmp_path / "submission-good.zip", answered | {"../evil.py": "x"})

    bad = dict(solution)
    bad["a1_lif.py"] += """
def spike(u, threshold=1.0):
    print("hello")
    return (u >= threshold).to(u.dtype)
def f_i_curve(currents, tau=2.0, threshold=1.0, steps=100):
    while True:
        pass
"""
    bad["a2_circuit.py"] = lecturer.student("a2", {'p["g_i"][:, None] * s_i': "s_i"})
    bad["a2_circuit.py"] += "\ndef pv_som_currents(x, p, stabilize):\n    import os\n    os._exit(0)\n"
    bad["a4_prop.py"] += "\nraise RuntimeError('no')\n"
    bad["a5_ablation.py"] = "def experiment(**options): return [dict(condition='full')]\n"
    pack(tmp_path / "submission-bad.zip", {f"folder/{name}": text for name, text in bad.items()})

    stored = [case["s"].tolist() for case in BOOK["spike"]["right"]]
    cheat = f"import torch\nstored = {stored}\ndef spike(u, threshold=1.0):\n    return torch.tensor(stored.pop(0))\n"
    (tmp_path / "cheat").mkdir()
    (tmp_path / "cheat" / "a1_lif.py").write_text(cheat, encoding="utf-8")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")

    assert lecturer.main(["grade", str(tmp_path), "--seconds", "10"]) == 0
    text = capsys.readouterr().out
    grades = {line.split(",")[0]: line for line in (tmp_path / "grades.csv").read_text(encoding="utf-8").splitlines()}
    columns = grades["id"].split(",")
    points = {name: dict(zip(columns, line.split(","), strict=True)) for name, line in grades.items()}
    remarks = (tmp_path / "remarks.txt").read_text(encoding="utf-8")
    assert points["good"]["total"] == "93", remarks  # all but results.csv and a5.png
    assert not (tmp_path.parent / "evil.py").exists()
    assert points["cheat"]["spike"] == "0" and points["cheat"]["total"] == "0"
    assert points["broken"]["total"] == "0"
    assert points["bad"]["spike"] == "3" and points["bad"]["f_i_curve"] == "0"
    assert points["bad"]["gain"] == "4" and points["bad"]["clamp_dale"] == "3"
    for sentence in (
        "f_i_curve: it did not end within 10 seconds",
        "pv_som_currents: it ended the program",
        "spike: right or wrong, it prints",
        "currents: no g_I. ",
        "stabilize: a4_prop.py, line ",
        "RuntimeError: no",
        "it cannot be unpacked: File is not a zip file",
        "surrogate: the file has no such function",
    ):
        assert sentence in remarks, remarks
    assert "currents,no g_I,1" in (tmp_path / "mistakes.csv").read_text(encoding="utf-8")
    assert "4 submissions" in text


def test_nothing_to_grade(tmp_path, capsys):
    assert lecturer.main(["grade", str(tmp_path)]) == 2
    assert lecturer.main(["grade", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
