import pytest
import torch
from conftest import relative_error

from bench import LiteralLIF
from lif import LIF, lif, membrane_potential


def literal(current, tau, threshold):
    """The equations as a loop over time that autograd differentiates."""
    return LiteralLIF(tau, threshold)(current)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("T", [1, 2, 4, 9])
@pytest.mark.parametrize("static", [False, True])
def test_equals_the_plain_loop(T, tau, threshold, static):
    x = torch.randn(1 if static else T, 3, 4, 5, 5).contiguous().requires_grad_()
    y = x.detach().clone().requires_grad_()
    grad = torch.randn(T, 3, 4, 5, 5)
    a, b = lif(x.expand(T, -1, -1, -1, -1), tau, threshold), literal(y.expand(T, -1, -1, -1, -1), tau, threshold)
    a.backward(grad)
    b.backward(grad)
    assert 0 < b.mean() < 1
    assert torch.equal(a, b)
    assert relative_error(x.grad, y.grad) < 1e-5


def test_reset_is_soft_and_the_threshold_fires():
    # u: 1 (fires, equal to theta), 0.5 * 0 + 2.5 (fires, 1.5 left over), 0.5 * 1.5 + 0.25 (fires again), 0
    assert lif(torch.tensor([1.0, 2.5, 0.25, 0.0])).tolist() == [1, 1, 1, 0]


def test_keeps_the_memory_layout():
    x = torch.randn(3, 2, 4, 5, 5).transpose(2, 4)
    assert lif(x)[0].stride() == x[0].stride() != x.contiguous()[0].stride()
    current = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    spikes = lif(current.expand(3, -1, -1, -1, -1))
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_gradient_in_double_precision_of_the_layer():
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    LIF(tau=3.0, threshold=0.7)(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    literal(y, 3.0, 0.7).sum().backward()
    assert relative_error(x.grad, y.grad) < 1e-12


@pytest.mark.parametrize("tau, threshold", [(0.5, 1.0), (2.0, 0.0), (2.0, -1.0), (float("nan"), 1.0)])
def test_refuses_what_is_no_neuron(tau, threshold):
    with pytest.raises(ValueError, match="tau"):
        lif(torch.ones(2, 3), tau, threshold)


@pytest.mark.parametrize("current", [torch.tensor(1.0), torch.ones(0, 3)])
def test_refuses_a_current_without_time(current):
    with pytest.raises(ValueError, match="time step"):
        lif(current)


def test_the_membrane_potential_is_that_of_the_spikes():
    current = torch.randn(6, 50) + 0.5
    u, spikes = membrane_potential(current, tau=3.0, threshold=0.8), lif(current, tau=3.0, threshold=0.8)
    assert torch.equal(spikes, (u >= 0.8).float()) and 0.1 < spikes.mean() < 0.9
    torch.testing.assert_close(u[1:], (1 - 1 / 3) * (u[:-1] - 0.8 * spikes[:-1]) + current[1:])
