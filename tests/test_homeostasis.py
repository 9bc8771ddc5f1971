"""Homeostasis: slow averages hold the currents, the gradient is a batch norm's, and rows of weights keep their sum."""

import pytest
import torch
import torch.nn.functional as F

from ei_init import initialize
from homeostasis import HomeostaticCircuit2d
from inhibition import EICircuit2d
from model import build, circuits
from train import train_step


def test_it_holds_the_current_by_slow_averages_and_learns_as_batch_norm(monkeypatch):
    monkeypatch.setattr(EICircuit2d, "forward", lambda self, i_int: i_int)
    circuit, gain = HomeostaticCircuit2d(3, 5, 3), torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    circuit.g_e.data, circuit.b_e.data = gain, gain - 1
    first, i_int = torch.randn(4, 5, 6, 6), 3 * torch.randn(4, 5, 6, 6).add(1)
    first[:, 4] = 0  # silent until now, so its first current counts whole
    circuit(first), circuit(i_int.requires_grad_())
    for name, of in dict(mean=torch.mean, sd=lambda x, d: torch.std(x, d, correction=0)).items():
        a, b = of(first, (0, 2, 3)), of(i_int, (0, 2, 3))
        torch.testing.assert_close(getattr(circuit, name), torch.cat([0.9 * a + 0.1 * b, b])[[0, 1, 2, 3, 9]])
    grad, found = torch.randn(4, 5, 6, 6), circuit(i_int)
    torch.testing.assert_close(found, circuit.eval()(i_int))  # the same in training and in testing
    torch.testing.assert_close(found[:1], circuit(i_int[:1]))  # for each sample by itself
    norm = F.batch_norm(i_int, None, None, gain, gain - 1, training=True)
    torch.testing.assert_close(*(torch.autograd.grad(out, i_int, grad)[0] for out in (found, norm)))


@pytest.mark.parametrize("kind", ["homeostasis", "ei"])
def test_a_step_conserves_the_strength_of_synapses(kind):
    model, x, y = build("vgg8", kind=kind, width=0.1, T=2), torch.rand(8, 3, 32, 32), torch.arange(8)
    initialize(model, x)
    *hidden, readout = circuits(model)
    before = [w.sum((1, 2, 3)) for c in hidden for w in (c.w_ee.detach(), c.w_ie.detach())]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    for _ in range(3):
        train_step(model, optimizer, x, y)
    after = [w.sum((1, 2, 3)) for c in hidden for w in (c.w_ee.detach(), c.w_ie.detach())]
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(after, before, strict=True)) == (kind == "homeostasis")
    assert all((p >= 0).all() for c in (*hidden, readout) for n, p in c.named_parameters() if n != "b_e")
