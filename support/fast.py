"""Fused forms of the plain equations, with the same results (tests/test_fast.py); what each saves: results/speed.md.
`accelerate(model)` puts one in the place of a plain form only where the text is the one that it was proven equal to.
An edited equation has another fingerprint, a checksum of its syntax tree: one line says so, the plain form trains."""

import ast
import ctypes
import hashlib
import inspect
import math
import sys
from functools import lru_cache, partialmethod
from pathlib import Path
from threading import Lock
from types import CodeType, FunctionType, NoneType

import torch
import torch.nn.functional as F
from torch import nn

import ei_prop
from baselines import DANNCircuit, DANNCircuit2d
from homeostasis import HomeostaticCircuit, HomeostaticCircuit2d
from inhibition import EICircuit, EICircuit2d
from lif import LIF, Spike
from model import AvgPool, Layer, Network


def refuse_create_graph():
    """A backward pass written by hand is no part of the graph, so a second derivative through it would be wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError("support/fast.py has first derivatives only; for second ones do not call accelerate")


def dtype_of_products(x):
    """bfloat16 in a network of `use_bfloat16`, else the type of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class _LIF(torch.autograd.Function):
    """dL/du[t] = dL/ds[t] ds/du[t] + (1 - 1/tau) dL/du[t+1],  dL/dI[t] = dL/du[t]."""

    @staticmethod
    def forward(ctx, current, tau, threshold, alpha):
        leak = 1 - 1 / tau
        s = torch.empty_like(current[0])  # its layout in memory is kept, also where `current` is expanded over time
        u = current.new_empty_strided(current.shape, (s.numel(), *s.stride()))
        spikes = torch.empty_like(u, dtype=dtype_of_products(u))  # 0 and 1 are exact in 16 bits
        u[0].copy_(current[0])
        for t in range(current.shape[0]):
            if t > 0:
                torch.sub(u[t - 1], s, alpha=threshold, out=u[t])
                torch.add(current[t], u[t], alpha=leak, out=u[t])
            torch.ge(u[t], threshold, out=s)
            spikes[t].copy_(s)
        ctx.save_for_backward(u)
        ctx.leak, ctx.threshold, ctx.alpha = leak, threshold, alpha
        return spikes

    @staticmethod
    def backward(ctx, grad_spikes):
        refuse_create_graph()
        (u,) = ctx.saved_tensors
        grad = torch.sub(u, ctx.threshold).mul_(ctx.alpha).sigmoid_()  # sigma; then dL/ds ds/du in its place
        torch.ops.aten.sigmoid_backward.grad_input(grad_spikes.to(grad.dtype), grad, grad_input=grad)
        grad.mul_(ctx.alpha)
        for t in reversed(range(len(u) - 1)):
            grad[t].add_(grad[t + 1], alpha=ctx.leak)
        return grad, None, None, None


class FastLIF(LIF):
    def forward(self, current):
        return _LIF.apply(current, self.tau, self.threshold, self.alpha)


class _GainControl(torch.autograd.Function):
    """balanced / I_div + b_E, straight through, with I_div = w s_I. With g = dL/dI_int, and the divisor for I_div:

        dL/dbalanced = g / I_div         dL/dI_div = -balanced g / I_div^2
        dL/ds_I = w^T dL/dI_div          dL/dw = dL/dI_div s_I^T

    currents, (N, ..., n_E + n_I), holds g_E (I_EE - I_sub) and s_I of each position side by side: the rows of a matrix.
    w, (n_E, n_I), is W_EI with g_I in it, b_e (n_E,), eps "adaptive" or what is added to I_div. pool: also its mean."""

    @staticmethod
    def forward(ctx, currents, w, b_e, eps, pool):
        balanced, s_i = currents.flatten(0, -2).split([w.shape[0], w.shape[1]], 1)
        w = w.to(currents.dtype)  # in bfloat16 the sums of products with W_EI have 16 bits too, the division has 32
        i_div = s_i @ w.t()
        sample = i_div.view(len(currents), -1)
        if pool:
            sample += sample.mean(1, keepdim=True)
        if eps == "adaptive":  # nothing that is positive is smaller than the smallest positive value
            torch.maximum(sample, ei_prop.STABILIZERS["adaptive"](sample), out=sample)
        else:
            i_div += eps
        ctx.save_for_backward(balanced, s_i, i_div, w)
        ctx.shape, ctx.pool = currents.shape, pool
        return torch.addcdiv(b_e, balanced, i_div)

    @staticmethod
    def backward(ctx, grad):
        refuse_create_graph()
        balanced, s_i, i_div, w = ctx.saved_tensors
        grad_currents = w.new_empty(ctx.shape)
        grad_balanced, grad_s_i = grad_currents.view(-1, sum(w.shape)).split([w.shape[0], w.shape[1]], 1)
        torch.div(grad.to(i_div.dtype), i_div, out=grad_balanced)  # where one convolution's gradient is needed
        minus_grad_div = torch.mul(grad_balanced, balanced).div_(i_div)
        if ctx.pool:
            sample = minus_grad_div.view(ctx.shape[0], -1)
            sample += sample.mean(1, keepdim=True)
        torch.mm(minus_grad_div, -w, out=grad_s_i)
        return grad_currents, -(minus_grad_div.t() @ s_i), grad.sum(0), None, None


class FastCircuit(EICircuit):
    def forward(self, x, pool=False, divided=True):
        """I_int, or with the pool `Homeostasis.quotient`. Not divided: what `_GainControl` takes, not yet exactly 0."""
        w_ie, w_ei, g_i = self.inhibitory_parameters()
        w = self.w_ee - (w_ei @ w_ie.flatten(1)).view_as(self.w_ee)  # I_EE - I_sub = w * x, for s_I is linear in x
        if not self.readout:  # g_E scales what the division scales
            g_e, b_e = (torch.full_like(self.g_e, 2), torch.zeros_like(self.b_e)) if pool else (self.g_e, self.b_e)
            w = torch.cat([g_e.view(-1, *[1] * (x.dim() - 1)) * w, w_ie])
            w_div = w_ei * g_i.flatten()  # g_I goes with the synapse in place of the activity
        currents = self.product(x, w)
        if not divided:
            return currents, w_div
        with torch.no_grad():  # the mask of `EICircuit.synapses`, in place
            currents.mul_(self.is_reached(x).to(currents.dtype))
        if self.readout:
            return currents.to(w.dtype)
        if not isinstance(self.eps, str) or (self.eps == "adaptive" and self.ste):
            rows = _GainControl.apply(currents.movedim(1, -1), w_div, b_e.flatten(), self.eps, pool)
            return rows.view(len(x), *currents.shape[2:], -1).movedim(-1, 1)
        balanced, s_i = currents.split([self.n_e, self.n_i], 1)
        i_div = self.lateral(w_div, s_i)
        i_div = i_div + i_div.mean(tuple(range(1, x.dim())), keepdim=True) if pool else i_div
        return ei_prop.divide(balanced.to(w.dtype), i_div, self.eps, self.ste) + b_e.view(-1, *[1] * (x.dim() - 2))


class FastCircuit2d(FastCircuit, EICircuit2d):
    def product(self, x, w):
        small = x.shape[2:] == (2, 2) and (*w.shape[2:], self.stride, self.padding) == (3, 3, 1, 1)
        return _conv_2x2(x, w) if small and x.is_cpu else super().product(x, w)


def _conv_2x2(x, w):
    """A 3x3 convolution with padding on 2x2 maps as one matrix product: each position q is reached from each position p
    by one of the kernel's weights; the other 20 of its 36 products meet the padding."""
    place = torch.tensor([0, 1, 3, 4])  # of the four positions in a 3x3 grid whose middle is number 4
    tap = 4 + place[:, None] - place  # p, q
    w_pq = w.permute(2, 3, 1, 0).flatten(0, 1).index_select(0, tap.flatten()).unflatten(0, (4, 4))  # p, q, in, out
    rows = x.permute(0, 2, 3, 1).flatten(1) @ w_pq.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return rows.view(-1, 2, 2, w.shape[0]).permute(0, 3, 1, 2)


POOL = dict(quotient=partialmethod(FastCircuit.forward, pool=True))  # as `Homeostasis.quotient`
FORMS = dict.fromkeys([DANNCircuit, HomeostaticCircuit], FastCircuit)  # circuits whose fused form is the same
FORMS |= dict.fromkeys([DANNCircuit2d, HomeostaticCircuit2d], FastCircuit2d)
FORMS = {kind: type(f"Fast{kind.__name__}", (kind, form), POOL) for kind, form in FORMS.items()}
globals().update({form.__name__: form for form in FORMS.values()})  # pickle asks for them by name
# What gives the same current for the same image at each time step; and what else stands in a layer of ours.
STEADY = (FastCircuit, FastCircuit2d, *FORMS.values(), nn.Conv2d, nn.Linear)
USUAL = (*STEADY, nn.Sequential, nn.BatchNorm1d, nn.BatchNorm2d, FastLIF, nn.ReLU)


def is_usual(layer):
    """Whether nothing in it is a student's, which may tell time steps apart, write into its input, or use `view`."""
    _, *parts = layer.modules()
    own = [k for m in parts for k, v in vars(m).items() if callable(v) or (k.endswith(("_hooks", "inplace")) and v)]
    eps = getattr(layer.circuit, "eps", "adaptive")
    return not own and all(type(m) in USUAL for m in parts) and (eps == "adaptive" or eps not in ei_prop.STABILIZERS)


ONE_AT_A_TIME = Lock()
KERNELS = {}  # type of a device -> {function: the same by `torch.compile`}, empty where that fails


def spikes(neuron, dtype, current, i_div=None, b_e=None, reached=None):
    """Gain control and LIF as plain text, of which `torch.compile` makes a kernel forward and one backward: spikes.
    neuron: T, tau, theta, alpha. current, i_div (T, B, positions, n_E), b_e (B, positions, n_E): the division; without
    i_div, current is I_int. reached (T, B, positions, 1): where x is active. A still image has one step of these."""
    (T, tau, threshold, alpha), found, wide = neuron, [], torch.promote_types(current.dtype, torch.float32)
    if i_div is not None:
        current, i_div = (ei_prop.straight_through(i, i * reached) for i in (current, i_div))
        smallest = ei_prop.STABILIZERS["adaptive"](i_div.detach().flatten(0, 1)).view(*i_div.shape[:2], 1, 1)
        i_div = ei_prop.straight_through(i_div, torch.maximum(i_div, smallest)).unbind()
    current, u = current.unbind(), None  # each time step on its own; else what lies between two goes through memory
    for t in range(T):
        if t < len(current):
            i_int = current[t].to(wide) if i_div is None else current[t].to(wide) / i_div[t].to(wide) + b_e
        u = i_int if u is None else (1 - 1 / tau) * (u - threshold * s.detach()) + i_int  # noqa: F821
        s = Spike.apply(u, threshold, alpha)
        found.append(s.to(dtype))
    return torch.stack(found)


class FastLayer(Layer):
    def forward(self, x):
        (T, B), usual = x.shape[:2], is_usual(self)
        still = usual and T > 1 and x.stride(0) == 0  # an image that is the same at each time step
        x = (x[:1] if still else x).flatten(0, 1)  # (B, ...) or (T B, ...)
        x = x.contiguous(memory_format=torch.channels_last if usual and x.dim() == 4 else torch.contiguous_format)
        if still and not isinstance(self.circuit, STEADY):
            x, still = torch.cat([x] * T), False  # BN-SNN counts every time step in its variance
        if usual and KERNELS.get(x.device.type) and isinstance(self.neuron, FastLIF):
            return self.in_few_kernels(x, T, B)
        current = self.circuit(x)
        if still:  # one step is expanded over time; the gradient of that is a sum, fast with channels last
            current = current.movedim(1, -1)
            return self.neuron(current.expand(T, *current.shape).movedim(-1, 2))
        current = current.to(torch.promote_types(current.dtype, next(self.parameters(), x).dtype))  # 32 bits at least
        current = current if usual else current.clone(memory_format=torch.contiguous_format)
        return self.neuron(current.unflatten(0, (T, B)))

    def in_few_kernels(self, x, T, B):
        """The same where all but the products is compiled."""
        circuit, neuron, more = self.circuit, self.neuron, ()
        whole = type(circuit) in (FastCircuit, FastCircuit2d) and circuit.eps == "adaptive" and circuit.ste
        current, w_div = circuit(x, divided=False) if whole else (circuit(x), None)
        rows = current.movedim(1, -1).reshape(len(x) // B, B, -1, current.shape[1])  # (T or 1, B, positions, n)
        if whole:
            rows, s_i = rows.split([circuit.n_e, circuit.n_i], 3)
            b_e = circuit.b_e.flatten().expand(rows.shape[1:])  # its gradient is summed outside
            more = F.linear(s_i, w_div), b_e, circuit.is_reached(x.detach()).reshape(*rows.shape[:3], 1)
        neuron = T, neuron.tau, neuron.threshold, neuron.alpha
        s = KERNELS[x.device.type][spikes](neuron, dtype_of_products(x), rows, *more)
        return s.view(T, B, *current.shape[2:], -1).movedim(-1, 2)


def halved(x):  # of four axes: with five, what is compiled would copy its gradient
    return F.avg_pool2d(x, 2)


class FastAvgPool(AvgPool):
    def forward(self, x):
        if x.is_cuda or x.device.type in KERNELS:  # interpolation was not tried there
            return KERNELS.get(x.device.type, {}).get(halved, halved)(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        half = F.interpolate(x.flatten(0, 1), scale_factor=0.5, mode="bilinear")  # between two pixels: their mean
        return half.unflatten(0, x.shape[:2])


class Bfloat16Network(Network):
    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x).float()


def use_bfloat16(model):
    """Has a network compute convolutions and matrix products in 16 bits, and all else as it is, in place."""
    if not isinstance(model, Bfloat16Network):  # of a student's class there is one of its own
        own = (Bfloat16Network, type(model))
        model.__class__ = Bfloat16Network if type(model) is Network else type("Bfloat16Network", own, {})
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    if next(model.parameters()).is_cpu and not (cpuinfo.exists() and "bf16" in cpuinfo.read_text()):
        print("no bfloat16 instructions found: a step takes 2.2 times as long as in float32 (AVX-512) or 15 (AVX2)")


FORMS |= {LIF: FastLIF, EICircuit: FastCircuit, EICircuit2d: FastCircuit2d, AvgPool: FastAvgPool, Layer: FastLayer}


# A checksum of each function that a fused form stands for. After a change of one, tests/test_fast.py says the new one:
# put it here when the other tests of that file have shown that plain and fused are equal.
_pairs = """
    baselines.DANN.__init__ da4054dce567  baselines.DANN.inhibitory_parameters 30182545b180  ei_prop.divide 19fcf8e48779
    ei_prop.scale_gradient 5b5b171c2520  inhibition.EICircuit.is_reached 52946c844d09  model.Layer.__init__ 8927d015ea48
    ei_prop.smallest_positive 6bebe15ba635  inhibition.EICircuit2d.is_reached 130a7f40af8a  lif.LIF.forward 9ef537752584
    ei_prop.stabilize 9d6be9594203  ei_prop.straight_through 0826f0058070  homeostasis.Homeostasis.__init__ 1b0a0cbac650
    inhibition.EICircuit.forward 9eb5b79b662d  lif.check_neuron 5c2f6a218fd0
    homeostasis.Homeostasis.forward d1893f5211ee  lif.LIF.__init__ 3eda42f2017f  lif.LIF.membrane_potential ee5833009f10
    homeostasis.Homeostasis.quotient 71fe727f50dc  lif.Spike.backward 75aee6ae5666  lif.Spike.setup_context ba32b189598e
    inhibition.EICircuit.__init__ c8f72c5493ee  inhibition.EICircuit.currents 69ccc3c402cd
    inhibition.EICircuit.inhibitory_parameters 17622cd6a0b7  lif.simulate 17596fc7bdee  model.Layer.forward b4012e9aa5d1
    inhibition.EICircuit.lateral 03b1740b1f1a  inhibition.EICircuit.synapses b848e127b27f
    inhibition.EICircuit.product 09171db9491e
    inhibition.EICircuit.scaled 5baa23733963  inhibition.EICircuit2d.product 4309ce30ea80  lif.LIF.simulate 3a04552d3938
    inhibition.EICircuit2d.__init__ dcf8d1859489  lif.Spike.forward 9e418c08b983  model.AvgPool.forward b49f03c86895
""".split()
FINGERPRINTS = dict(zip(_pairs[::2], _pairs[1::2], strict=True))
CONCEPTS = {name.partition(".")[0] for name in FINGERPRINTS}  # lif, inhibition, ...


def normal_form(node):
    """A syntax tree as nested tuples without docstrings and empty fields: the same in every version of Python."""
    if isinstance(node, list):
        return tuple(map(normal_form, node))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    kept = [(key, normal_form(value)) for key, value in fields.items() if value not in (None, []) and key != "kind"]
    return type(node).__name__, *sorted(kept)


def checksum(tree):
    return hashlib.sha256(repr(normal_form(tree)).encode()).hexdigest()[:12]


@lru_cache
def definitions(text):
    """The functions in the text of a file: (name, first line) -> (syntax tree, code)."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    trees = {(f.name, min(part.lineno for part in (f, *f.decorator_list))): f for f in functions}
    codes, left = {}, [compile(text, "", "exec", dont_inherit=True)]
    while left:
        code = left.pop()
        codes[code.co_name, code.co_firstlineno] = code
        left += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return {place: (tree, codes[place]) for place, tree in trees.items()}


def fingerprint(function):
    """A checksum of a function without comments, docstrings, layout. None: its text cannot be read, or does not run."""
    loaded = inspect.unwrap(function)
    try:
        text = "".join(inspect.findsource(loaded)[0])
        tree, code = definitions(text)[loaded.__name__, loaded.__code__.co_firstlineno]
    except (AttributeError, OSError, TypeError, SyntaxError, KeyError):
        return None
    decorated = any(getattr(decorator, "id", "") != "staticmethod" for decorator in tree.decorator_list)
    wrapped = function is not loaded and not decorated
    return checksum(tree) if code == loaded.__code__ and not wrapped else None


MODULES = (torch, F, nn, math)  # which the concept files use; another one under such a name is an edit


def functions_of(thing, place):
    """All that a class or a function of the concept files leads to, {"lif.simulate": the function}. place: its name."""
    found, left = {}, [(thing, place)]
    while left:
        thing, place = left.pop()
        home = str(getattr(thing, "__module__", "")).partition(".")[0]
        if isinstance(thing, type) and home in CONCEPTS:
            bases = [base for base in thing.__bases__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
            left += [(base, f"{home}.{thing.__name__}") for base in bases]  # also a student's mixin
            members = [(getattr(m, "__func__", m), f"{home}.{thing.__name__}.{key}") for key, m in vars(thing).items()]
            members = [(m, key) for m, key in members if not isinstance(m, type) and "extra_repr" not in key]
            left += [(m, key) for m, key in members if callable(m) or isinstance(m, property | partialmethod)]
            continue
        known = isinstance(thing, FunctionType) and home in CONCEPTS
        name = f"{home}.{thing.__qualname__}" if known else place
        if known and name not in found:
            code, scope = inspect.unwrap(thing).__code__, inspect.unwrap(thing).__globals__
            names = [key for key in code.co_names if not isinstance(scope.get(key), dict | NoneType)]
            names = [key for key in names if not any(scope[key] is module for module in MODULES)]
            left += [(scope[key], f"{home}.{key}") for key in names]
        found[name] = thing
    return found


def edited(module):
    """The functions of a module that are not those that its fused form was written for: a set of names."""
    kind = next(base for base in type(module).__mro__ if base in FORMS)
    place = f"{kind.__module__}.{kind.__name__}"
    if kind is not type(module):  # a subclass
        return {place}
    found = functions_of(kind, place)
    if isinstance(module, EICircuit) and isinstance(module.eps, str) and module.eps == "adaptive":
        found |= functions_of(ei_prop.STABILIZERS["adaptive"], "ei_prop.STABILIZERS")
    classes = tuple(f"{base.__module__}.{base.__name__}." for base in kind.__mro__)
    names = found.keys() | {name for name in FINGERPRINTS if name.startswith(classes)}
    changed = {name for name in names if name not in found or fingerprint(found[name]) != FINGERPRINTS.get(name, "")}
    own = [name for name, value in vars(module).items() if callable(value) and hasattr(kind, name)]
    options = ("eps",) if isinstance(module, EICircuit) else ("tau", "threshold", "alpha")  # a tensor may learn
    own += [name for name in options if isinstance(getattr(module, name, None), torch.Tensor)]
    return changed | {f"{place}.{name}" for name in own}


def accelerate(model, batch=None, compiled=False):
    """Puts the fused forms in the place of the plain ones, where the plain text is the one that they stand for. Change
    functions and modules before; if you do so later, call it again. Returns the functions that were edited,
    {"lif.simulate"}: each is printed and stays plain.
    model: a network of `build` on its device, changed in place; parameters and their names stay. batch: not used.
    compiled: also compile, on a GPU, perhaps a minute: for long trainings. All later networks are compiled, too."""
    device = next(model.parameters()).device.type
    if device not in ("cpu", "cuda"):  # on others (Apple's MPS) they were never run
        return set()
    differing, plain = set(), {form: plain for plain, form in FORMS.items()}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
        if isinstance(module, tuple(FORMS)):
            names = edited(module)
            differing |= names
            if not names:
                module.__class__ = FORMS[type(module)]
    if compiled and device == "cuda" and device not in KERNELS:
        compile_on(device)
    for file, function in sorted(name.split(".", 1) for name in differing):
        print(f"{file}.py: {function} is not the text that support/fast.py was written for, so the plain form runs")
    return differing


def kernel_of(function, device):
    """What `torch.compile` makes of a function, anew for each shape: one for all shapes has twice the instructions, and
    is cut for the first that it meets. Where compiling fails, the function runs as it is."""
    from torch._dynamo import config as dynamo  # here, for it takes a second
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    options = dict(max_pointwise_cat_inputs=0, max_complex_pointwise_cat_inputs=0)  # time steps share their kernel
    options |= dict(realize_reads_threshold=10**6, realize_opcount_threshold=10**6)
    options = {name: value for name, value in options.items() if hasattr(inductor, name)}
    kernel = torch.compile(function, dynamic=False, options=options)
    # Only what goes in is kept. The backward pass is compiled with the forward one, for its errors are caught there.
    kernel = functorch.patch(activation_memory_budget=0, force_non_lazy_backward_lowering=True)(kernel)
    kernel = dynamo.patch(specialize_float=True, cache_size_limit=1024, accumulated_cache_size_limit=1024)(kernel)

    def run(*args):
        try:
            with ONE_AT_A_TIME:  # else PyTorch 2.11 does not undo the settings
                return kernel(*args)
        except Exception as error:  # no Triton, no C compiler: it fails in many ways
            no_kernels(device, type(error).__name__)
            return function(*args)

    return run


def no_kernels(device, why):
    if KERNELS.pop(device, True):  # said once
        print(f"torch.compile makes no kernels here ({why}): gain control and LIF run operation by operation")
    KERNELS[device] = {}


@torch.inference_mode(False)
def compile_on(device):
    """Has `torch.compile` make kernels for this type of device, if it can (on a GPU with Triton, which is there on
    Linux), and if examples are the same with and without them, values and gradients. PyTorch keeps what it compiled."""
    x, found = torch.linspace(0, 3, 960, device=device).sin().abs().view(4, 3, 8, 10)[..., :8], []
    sides = [side.detach().requires_grad_() for side in (x, 2 * x.flip(2), (x[0, 0, 0] - 0.5).expand(3, 8, 8))]
    try:
        KERNELS[device] = kernels = {function: kernel_of(function, device) for function in (spikes, halved)}
        for steps, pool in ((spikes, halved), kernels.values()):
            out = [steps((4, 2.0, 1.0, 4.0), x.dtype, *sides, x[..., :1] > 0.1), pool(sides[0])]
            out.append(steps((4, 2.0, 1.0, 4.0), x.dtype, sides[0][:1]))
            found.append([*out, *torch.autograd.grad(sum(part.cumsum(0).square().sum() for part in out), sides)])
    except Exception as error:  # also of a system, or of an older PyTorch, that cannot do this
        return no_kernels(device, type(error).__name__)
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True)):
        no_kernels(device, "they give other results")


class Recorded:
    """A training step of which CUDA keeps one graph: Python then starts the step, and not each of its operations.
    step(network, optimizer, x, y, *more) -> tensors: it trains on a GPU and reads no number there. The first calls run
    it as it is, for the optimizer makes its state in them. Then it is recorded, and both ways are run from the same
    state on the same batch. Where they differ, or recording fails, one line says so, and the step goes on as it is."""

    EAGER_CALLS = 3

    def __init__(self, step):
        self.step, self.graph, self.calls = step, None, 0

    def __call__(self, network, optimizer, x, y, *more):
        self.calls += 1
        if self.calls == self.EAGER_CALLS + 1:
            return self.record(network, optimizer, x, y, *more)
        if self.graph is None or x.shape != self.x.shape:
            return self.step(network, optimizer, x, y, *more)
        return self.replay(optimizer, x, y)

    def replay(self, optimizer, x, y):
        self.x.copy_(x)
        self.y.copy_(y)
        for rate, group in zip(self.rates, optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        return [value.clone() for value in self.out]  # the next replay writes to the same place

    @torch.no_grad()
    def record(self, network, optimizer, x, y, *more):
        """Runs the step, records it, and compares. Returns what the step gives."""
        of_optimizer = [value for values in optimizer.state.values() for value in values.values()]
        state = [*network.parameters(), *network.buffers(), *filter(torch.is_tensor, of_optimizer)]  # a step changes it
        before = [value.clone() for value in state]
        with torch.enable_grad():
            out = self.step(network, optimizer, x, y, *more)
        after = [value.clone() for value in state]
        lr = [group["lr"] for group in optimizer.param_groups]
        self.x, self.y, self.rates = x.clone(), y.clone(), [torch.tensor(float(rate)).to(x.device) for rate in lr]
        try:
            if not all(value is None or torch.is_tensor(value) for value in of_optimizer):
                raise RuntimeError("the optimizer counts in Python numbers")
            set_rates(optimizer, self.rates)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph), torch.enable_grad():
                self.out = self.step(network, optimizer, self.x, self.y, *more)
            set_rates(optimizer, lr)
            torch._foreach_copy_(state, before)
            found = self.replay(optimizer, x, y)
            pairs = [*zip(found, out, strict=True), *zip(state, after, strict=True)]
            if all((a.double() - b.double()).norm() <= 1e-3 * b.double().norm() for a, b in pairs):
                return found
            reason = "it gives other results"
        except Exception as error:  # of CUDA, of the compiler, of a step of your own
            reason = str(error).strip().partition("\n")[0]
        print(f"the training step is not recorded as a CUDA graph ({reason}), so it runs operation by operation")
        self.graph = None
        set_rates(optimizer, lr)
        torch._foreach_copy_(state, after)
        return out


def set_rates(optimizer, rates):
    """Gives each group of parameters its learning rate."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def keep_memory(keep=True):
    """On Linux, has the C library keep the memory that tensors give back (`keep=False`: as by default). Else blocks of
    more than 32 MB go back to the system, which clears them anew: a quarter and more of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX
        mallopt(-1, -1 if keep else 64 << 20)  # M_TRIM_THRESHOLD
