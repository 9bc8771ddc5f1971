"""Homeostasis: slow averages hold the quotient, the gradient is a batch norm's, and rows of weights keep their sum."""

import pytest
import torch
import torch.nn.functional as F

from ei_init import initialize
from homeostasis import HomeostaticCircuit2d, strength
from model import build, circuits
from train import train_step


def test_the_division_has_a_pool_and_no_contrast():
    circuit, x = HomeostaticCircuit2d(3, 5, 3).double(), torch.rand(2, 3, 6, 6).double()
    x[1, :, :4] = 0  # three of four rows of its positions are silent
    i_ee, _, i_sub, i_div, _ = circuit.currents(x).values()
    q = (i_ee - i_sub) / (i_div + i_div.mean((1, 2, 3), keepdim=True))
    torch.testing.assert_close((circuit.quotient(x), circuit.quotient(3 * x)), (q, q))
    assert not circuit.quotient(0 * x).any()


def test_it_holds_the_quotient_by_slow_averages_and_learns_as_batch_norm(monkeypatch):
    monkeypatch.setattr(HomeostaticCircuit2d, "quotient", lambda self, q: q)
    circuit, gain = HomeostaticCircuit2d(3, 5, 3), torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    circuit.g_e.data, circuit.b_e.data = gain, gain - 1
    first, q = torch.randn(4, 5, 6, 6), 3 * torch.randn(4, 5, 6, 6).add(1)
    first[:, 4] = 0  # silent until now, so its first current counts whole
    circuit(first), circuit(q.requires_grad_()), circuit(torch.full_like(q, torch.inf))  # which is left out
    for name, of in dict(mean=torch.mean, sd=lambda x, d: torch.std(x, d, correction=0)).items():
        a, b = of(first, (0, 2, 3)), of(q, (0, 2, 3))
        torch.testing.assert_close(getattr(circuit, name), torch.cat([0.9 * a + 0.1 * b, b])[[0, 1, 2, 3, 9]])
    grad, found = torch.randn(4, 5, 6, 6), circuit(q)
    torch.testing.assert_close(found, circuit.eval()(q))  # the same in training and in testing
    torch.testing.assert_close(found[:1], circuit(q[:1]))  # for each sample by itself
    norm = F.batch_norm(q, None, None, gain, gain - 1, training=True)
    torch.testing.assert_close(*(torch.autograd.grad(out, q, grad)[0] for out in (found, norm)))


@pytest.mark.parametrize("kind", ["homeostasis", "ei"])
def test_a_step_conserves_the_strength_of_synapses(kind):
    model, x, y = build("vgg8", kind=kind, width=0.1, T=2), torch.rand(8, 3, 32, 32), torch.arange(8)
    initialize(model, x)
    weights = [w.detach() for c in circuits(model)[:-1] for w in (c.w_ee, c.w_ie)]
    before, optimizer = [*map(strength, weights)], torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    for _ in range(3):
        train_step(model, optimizer, x, y)
    kept = [torch.allclose(strength(w), total, rtol=1e-4) for w, total in zip(weights, before, strict=True)]
    assert all(kept) == (kind == "homeostasis")
    assert all((p >= 0).all() for name, p in model.named_parameters() if "b_e" not in name)
