"""The fused forms against the plain ones, and what `accelerate` does when someone edits the plain ones."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

import ei_prop
import lif
from baselines import DANNCircuit, DANNCircuit2d
from ei_init import ei_init, initialize
from ei_prop import divide
from inhibition import EICircuit, EICircuit2d
from lif import LIF
from model import ARCHS, KINDS, AvgPool, Layer, Network, build, circuits, layers
from support import fast
from support.fast import FORMS, FastAvgPool, FastCircuit, FastCircuit2d, FastLIF, accelerate, gain_control

NARROW = [8, "P", 8, "P", 16, "P", 16, "P", 16, "P"]
ROOT = Path(__file__).parents[1]


def gradients(model, x):
    y = torch.arange(len(x)) % 10
    model.zero_grad()
    logits = model(x)
    F.cross_entropy(logits, y).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def fused(module):
    """A copy in which every module has its fused form, without any comparison."""
    module = copy.deepcopy(module)
    for m in module.modules():
        m.__class__ = FORMS.get(type(m), type(m))
    return module


def pair(arch, T, x, **options):
    """A network and its plain form, in double precision: rounding makes no neuron fire in one of them only."""
    torch.manual_seed(0)
    plain = build(arch, T=T, **options).double()
    initialize(plain, x)
    with torch.no_grad():
        for circuit in circuits(plain):
            for p in circuit.parameters():
                p.mul_(0.95 + 0.1 * torch.rand_like(p))
            if not circuit.readout:
                circuit.b_e.uniform_(-0.5, 1.5)  # some fire without input
    return fused(plain), plain


def assert_equal(fast, slow, x):
    (a, a_grads), (b, b_grads) = gradients(fast, x), gradients(slow, x)
    assert b.norm() > 0 and relative_error(a, b) < 1e-9
    for name, grad in b_grads.items():
        assert (a_grads[name] - grad).norm() <= 1e-8 * grad.norm(), name  # 0 where nothing comes in


# ---- each form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_fast_equals_plain_in_every_architecture(arch, T):
    x = torch.rand(2, 3, 32, 32, dtype=torch.double)
    assert_equal(*pair(arch, T, x, width=1.0 if arch == "vgg8" and T == 3 else 0.25), x)


@pytest.mark.parametrize("options", [dict(ste=False), dict(eps=1e-3), dict(grad_scaling=False), dict(ei_ratio=8)])
@pytest.mark.parametrize("arch", ["mlp", "vgg8", "resnet18"])
def test_fast_equals_plain_with_every_option(arch, options):
    x = torch.rand(2, 3, 32, 32, dtype=torch.double)
    assert_equal(*pair(arch, 2, x, width=0.125, tau=3.0, threshold=0.8, alpha=2.0, **options), x)


@pytest.mark.parametrize("kind", ["bn", "plain", "dann"])
@pytest.mark.parametrize("arch", ["mlp", "vgg8", "resnet18"])
def test_the_rivals_are_the_same_too(arch, kind):
    x = torch.rand(4, 3, 32, 32, dtype=torch.double)
    plain = build(arch, T=3, kind=kind, width=0.125).double()
    with torch.no_grad():
        for p in plain.parameters():  # DANN's W_EI is constant, and the gradient of its W_IE then 0 by symmetry
            p.mul_(0.95 + 0.1 * torch.rand_like(p))
    quick = fused(plain)
    assert_equal(quick, plain, x)
    for a, b in zip(quick.buffers(), plain.buffers(), strict=True):  # running statistics of batch normalization
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("density", [0.002, 0.3, 1.0])
def test_fast_equals_plain_for_sparse_and_silent_inputs(density, T):
    x = torch.rand(4, T, 3, 32, 32, dtype=torch.double)  # frames
    quick, slow = pair("vgg8", T, x, plan=NARROW)
    x *= torch.rand_like(x) < density
    x[0] = 0
    assert_equal(quick, slow, x)
    x[:] = 0
    assert_equal(quick, slow, x)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("T", [1, 2, 4, 9])
@pytest.mark.parametrize("static", [False, True])
def test_lif(T, tau, threshold, static):
    x = torch.randn(1 if static else T, 3, 4, 5, 5).contiguous().requires_grad_()
    grad = torch.randn(T, 3, 4, 5, 5)
    found = []
    for form in (FastLIF(tau, threshold, 3.0), LIF(tau, threshold, 3.0)):
        out = form(x.expand(T, -1, -1, -1, -1))
        found.append((out, *torch.autograd.grad(out, x, grad)))
    assert 0 < found[1][0].mean() < 1 and torch.equal(found[0][0], found[1][0])
    assert relative_error(found[0][1], found[1][1]) < 1e-5


def test_lif_keeps_the_memory_layout():
    lif = FastLIF()
    x = torch.randn(3, 2, 4, 5, 5).transpose(2, 4)
    assert lif(x)[0].stride() == x[0].stride() != x.contiguous()[0].stride()
    current = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    spikes = lif(current.expand(3, -1, -1, -1, -1))
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_lif_keeps_only_the_potential_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        FastLIF()(torch.randn(4, 10, requires_grad=True))
    assert kept == [40]


@pytest.mark.parametrize("shape", [(5,), (5, 3, 3)])
@pytest.mark.parametrize("eps", ["adaptive", 1e-3])
def test_gain_control_is_the_division_and_b_e(shape, eps):
    n_e, n_i = 8, 2
    currents = torch.rand(*shape, n_e + n_i, dtype=torch.double)
    currents[..., n_e:] *= torch.rand(*shape, 1) < 0.6  # positions without inhibition
    currents[0, ..., n_e:], currents[1, ..., n_e:] = 0, 0.5  # a silent sample, one without zeros
    w, b_e = torch.rand(n_e, n_i, dtype=torch.double), torch.randn(n_e, dtype=torch.double)
    inputs = [t.requires_grad_() for t in (currents, w, b_e)]
    fused = gain_control(*inputs, eps)
    plain = divide(currents[..., :n_e], currents[..., n_e:] @ w.t(), eps) + b_e
    grad = torch.randn_like(plain)
    torch.testing.assert_close(fused, plain)
    for a, b in zip(*(torch.autograd.grad(out, inputs, grad) for out in (fused, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_2x2_map_as_one_product_equals_the_convolution():
    x = torch.rand(3, 5, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    circuit = FastCircuit2d(5, 8, 3, padding=1)
    w = torch.randn(7, 5, 3, 3, requires_grad=True)
    fast, slow = circuit.product(x, w), torch.nn.functional.conv2d(x, w, padding=1)
    assert not torch.equal(fast, slow)  # rounded differently, so the other form was taken
    assert relative_error(fast, slow) < 1e-6
    grad = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad(out, (x, w), grad) for out in (fast, slow)), strict=True):
        assert relative_error(a, b) < 1e-6
    for other in (FastCircuit2d(5, 8, 3), FastCircuit2d(5, 8, 3, stride=2, padding=1), FastCircuit2d(5, 8, 1)):
        big = torch.rand(3, 5, 4, 4)
        for maps in (big, big[..., :2, :2]) if other.kernel_size == 1 or other.padding else (big,):
            assert relative_error(other.product(maps, other.w_ee), EICircuit2d.product(other, maps, other.w_ee)) < 1e-6


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("kind", ["dense", "2d", "2x2"])
@pytest.mark.parametrize("options", [{}, dict(ste=False), dict(eps=1e-2), dict(grad_scaling=False)])
def test_forward_equals_the_equations(kind, density, readout, options):
    if kind == "dense":
        circuit, x = EICircuit(20, 8, readout=readout, **options), (torch.rand(5, 20) < density).float()
    else:
        circuit = EICircuit2d(6, 8, 3, padding=1, readout=readout, **options)
        x = (torch.rand(5, 6, 7, 7) if kind == "2d" else torch.rand(5, 6, 2, 2)).lt(density).float()
    ei_init(circuit, x)
    with torch.no_grad():
        for p in circuit.parameters():
            p.mul_(torch.rand_like(p) + 0.5)
        if not circuit.readout:
            circuit.b_e.normal_()
    x[0] = 0
    x.requires_grad_()
    plain, quick = circuit.currents(x)["i_int"], fused(circuit)
    out, grad = quick(x), torch.randn_like(plain)
    assert relative_error(out, plain) < 1e-5
    ours = torch.autograd.grad(out, [x, *quick.parameters()], grad)
    for a, b in zip(ours, torch.autograd.grad(plain, [x, *circuit.parameters()], grad), strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (6, 5), (3, 3)])
def test_pooling_equals_pytorch_s(size):
    x = torch.randn(1, 2, 3, *size)
    x = x[0].contiguous(memory_format=torch.channels_last)[None].requires_grad_()
    theirs = torch.nn.functional.avg_pool2d(x[0], 2)[None]
    grad = torch.randn_like(theirs)
    for ours in (AvgPool()(x), FastAvgPool()(x)):
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (ours, theirs)))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("arch, plan", [("vgg8", NARROW), ("mlp", [20, 12])])
def test_a_still_image_passes_the_first_circuit_once(arch, plan, T):
    for kind in ("ei", "plain", "dann"):  # in BN-SNN the variance counts every time step
        model = fused(build(arch, plan=plan, kind=kind, T=T))
        sizes = []
        layers(model)[0].circuit.register_forward_pre_hook(lambda _, a, s=sizes: s.append(len(a[0])))
        model(torch.rand(5, 3, 32, 32))
        model(torch.rand(5, T, 3, 32, 32))
        assert sizes == [5, 5 * T]


def test_second_derivatives_raise():
    """The fused backward passes are written out and have no derivative: better an error than a wrong number."""
    circuit, dense = EICircuit2d(3, 8, 3, padding=1), EICircuit(12, 8)
    x = torch.rand(4, 3, 6, 6, requires_grad=True)
    cases = [
        (FastLIF(), torch.randn(3, 4, requires_grad=True)),
        (FastAvgPool(), torch.rand(2, 3, 4, 6, 6, requires_grad=True)),
        (fused(circuit), x),
        (fused(dense), torch.rand(4, 12, requires_grad=True)),
        (lambda w: fast._ScaleGradient.apply(w, 0.5).square(), torch.rand(3, requires_grad=True)),
    ]
    for form, leaf in cases:
        out = form(leaf)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


def test_keep_memory_changes_no_result():
    x = torch.rand(4, 3, 32, 32)
    model = build("vgg8", plan=NARROW, T=2)
    initialize(model, x)
    before = gradients(model, x)
    try:
        fast.keep_memory()
        after = gradients(model, x)
    finally:
        fast.keep_memory(False)
    assert torch.equal(before[0], after[0]) and all(torch.equal(before[1][k], after[1][k]) for k in before[1])


# ---- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(kind="dann"), dict(eps=1e-8), dict()])
@pytest.mark.parametrize("arch", ["mlp", "vgg8"])
def test_a_small_change_of_an_equation_is_noticed(arch, options, monkeypatch):
    """Also with a fixed eps, where a silent position has a current of 1e8, beside which it would be nothing."""
    model = build(arch, T=2, width=0.1, **options)
    batch = torch.rand(6, 3, 32, 32)
    initialize(model, batch)
    plain = EICircuit.forward
    monkeypatch.setattr(EICircuit, "forward", lambda self, x: plain(self, x) + 0.01 * (not self.readout))
    assert accelerate(model, batch) == {"baselines.py" if "kind" in options else "inhibition.py"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_accelerate_finds_no_difference_in_an_untouched_network(arch, kind, capsys):
    model = build(arch, T=2, kind=kind, width=0.125, in_channels=2)
    batch = torch.rand(6, 2, 32, 32)
    initialize(model, batch)
    names = list(model.state_dict())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ids = [id(p) for p in model.parameters()]
    logits = model(batch)
    state = {k: v.clone() for k, v in model.state_dict().items()}  # with batch normalization's statistics of this pass
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    assert accelerate(model, batch) == set()
    assert torch.equal(torch.get_rng_state(), generator)
    assert not capsys.readouterr().out
    assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(type(m) in FORMS for m in model.modules())
    assert type(model) is FORMS[Network] and all(type(layer) is FORMS[Layer] for layer in layers(model))
    if kind == "ei":
        assert {type(c) for c in circuits(model)} == ({FastCircuit} if arch == "mlp" else {FastCircuit, FastCircuit2d})
    torch.testing.assert_close(model(batch), logits, rtol=1e-2, atol=1e-2)
    assert accelerate(model, batch) == set()  # again: nothing is left to do


def test_accelerate_is_quick():
    model = build("vgg8")
    batch = torch.rand(128, 3, 32, 32)
    initialize(model, batch[:8])
    start = time.perf_counter()
    assert accelerate(model, batch) == set()
    assert time.perf_counter() - start < 4


@pytest.mark.parametrize("T", [1, 3])
def test_accelerate_with_frames(T):
    model, frames = build("vgg8", plan=NARROW, T=T), torch.rand(4, T, 3, 32, 32)
    initialize(model, frames)
    assert accelerate(model, frames) == set() and not any(type(m) in FORMS for m in model.modules())


def test_a_fused_network_keeps_its_mode_and_reads_a_plain_state():
    plain = build("vgg8", plan=NARROW, T=2)
    x = torch.rand(4, 3, 32, 32)
    initialize(plain, x)
    model = build("vgg8", plan=NARROW, T=2)
    initialize(model, x)
    model.eval()
    accelerate(model, x)
    assert not model.training
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-3)
    assert not FORMS.keys() & {type(m) for m in copy.deepcopy(model).modules()}


OPTIONS = [
    dict(tau=1.0),
    dict(tau=5.0, threshold=0.3, alpha=1.0),
    dict(alpha=10.0, threshold=3.0),
    dict(ei_ratio=8),
    dict(ei_ratio=1000),
    dict(eps=1e-8),
    dict(eps=1e-3, ste=False),
    dict(ste=False),
    dict(grad_scaling=False),
    dict(T=1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_accelerate_finds_no_difference_with_any_option(options, capsys):
    model, x = build("vgg8", plan=NARROW, **dict(T=2) | options), torch.rand(4, 3, 32, 32)
    initialize(model, x)
    assert accelerate(model, x) == set() and not capsys.readouterr().out


def largest(i_div):
    found = i_div.amax(tuple(range(1, i_div.dim())), keepdim=True)
    return torch.where(found > 0, found, torch.inf)


def half_of_the_mean_by_map(i_div):  # (N, n_E, ...) -> (N, n_E, 1, ...)
    return 0.5 * i_div.mean(tuple(range(2, i_div.dim())), keepdim=True) + 0.1


@pytest.mark.parametrize("ste", [True, False])
@pytest.mark.parametrize("stabilizer", [largest, half_of_the_mean_by_map, lambda i_div: torch.full_like(i_div, 0.3)])
def test_a_new_stabilizer_works_in_both_forms(stabilizer, ste, monkeypatch):
    monkeypatch.setitem(ei_prop.STABILIZERS, "mine", stabilizer)
    x = torch.rand(4, 3, 32, 32, dtype=torch.double)
    quick, plain = pair("vgg8", 2, x, plan=NARROW, eps="mine", ste=ste)
    x *= torch.rand_like(x) < 0.05
    x[:, :, :16] = 0
    assert_equal(quick, plain, x)
    assert accelerate(plain, x) == set()
    assert_equal(quick, plain, x)


def test_what_the_fused_form_does_not_know_stays_plain(capsys, monkeypatch):
    """Subclasses, and functions that a notebook replaces while it runs."""

    class Mine(EICircuit2d):
        def forward(self, x):
            return super().forward(x) + 1

    model, x = build("vgg8", plan=NARROW, T=2), torch.rand(4, 3, 32, 32)
    initialize(model, x)
    layers(model)[1].circuit.__class__ = Mine
    assert accelerate(model, x) == set()
    assert [type(c).__name__ for c in circuits(model)][:3] == ["FastCircuit2d", "Mine", "FastCircuit2d"]
    monkeypatch.setattr(lif, "lif", lambda current, *_: (current > 0).to(current.dtype) * current)
    model = build("vgg8", plan=NARROW, T=2)
    initialize(model, x)
    assert accelerate(model, x) == {"lif.py"}
    assert capsys.readouterr().out.startswith("lif.py computes something else than support/fast.py")
    assert {type(layer.neuron) for layer in layers(model)} == {LIF}
    assert {type(c) for c in circuits(model)} == {FastCircuit, FastCircuit2d}


def test_forms_name_every_module_that_has_one():
    assert set(FORMS) == {LIF, EICircuit, EICircuit2d, DANNCircuit, DANNCircuit2d, AvgPool, Layer, Network}
    for plain, quick in FORMS.items():
        assert issubclass(quick, plain) and quick is not plain


# ---- a reader edits the plain text -----------------------------------------------------------------------------------

EDITS = {  # name: (file, text, its replacement)
    "slope": ("lif.py", "return grad_s * ctx.alpha * sigma", "return grad_s * 0.5 * ctx.alpha * sigma"),
    "rectangle": (
        "lif.py",
        "sigma * (1 - sigma), None, None",
        "((u - ctx.threshold).abs() < 0.5).to(u.dtype), None, None",
    ),
    "strictly above": ("lif.py", "(u >= threshold)", "(u > threshold)"),
    "gradient through the reset": ("lif.py", "threshold * s.detach()", "threshold * s"),
    "hard reset": ("lif.py", "(u - threshold * s.detach())", "u * (1 - s.detach())"),
    "decay of the input": ("lif.py", "+ i_t  # u[t]", "+ i_t / tau  # u[t]"),
    "power of 1/d": ("inhibition.py", "(self.w_ei, 1 / self.fan_in)", "(self.w_ei, self.fan_in**-0.5)"),
    "g_E of b_E": ("inhibition.py", "i_int = g_e * quotient + b_e", "i_int = g_e * (quotient + b_e)"),
    "I_sub without W_EI": ("inhibition.py", "i_sub = self.lateral(w_ei, s_i)", "i_sub = s_i.mean(1, keepdim=True)"),
    "I_div without W_EI": (
        "inhibition.py",
        "i_div = self.lateral(w_ei, g_i * s_i)",
        "i_div = (g_i * s_i).mean(1, keepdim=True).expand_as(i_ee)",
    ),
    "ReLU": ("inhibition.py", "s_i = i_ie  #", "s_i = i_ie.relu()  #"),
    "readout divides": ("inhibition.py", "i_int=i_ee - i_sub)", "i_int=i_ee - 0.5 * i_sub)"),
    "twice 1/d": ("ei_prop.py", "w.detach() + factor * (w - w.detach())", "w.detach() + 2 * factor * (w - w.detach())"),
    "STE of the wrong part": (
        "ei_prop.py",
        "return x + (value - x).detach()",
        "return value + (x - value).detach() * 0",
    ),
    "added to all": ("ei_prop.py", "torch.where(i_div > 0, i_div, borrowed)", "i_div + borrowed"),
    "at least 1e-6": (
        "ei_prop.py",
        "    return positive.amin(tuple(range(1, i_div.dim())), keepdim=True)",
        "    return positive.amin(tuple(range(1, i_div.dim())), keepdim=True).clamp(min=1e-6)",
    ),
    "mean, not smallest": (
        "ei_prop.py",
        "    return positive.amin(tuple(range(1, i_div.dim())), keepdim=True)",
        "    axes = tuple(range(1, i_div.dim()))\n"
        "    n = (i_div > 0).sum(axes, keepdim=True)\n"
        "    return torch.where(n > 0, i_div.sum(axes, keepdim=True) / n, torch.inf)",
    ),
    "half the smallest": (
        "ei_prop.py",
        "    return positive.amin(tuple(range(1, i_div.dim())), keepdim=True)",
        "    return 0.5 * positive.amin(tuple(range(1, i_div.dim())), keepdim=True)",
    ),
    "max pooling": ("model.py", "F.avg_pool2d(x.flatten(0, 1), 2)", "F.max_pool2d(x.flatten(0, 1), 2)"),
    "spikes doubled": (
        "model.py",
        "return self.neuron(current.unflatten(0, (T, B)))",
        "return 2 * self.neuron(current.unflatten(0, (T, B)))",
    ),
    "current halved": (
        "model.py",
        "current = self.circuit(x.flatten(0, 1))",
        "current = 0.5 * self.circuit(x.flatten(0, 1))",
    ),
    "last step": ("model.py", "return logits.mean(0)  # (B", "return logits[-1]  # (B"),
    "names of another": (
        "lif.py",
        "self.tau, self.threshold, self.alpha = tau, threshold, alpha",
        "self.settings = tau, threshold, alpha",
    ),
    "learnable tau": (
        "lif.py",
        "self.tau, self.threshold, self.alpha = tau, threshold, alpha",
        "self.tau, self.threshold, self.alpha = nn.Parameter(torch.tensor(float(tau))), threshold, alpha",
    ),
    "learnable threshold": (
        "lif.py",
        "self.tau, self.threshold, self.alpha = tau, threshold, alpha",
        "self.tau, self.threshold, self.alpha = tau, nn.Parameter(torch.tensor(float(threshold))), alpha",
    ),
    "slow interneurons": (  # a circuit that takes time apart: the comparison's own inputs cannot pass it
        "inhibition.py",
        "s_i = i_ie  #",
        "s_i = i_ie.unflatten(0, (4, -1)).cumsum(0).flatten(0, 1)  #",
    ),
    "from t = 3 on": (
        "lif.py",
        "        potentials.append(u)\n",
        "        s = s if len(spikes) < 2 else 0 * s\n        potentials.append(u)\n",
    ),
    "table": ("ei_prop.py", '{"adaptive": smallest_positive}', '{"adaptive": lambda v: v.amax(1, keepdim=True) + 1}'),
    "sum pooling": ("model.py", "F.avg_pool2d(x.flatten(0, 1), 2)", "4 * F.avg_pool2d(x.flatten(0, 1), 2)"),
    "g_I of another name": (
        "inhibition.py",
        "self.grad_scaling = readout, eps, ste, grad_scaling",
        "self.scaled = readout, eps, ste, grad_scaling",
    ),
}
ALSO = {  # edits that need a second replacement to run
    "names of another": [
        ("lif.py", "lif(current, self.tau, self.threshold, self.alpha)", "lif(current, *self.settings)"),
        ("lif.py", 'f"tau={self.tau}, threshold={self.threshold}, alpha={self.alpha}"', '"mine"'),
    ],
    "g_I of another name": [("inhibition.py", "if self.grad_scaling else", "if self.scaled else")],
}
SAME = {"last step"}  # the fused network calls the plain forward: an edit there needs no word
NUMBERS_STAY = {
    "at least 1e-6",
    "strictly above",
    "learnable tau",
    "learnable threshold",
    *ALSO,
}  # no potential of this network is exactly 0.5
TIME = {"slow interneurons"}
BOTH = {"half the smallest"}  # STABILIZERS serves both forms

PROGRAM = """
import contextlib, importlib, io, json, os, sys, traceback
import torch
torch.set_num_threads(1)
sys.path.insert(0, "")


def gradients(model, x):
    logits = model(x)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(x))).backward()
    return torch.cat([logits.detach().flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def try_out(folder):
    os.chdir(folder)
    for name in list(sys.modules):
        if name.split(".")[0] in ("lif", "ei_prop", "inhibition", "ei_init", "baselines", "model", "support"):
            del sys.modules[name]
    importlib.invalidate_caches()
    from ei_init import initialize
    from model import build, circuits
    from support.fast import accelerate
    assert os.path.abspath(build.__code__.co_filename).startswith(folder)
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32, dtype=torch.double)
    x *= torch.rand_like(x) < 0.05
    model = build("vgg8", plan=[8, "P", 8, "P", 8, "P", 8, "P", 8, "P"], T=4, threshold=0.5).double()
    initialize(model, x)
    with torch.no_grad():
        for circuit in circuits(model):
            for name, p in circuit.named_parameters():
                p.mul_(0.5 + torch.rand_like(p))
            if not circuit.readout:
                circuit.w_ie[:, :, :, 0] = 0
                circuit.b_e.uniform_(-0.6, 0.2)
    plain = gradients(model, x)
    model.zero_grad()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = accelerate(model, x)
    fast = gradients(model, x)
    error = ((fast - plain).norm() / plain.norm()).item()
    return dict(found=sorted(found), out=out.getvalue(), error=error, size=plain.norm().item(),
                classes=sorted({type(m).__name__ for m in model.modules()}))


results = {}
here = os.getcwd()
for folder in sorted(os.listdir(here)):
    if os.path.isdir(os.path.join(here, folder)):
        try:
            results[folder] = try_out(os.path.join(here, folder))
        except Exception:
            results[folder] = dict(failed=traceback.format_exc())
        os.chdir(here)
print(json.dumps(results))
"""


def copy_of_the_repository(folder):
    folder.mkdir(parents=True)
    for name in ("lif", "ei_prop", "inhibition", "ei_init", "baselines", "model"):
        shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copytree(ROOT / "support", folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def replace(folder, file, old, new):
    text = (folder / file).read_text()
    assert text.count(old) == 1, (file, old)
    (folder / file).write_text(text.replace(old, new))


def in_subprocess(program, folder):
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", PYTHONPATH="")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """What `accelerate` says and what is trained after each of the edits: {name: dict}."""
    folder = tmp_path_factory.mktemp("edits")
    copy_of_the_repository(folder / "as it is")
    for name, edit in EDITS.items():
        place = copy_of_the_repository(folder / name.replace("/", ":"))
        for file, old, new in [edit, *ALSO.get(name, [])]:
            replace(place, file, old, new)
    return json.loads(in_subprocess(PROGRAM, folder))


def test_the_text_as_it_is_is_accelerated(edited):
    result = edited["as it is"]
    assert "failed" not in result, result["failed"]
    assert result["found"] == [] and not result["out"] and 0 < result["error"] < 1e-9
    assert "LIF" not in result["classes"] and "FastLIF" in result["classes"]


@pytest.mark.parametrize("name", [name for name in EDITS if name not in SAME | BOTH | TIME])
def test_an_edit_is_noticed_and_trained(name, edited):
    result, file = edited[name.replace("/", ":")], EDITS[name][0]
    assert "failed" not in result, result["failed"]
    assert result["found"] == [file]
    assert (
        result["out"]
        == f"{file} computes something else than support/fast.py: its plain form is used, which is slower\n"
    )
    assert result["error"] < 1e-9
    assert result["size"] != pytest.approx(edited["as it is"]["size"], rel=1e-12) or name in NUMBERS_STAY


@pytest.mark.parametrize("name", sorted(SAME | BOTH))
def test_an_edit_of_what_both_forms_share_is_trained(name, edited):
    result = edited[name]
    assert "failed" not in result, result["failed"]
    assert result["error"] < 1e-9 and result["found"] == [] and "FastLIF" in result["classes"], result
    assert result["size"] != pytest.approx(edited["as it is"]["size"], rel=1e-9)


# ---- a circuit with another cell type --------------------------------------------------------------------------------

LOOP = "        with torch.no_grad():\n            for w in self.parameters():"
SOM = [
    (
        "inhibition.py",
        LOOP,
        "        self.w_se = nn.Parameter(torch.empty(max(1, n_e // 8), *fan_in_shape))\n"
        "        self.w_es = nn.Parameter(torch.empty(self.n_e, max(1, n_e // 8)))\n" + LOOP,
    ),
    ("inhibition.py", "self.lateral(w_ei, s_i)  #", "self.lateral(self.w_es, self.synapses(x, self.w_se))  #"),
]

SOM_PROGRAM = """
import torch, json
torch.set_num_threads(1)
from ei_init import initialize
from inhibition import EICircuit, clamp_dale
from model import build, circuits, layers
from support.fast import accelerate
from support.measure import costs, population

plan = [16, "P", 16, "P"]
torch.manual_seed(0)
x = torch.rand(4, 3, 32, 32)
model = build("vgg8", plan=plan, T=2)
initialize(model, x)
big = EICircuit(200, 800)
from ei_init import ei_init
ei_init(big, torch.rand(50, 200))
found = dict(w_se=[big.w_se.mean().item(), big.w_se.std().item(), big.w_ee.mean().item()],
             w_es=[big.w_es.min().item(), big.w_es.max().item()], shape=[list(big.w_se.shape), list(big.w_es.shape)])
plain = model(x)
found["accelerated"] = sorted(accelerate(model, x))
found["same"] = torch.equal(plain, model(x)) or (plain - model(x)).abs().max().item() < 1e-4
found["classes"] = sorted({type(c).__name__ for c in circuits(model)})
torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
found["grad"] = all((c.w_se.grad.any() and c.w_es.grad.any()).item() for c in circuits(model)[:-1])
with torch.no_grad():
    for p in model.parameters():
        p.sub_(1)
clamp_dale(model)
found["dale"] = min(p.min().item() for name, p in model.named_parameters() if not name.endswith("b_e"))
found["b_e"] = min(c.b_e.min().item() for c in circuits(model)[:-1])
found["population"] = population(build("vgg8", plan=plan, T=2))
found["inhibitory"] = [row["neurons_i"] for row in costs(build("vgg8", plan=plan, T=2), x)]
print("JSON" + json.dumps(found))
"""


def test_a_reader_adds_a_cell_type(tmp_path):
    """SOM interneurons subtract, W_ES (W_SE x), and PV interneurons only divide: three lines in `inhibition.py`."""
    folder = copy_of_the_repository(tmp_path / "som")
    for edit in SOM:
        replace(folder, *edit)
    said, found = in_subprocess(SOM_PROGRAM, folder).split("JSON")
    found = json.loads(found)
    mean, std, mean_ee = found["w_se"]
    assert mean == pytest.approx(mean_ee, rel=0.03) and std == pytest.approx(mean, rel=0.05)  # Exponential, as W_EE
    assert found["shape"] == [[100, 200], [800, 100]] and found["w_es"] == pytest.approx([1 / 100, 1 / 100])
    assert found["accelerated"] == ["inhibition.py"] and said.startswith("inhibition.py computes something else")
    assert said.count("\n") == 1 and found["same"] and found["grad"]
    assert found["classes"] == ["EICircuit", "EICircuit2d"]
    assert found["dale"] == 0 and found["b_e"] == -1
    sizes = [(16, 32 * 32), (16, 16 * 16), (10, 1)]
    pv_and_som = [n // 4 + max(1, n // 8) for n, _ in sizes]
    assert found["inhibitory"] == [n * p for n, (_, p) in zip(pv_and_som, sizes, strict=True)]
    assert found["population"] == [sum(n * p for n, p in sizes), sum(found["inhibitory"])]


def test_a_circuit_that_takes_time_apart_is_trained(edited):
    """Where the comparison's own inputs cannot pass the edited circuit, the plain form stays."""
    result = edited["slow interneurons"]
    assert "failed" not in result, result["failed"]
    assert result["found"] == ["inhibition.py", "model.py"] and result["out"].count("\n") == 2
    assert result["error"] < 1e-9 and {"EICircuit2d", "Layer"} <= set(result["classes"])
