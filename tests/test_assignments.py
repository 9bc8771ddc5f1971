"""The course: its check, its known mistakes, its handout, and the grading of what is handed in."""

import inspect
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import ablation
import check
import grading
import lecturer
import mistakes
import numpy as np
import probes
import pytest
from reference import REFERENCE

FOLDER = Path(__file__).parents[1] / "assignments"

BOOK = check.read()
FUNCTIONS = grading.FUNCTIONS
CODE = {name: worth for points in FUNCTIONS.values() for name, worth in points.items()}


def verdicts(module, functions, book=BOOK):
    found = {name: probes.observe(name, module, book[name]["inputs"]) for name in functions}
    return {name: check.verdict(name, f, book[name]) for name, f in found.items()}


def same_book(a, b):
    """Whether two books hold the same, up to rounding, and the random draws of ei_init up to their tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        assert [w[:2] for w in a[name]["wrong"]] == [tuple(w[:2]) for w in b[name]["wrong"]], name
        sides = [(a[name][part], b[name][part]) for part in ("inputs", "right")]
        sides += [(v[2], w[2]) for v, w in zip(a[name]["wrong"], b[name]["wrong"], strict=True)]
        for ours, theirs in sides:
            for x, y in zip(ours, theirs, strict=True):
                assert (x is None) == (y is None) and (x is None or x.keys() == y.keys()), name
                for key in x or ():
                    if x[key].dtype.kind in "fiub":
                        assert not check.differs(x[key] * 1.0, y[key] * 1.0, key).any(), (name, key)


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
        "print(*[n for n in old if any(check.first_difference(x, y)"
        " for x, y in zip(new[n]['right'], old[n]['right']))])"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.strip(), ran.stderr


def test_the_solution_gets_all_points_on_other_inputs_too():
    for book in (BOOK, lecturer.compile_book(seed=5), lecturer.compile_book(seed=6)):
        for a, functions in FUNCTIONS.items():
            for name, (right, text, _) in verdicts(lecturer.module(lecturer.student(a)), functions, book).items():
                assert right, (name, text)
    assert sum(CODE.values()) + sum(check.POINTS["a5"].values()) + 2 * len(check.QUESTIONS) == 100


def test_signatures_agree():
    for a, functions in FUNCTIONS.items():
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
        found = verdicts(lecturer.module(lecturer.student(a, way)), FUNCTIONS[a], book)
        wrong = {name: (text, called) for name, (right, text, called) in found.items() if not right}
        assert wrong, mistake
        assert {called for _, called in wrong.values()} == {mistake}, wrong


OTHER = lecturer.compile_book(seed=2)


def test_there_are_ten_mistakes_for_each_assignment():
    for several in mistakes.MISTAKES.values():
        assert len({name for name, _, _ in several}) >= 10
    assert len({name for name, _ in ABLATION}) >= 10


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


SUBTLE = [  # errors that only some inputs show
    ("a1", "spike", {"return (u >= threshold).to(u.dtype)": "return torch.tensor([float(v >= threshold) for v in u])"}),
    ("a1", "simulate", {"    u = s = torch": "    T, n = current.shape\n    u = s = torch"}),
    ("a2", "currents", {"    i_ee = p": "    p = {k: v.data for k, v in p.items()}\n    i_ee = p"}),
    ("a2", "currents", {"stabilize(i_div)": "torch.where(i_div == 0, 1.0, i_div)"}),
    ("a2", "clamp_dale", {"p[name].clamp_(min=0)": "p[name].clamp_(min=1e-6)"}),
    ("a2", "clamp_dale", {"p[name].clamp_(min=0)": "p[name].requires_grad_(False).clamp_(min=0)"}),
    ("a2", "clamp_dale", {'if name != "b_e"': 'if name not in ("b_e", "w_ee")'}),
    ("a2", "clamp_dale", {'if name != "b_e"': 'if name == "b_e"'}),
    ("a3", "ei_init", {"p[name].exponential_()": "p[name].requires_grad_(False).exponential_()"}),
    ("a3", "ei_init", {'d = fan_in(p["w_ee"])': "d = x[0].numel()"}),
    ("a3", "ei_init", {'p["g_i"].fill_(gain(x, d))': 'p["g_i"].fill_(1.1 * gain(x, d))'}),
    ("a4", "stabilize", {"i_div == 0": "i_div < 1e-6", "i_div > 0": "i_div > 1e-6"}),
    ("a4", "stabilize", {"masked_fill(smallest.isinf(), 1)": "masked_fill(smallest.isinf(), 0.5)"}),
]


@pytest.mark.parametrize("a, function, way", SUBTLE, ids=range(len(SUBTLE)))
def test_a_subtle_error_is_seen_and_gets_no_false_name(a, function, way):
    right, text, called = verdicts(lecturer.module(lecturer.student(a, way)), [function])[function]
    assert not right and called is None, text


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

NETWORK = "    network = Network(condition)\n"
ABLATION = [
    (
        "network reused",
        {
            NETWORK: "    network = run.__dict__.setdefault('network', Network(condition))\n",
            'if condition != "no E-I Init":': "if seed == 0 and condition == 'full':",
        },
    ),
    ("E-I Init forgotten", {'if condition != "no E-I Init":': "if False:"}),
    ("E-I Init forgotten", {'if condition != "no E-I Init":': "if condition == 'full':"}),
    ("E-I Init under every condition", {'if condition != "no E-I Init":': "if True:"}),
    ("initialised on test data", {"train_x[batches(seed, 0)[0]]": "test_x"}),
    ("initialised on test data", {"train_x[batches(seed, 0)[0]]": "test_x[:BATCH]"}),
    ("initialised on the whole training set", {"train_x[batches(seed, 0)[0]]": "train_x"}),
    ("seed ignored", {"torch.manual_seed(seed)": "torch.manual_seed(0)"}),
    ("seed ignored", {"batches(seed, epoch)": "batches(0, epoch)", "batches(seed, 0)": "batches(0, 0)"}),
    (
        "seeded once",
        {"    torch.manual_seed(seed)\n": "", "    rows = []\n": "    rows = []\n    torch.manual_seed(0)\n"},
    ),
    ("no clamp", {"clamp_dale(p)": "pass"}),
    (
        "clamp before the step",
        {
            "            optimizer.step()\n            for p in network.layers:\n                clamp_dale(p)\n": (
                "            for p in network.layers:\n                clamp_dale(p)\n            optimizer.step()\n"
            )
        },
    ),
    ("training accuracy reported", {"accuracy(network, test_x, test_y)": "accuracy(network, train_x, train_y)"}),
    ("best epoch reported", {"test_accuracy=accuracies[-1]": "test_accuracy=max(accuracies)"}),
    ("unequal steps", {"range(epochs)": "range(epochs + (condition == 'full'))"}),
]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A function: the rows of a short experiment with a network of solved assignments, with some changes of `run`."""
    for a in ("a1", "a2", "a3", "a4"):
        sys.modules[probes.FILES[a]] = lecturer.module(lecturer.student(a))

    def judge(edits=(), epochs=1, n_batches=4):
        how = dict(conditions=("full", "no STE", "no E-I Init"), seeds=(0, 1), epochs=epochs)
        made = lecturer.module(lecturer.student("a5", edits))
        made.HERE = FOLDER
        whole = made.batches
        made.batches = lambda seed, epoch: whole(seed, epoch)[:n_batches]
        path = tmp_path_factory.mktemp("a5") / "results.csv"
        made.write_csv(made.experiment(**how), path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ablation, "N_BATCHES", n_batches)
            return check.judged(check.read_lines(path), **how)

    yield judge
    for a in FUNCTIONS:
        del sys.modules[probes.FILES[a]]


@pytest.mark.parametrize("mistake, edits", ABLATION, ids=[f"{name} {i}" for i, (name, _) in enumerate(ABLATION)])
def test_results_show_the_mistakes_of_an_experiment(experiment, mistake, edits):
    longer = mistake in ("no clamp", "best epoch reported")  # they show only after some steps
    right, text, called = experiment(edits, *((3, 6) if longer else ()))
    assert not right and called == mistake, text


FALSE = [  # errors of other kinds, which must not be taken for those
    {'first["g_i"][0].item()': "1.0"},  # read before E-I Init
    {'row.setdefault("first_loss", loss.item())': 'row["first_loss"] = loss.item()'},
    {"            optimizer.step()\n": ""},
    {"range(epochs)": "range(2)"},
    {"in batches(seed, epoch):": "in batches(seed, epoch)[:1]:"},
    {"accuracy(network, test_x, test_y)": "round(accuracy(network, test_x, test_y), 2)"},
]


@pytest.mark.parametrize("edits", FALSE, ids=range(len(FALSE)))
def test_other_errors_of_an_experiment_get_no_such_name(experiment, edits):
    right, text, called = experiment(edits)
    assert called is None, text
    assert not right or "optimizer.step" in str(edits) or "first_loss" in str(edits)  # which nothing contradicts here


def test_a_right_experiment_is_right(experiment):
    assert experiment() == (True, "right", None)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("condition,seed\nfull,0\n", "line 2: there is no steps; the columns are condition, seed, steps"),
        ("condition;seed;steps\nfull;0;1\n", "line 2: there is no condition; the columns are condition, seed, steps"),
        (
            ",".join(ablation.COLUMNS) + "\nfull,0,1,1,x,0,0,0.1,0.1\n",
            "line 2: first_weight is 'x', which is no number",
        ),
        (",".join(ablation.COLUMNS) + "\nfull,0,1,1,nan,0,0,0.1,0.1\n", "line 2: first_weight is nan, and"),
        (",".join(ablation.COLUMNS) + "\nfull,0," + "1" * 400 + ",1,1,0,0,0.1,0.1\n", "line 2: steps is 1111"),
        (",".join(ablation.COLUMNS) + "\nfull,0,1,1,1,0,0,,0.1\n", "line 2: by_epoch is empty"),
        (",".join(ablation.COLUMNS) + "\nfull,0,1,1,1,0,0\n", "line 2: there is no by_epoch"),
        (",".join(ablation.COLUMNS) + "\n", "There are 0 lines for 'full', seed 0"),
    ],
)
def test_a_table_that_cannot_be_read_gets_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "results.csv"
    path.write_text("\ufeff" + text, encoding="utf-8")
    right, said, called = check.judged(check.read_lines(path))
    assert not right and called is None and sentence in said


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (None, "it returns NoneType, not a list of dicts"),
        ([1], "it returns list, not a list of dicts"),
        ([dict(condition="full")], "run, line 1: there is no seed"),
        ([dict(by_epoch=5)], "TypeError"),
        ([], "There are 0 lines"),
    ],
)
def test_what_is_no_experiment_gets_one_sentence(rows, sentence):
    class Module:
        experiment = staticmethod(lambda *_: rows)

    right, said, _ = check.judged(check.experiment(Module, **check.SHORT), "run", **check.SHORT)
    assert not right and sentence in said


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
    assert names == {f"{f}.py" for f in probes.FILES.values()} | {"README.md", *lecturer.GIVEN}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000
    assert "For the lecturer" not in (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("a*.py"):  # as an editor on Windows saves it
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    ran = run_check(folder, "all")
    assert ran.returncode == 1 and "Traceback" not in ran.stdout + ran.stderr, ran.stderr
    assert ran.stdout.count("not done yet") == len(CODE) + len(check.POINTS["a5"]) + len(check.QUESTIONS)
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
    assert f"{sum(CODE.values()) + 5} of 90 points" in ran.stdout, ran.stdout + ran.stderr


def test_a_file_that_fails_does_not_hide_the_others(solved):
    (solved / "a1_lif.py").write_text("def spike(:\n", encoding="utf-8")
    (solved / "a2_circuit.py").write_text("\n\ndef currents(x, p, stabilize):\n    return x.foo\n", encoding="utf-8")
    ran = run_check(solved, "all")
    assert ran.returncode == 1 and "Traceback" not in ran.stdout + ran.stderr
    assert "a1_lif.py cannot be imported: a1_lif.py, line 1: SyntaxError" in ran.stdout
    assert "a2_circuit.py, line 4: AttributeError" in ran.stdout and "no such function" in ran.stdout
    assert "20 of" not in ran.stdout and "4/4   gain: right" in ran.stdout


@pytest.mark.parametrize("arguments", [["a6"], [], ["submit"], ["submit", "--id", "../x"], ["setup", "--id", "a b"]])
def test_a_wrong_command_ends_with_2(monkeypatch, arguments):
    with pytest.raises(SystemExit, match="2"):
        check.main(arguments)


def test_own_numbers():
    many = [check.own_numbers(f"student{i}") for i in range(300)]
    assert len({str(numbers) for numbers in many}) == 300
    for numbers in many:
        for a in check.QUESTIONS:
            assert np.isfinite(grading.answer_of(a, numbers[a]))
        flat = [v for row in numbers["a4"]["I_div"] for v in row]
        positive = [v for v in flat if v]
        assert 0 < len(positive) < 6 and len(set(positive)) == len(positive)
        lent = numbers["a4"]["c"] * (1 + flat.count(0))  # its own gradient, and that of each zero
        assert grading.answer_of("a4", numbers["a4"]) == pytest.approx(lent)
        tau, theta, steps = numbers["a1"]["tau"], numbers["a1"]["theta"], numbers["a1"]["T"]
        current = grading.answer_of("a1", numbers["a1"])
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
        answered[f"{probes.FILES[a]}.py"] += f"\nANSWERS[{key!r}] = {grading.answer_of(a, numbers[a])}\n"
    answered["a5_ablation.py"] += "\nANSWERS['sentences'] = ['This is a long enough sentence.'] * 5\n"
    pack(tmp_path / "Some Name_submission-bad.ZIP", answered | {"id.txt": "good", "../evil.py": "x"})

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
    bad["a3_init.py"] += "\nANSWERS = 5\n"
    bad["a4_prop.py"] += "\nANSWERS = {'gradient_without_ste': float('nan')}\nraise RuntimeError('no\\ud800')\n"
    bad["a5_ablation.py"] = (
        "ANSWERS = dict(sentences=5, silent_loss=10**400)\ndef experiment(*a): return [{'seed': 1}]\n"
    )
    pack(tmp_path / "submission-b.zip", {f"folder/{name}": text for name, text in bad.items()})

    stored = [case["s"].tolist() for case in BOOK["spike"]["right"]]
    cheat = f"import torch\nstored = {stored}\ndef spike(u, threshold=1.0):\n    return torch.tensor(stored.pop(0))\n"
    (tmp_path / "cheat" / "deep").mkdir(parents=True)
    (tmp_path / "cheat" / "deep" / "a1_lif.py").write_text(cheat, encoding="utf-8")
    answer = grading.answer_of("a5", check.own_numbers("cheat")["a5"])
    written = f"import os\nos._exit(0)\nANSWERS = {{'silent_loss': {answer}}}\n"  # is read, though it never gets there
    (tmp_path / "cheat" / "deep" / "a5_ablation.py").write_text(written, encoding="utf-8")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    pack(tmp_path / "other.zip", {"essay.txt": "dear professor"})
    (tmp_path / "c.tar.gz").write_bytes(b"")

    assert lecturer.main(["grade", str(tmp_path), "--seconds", "15"]) == 0
    out = capsys.readouterr().out
    header, *lines = (tmp_path / "grades.csv").read_text(encoding="utf-8").splitlines()
    points = {line.split(",")[0]: dict(zip(header.split(","), line.split(","), strict=True)) for line in lines}
    remarks = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "remarks").iterdir()}
    assert points.keys() == remarks.keys() == {"good", "b", "cheat", "broken", "other"}
    assert points["good"]["total"] == "93", remarks["good"]  # all but results.csv and a5.png
    assert not list(tmp_path.parent.rglob("evil.py"))
    assert points["cheat"]["spike"] == "0" and points["cheat"]["total"] == "2", remarks["cheat"]
    assert [points["b"][part] for part in ("spike", "simulate", "f_i_curve", "gain", "clamp_dale", "sentences")] == [
        *("3", "10", "0", "4", "3", "0")
    ], remarks["b"]
    for name, sentence in (
        ("b", "f_i_curve: It did not end within 15 seconds."),
        ("b", "pv_som_currents: It ended the program."),
        ("b", "spike: it prints something."),
        ("b", "currents: no g_I. "),
        ("b", "stabilize: a4_prop.py, line "),
        ("b", "RuntimeError: no"),
        ("b", "experiment: run, line 1: there is no condition"),
        ("b", "silent_loss: "),
        ("b", "gain_for_poisson: there is no answer; right is "),
        ("cheat", "surrogate: the file has no such function"),
        ("broken", "It cannot be unpacked: File is not a zip file"),
        ("other", "There is none of the files a1_lif.py, "),
    ):
        assert sentence in remarks[name], remarks[name]
    assert "currents,no g_I,1" in (tmp_path / "mistakes.csv").read_text(encoding="utf-8")
    assert "5 submissions" in out and "not graded, because it is no zip file: c.tar.gz" in out


def test_one_submission_does_not_end_the_grading_of_the_others(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        pack(tmp_path / f"submission-{name}.zip", {"a1_lif.py": ""})
    pack(tmp_path / "submission-a (1).zip", {"a1_lif.py": ""})

    def grade_one(folder, student_id, *_):
        if student_id == "a":
            raise ZeroDivisionError("by zero")
        return {"spike": 3}, [], []

    monkeypatch.setattr(grading, "grade_one", grade_one)
    assert lecturer.main(["grade", str(tmp_path)]) == 0
    lines = (tmp_path / "grades.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["a", "0"], ["a", "0"], ["b", "3"]]
    said = (tmp_path / "remarks" / "a.txt").read_text(encoding="utf-8")
    assert "could not be graded: ZeroDivisionError" in said and "more than one submission of a" in said


def test_nothing_to_grade(tmp_path, capsys):
    assert lecturer.main(["grade", str(tmp_path)]) == 2
    assert lecturer.main(["grade", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
