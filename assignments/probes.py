"""What `check.py` asks each function of A1 to A4, and what it looks at. Students need not read this file."""

import traceback
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
FILES = dict(a1="a1_lif", a2="a2_circuit", a3="a3_init", a4="a4_prop", a5="a5_ablation")

# The earlier functions that a function may use. Where one of them is wrong, the function is tried once more with a
# stand-in for it, and compared with what the right function does with the stand-in: a mistake costs points only once.
USES = dict(simulate=("spike", "surrogate"), f_i_curve=("spike", "simulate"), lateral_weights=("scale_gradient",))
USES["ei_init"] = ("fan_in", "weight_mean", "gain")
STAND_INS = dict(  # none is a solution
    spike=lambda u, threshold=1.0: (torch.sin(9 * u) > threshold - 1.1).to(u.dtype),
    surrogate=lambda u, threshold=1.0, alpha=4.0: torch.cos(alpha * u - threshold),
    simulate=lambda current, tau=2.0, threshold=1.0, alpha=4.0: (current, 1.0 * (current.cumsum(0) % tau > threshold)),
    fan_in=lambda w: 50 + w.dim(),
    weight_mean=lambda x, d: 0.3 + 1 / d,
    gain=lambda x, d: 0.7 + 1 / d,
    scale_gradient=lambda w, factor: w * (2 + factor),
)


class Problem(Exception):
    """A sentence that says what is wrong, and the name of the mistake, if it is known."""

    def __init__(self, text, name=None):
        super().__init__(". ".join(filter(None, [name, text])))
        self.name = name


class Case(dict):
    """Fresh copies of the inputs of one probe, by name: tensors, numbers, or text."""

    def __init__(self, given):
        dtype = getattr(torch, given.get("dtype", "float32"))
        super().__init__({k: torch.tensor(v, dtype=dtype) if isinstance(v, list) else v for k, v in given.items()})
        self.originals = {name: value.clone() for name, value in self.items() if isinstance(value, torch.Tensor)}

    def with_gradient(self, name):
        self[name] = self[name].requires_grad_() * 1  # not a leaf: a change in place shall be seen, not refused
        return self[name]

    def parameters(self):
        """The inputs p_... as a dict."""
        return {name[2:]: value for name, value in self.items() if name.startswith("p_")}

    def unchanged(self):
        for name, original in self.originals.items():
            if not torch.equal(self[name].detach(), original):
                raise Problem(f"it changes its input {name.removeprefix('p_')} in place; make a new tensor instead")


def tensor(value, like, what):
    """`value`, if it is a tensor of the shape and type of `like` without NaN."""
    if value is None:
        raise Problem(f"{what} is None: is there a `return`?")
    if not isinstance(value, torch.Tensor):
        raise Problem(f"{what} is a {type(value).__name__}, not a tensor")
    if value.shape != like.shape:
        raise Problem(f"{what} has the shape {tuple(value.shape)}, not {tuple(like.shape)}")
    if value.dtype != like.dtype:
        raise Problem(f"{what} is of type {value.dtype}, not {like.dtype}, the type of its input")
    if value.isnan().any():
        raise Problem(f"{what} is NaN at index {value.isnan().nonzero()[0].tolist()}, as 0 / 0 is")
    return value


def number(value, what):
    """`value`, if it is a single number that is not NaN."""
    if value is None:
        raise Problem(f"{what} is None: is there a `return`?")
    try:
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
    except (TypeError, ValueError):
        raise Problem(f"{what} is a {type(value).__name__}, not a number") from None
    if array.ndim:
        raise Problem(f"{what} has the shape {array.shape}, not a single number")
    if np.isnan(array):
        raise Problem(f"{what} is NaN")
    return array


def gradient(out, weights, x, keep=False):
    """d(sum of weights times out)/dx; 0 where nothing leads from out back to x."""
    loss = (out * weights).sum()
    try:
        found = torch.autograd.grad(loss, x, allow_unused=True, retain_graph=keep)[0] if loss.requires_grad else None
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise Problem(
            "a tensor that the gradient needs was overwritten, e.g. by u[t] = ...: append to a list, use torch.stack"
        ) from None
    if found is not None and found.isnan().any():
        raise Problem(f"the gradient is NaN at index {found.isnan().nonzero()[0].tolist()}")
    return torch.zeros_like(x) if found is None else found


# A probe calls a function of a student's module m for a case c, and returns arrays by name. A name with "dL/" is a
# gradient. A name with "~" is no part of what is right: it is a code number for a kind of mistake.


def simulate(m, c):
    current = c.with_gradient("current")
    out = m.simulate(current, *(c[name] for name in ("tau", "threshold", "alpha") if name in c))
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise Problem(f"simulate returns {type(out).__name__}, not a pair (u, s)")
    u, s = tensor(out[0], current, "u"), tensor(out[1], current, "s")
    c.unchanged()
    return {"u": u, "s": s, "dL/dI": gradient(s, c["weights"], current)}


def some_currents(function, names, m, c):
    x = c.with_gradient("x")
    parameters, calls = [c.with_gradient(name) for name in c if name.startswith("p_")], []

    def stabilize(i_div):
        calls.append(i_div)
        return i_div + 0.5 * (i_div == 0)  # zeros become 0.5

    out = getattr(m, function)(x, c.parameters(), stabilize)
    if not isinstance(out, dict):
        raise Problem(f"it returns {'None' if out is None else type(out).__name__}, not a dict of currents")
    like_ie = x.new_empty(len(x), len(c["p_w_ie"]), x.shape[2]) if "i_ie" in names else None
    found = {}
    for name in names:
        if name not in out:
            raise Problem(f"the dict has no {name}")
        found[name] = tensor(out[name], like_ie if name == "i_ie" else c["weights"], name)
    c.unchanged()
    quotient = c["p_g_e"][:, None] * (out["i_ee"] - out["i_sub"]) / out["i_div"] + c["p_b_e"][:, None]
    close = torch.isclose(out["i_int"], quotient, rtol=0.01, atol=0.01) | (out["i_div"] < 0.1)
    found["~divided by I_div, and stabilize not called"] = float(bool(close.all()) and not calls)
    found["dL/dx"] = gradient(out["i_int"], c["weights"], x, keep=True)
    norms = [gradient(out["i_int"], c["weights"], p, keep=True).norm() for p in parameters]
    return found | {f"norm of dL/d of {', '.join(c.parameters())},": torch.stack(norms)}


def changed(held):
    """The values of parameters that a function has changed in place, by name."""
    for name, p in held.items():
        if not p.requires_grad:
            raise Problem(f"{name} requires no gradient any more; change only its values")
    return {name: tensor(p.detach(), p, name) for name, p in held.items()}


def clamp_dale(m, c):
    held = {name: value.requires_grad_() for name, value in c.parameters().items()}  # what an optimiser would hold
    m.clamp_dale(dict(held))
    values = changed(held)
    raised = torch.cat([v[c.originals[f"p_{n}"] < 0] for n, v in values.items() if n != "b_e"])
    positive = bool((raised == raised[0]).all() and raised[0] > 0)  # all that was negative is the same number
    zero = torch.cat([v.flatten() == 0 for v in values.values()]).float()
    return values | {"values that are 0": zero, "~clamped at a positive number": float(positive)}


def drawn(w, before):
    """The kind of a distribution: 0 as it was, 1 constant, 2 of any sign, 3 as an exponential, 4 another."""
    if np.array_equal(w, before) or w.std() <= 1e-3 * abs(w.mean()):
        return 0 if np.array_equal(w, before) else 1
    if w.min() < 0:
        return 2
    return 3 if abs(w.std() / w.mean() - 1) < 0.06 and abs((w < w.mean()).mean() - 0.632) < 0.03 else 4


def ei_init(m, c):
    n_e, n_i, shape = c["n_e"], c["n_i"], tuple(c["x"].shape[1:2]) + (c["k"], c["k"])[: c["x"].dim() - 2]
    torch.manual_seed(c["seed"])
    held = dict(w_ee=torch.rand(n_e, *shape), w_ie=torch.rand(n_i, *shape), w_ei=torch.rand(n_e, n_i))
    if not c["readout"]:
        held |= dict(g_i=torch.rand(n_i), g_e=torch.rand(n_e), b_e=torch.rand(n_e))
    before = {name: value.numpy().copy() for name, value in held.items()}
    held = {name: value.requires_grad_() for name, value in held.items()}
    m.ei_init(dict(held), c.with_gradient("x"))
    p, found = {name: value.numpy().copy() for name, value in changed(held).items()}, {}
    m.ei_init(dict(held), c["x"])
    found["the same w_ee the second time"] = np.array_equal(held["w_ee"].detach(), p["w_ee"])
    for name, w in p.items():
        if name in ("w_ee", "w_ie"):
            found[f"mean of {name}"], found[f"standard deviation of {name}"] = w.mean(), w.std()
            found[f"share of {name} below its mean"] = (w < 0.999 * w.mean()).mean()
        else:
            found[f"smallest and largest {name}"] = [w.min(), w.max()]
        found[f"~distribution of {name}"] = min(drawn(w, before[name]), 4 if "mean of " + name in found else 2)
    n = min(n_e, n_i)
    with np.errstate(all="ignore"):  # constant weights have no correlation
        found["copies of w_ee in w_ie"] = np.corrcoef(p["w_ee"][:n].ravel(), p["w_ie"][:n].ravel())[0, 1] > 0.5
    return found


def initialize(m, c):
    seen = []

    def init(p, x):
        if not isinstance(x, torch.Tensor):
            raise Problem(f"it calls init with a {type(x).__name__} in place of the layer's input")
        seen.append(x.detach().clone())
        with torch.no_grad():
            p["w"].fill_(x.mean() + 1)

    def forward(i, p, x):
        return p["w"] * x + i

    layers = [(dict(w=torch.zeros((), requires_grad=True)), partial(forward, i + 1)) for i in range(c["n_layers"])]
    m.initialize(layers, c["x"], init)
    if len(seen) != c["n_layers"]:
        raise Problem(f"it calls init {len(seen)} times for {c['n_layers']} layers")
    return {f"input of layer {i + 1}": tensor(x, c["x"], "the input of a layer") for i, x in enumerate(seen)}


# Functions of one output: their arguments; the argument with the shape of the output (None: it is a number); the
# argument of the gradient that is looked at; the name of the output.
CALLS = {
    "spike": ("u threshold", "u", None, "s"),
    "surrogate": ("u threshold alpha", "u", None, "ds/du"),
    "f_i_curve": ("currents tau threshold steps", "currents", None, "rate"),
    "fan_in": ("w", None, None, "d"),
    "weight_mean": ("x d", None, None, "m"),
    "gain": ("x d", None, None, "g_I"),
    "poisson_gain": ("rate d", None, None, "g_I"),
    "stabilize": ("i_div eps ste", "i_div", "i_div", "stabilize(I_div)"),
    "scale_gradient": ("w factor", "w", "w", "w"),
    "lateral_weights": ("w_ei fan_in", "w_ei", "w_ei", "W_EI"),
}


def what_zeros_become(m, c, out):
    """0, or where zeros become a number that does not depend on I_div: 1 nothing else is changed, 2 it is added to all
    values, 3 smaller values become this number too."""
    i_div, out = c["i_div"].detach(), out.detach()
    loud = (i_div > 0).flatten(1).any(1).view(-1, *[1] * (i_div.dim() - 1))  # samples with a positive value
    became, twice = (o[(i_div == 0) & loud] for o in (out, m.stabilize(2 * i_div, c["eps"], c["ste"])))
    a = became[0]
    if not (0 < a < torch.inf and (became == a).all() and (twice == a).all()):
        return 0
    x, now = i_div[i_div > 0], out[i_div > 0]
    ways = [torch.allclose(now, wanted, rtol=1e-4, atol=0) for wanted in (x, x + a, x.clamp(min=a))]
    return 1 + ways.index(True) if any(ways) else 0


def call(name, m, c):
    arguments, like, differentiate, what = CALLS[name]
    if differentiate or "x" in c:  # the input of a layer carries a gradient, too
        c.with_gradient(differentiate or "x")
    found = {}
    for again in ("", ", the second time") if differentiate else ("",):  # what the first call leaves on its input shows
        out = getattr(m, name)(*(c[argument] for argument in arguments.split() if argument in c))
        out = tensor(out, c[like], what) if like else number(out, what)
        c.unchanged()
        if name == "stabilize" and not again:
            found["zeros that are left"] = (out == 0).to(out.dtype)
            found["~what zeros become"] = what_zeros_become(m, c, out) if c["eps"] == "adaptive" else 0
        found[what] = out
        if differentiate:
            found[f"dL/d{arguments.split()[0]}{again}"] = gradient(out, c["weights"], c[differentiate])
    return found


PROBES = {name: partial(call, name) for name in CALLS}
PROBES |= dict(simulate=simulate, clamp_dale=clamp_dale, ei_init=ei_init, initialize=initialize)
PROBES["currents"] = partial(some_currents, "currents", ("i_ee", "i_ie", "i_sub", "i_div", "i_int"))
PROBES["pv_som_currents"] = partial(some_currents, "pv_som_currents", ("i_ee", "i_sub", "i_div", "i_int"))


def explain(error):
    """An exception in one line, with the last line of the student's own files on its way."""
    if type(error) is NotImplementedError and not str(error):  # that of a stub says nothing; torch's says something
        return "not done yet"
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places, message = [(error.filename, error.lineno)], f"{type(error).__name__}: {error.msg}"
    for path, line in ((Path(file), line) for file, line in reversed(places)):
        if path.stem in FILES.values():
            message = f"{path.name}, line {line}: {message}"
            break
    return message.encode(errors="backslashreplace").decode()


def observe(name, module, inputs, replaced=()):
    """What a function of a module does with each of its inputs: a list of dicts of arrays, or of text where it cannot
    be compared. replaced: names of other functions of the module in whose place there are stand-ins."""
    found = []
    for given in inputs:
        try:
            if not callable(getattr(module, name, None)):
                raise Problem("the file has no such function")
            stand_ins, grad = {other: STAND_INS[other] for other in replaced}, not given.get("no_grad")
            with patch.dict(vars(module), stand_ins), torch.set_grad_enabled(grad):
                out = PROBES[name](module, Case(given))
            arrays = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in out.items()}
            found.append({k: np.asarray(v, dtype=np.float64) for k, v in arrays.items()})
        except Problem as problem:
            found.append(str(problem))
        except (Exception, SystemExit) as error:
            found.append(explain(error))
    return found
