import re

import pytest
import torch
from conftest import relative_error
from torch.autograd import gradcheck, gradgradcheck

from lif import LIF, Spike, lif, membrane_potential, simulate


def literal(current, tau=2.0, threshold=1.0, alpha=4.0):
    """The equations on their own, without any code of `lif.py`: s has the value of the step and the slope of sigma."""
    u, s, spikes = torch.zeros_like(current[0]), torch.zeros_like(current[0]), []
    for i in current:
        u = (1 - 1 / tau) * (u - threshold * s) + i
        smooth = 1 / (1 + torch.exp(-alpha * (u - threshold)))
        s = (u >= threshold).to(u.dtype)
        spikes.append(s + (smooth - smooth.detach()))
    return torch.stack(spikes)


@pytest.mark.parametrize("alpha", [1.5, 4.0])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_equals_the_plain_loop(T, tau, threshold, alpha):
    x = torch.randn(T, 3, 4, 5, 5, dtype=torch.double, requires_grad=True)
    literally, grad = literal(x, tau, threshold, alpha), torch.randn_like(x)
    wanted = torch.autograd.grad(literally, x, grad)[0]
    assert 0 < literally.mean() < 1
    for spikes in (lif(x, tau, threshold, alpha), LIF(tau, threshold, alpha)(x)):
        assert torch.equal(spikes, literally)
        assert relative_error(torch.autograd.grad(spikes, x, grad)[0], wanted) < 1e-12


def test_the_defaults_are_those_of_the_paper():
    x = torch.linspace(-2, 3, 64, dtype=torch.double).view(8, 8)
    paper = (2.0, 1.0, 4.0)  # tau, theta, alpha

    def gradient_of(f, *args):
        leaf = x.clone().requires_grad_()
        f(leaf, *args).square().sum().backward()
        return leaf.grad

    for f in (lif, lambda x, *a: torch.stack(simulate(x, *a)[1]), lambda x, *a: LIF(*a)(x)):
        assert torch.equal(gradient_of(f), gradient_of(lif, *paper))
    assert torch.equal(membrane_potential(x), membrane_potential(x, 2.0, 1.0))


def test_reset_is_soft_and_the_threshold_fires():
    # u: 1 (fires, equal to theta), 0.5 * 0 + 2.5 (fires, 1.5 left over), 0.5 * 1.5 + 0.25 (fires again), 0
    current = torch.tensor([1.0, 2.5, 0.25, 0.0])
    assert lif(current).tolist() == [1, 1, 1, 0]
    assert membrane_potential(current).tolist() == [1, 2.5, 1, 0]


def test_keeps_type_and_shape():
    for shape in ((3,), (3, 2), (1, 2, 4, 5)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            current = torch.randn(shape).to(dtype)
            for out in (lif(current), membrane_potential(current)):
                assert out.dtype == dtype and out.shape == shape


def test_second_derivatives_are_those_of_the_surrogate():
    x = (2 * torch.rand(3, 5, dtype=torch.double)).requires_grad_()
    w = torch.randn(3, 5, dtype=torch.double)

    def first(f, x):
        return torch.autograd.grad((f(x) * w).sum(), x, create_graph=True)[0]

    second = [torch.autograd.grad(first(f, x).square().sum(), x)[0] for f in (lif, literal)]
    assert second[1].abs().min() > 0 and relative_error(*second) < 1e-10

    def slopes(u):  # the derivative as a function of its own: what autograd says of it must be its finite differences
        return torch.autograd.grad(Spike.apply(u, 1.0, 4.0), u, torch.ones_like(u), create_graph=True)[0]

    assert gradcheck(slopes, x[0].detach().requires_grad_()) and gradgradcheck(slopes, x[0].detach().requires_grad_())


BAD = [(0.5, 1.0, 4.0), (2.0, 0.0, 4.0), (2.0, -1.0, 4.0), (float("nan"), 1.0, 4.0), (2.0, float("nan"), 4.0)]
BAD += [(2.0, 1.0, 0.0), (2.0, 1.0, -4.0), (2.0, 1.0, float("nan"))]


@pytest.mark.parametrize("tau, threshold, alpha", BAD)
def test_refuses_what_is_no_neuron(tau, threshold, alpha):
    message = f"must be positive, not tau={tau}, threshold={threshold}, alpha={alpha}$"
    for make in (lambda *a: lif(torch.ones(2, 3), *a), LIF):
        with pytest.raises(ValueError, match=f"^lif: tau must be at least 1, threshold and alpha {message}"):
            make(tau, threshold, alpha)


@pytest.mark.parametrize("current", [torch.tensor(1.0), torch.ones(0, 3)])
@pytest.mark.parametrize("f", [lif, membrane_potential, LIF()])
def test_refuses_a_current_without_time(f, current):
    message = re.escape(f"lif: the current needs a first axis of at least one time step, not {tuple(current.shape)}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        f(current)


def test_the_membrane_potential_is_that_of_the_spikes():
    current = torch.randn(6, 50) + 0.5
    u, layer = membrane_potential(current, tau=3.0, threshold=0.8), LIF(3.0, 0.8, 2.0)
    spikes = layer(current)
    assert torch.equal(layer.membrane_potential(current), u)
    assert torch.equal(spikes, (u >= 0.8).float()) and 0.1 < spikes.mean() < 0.9
    torch.testing.assert_close(u[1:], (1 - 1 / 3) * (u[:-1] - 0.8 * spikes[:-1]) + current[1:])
    assert torch.equal(u[0], current[0])
    for f in (membrane_potential, layer.membrane_potential):
        assert not f(current.requires_grad_()).requires_grad


def test_a_layer_keeps_no_state():
    layer, x = LIF(), torch.rand(3, 40) + 0.4
    assert torch.equal(layer(x), layer(x)) and not list(layer.parameters()) and not layer.state_dict()
    assert repr(LIF(3.0, 0.5, 2.0)) == "LIF(tau=3.0, threshold=0.5, alpha=2.0)"


def test_the_demonstration(demonstration):
    rows = [line.split() for line in demonstration("lif.py").splitlines() if line.strip()[:1].isdigit()]
    t, current, u, spikes, slope, grad = ([float(v) for v in column] for column in zip(*rows, strict=True))
    assert t == [1, 2, 3, 4, 5, 6, 7, 8] and current == [0.5, 0.5, 0.5, 0.5, 2.5, 0.5, 0.25, 0]
    assert u == pytest.approx([0.5, 0.75, 0.875, 0.9375, 2.96875, 1.484375, 0.4921875, 0.24609375], abs=1e-4)
    assert spikes == [0, 0, 0, 0, 1, 1, 0, 0]
    leaf = torch.tensor(current, requires_grad=True)
    literal(leaf).sum().backward()
    assert grad == pytest.approx(leaf.grad.tolist(), abs=1e-4)
    for k in range(7):
        assert grad[k] == pytest.approx(slope[k] + 0.5 * grad[k + 1], abs=2e-4)
