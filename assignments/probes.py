"""What `check.py` asks each function of A1 to A4, and what it looks at: outputs, gradients, changes in place.

Students need not read this file. It needs torch and numpy.
"""

import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
FILES = dict(a1="a1_lif", a2="a2_circuit", a3="a3_init", a4="a4_prop", a5="a5_ablation")


class Problem(Exception):
    """One sentence that says why an output cannot be compared."""


class Case(dict):
    """Fresh copies of the inputs of one probe, by name: tensors, numbers, or text."""

    def __init__(self, arrays):
        super().__init__()
        for name, array in arrays.items():
            self[name] = torch.tensor(array) if array.ndim else array.item()
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
        raise Problem(f"{what} is of type {value.dtype}, not {like.dtype}")
    if value.isnan().any():
        raise Problem(f"{what} is NaN at index {value.isnan().nonzero()[0].tolist()}")
    return value


def number(value, what):
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


def simulate(m, c):
    current = c.with_gradient("current")
    out = m.simulate(current, c["tau"], c["threshold"], c["alpha"])
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise Problem(f"simulate returns {type(out).__name__}, not a pair (u, s)")
    u, s = tensor(out[0], current, "u"), tensor(out[1], current, "s")
    c.unchanged()
    return {"u": u, "s": s, "dL/dI": gradient(s, c["weights"], current)}


def some_currents(function, names, m, c):
    x = c.with_gradient("x")
    parameters = [c.with_gradient(name) for name in c if name.startswith("p_")]
    out = getattr(m, function)(x, c.parameters(), lambda i_div: i_div + 0.5 * (i_div == 0))  # zeros become 0.5
    if not isinstance(out, dict):
        raise Problem(f"it returns {'None' if out is None else type(out).__name__}, not a dict of currents")
    if missing := [name for name in names if name not in out]:
        raise Problem(f"the dict has no {missing[0]}")
    like_ie = x.new_empty(len(x), len(c["p_w_ie"]), x.shape[2]) if "i_ie" in names else None
    found = {name: tensor(out[name], like_ie if name == "i_ie" else c["weights"], name) for name in names}
    c.unchanged()
    found["dL/dx"] = gradient(out["i_int"], c["weights"], x, keep=True)
    norms = [gradient(out["i_int"], c["weights"], p, keep=True).norm() for p in parameters]
    return found | {f"norm of dL/d of {', '.join(c.parameters())},": torch.stack(norms)}


def still_trained(parameters):
    for name, p in parameters.items():
        if not p.requires_grad:
            raise Problem(f"{name} requires no gradient any more; change only its values")


def clamp_dale(m, c):
    p = c.parameters()
    for value in p.values():
        value.requires_grad_()
    held = dict(p)  # what an optimiser would hold
    m.clamp_dale(p)
    still_trained(held)
    values = {name: tensor(value.detach(), value, name) for name, value in held.items()}
    return values | {"values that are 0": torch.cat([v.flatten() == 0 for v in values.values()]).float()}


def ei_init(m, c):
    n_e, n_i, shape = c["n_e"], c["n_i"], tuple(c["x"].shape[1:2]) + (c["k"], c["k"])[: c["x"].dim() - 2]
    torch.manual_seed(c["seed"])
    p = dict(w_ee=torch.rand(n_e, *shape), w_ie=torch.rand(n_i, *shape), w_ei=torch.rand(n_e, n_i))
    if not c["readout"]:
        p |= dict(g_i=torch.rand(n_i), g_e=torch.rand(n_e), b_e=torch.rand(n_e))
    held = {name: value.requires_grad_() for name, value in p.items()}
    m.ei_init(dict(held), c["x"])
    still_trained(held)
    p = {name: tensor(value.detach(), value, name).numpy() for name, value in held.items()}
    found = {}
    for name in ("w_ee", "w_ie"):
        w = p.pop(name)
        found[f"mean of {name}"], found[f"standard deviation of {name}"] = np.array(w.mean()), np.array(w.std())
        found[f"share of {name} below 0"] = np.array((w < 0).mean())
        found[f"share of {name} below its mean"] = np.array((w < 0.999 * w.mean()).mean())
    return found | p


def initialize(m, c):
    seen = []

    def init(p, x):
        if not isinstance(x, torch.Tensor):
            raise Problem(f"it calls init with a {type(x).__name__} in place of the layer's input")
        seen.append(x.detach().clone())
        p["w"].fill_(x.mean() + 1)

    layers = [(dict(w=torch.zeros(())), lambda p, x: p["w"] * x + 1) for _ in range(c["n_layers"])]
    m.initialize(layers, c["x"], init)
    if len(seen) != c["n_layers"]:
        raise Problem(f"it calls init {len(seen)} times for {c['n_layers']} layers")
    return {f"input of layer {i + 1}": tensor(x, c["x"], "the input of a layer") for i, x in enumerate(seen)}


# Functions of one output: their arguments; the argument that has the shape of the output (None: it is a number); the
# argument to which the gradient is looked at; the name of the output.
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


def call(name, m, c):
    arguments, like, differentiate, what = CALLS[name]
    if differentiate:
        c.with_gradient(differentiate)
    found = {}
    for again in ("", ", the second time") if differentiate else ("",):  # what the first call leaves on its input shows
        out = getattr(m, name)(*(c[argument] for argument in arguments.split()))
        out = tensor(out, c[like], what) if like else number(out, what)
        c.unchanged()
        if name == "stabilize":
            found["zeros that are left"] = (out == 0).to(out.dtype)
        found[what] = out
        if differentiate:
            found[f"dL/d{arguments.split()[0]}{again}"] = gradient(out, c["weights"], c[differentiate])
    return found


PROBES = {name: partial(call, name) for name in CALLS}
PROBES |= dict(simulate=simulate, clamp_dale=clamp_dale, ei_init=ei_init, initialize=initialize)
PROBES["currents"] = partial(some_currents, "currents", ("i_ee", "i_ie", "i_sub", "i_div", "i_int"))
PROBES["pv_som_currents"] = partial(some_currents, "pv_som_currents", ("i_ee", "i_sub", "i_div", "i_int"))


def explain(error, folder):
    """An exception in one line, with the last line of the student's own files on its way."""
    if type(error) is NotImplementedError and not str(error):  # that of a stub says nothing; torch's says something
        return "not done yet"
    name = type(error).__name__
    message = f"{name}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
    message = message.encode(errors="backslashreplace").decode()
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}: {name}: {error.msg}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.parent == folder and path.stem in FILES.values():
            return f"{path.name}, line {frame.lineno}: {message}"
    return message


def observe(name, module, inputs, folder=HERE):
    """What a function does with each of its inputs: a list of dicts of arrays, or of text where it cannot be compared.

    Args:
        name: of the function, a key of `PROBES`.
        module: where the function is.
        inputs: a list of dicts of arrays, one for each case.
    """
    found = []
    for arrays in inputs:
        case = Case(arrays)
        try:
            if not callable(getattr(module, name, None)):
                raise Problem("the file has no such function")
            out = PROBES[name](module, case)
            found.append({k: np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in out.items()})
        except Problem as problem:
            found.append(str(problem))
        except (Exception, SystemExit) as error:
            found.append(explain(error, folder))
    return found
