"""Homeostasis: slow averages hold the quotient, the gradient is a batch norm's, and rows of weights keep their sum."""

import torch
import torch.nn.functional as F

from ei_init import initialize
from homeostasis import HomeostaticCircuit, HomeostaticCircuit2d, conserve_synapses, strength
from model import build, circuits
from train import train_step


def test_the_division_has_a_pool_and_no_contrast():
    circuit, x = HomeostaticCircuit2d(3, 5, 3).double(), torch.rand(2, 3, 6, 6).double()
    x[1, :, :4] = 0  # two of four rows of its positions are silent
    i_ee, _, i_sub, i_div, i_int = circuit.currents(x).values()
    q = 2 * (i_ee - i_sub) / (i_div + i_div.mean((1, 2, 3), keepdim=True))
    torch.testing.assert_close([circuit.quotient(contrast * x) for contrast in (1, 3, 0)], [q, q, 0 * q])
    torch.testing.assert_close(circuit.currents(3 * x)["i_int"], i_int)  # nor has the paper's


def test_it_holds_the_quotient_by_slow_averages_and_learns_as_batch_norm(monkeypatch):
    monkeypatch.setattr(HomeostaticCircuit2d, "quotient", lambda self, q: q)
    circuit, q = HomeostaticCircuit2d(3, 5, 3), 3 * torch.randn(4, 5, 6, 6).add(1)
    circuit.g_e.data, circuit.b_e.data = gain, bias = torch.tensor([1.0, 2, 0.5, 3, 1]), torch.randn(5)
    first, gain, bias = circuit(q), gain.view(-1, 1, 1), bias.view(-1, 1, 1)
    mean, var = 0.1 * q.mean((0, 2, 3)), 0.9 + 0.1 * q.var((0, 2, 3), correction=0)
    torch.testing.assert_close((circuit.mean, circuit.var), (mean, var))
    held = gain * (q - mean.view(-1, 1, 1)) / var.view(-1, 1, 1).sqrt() + bias
    torch.testing.assert_close((first, circuit.eval()(q)), (held, held), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(circuit(q[:1]), held[:1], rtol=1e-4, atol=1e-4)  # each sample by itself
    inputs, grad = (q.requires_grad_(), circuit.g_e, circuit.b_e), torch.randn(4, 5, 6, 6)
    norm = F.batch_norm(q, None, None, circuit.g_e, circuit.b_e, training=True)
    for out in zip(*(torch.autograd.grad(out, inputs, grad) for out in (circuit.train()(q), norm)), strict=True):
        torch.testing.assert_close(*out)


def test_a_step_conserves_the_strength_of_synapses():
    model, x, y = build("vgg8", kind="homeostasis", width=0.1, T=2), torch.rand(8, 3, 32, 32), torch.arange(8)
    initialize(model, x)
    weights = [w.detach() for c in circuits(model)[:-1] for w in (c.w_ee, c.w_ie)]
    before, optimizer = [*map(strength, weights)], torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    for _ in range(3):
        train_step(model, optimizer, x, y)
    torch.testing.assert_close([*map(strength, weights)], before, rtol=1e-4, atol=0)
    assert all((p >= 0).all() for name, p in model.named_parameters() if "b_e" not in name)


def test_what_all_synapses_gain_alike_is_taken_away():
    circuit, gain = HomeostaticCircuit(9, 5), torch.rand(5, 9)
    w = circuit.w_ee.data.add_(1)
    w[0] = gain[0] = 0  # a neuron without synapses
    expected = w + gain - gain.mean(1, keepdim=True)
    with conserve_synapses(circuit):
        w += gain
    torch.testing.assert_close(w, expected)
