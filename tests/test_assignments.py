"""The course: its solutions, its check, its known mistakes, its handout, and the grading of what is handed in."""

import itertools
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import ablation
import check
import grading
import lecturer
import numpy as np
import pytest
import torch
from probes import FILES, USES, Case, observe

import ei_init
import ei_prop
import lif
from inhibition import EICircuit, EICircuit2d, clamp_dale

pytestmark = pytest.mark.course

FOLDER = Path(__file__).parents[1] / "assignments"
BOOK = check.read()
CODE = {name: worth for points in lecturer.FUNCTIONS.values() for name, worth in points.items()}
POSIX = os.name == "posix"


@pytest.fixture(scope="module")
def other():
    return lecturer.compile_book(seed=2)


def judge(a, book, edits=(), code=""):
    """part -> (right?, text, name of the mistake) for a solved assignment, with changes and with more code."""
    made = lecturer.module(lecturer.student(a, edits))
    exec(code, made.__dict__)
    verdicts = check.verdicts(a, book, lambda name, group: observe(name, made, book[name]["inputs"], group))
    return {part: (right, text, mistake) for part, _, right, text, mistake in verdicts}


# ---- solutions ----


def same(a, b):
    return torch.allclose(torch.as_tensor(a).float(), torch.as_tensor(b).float(), rtol=1e-4, atol=1e-6)


def with_gradient(f, x, weights):
    x = x.clone().requires_grad_()
    return f(x), torch.autograd.grad((f(x) * weights).sum(), x)[0]


@pytest.mark.parametrize("seed", [3, 4])
def test_the_solutions_do_what_the_repository_does(seed):
    a1, a2, a3, a4 = (lecturer.module(lecturer.student(a)) for a in lecturer.FUNCTIONS)
    cases = {name: [Case(case) for case in several] for name, several in lecturer.cases(seed).items()}
    for c in cases["simulate"]:
        how = {k: c[k] for k in ("tau", "threshold", "alpha") if k in c}
        ours = with_gradient(lambda x, how=how: a1.simulate(x, **how)[1], c["current"], c["weights"])
        theirs = with_gradient(lambda x, how=how: lif.lif(x, **how), c["current"], c["weights"])
        assert same(ours[0], theirs[0]) and same(ours[1], theirs[1])
        assert same(a1.simulate(c["current"], **how)[0], torch.stack(lif.simulate(c["current"], **how)[0]))
    for c in cases["spike"]:
        theta = c.get("threshold", 1.0)
        s, slope = with_gradient(lambda u, theta=theta: lif.lif(u[None], 1.0, theta)[0], c["u"], 1)
        assert same(a1.spike(c["u"], theta), s) and same(a1.surrogate(c["u"], theta), slope)
    for c in cases["f_i_curve"]:
        theirs = lif.lif(c["currents"].expand(c["steps"], -1), c["tau"], c["threshold"]).mean(0)
        assert same(a1.f_i_curve(c["currents"], c["tau"], c["threshold"], c["steps"]), theirs)
    for c in cases["currents"]:
        p = {name[2:]: torch.nn.Parameter(value) for name, value in c.items() if name.startswith("p_")}
        circuit = EICircuit(p["w_ee"].shape[1], len(p["w_ee"]), eps=0.5, grad_scaling=False)
        for name, value in p.items():
            setattr(circuit, name, value)
        theirs = circuit.currents(c["x"].transpose(1, 2).flatten(0, 1))  # each position is a sample
        for name, value in a2.currents(c["x"], p, lambda i_div: i_div + 0.5).items():
            assert same(value.transpose(1, 2).flatten(0, 1), theirs[name]), name
        for value in p.values():
            value.data -= 0.5
        mine = {name: value.detach().clone() for name, value in p.items()}
        a2.clamp_dale(mine)
        clamp_dale(circuit)
        assert all(same(mine[name], p[name]) for name in p)
    for c in cases["stabilize"]:
        stabilizers = (lambda x, f=f, c=c: f(x, c["eps"], c["ste"]) for f in (a4.stabilize, ei_prop.stabilize))
        ours, theirs = (with_gradient(f, c["i_div"], c["weights"]) for f in stabilizers)
        assert same(ours[0] / theirs[0], 1) and same(ours[1], theirs[1])
    torch.manual_seed(seed)
    circuit, x, gradients = EICircuit(5, 4), torch.rand(6, 5), []
    for circuit.grad_scaling in (True, False):
        gradients += torch.autograd.grad(circuit(x).square().sum(), circuit.w_ei)
    assert same(gradients[0], with_gradient(lambda w: a4.lateral_weights(w, 5), circuit.w_ei.detach(), gradients[1])[1])
    model = torch.nn.Sequential(EICircuit2d(2, 400, 3), torch.nn.ReLU(), EICircuit2d(400, 8, 1))
    batch = torch.rand(7, 2, 4, 4)
    ei_init.initialize(model, batch)
    for circuit, x in ((model[0], batch), (model[2], model[:2](batch).detach())):
        d = a3.fan_in(circuit.w_ee)
        assert d == circuit.fan_in and same(circuit.g_i, a3.gain(x, d).expand(circuit.n_i))
        assert abs(circuit.w_ee.mean() / a3.weight_mean(x, d) - 1) < 0.1
        p = {name: torch.rand_like(value) for name, value in circuit.named_parameters()}
        a3.ei_init(p, x)
        assert all(same(p[name], getattr(circuit, name)) for name in ("w_ei", "g_i", "g_e", "b_e"))


def test_the_solution_gets_all_points_on_other_inputs_too(other):
    for a, book in itertools.product(lecturer.FUNCTIONS, (BOOK, other, lecturer.compile_book(seed=5))):
        for name, (right, text, _) in judge(a, book).items():
            assert right, (name, text)
    assert sum(CODE.values()) + sum(check.POINTS["a5"].values()) + 2 * len(check.QUESTIONS) == 100


def test_expected_is_what_freeze_writes_and_small(tmp_path):
    lecturer.write(lecturer.compile_book(seed=1), tmp_path / "expected.npz")
    for name, new in check.read(tmp_path / "expected.npz").items():
        assert BOOK[name]["inputs"] == new["inputs"]
        assert [w[:2] for w in BOOK[name]["wrong"]] == [w[:2] for w in new["wrong"]]
        pairs = zip(BOOK[name]["right"], new["right"], strict=True)
        assert all(check.same(a, b, key) for a, b in pairs for key in b), name
    assert (FOLDER / "expected.npz").stat().st_size < 200_000


# ---- mistakes ----


@pytest.mark.parametrize("a", lecturer.FUNCTIONS)
def test_a_known_mistake_is_called_by_its_name(a, other):
    names, books = {}, itertools.cycle([BOOK, other])
    for _, name, sentence, way in (m for m in lecturer.mistakes() if m[0] == a):
        names[name] = sentence
        wrong = {part: (v[1], v[2]) for part, v in judge(a, next(books), way).items() if not v[0]}
        assert wrong and {called for _, called in wrong.values()} == {name}, (name, way, wrong)
    assert len(names) >= 40 and all(names.values())


UNKNOWN = [  # errors that are not planted, and that must get no name
    ("a1", "simulate", {"u = (1 - 1 / tau) * (u": "u = 0.1 + (1 - 1 / tau) * (u"}),
    ("a1", "simulate", {"* s.detach()) + i": "* s.detach()).clamp(min=-5) + i"}),
    ("a2", "currents", {"    i_ee = p": "    p = {k: v.data for k, v in p.items()}\n    i_ee = p"}),
    ("a2", "currents", {'+ p["b_e"][:, None]\n': '+ p["b_e"][:, None]\n    i_int = i_int.clamp(-10, 10)\n'}),
    ("a3", "gain", {"    mean, square, var = x.mean()": "    x = x.numpy()\n    mean, square, var = x.mean()"}),
    ("a3", "ei_init", {".mul_(m)": ".mul_(2 * m)"}),
    ("a4", "stabilize", {".amin(axes, keepdim=True)": ".amin(axes, keepdim=True) * 2"}),
    ("a4", "stabilize", {"i_div == 0": "i_div < 1e-6", "i_div > 0": "i_div > 1e-6"}),
]


def test_an_unknown_error_is_seen_and_gets_no_name():
    for a, function, way in UNKNOWN:
        right, text, called = judge(a, BOOK, way)[function]
        assert not right and called is None, (way, text)


OUTPUTS = [  # what is no output at all: text of a function, and what the check says
    ("a4", "lateral_weights(w, d)", "w = 1 * w\n    w.register_hook(lambda g: g / d)\n    return w", "no_grad = True"),
    ("a1", "spike(u, threshold=1.0)", "return u >= threshold", "is of type torch.bool, not torch.float32"),
    ("a2", "currents(x, p, stabilize)", "return dict(i_ee=x)", "the dict has no i_ie"),
    ("a4", "stabilize(*a)", "raise SystemExit('bye')", "SystemExit: bye"),
    ("a4", "stabilize(i_div, eps='adaptive', ste=True)", "return i_div", "eps = adaptive"),
]


def test_what_is_wrong_is_said_in_one_line_with_its_input():
    for a, function, body, sentence in OUTPUTS:
        right, text, _ = judge(a, BOOK, code=f"def {function}:\n    {body}\n")[function.partition("(")[0]]
        assert not right and sentence in text and "\n" not in text and "Traceback" not in text


def test_a_mistake_costs_points_where_it_is_made_and_only_there():
    for name, earlier in ((name, e) for name, several in USES.items() for e in several):
        a = next(a for a, parts in lecturer.FUNCTIONS.items() if name in parts)
        for body in ("raise NotImplementedError", "return 0 * a[0] + 7 if hasattr(a[0], 'dim') else 7"):
            found = judge(a, BOOK, code=f"def {earlier}(*a, **k):\n    {body}\n")
            assert not found[earlier][0] and found[name][0], (earlier, name, found[name])
    found = judge("a1", BOOK, {"u >= threshold": "u > 2 * threshold", "s.mean(0)": "s.sum(0)"}).values()
    assert [right for right, _, _ in found] == [False, True, True, False]


# ---- A5 ----

STEP = "            optimizer.step()\n"
CLAMP = "            for p in network.layers:\n                clamp_dale(p)\n"
LOGITS = "network(train_x[batch])"
LOSS = f"F.cross_entropy({LOGITS}, train_y[batch])"
SGD = "torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)"
TESTED = "accuracy(network, test_x, test_y)"
ABLATION = [
    ("no optimizer.step()", {STEP: ""}),
    ("no zero_grad", {"            optimizer.zero_grad()\n": ""}),
    ("another optimiser than SGD", {SGD: "torch.optim.Adam(network.parameters(), lr=LR)"}),
    ("another learning rate than LR = 0.003", {"lr=LR": "lr=10 * LR"}),
    ("trained on test images", {LOSS: "F.cross_entropy(network(test_x[batch % 360]), test_y[batch % 360])"}),
    ("labels that are not those of the images", {"train_y[batch])": "train_y[batch - 1])"}),
    ("softmax before the cross-entropy", {LOSS: "F.cross_entropy(network(train_x[batch]).softmax(1), train_y[batch])"}),
    ("another first loss", {'"first_loss", loss.item()': '"first_loss", 2.3026'}),
    ("accuracies that are not the network's", {f"accuracies.append({TESTED})": "accuracies.append(0.8)"}),
    ("another epoch than the last reported", {"test_accuracy=accuracies[-1]": "test_accuracy=max(accuracies)"}),
    ("network reused", {"network = Network(condition)": "network = globals().setdefault('n', Network(condition))"}),
    ("E-I Init forgotten", {'if condition != "no E-I Init":': "if condition == 'full':"}),
    ("no seed before the network", {"    torch.manual_seed(seed)\n": ""}),
    ("no clamp", {"clamp_dale(p)": "pass"}),
    ("clamp before the step", {STEP + CLAMP: CLAMP + STEP}),
    (None, {"for seed in seeds]": "for seed in seeds[:1]]"}),
    (None, {"return [run(condition, seed, epochs)": "return [run(condition, seeds[0], epochs)"}),
    ("right", {}),
    ("right", {LOSS: f"{LOGITS}.logsumexp(1).mean() - {LOGITS}[range(32), train_y[batch]].mean()"}),
    ("right", {"epochs=EPOCHS):\n    \"\"\"Trains": "epochs=EPOCHS, quiet=True):\n    \"\"\"Trains"}),
    ("right", {"clamp_dale(p)": "[v.data.relu_() for k, v in p.items() if k != 'b_e']"}),
]  # fmt: skip


@pytest.mark.parametrize("mistake, edits", ABLATION)
def test_what_an_experiment_does_is_seen(monkeypatch, mistake, edits):
    monkeypatch.syspath_prepend(FOLDER / "solutions")
    right, text, called, _ = ablation.experiment(lecturer.module(lecturer.student("a5", edits)))
    assert (right, called) == (mistake == "right", None if mistake == "right" else mistake), text


def a_table(**changes):
    """results.csv as the solution writes it, with changes of its first line."""
    lines = [",".join(ablation.COLUMNS)]
    for condition, seed in itertools.product(ablation.CONDITIONS, ablation.SEEDS):
        g_i = 1.0 if condition == "no E-I Init" else ablation.G_I[seed]
        row = dict(condition=condition, seed=seed, steps=220, g_i=g_i, first_weight=0.1, first_loss=2.3, lowest=0.0)
        row |= dict(by_epoch="0.2 0.5 0.9 0.8 0.75", test_accuracy=0.75) | (changes if len(lines) == 1 else {})
        lines.append(",".join(str(value) for value in row.values()))
    return "\n".join(lines)


TABLES = [
    (a_table(), "right"),
    (a_table(steps=44), "other steps or epochs. 'full', seed 0: 44 steps"),
    (a_table(by_epoch=" ".join(str(n / 1437) for n in (9, 10, 11, 12, 13)), test_accuracy=13 / 1437), "training acc"),
    (a_table(g_i="nan"), "line 2: g_i is 'nan'"),
    (a_table().replace(",", ";"), "there is no condition; the columns are condition, seed"),
]


def test_what_is_wrong_with_a_table_is_said():
    for text, sentence in TABLES:
        right, said, _ = ablation.verdict_of(ablation.look_at_table, ("\ufeff" + text).encode())
        assert right == (sentence == "right") and sentence in said


# ---- the handout ----


def run_check(folder, *arguments):
    """check.py in a folder, on an ASCII console, without what a student may not have."""
    program = "import sys, runpy; sys.argv[:1] = ['check.py']; sys.path[0] = '.'\n"
    program += "sys.modules |= dict.fromkeys(['resource', 'fcntl', 'sklearn', 'matplotlib', 'lif', 'scipy'])\n"
    program += "runpy.run_path('check.py', run_name='__main__')"
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "SYSTEMROOT": "", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_handout_holds_no_solution_and_says_what_is_not_done(tmp_path, capsys):
    folder = tmp_path / "my course \N{LATIN SMALL LETTER U WITH DIAERESIS}"
    lecturer.main(["handout", str(folder)])
    names = {"README.md", *lecturer.GIVEN, *(f"{file}.py" for file in FILES.values())}
    assert {path.name for path in folder.iterdir()} == names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000
    assert "For the lecturer" not in (folder / "README.md").read_text(encoding="utf-8")
    for a, file in FILES.items():
        path = folder / f"{file}.py"
        parts = 3 if a == "a5" else len(check.POINTS[a])
        assert path.read_text(encoding="utf-8").count("    raise NotImplementedError\n") == parts
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as an editor on Windows saves it
    ran = run_check(folder, "submit", "--id", "s-1")
    assert ran.returncode == 0 and (folder / "submission-s-1.zip").exists(), ran.stderr
    assert ran.stdout.count("not done yet") == len(CODE) + 3 + len(check.QUESTIONS) and "0 of 90" in ran.stdout
    with pytest.raises(ValueError, match="exists already"):
        lecturer.main(["handout", str(folder)])


def test_a_file_that_fails_does_not_hide_the_others(tmp_path):
    folder = tmp_path / "solved"
    lecturer.main(["solve", str(folder)])
    assert f"{sum(CODE.values()) + 5} of 90 points" in run_check(folder, "all").stdout
    (folder / "a1_lif.py").write_text("def spike(:\n", encoding="utf-8")
    (folder / "a2_circuit.py").write_text("\n\ndef currents(x, p, stabilize):\n    return x.foo\n", encoding="utf-8")
    ran = run_check(folder, "all")
    assert ran.returncode == 1 and "Traceback" not in ran.stdout + ran.stderr
    assert "a1_lif.py cannot be imported: a1_lif.py, line 1: SyntaxError" in ran.stdout
    assert "a2_circuit.py, line 4: AttributeError" in ran.stdout and "no such function" in ran.stdout
    assert "4/4   gain: right" in ran.stdout and "5/5   experiment: right" in ran.stdout


def test_wrong_commands_end_with_2(tmp_path):
    for arguments in ("a6", "", "submit", "submit --id ../x", "setup --id -b", "setup --id YOUR_ID"):
        with pytest.raises(SystemExit, match="2"):
            check.main(arguments.split())
    for arguments in (["grade", str(tmp_path)], ["grade", str(tmp_path / "none")], ["grade", ".", "--seconds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            check.on_any_console(lambda arguments=arguments: lecturer.main(arguments))


def test_own_numbers_and_answers():
    many = [check.own_numbers(f"student{i}") for i in range(300)]
    assert len({str(numbers) for numbers in many}) == 300
    for numbers in many:
        right = {a: grading.ANSWERS[a](**numbers[a]) for a in check.QUESTIONS}
        assert np.isfinite(list(right.values())).all()
        i_div = torch.tensor([numbers["a4"]["I_div"]], requires_grad=True)
        (numbers["a4"]["c"] * ei_prop.stabilize(i_div, ste=False)).sum().backward()
        assert right["a4"] == pytest.approx(i_div.grad[i_div == i_div[i_div > 0].min()].item())
        tau, theta, steps = numbers["a1"]["tau"], numbers["a1"]["theta"], numbers["a1"]["T"]
        fires = [lif.lif(torch.full((steps,), f * right["a1"]), tau, theta).any() for f in (1.001, 0.999)]
        assert fires == [True, False]
    for answer in ("0.2", True, 10**400, [], np.float32(0.5), torch.tensor(0.5), 0.5):
        number = 0.5 if answer == 0.5 else None
        assert check.answers_of(dict(smallest_current=answer), "a1")["value"] == number
    for given in (None, [], 5, dict(smallest_current=None, sentences=[1, None]), {("x",): 1}):
        assert check.answers_of(given, "a1") == dict(value=None, text="", sentences=[])
    assert grading.answers_in(b"ANSWERS = dict(a=1)\nANSWERS = {'c': 3, **x, 'd': y}") == {"a": 1, "c": 3}
    assert grading.answers_in(b"ANSWERS = None") == grading.answers_in(b"\x00(") == {}


# ---- grading ----

LEAVES = (
    "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    while time.sleep(0.1) is None:\n"
)
LEAVES += "      open(os.environ['COURSE'] + '/alive', 'w').write(str(time.time()))\n  os._exit(0)\n"
TAMPER = "import os, pathlib\nfor p in pathlib.Path(os.environ['COURSE']).rglob('*.[ct][sx][vt]'): p.write_text('x')\n"
ODD = dict(  # points, and what stands at the end of the files
    good=(100, {}),
    answers=(76, dict(a1="ANSWERS = dict(smallest_current=0)\nraise RuntimeError('no\\ud800')", a2="ANSWERS = []")),
    hangs=(97, dict(a1="def spike(u, threshold=1.0):\n    while True:\n        pass")),
    ends=(95, dict(a4="ANSWERS['gradient_without_ste'] = '1'", a2="import os\ndef clamp_dale(p):\n    os._exit(0)")),
    forges=(95, dict(a1="import check\ncheck.experiment = lambda *a: (True, 'right', None, {})")),
    changes=(100, dict(a2="torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\ntorch.where = None")),
    tampers=(100, dict(a1=TAMPER)),
)
if sys.platform == "linux":
    ODD["leaves"] = (100, dict(a1=LEAVES))
    ODD["takes"] = (97, dict(a2="def clamp_dale(p):\n    x = []\n    while True:\n        x.append(torch.ones(10**9))"))


def test_grade(tmp_path, monkeypatch):
    def pack(path, files):
        with zipfile.ZipFile(path, "w") as file:
            for name, text in files.items():
                file.writestr(name, text)

    folder, alive, began = tmp_path / "in", tmp_path / "alive", []
    monkeypatch.setenv("COURSE", str(tmp_path))
    (folder / "Ann" / "deep").mkdir(parents=True)
    for student, (_, more) in ODD.items():
        files = {f"{file}.py": lecturer.student(a) for a, file in FILES.items()}
        files["a5_ablation.py"] += "\nANSWERS['sentences'] = ['This is a long enough sentence.'] * 5\n"
        for a, numbers in check.own_numbers(student).items():
            answer = f"\nANSWERS[{check.QUESTIONS[a]!r}] = {grading.ANSWERS[a](**numbers)}\n"
            files[f"{FILES[a]}.py"] += answer + more.get(a, "")
        files |= {"results.csv": a_table(), "a5.png": b"\x89PNG\r\n\x1a\n", "id.txt": student, "../evil.py": ""}
        pack(folder / f"Some Name_submission-{student}.ZIP", files)
    pack(folder / "submission-x.zip", {zipfile.ZipInfo("a1_lif.py"): "", zipfile.ZipInfo("id.txt"): "GOOD"})  # of 1980
    (folder / "broken.zip").write_bytes(b"PK no zip")
    (folder / "c.tar.gz").write_bytes(b"")
    (folder / "Ann" / "deep" / "a3_init.py").write_text(lecturer.student("a3"), encoding="utf-8")
    pack(folder / ("=a" + "\N{EURO SIGN}" * 60 + ".zip"), {"essay.txt": "dear professor"})
    if POSIX:
        os.mkfifo(folder / "submission-pipe.zip")
        (folder / "submission-link.zip").symlink_to(folder / "broken.zip")
        os.mkfifo(folder / "Ann" / "a5.png")
    grade_one = grading.grade_one

    def stopped(files, student, *rest):
        began.append(student)
        if len(began) == 3:
            raise KeyboardInterrupt
        return grade_one(files, student, *rest)

    monkeypatch.setattr(grading, "grade_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        lecturer.main(["grade", str(folder), "--seconds", "8"])
    note = folder / "remarks" / f"{began[0]}.txt"
    written = note.write_bytes(note.read_bytes() + b"the lecturer's words \xfc\r\n") and note.read_bytes()
    lecturer.main(["grade", str(folder), "--seconds", "8"])
    assert note.read_bytes() == written
    assert began[-1] == began[2] and len(began) == len(set(began)) + 1  # it went on, and with that one at the end
    _, *lines = (folder / "grades.csv").read_text(encoding="utf-8").splitlines()
    totals = {line.split(",")[0]: int(line.split(",")[1]) for line in lines}
    remarks = {path.stem: path.read_text("utf-8", "replace") for path in (folder / "remarks").iterdir()}
    assert totals.keys() == remarks.keys() and not any(name.startswith(("=", "-")) for name in totals)
    assert {name: total for name, total in totals.items() if name in ODD} == {n: worth for n, (worth, _) in ODD.items()}
    assert totals["Ann"] == 20 and len(totals) == len(ODD) + 4 + 2 * POSIX
    assert not list(tmp_path.rglob("evil.py")) and all(text.startswith(name) for name, text in remarks.items())
    for name, sentence in dict(
        good="Handed in 2 times: submission-x.zip, Some Name_submission-good.ZIP. The later one, Some Name",
        answers="spike, surrogate, simulate, f_i_curve: a1_lif.py, line",
        hangs="spike: It did not end within 8 seconds.",
        Ann="There is no a1_lif.py.",
    ).items():
        assert sentence in remarks[name], remarks[name]
    if "leaves" in ODD:
        time.sleep(1)
        assert time.time() - float(alive.read_text()) > 1
