"""What `check.py` sees in A5: what `run` does with a network that watches it, and results.csv.

Students need not read this file. The watching network takes the place of `Network`: nothing here depends on A1 to A4.
"""

import csv
import inspect
import io
import itertools
import re
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from probes import HERE, Problem, explain, number
from torch.optim.optimizer import register_optimizer_step_post_hook

CONDITIONS, SEEDS, EPOCHS = ("full", "eps=1e-8", "no STE", "no E-I Init"), (0, 1, 2, 3, 4), 5
N_TRAIN, N_TEST, BATCH, LR, MOMENTUM = 1437, 360, 32, 0.003, 0.9
N_BATCHES = N_TRAIN // BATCH  # of an epoch
G_I = dict(enumerate((0.60627, 0.61017, 0.60642, 0.61297, 0.60807)))  # after E-I Init, by seed, the same everywhere
COLUMNS = "condition seed steps g_i first_weight first_loss lowest by_epoch test_accuracy".split()
BEFORE = 987654321  # the seed that is set before a run
PIXELS = torch.from_numpy(np.random.RandomState(0).randint(1, 2**20, 64)).double()  # weights of a sum over an image


class Run:
    """A run of a student: what is written down while it goes on. Its events are letters: N a network, I E-I Init, B a
    backward pass, S a step of an optimiser, 0 1 2 a layer is clamped, = there is nothing to clamp."""

    def __init__(self, condition, seed, epochs):
        self.condition, self.seed, self.epochs, self.events, self.over = condition, seed, epochs, "", False
        with np.load(HERE / "digits.npz") as file:
            self.x, self.y = torch.from_numpy(file["x"]).float()[:, None] / 16, torch.from_numpy(file["y"]).long()
        self.numbers = {code: i for i, code in enumerate(self.codes(self.x))}
        self.wanted, self.seen = self.order(seed), []
        self.inits, self.losses, self.steps, self.lows, self.accuracies = [], [], [], [], []

    def codes(self, x):
        return (16 * x.detach().double().flatten(1) @ PIXELS).tolist()

    def known(self, x):
        """The numbers of images, -1 for one that is changed."""
        return tuple(self.numbers.get(code, -1) for code in self.codes(x))

    def order(self, seed):
        """The images of each batch, as they should be."""
        epochs = [np.random.RandomState(1000 * seed + epoch).permutation(N_TRAIN) for epoch in range(self.epochs)]
        rows = np.concatenate([order[: N_BATCHES * BATCH].reshape(-1, BATCH) for order in epochs])
        return [tuple(row) for row in rows.tolist()]


class Watching:
    """A network with the parameters of `Network`, which is fast and smooth, and writes down what is done with it."""

    def __init__(self, run, condition):
        self.run, self.condition, self.seed, run.net = run, condition, torch.initial_seed(), self
        run.events += "N"
        r = np.random.RandomState(int(torch.randint(2**31 - 1, ())))
        self.layers = []
        for n, n_i, inputs in ((16, 4, (1, 3, 3)), (32, 8, (16, 3, 3)), (10, 2, (128,))):
            shapes = dict(w_ee=(n, *inputs), w_ie=(n_i, *inputs), w_ei=(n, n_i))
            shapes |= dict(g_i=(n_i,), g_e=(n,), b_e=(n,)) if n > 10 else {}
            p = {name: torch.tensor(r.uniform(0, 0.2, shape)).requires_grad_() for name, shape in shapes.items()}
            self.layers.append(p)
        self.born, self.first = self.start(), None
        self.gradients = {p: [] for p in self.parameters()}  # since the last step
        for p, gradients in self.gradients.items():
            p.register_hook(gradients.append)

    def parameters(self):
        return [p for layer in self.layers for p in layer.values()]

    def start(self):
        return dict(g_i=self.layers[0]["g_i"][0].item(), first_weight=self.layers[0]["w_ee"].flatten()[0].item())

    def initialize(self, x):
        self.run.events += "I"
        self.run.inits.append(self.run.known(x))
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(1 + x.mean().item())

    def forward(self, p, x):
        y = x @ p["w_ee"].flatten(1).T - x @ p["w_ie"].flatten(1).T @ p["w_ei"].T
        return p["g_e"] * y / (1 + p["g_i"].sum()) + p["b_e"] if "g_e" in p else y

    def logits(self, x):
        nine, sixteen = (F.adaptive_avg_pool2d(x.double(), n).flatten(1) for n in (3, 4))
        h = self.forward(self.layers[0], nine)  # (B, 16)
        h = self.forward(self.layers[1], (h[:, :, None] * nine[:, None]).flatten(1))  # (B, 32)
        z = 5 * self.forward(self.layers[2], (h[:, :8, None] * sixteen[:, None]).flatten(1))  # (B, 10)
        return -z if len(self.run.losses) >= 2 * N_BATCHES else z  # so that the last epoch is not the best one

    def __call__(self, x):
        if self.run.over:
            raise Problem("Each run needs a new Network(condition).", "network reused")
        self.settle()
        z = self.logits(x)
        if z.requires_grad:
            self.first = self.first or self.start()
            z.register_hook(partial(self.backward, self.run.known(x), z.detach()))
        return z

    def backward(self, seen, z, gradient):
        """Is called in each backward pass, with the gradient of the logits z."""
        if self.run.events[-1] == "B" and self.run.seen[-1] == seen:  # a loss that calls the network twice
            self.run.losses[-1][1].add_(gradient)
            return
        if self.run.losses and len(self.run.losses) % N_BATCHES == 0:
            self.test()
        self.run.events += "B"
        self.run.seen.append(seen)
        self.run.losses.append((z, gradient.detach().clone()))

    @torch.no_grad()
    def test(self):
        """The accuracies on the test images and on the training images."""
        right = (self.logits(self.run.x).argmax(1) == self.run.y).double()
        self.run.accuracies.append((right[N_TRAIN:].mean().item(), right[:N_TRAIN].mean().item()))

    def step(self, optimizer):
        """Is called after each step of an optimiser."""
        self.settle()
        group = optimizer.param_groups[0]
        step = dict(optimizer=id(optimizer), kind=type(optimizer).__name__, lr=group["lr"], low=self.lowest())
        step |= dict(momentum=group.get("momentum", 0), n=sum(len(g["params"]) for g in optimizer.param_groups))
        step |= dict(options=[k for k in ("weight_decay", "dampening", "nesterov", "maximize") if group.get(k)])
        now = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters()]
        new = [sum(gradients, torch.zeros_like(p)) for p, gradients in self.gradients.items()]
        old = self.run.steps[-1]["gradients"] if self.run.steps else new
        step |= dict(gradients=now, none=not any(g.any() for g in now))
        step["new"] = all(map(torch.allclose, now, new))
        step["added"] = not step["new"] and all(torch.allclose(a, b + c) for a, b, c in zip(now, new, old, strict=True))
        self.run.steps.append(step)
        self.run.events += "S"
        for gradients in self.gradients.values():
            gradients.clear()

    def clamp(self, p):
        """Takes the place of `clamp_dale`: the values show that it was called, and nothing else."""
        self.run.events += "".join(str(i) for i, layer in enumerate(self.layers) if layer["w_ee"] is p["w_ee"])
        with torch.no_grad():
            for value in p.values():
                value.sub_(value.clamp(max=0) / 2)

    def settle(self):
        """All that follows a step is done."""
        if len(self.run.lows) < len(self.run.steps):
            self.run.lows.append(self.lowest())
            if self.run.events[-1] == "S" and self.lowest() >= 0:  # nothing to clamp, or clamped by other means
                self.run.events += "=" if self.run.steps[-1]["low"] >= 0 else "012"

    def lowest(self):
        return min(t.min().item() for p in self.layers for name, t in p.items() if name != "b_e")


LOSSES = {  # what is taken for the cross-entropy, of logits z and labels y
    "the loss is summed over the batch": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "softmax before the cross-entropy": lambda z, y: F.cross_entropy(z.softmax(1), y),
    "no logarithm of the softmax": lambda z, y: F.nll_loss(z, y),
    "squared error for the cross-entropy": lambda z, y: F.mse_loss(z, F.one_hot(y, 10).to(z.dtype)),
    "binary cross-entropy": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 10).to(z.dtype)),
}


def loss_of(run):
    """The name of what is taken for the loss; False for the right one, and True for one that is not known."""
    losses = {False: F.cross_entropy} | LOSSES
    for seen, (z, gradient) in zip(run.seen, run.losses, strict=True):
        if not gradient.isfinite().all():
            return False  # the training has failed for another reason
        z, y = z.clone().requires_grad_(), run.y[list(seen)]
        slopes = ((name, torch.autograd.grad(loss(z, y), z)[0]) for name, loss in losses.items())
        name = next((name for name, slope in slopes if torch.allclose(slope, gradient, 1e-4, 1e-8)), True)
        if name:
            one_hot = (z.softmax(1) - len(z) * gradient).sort(1)[0]  # what the labels would have to be
            others = torch.allclose(one_hot, torch.tensor([0.0] * 9 + [1]).double(), atol=1e-3)
            return "labels that are not those of the images" if others else name
    return False


def other(run, name, right):
    """What the optimiser has in place of what is right, or False."""
    found = [step[name] for step in run.steps if step[name] != right]
    return str(found[0]) if found else False


# What may be wrong in a run, in the order in which it is looked for: the name of the mistake (with a ? in front, where
# it may be one of several), and how it is known: by all events, or by what a function of the run returns (False, True,
# or what is there in place of the right).
RULES = [
    ("no new network in a run: Make Network(condition)", r"[^N]*"),
    ("more than one network in a run: Make it before the loops", r".*N.*B.*N.*B.*"),
    ("no seed before the network: Call torch.manual_seed(seed) in each run", lambda r: r.net.seed == BEFORE),
    ("another seed in torch.manual_seed", lambda r: r.net.seed != r.seed and str(r.net.seed)),
    ("condition ignored: Make Network(condition)", lambda r: r.net.condition != r.condition and r.net.condition),
    ("E-I Init under every condition", lambda r: r.condition == "no E-I Init" and "I" in r.events),
    ("E-I Init forgotten", lambda r: r.condition != "no E-I Init" and "I" not in r.events),
    ("E-I Init within the training: It comes once, before the first step", r".*[IS].*I.*"),
    ("initialised on test data", lambda r: any(min(images) >= N_TRAIN for images in r.inits)),
    ("initialised on the whole training set", lambda r: any(len(images) >= N_TRAIN for images in r.inits)),
    ("the batches of another seed", lambda r: r.seen == r.order(0)),
    ("?E-I Init with other images than batches(seed, 0)[0]", lambda r: any(i != r.wanted[0] for i in r.inits)),
    ("no backward pass reaches the network", r"[^B]*"),
    ("trained on test images", lambda r: any(max(images) >= N_TRAIN for images in r.seen)),
    ("the same order in each epoch", lambda r: r.epochs > 1 and r.seen == r.wanted[:N_BATCHES] * r.epochs),
    ("?It does not learn from batches(seed, epoch)", lambda r: r.seen[: len(r.wanted)] != r.wanted[: len(r.seen)]),
    ("?The loss is not F.cross_entropy(network(images), labels)", loss_of),
    ("no optimizer.step()", lambda r: not r.steps and r.net.start() == r.net.first),
    ("?The weights are changed, but not by torch.optim", r"[^S]*"),
    ("the step before the backward pass", r"[^B]*S.*"),
    ("not one step for each batch", r".*(B[012=]*B|S[012=]*S).*"),
    ("not all parameters are trained", lambda r: other(r, "n", len(r.net.parameters()))),
    ("zero_grad between backward and step", lambda r: any(step["none"] for step in r.steps)),
    ("no zero_grad: Gradients of earlier batches are added", lambda r: any(step["added"] for step in r.steps)),
    ("?The gradients of a step are not those of its loss", lambda r: not all(step["new"] for step in r.steps)),
    ("another optimiser than SGD", lambda r: other(r, "kind", "SGD")),
    (f"another learning rate than LR = {LR}", lambda r: other(r, "lr", LR)),
    (f"another momentum than MOMENTUM = {MOMENTUM}", lambda r: other(r, "momentum", MOMENTUM)),
    ("another option of the optimiser than lr and momentum", lambda r: other(r, "options", [])),
    ("a new optimiser within the training", lambda r: len({step["optimizer"] for step in r.steps}) > 1),
    ("another number of steps: 44 in each epoch", lambda r: len(r.steps) != len(r.wanted) and f"{len(r.steps)} in all"),
    ("no clamp: Call clamp_dale for each layer after each step", r"(?=.*S([^012=]|$))[^012]*"),
    ("clamp before the step: Call clamp_dale after optimizer.step()", r".*B[012]+S.*"),
    ("not every layer is clamped", lambda r: not all(layer in r.events for layer in "012")),
    ("?clamp_dale is not called for each layer after each step", r"(?!NI?(BS(012|021|102|120|201|210|=))*$).*"),
]  # fmt: skip


def values_of(run):
    """What `run` should return, but for condition and seed: what the network saw."""
    z, y = run.losses[0][0], run.y[list(run.seen[0])]
    found = dict(steps=len(run.steps), **run.net.first, first_loss=F.cross_entropy(z, y).item(), lowest=min(run.lows))
    tested = [tested for tested, _ in run.accuracies]  # after each epoch
    return found | dict(by_epoch=tested, test_accuracy=tested[-1])


def near(a, b):
    return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-5, atol=1e-9)


def compare(run, row):
    """Raises a Problem for the first entry of the dict that is not what the network saw."""
    tested, trained = np.transpose(run.accuracies)
    usual = [("test_accuracy", "another epoch than the last reported", a) for a in tested[:-1]]
    usual += [("first_loss", "another first loss", None)]
    usual += [(key, "read before E-I Init", value) for key, value in run.net.born.items()]
    usual += [("lowest", "read before the clamp", min(step["low"] for step in run.steps))]
    for key, a, b in (("by_epoch", tested, trained), ("test_accuracy", tested[-1], trained[-1])):
        usual += [(key, "training accuracy reported", b), (key, "accuracy in percent", 100 * a)]
        usual += [(key, "accuracy rounded", np.round(a, n)) for n in (1, 2, 3, 4)]
        usual += [(key, "accuracies that are not the network's", None)]
    for key, value in (dict(condition=run.condition, seed=run.seed) | values_of(run)).items():
        if key not in row:
            raise Problem(f"The dict that `run` returns has no {key}.")
        found = row[key]
        if key != "condition":
            found = [float(number(a, key)) for a in found] if key == "by_epoch" else float(number(found, key))
        if not (found == value if key == "condition" else near(found, value)):
            shape = np.shape(found) == np.shape(value)
            names = [name for k, name, v in usual if k == key and (near(found, v) if v is not None else shape)]
            raise Problem(f"{key} is {found}, but the network had {value}.", *names[:1])


def watched(module, function, run):
    """The row that a student's `run` returns. Raises a Problem if something is wrong."""
    given = dict(Network=partial(Watching, run), clamp_dale=lambda p: run.net.clamp(p))
    given["initialize"] = lambda layers, x, *_: run.net.initialize(x[: len(x) // 2])  # of two time steps
    Watching(run, run.condition)  # until there is one
    run.events = ""
    watching = register_optimizer_step_post_hook(lambda optimizer, *_: run.net.step(optimizer))
    torch.manual_seed(BEFORE)
    try:
        with patch.multiple(module, create=True, **given):
            row = function(run.condition, run.seed, run.epochs)
    finally:
        watching.remove()
    run.over = True
    if not isinstance(row, dict):
        raise Problem(f"`run` returns {'None' if row is None else type(row).__name__}, not a dict.")
    run.net.settle()
    run.net.test()
    for text, rule in RULES:
        found = re.fullmatch(rule, run.events) is not None if isinstance(rule, str) else rule(run)
        what = found if isinstance(found, str) else None
        if found and text[0] == "?":
            raise Problem(text[1:], what)
        if found:
            name, _, more = text.partition(": ")
            raise Problem(". ".join(filter(None, [more, what and f"It is {what}"])), name)
    compare(run, row)
    return row


def look_at(module, values, conditions, seeds, epochs):
    """Calls a student's `experiment`, and watches each run. Raises a Problem if something is wrong."""
    for name in ("run", "experiment"):
        if not callable(getattr(module, name, None)):
            raise Problem(f"the file has no function {name}")
    left = [(condition, seed, epochs) for condition in conditions for seed in seeds]
    function, rows, n = module.run, [], len(left)

    def run(*given, **named):
        arguments = inspect.signature(function).bind(*given, **named)
        arguments.apply_defaults()
        asked = arguments.args[:3]
        if asked not in left:
            raise Problem(f"experiment{(conditions, seeds, epochs)} calls run{asked}, not asked for, or again.")
        left.remove(asked)
        run = Run(*asked)
        rows.append(watched(module, function, run))
        values[f"{run.condition}, {run.seed}"] = values_of(run)
        return rows[-1]

    with patch.object(module, "run", run):
        found = module.experiment(conditions, seeds, epochs)
    if left:
        raise Problem(f"experiment{(conditions, seeds, epochs)} does not call run{left[0]}.")
    if not isinstance(found, list | tuple) or len(found) != n or not all(row in found for row in rows):
        number_of = len(found) if isinstance(found, list | tuple) else "no list of"
        raise Problem(f"`experiment` returns {number_of} dicts, not those of the {n} runs, each once.")


def verdict_of(look, *arguments):
    """(right?, text, name of the mistake or None) for what a function says by a Problem, or not."""
    try:
        look(*arguments)
    except Problem as problem:
        return False, str(problem), problem.name
    except (Exception, SystemExit) as error:
        return False, explain(error), None
    return True, "right", None


def experiment(module, conditions=("full", "no E-I Init", "no STE"), seeds=(7, 8), epochs=2):
    """(right?, text, name of the mistake or None, values by run) of a student's `run` and `experiment`."""
    values = {}
    return *verdict_of(look_at, module, values, tuple(conditions), tuple(seeds), epochs), values


def rows_of(data):
    """results.csv, bytes, as a list of dicts; a Problem names what is wrong in which line."""
    try:
        lines = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (UnicodeError, csv.Error):
        raise Problem("it cannot be read as text; let write_csv write it") from None
    for i, line in enumerate(lines, 2):
        for name in COLUMNS:
            text = line.get(name)
            if text is None:
                hint = " It has semicolons, as some tables save it: let write_csv write it." * (";" in str(line))
                raise Problem(f"line {i}: there is no {name}; the columns are {', '.join(COLUMNS)}.{hint}")
            if name != "condition":
                try:
                    line[name] = [float(a) for a in text.split()] if name == "by_epoch" else float(text)
                except ValueError:
                    line[name] = []
                if not np.size(line[name]) or not np.all(np.abs(line[name]) < 1e12):
                    raise Problem(f"line {i}: {name} is {text[:40]!r}, which is no number of usual size")
    return lines


def look_at_table(data, others_right=True):
    """Raises a Problem if something is wrong with results.csv, bytes or None.

    others_right: whether A1 to A4 are right. If not, what depends on them costs no points here.
    """
    if data is None:
        raise Problem("not done yet: there is no results.csv")
    rows = rows_of(data)
    found = [(row["condition"], row["seed"]) for row in rows]
    for key in itertools.product(CONDITIONS, SEEDS):
        if found.count(key) != 1:
            raise Problem(f"There are {found.count(key)} lines for {key[0]!r}, seed {key[1]}, and there should be 1.")
    for row in rows:
        tested, last, g_i = np.array(row["by_epoch"]), row["test_accuracy"], G_I.get(row["seed"], 0)
        shares = [all(abs(a * n - round(a * n)) < 1e-3 for a in (*tested, last)) for n in (N_TEST, N_TRAIN)]
        fits = 0 <= min(*tested, last) and max(*tested, last) <= 1 and shares[0]
        steps = f"{row['steps']:g} steps and {len(tested)} accuracies, not {N_BATCHES * EPOCHS} and {EPOCHS}"
        best = "another epoch than the last reported" if last == tested.max() else None
        without = row["condition"] == "no E-I Init"
        for wrong, name, text in (
            (row["steps"] != N_BATCHES * EPOCHS or len(tested) != EPOCHS, "other steps or epochs", steps),
            (shares == [False, True], "training accuracy reported", f"shares of the {N_TRAIN} training images"),
            (not fits, None, f"its accuracies are no shares of the {N_TEST} test images. Do not round; no percent"),
            (last != tested[-1], best, f"test_accuracy should be the last of by_epoch, {tested[-1]:.6g}"),
            (others_right and row["lowest"] < 0, "no clamp", f"lowest is {row['lowest']:.3g}, below 0"),
            (others_right and without and row["g_i"] != 1, "E-I Init under every condition", "g_i is not 1"),
            (others_right and not without and row["g_i"] == 1, "E-I Init forgotten", f"g_i is 1, not {g_i}"),
            (others_right and not without and abs(row["g_i"] - g_i) > 1e-4, None, f"g_i is {row['g_i']}, not {g_i}"),
        ):
            if wrong:
                raise Problem(f"{row['condition']!r}, seed {row['seed']:g}: {text}.", name)
    if others_right and max(max(row["by_epoch"]) for row in rows) < 0.5:
        raise Problem("No accuracy is above 0.5. Does the optimiser make its steps?")
