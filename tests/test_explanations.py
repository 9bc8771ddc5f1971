"""What the docstrings of `ei_prop.py` and `inhibition.py` claim, as numbers.

Measured in the first step of VGG-8 on 32 digits, with E-I Init. Each layer gets its input and its incoming gradient
dL/dI_int of that step, and is computed alone in float64 (every eighth sample of the batch). The first layer receives
the same image at each time step; it is computed once, with the sum of its gradients over time.
"""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ei_init import initialize
from ei_prop import divide
from inhibition import EICircuit
from model import build, circuits
from support import data
from support.fast import FORMS, accelerate
from support.measure import hooked

PLAIN = {fast: plain for plain, fast in FORMS.items()}


class FirstStep:
    """One layer in the first step: its circuit, input x and incoming gradient g."""

    def __init__(self, circuit, x, g):
        self.circuit, self.x, self.g = circuit, x[::8].double(), g[::8].double()
        self.all_x = x

    def gradients(self, g=None, **settings):
        """dL/dx, and of each parameter of the layer, with another g or other settings of the circuit: a dict."""
        usual = {name: getattr(self.circuit, name) for name in settings}
        vars(self.circuit).update(settings)
        leaf = self.x.clone().requires_grad_()
        names = ["x", *(name for name, _ in self.circuit.named_parameters())]
        found = torch.autograd.grad(self.circuit(leaf), [leaf, *self.circuit.parameters()], self.g if g is None else g)
        vars(self.circuit).update(usual)
        return dict(zip(names, found, strict=True))

    @torch.no_grad()
    def moved(self, name, step):
        """How far I_int moves when `step` times a small rate is taken from a weight."""
        p, before, rate = getattr(self.circuit, name), self.circuit(self.x), 1e-6
        p.sub_(rate * step)
        after = self.circuit(self.x)
        p.add_(rate * step)
        return ((after - before).norm() / rate).item()


def first_step(seed, first):
    """The layers in the first step of the network drawn with `seed`, on 32 digits from number `first` on."""
    torch.manual_seed(seed)
    dataset = data.load("digits")
    x, y = data.to_input(dataset.train_x[first : first + 32]), dataset.train_y[first : first + 32]
    model, seen = build("vgg8", in_channels=1), []
    initialize(model, x)
    accelerate(model)  # only to save time

    def record(circuit, args, i_int):
        i_int.retain_grad()
        seen.append((circuit, args[0].detach(), i_int))

    with hooked(model, [c.register_forward_hook(record) for c in circuits(model)[:-1]], training=True):
        F.cross_entropy(model(x), y).backward()
    for circuit in circuits(model):
        circuit.__class__ = PLAIN.get(type(circuit), type(circuit))
    model.double()
    return [FirstStep(circuit, x, i_int.grad) for circuit, x, i_int in seen]


@pytest.fixture(scope="module")
def steps():
    return first_step(0, 0)


@pytest.fixture(scope="module")
def two_draws(steps):
    return steps, first_step(2, 300)


def change(a, b):
    """Norm of the difference beside the norm of b."""
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_zeros_of_i_div_are_silent_receptive_fields_in_exact_balance(steps):
    shares = []
    for step in steps:
        found = step.circuit.currents(step.x)
        zero = found["i_div"] == 0
        assert torch.equal(zero, ~step.circuit.is_reached(step.x).expand_as(zero))
        assert not (found["i_ee"] - found["i_sub"])[zero].any()
        shares.append((~step.circuit.is_reached(step.all_x)).float().mean().item())
    assert shares[0] == pytest.approx(0.223, abs=0.03)  # 22 % in the first layer, 7 % in the second
    assert shares[1] == pytest.approx(0.067, abs=0.03)
    assert shares[2:] == [0, 0, 0]


def test_a_fixed_eps_explodes_in_the_gradient_to_x_and_in_no_weight(steps):
    for step in steps[:2]:
        adaptive = step.gradients()
        norms = []
        for eps in (1e-5, 1e-6, 1e-7, 1e-8):
            fixed = step.gradients(eps=eps)
            norms.append((fixed["x"].norm() / adaptive["x"].norm()).item())
            for name in adaptive.keys() - {"x"}:
                assert change(fixed[name], adaptive[name]) < 0.02, name
            # what explodes is the part that comes through silent receptive fields: without their g nothing does
            g = step.g * step.circuit.is_reached(step.x)
            assert change(step.gradients(g, eps=eps)["x"], step.gradients(g)["x"]) < 0.1
        assert norms[0] > 10 and norms[1] == pytest.approx(10 * norms[0], rel=0.02)
        assert norms[3] == pytest.approx(100 * norms[1], rel=0.02)
        assert norms[3] > 1e4
    for step in steps[2:]:  # nothing is silent there yet
        assert change(step.gradients(eps=1e-8)["x"], step.gradients()["x"]) < 1e-4


def test_at_silent_receptive_fields_ste_changes_no_gradient(steps):
    for step in steps[:3]:
        with_ste, without = step.gradients(), step.gradients(ste=False)
        for name, grad in with_ste.items():
            assert change(without[name], grad) < 1e-12, name


def test_ste_matters_where_i_div_is_0_but_i_ee_is_not_i_sub(steps):
    step = steps[1]
    w_ie = step.circuit.w_ie.detach().clone()
    with torch.no_grad():
        step.circuit.w_ie[:, :, :, 1:] = 0  # as if Dale's law had set them to 0
        found = step.circuit.currents(step.x)
        zero = found["i_div"] == 0
        unbalanced = (zero & (found["i_ee"] != found["i_sub"])).sum() / zero.sum()
    assert unbalanced > 0.1, unbalanced
    with_ste, without = step.gradients(), step.gradients(ste=False)
    assert change(without["w_ie"], with_ste["w_ie"]) > 0.01
    with torch.no_grad():
        step.circuit.w_ie.copy_(w_ie)


def test_a_relu_on_the_interneurons_unbalances_the_gradient_to_x(two_draws):
    """In layer 2 by 0.2 to 1.9 times its norm, in layer 1 by 1.6 to 4.5 times; then nothing is silent yet."""

    def with_relu(step, subtractive, divisive):
        circuit, leaf = step.circuit, step.x.clone().requires_grad_()
        w_ie, w_ei, g_i = circuit.inhibitory_parameters()
        g_i, g_e, b_e = (p.view(-1, 1, 1) for p in (g_i, circuit.g_e, circuit.b_e))
        i_ee, i_ie = circuit.synapses(leaf, circuit.w_ee), circuit.synapses(leaf, w_ie)
        i_sub = circuit.lateral(w_ei, i_ie.relu() if subtractive else i_ie)
        i_div = circuit.lateral(w_ei, g_i * (i_ie.relu() if divisive else i_ie))
        i_int = g_e * divide(i_ee - i_sub, i_div) + b_e
        return i_int, torch.autograd.grad(i_int, leaf, step.g)[0]

    changes = []
    for step in [*two_draws[0][:3], *two_draws[1][:2]]:
        plain, grad = with_relu(step, False, False)
        assert torch.equal(plain, step.circuit(step.x)) and change(step.gradients()["x"], grad) < 1e-12
        relu, cut = with_relu(step, True, True)
        assert torch.equal(relu, plain)  # forward it changes nothing
        assert change(with_relu(step, False, True)[1], grad) < 1e-12  # the divisive path has nothing to lose
        changes.append(change(cut, grad))
    assert changes[2] == 0
    assert all(1.2 < c < 5.5 for c in changes[0::3]), changes  # wider: each version of PyTorch draws other weights
    assert all(0.2 < c < 2.5 for c in changes[1::3]), changes


def test_without_one_over_d_w_ei_learns_faster_and_with_it_hardly_at_all(two_draws):
    """I_int moves in one step of plain SGD on W_EI, beside one on W_EE: 1.3 to 17 times as much, or, with 1/d, less."""
    moved, scaled = [], []
    for step in [*two_draws[0], two_draws[1][3]]:
        grads, d = step.gradients(grad_scaling=False), step.circuit.fan_in
        by_w_ee = step.moved("w_ee", grads["w_ee"])
        moved.append(step.moved("w_ei", grads["w_ei"]) / by_w_ee)
        scaled.append(step.moved("w_ei", grads["w_ei"] / d) / by_w_ee)
    torch.testing.assert_close(step.gradients()["w_ei"], grads["w_ei"] / d)
    assert 1 < min(moved) < 3.5 and 7 < max(moved) < 25, moved
    assert 0.3 < scaled[0] < 1 and max(scaled[1:]) < 1 / 50, scaled


def test_the_figures_show_what_the_docstrings_say():
    def column(file, name, **where):
        with open(Path(__file__).parents[1] / "figures" / file, encoding="utf-8") as lines:
            return [float(row[name]) for row in csv.DictReader(lines) if where.items() <= row.items()]

    stds = column("init.csv", "std", init="E-I Init")  # VGG-8 and VGG-19
    assert len(stds) == 5 + 16 and (round(min(stds), 2), round(max(stds), 2)) == (0.69, 1.40)
    unscaled = column("ablation.csv", "test_accuracy", run="no gradient scaling")
    assert len(unscaled) == 6 and max(unscaled) < 0.11  # at chance
    assert max(column("ablation.csv", "test_accuracy", run="all of it")) > 0.9


def test_a_negative_input_can_make_i_div_negative_or_close_to_0():
    circuit = EICircuit(20, 8)
    i_div = circuit.currents(torch.randn(200, 20))["i_div"]
    assert (i_div < 0).float().mean() > 0.2 and i_div.abs().min() < 0.05 * i_div.abs().mean()
    assert (circuit.currents(torch.rand(200, 20))["i_div"] > 0).all()
