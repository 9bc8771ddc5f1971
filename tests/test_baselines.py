import math

import pytest
import torch

from baselines import DANNCircuit, DANNCircuit2d, bn_conv, bn_dense, plain_conv, plain_dense
from inhibition import EICircuit, EICircuit2d, clamp_dale
from model import build


def rectified(*shape):
    """What a layer of rectifiers sends on when its pre-activation is normalized."""
    return torch.randn(*shape).relu()


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda **o: DANNCircuit(200, 400, **o), lambda **o: DANNCircuit2d(8, 400, 5, **o)])
def test_dann_draws_its_constants(make):
    circuit = make(ei_ratio=2)
    d, n_i = 200, 200
    assert isinstance(circuit, EICircuit) and circuit.n_i == n_i and circuit.eps == 1e-8 and circuit.fan_in == d
    for w in (circuit.w_ee, circuit.w_ie):
        mean = math.sqrt(2 * math.pi / (d * (2 * math.pi - 1)))
        assert w.min() >= 0 and w.mean().item() == pytest.approx(mean, rel=0.02)
        assert w.std().item() == pytest.approx(mean, rel=0.03)
    assert circuit.alpha.exp().tolist() == pytest.approx([math.sqrt((2 * math.pi - 1) / d)] * n_i)
    assert (circuit.w_ei == 1 / n_i).all() and (circuit.g_e == 1).all() and not circuit.b_e.any()
    assert set(dict(circuit.named_parameters())) == {"w_ee", "w_ie", "w_ei", "alpha", "g_e", "b_e"}
    assert set(dict(make(readout=True).named_parameters())) == {"w_ee", "w_ie", "w_ei"}
    assert not circuit.needs_batch and EICircuit2d.needs_batch and circuit.free == ("b_e", "alpha")
    with pytest.raises(ValueError, match="at least 1"):
        make(ei_ratio=0)


@torch.no_grad()
def test_dense_rivals():
    x = 5 + 3 * torch.randn(400, 200)
    synapses = bn_dense(200, 50)
    out = synapses(x)
    assert out.mean(0).abs().max() < 1e-4 and (out.std(0) - 1).abs().max() < 0.01
    assert [tuple(p.shape) for p in synapses.parameters()] == [(50, 200), (50,), (50,)]  # no bias beside the norm's
    weight = next(p for p in plain_dense(200, 5000).parameters() if p.dim() == 2)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.01)


def test_dann_computes_cornford_s_equation_with_corrected_gradients():
    circuit, x = DANNCircuit2d(6, 8, 3, padding=1), rectified(5, 6, 4, 4)
    circuit(x).square().sum().backward()
    w_ee, w_ie, w_ei, alpha, g_e, b_e = (
        p.detach().clone().requires_grad_()
        for p in (circuit.w_ee, circuit.w_ie, circuit.w_ei, circuit.alpha, circuit.g_e, circuit.b_e)
    )
    conv = torch.nn.functional.conv2d
    s_i = conv(x, w_ie, padding=1)
    subtracted = conv(x, w_ee, padding=1) - conv(s_i, w_ei[:, :, None, None])
    divisor = conv(alpha.exp().view(-1, 1, 1) * s_i, w_ei[:, :, None, None]) + 1e-8
    z = g_e.view(-1, 1, 1) * subtracted / divisor + b_e.view(-1, 1, 1)
    torch.testing.assert_close(circuit(x), z, rtol=1e-4, atol=1e-5)
    z.square().sum().backward()
    readout = DANNCircuit(6, 8, readout=True)
    x = rectified(5, 6)
    readout(x).square().sum().backward()
    w_r = [p.detach().clone().requires_grad_() for p in (readout.w_ee, readout.w_ie, readout.w_ei)]
    (x @ w_r[0].t() - x @ w_r[1].t() @ w_r[2].t()).square().sum().backward()
    for p, w, factor in zip(readout.parameters(), w_r, (1, 1 / math.sqrt(8), 1 / 6), strict=True):
        torch.testing.assert_close(p.grad, factor * w.grad, rtol=1e-4, atol=1e-5)
    d, n_e = 6 * 9, 8
    factors = dict(w_ee=1, w_ie=1 / math.sqrt(n_e), w_ei=1 / d, alpha=1 / (d * math.sqrt(n_e)), g_e=1, b_e=1)
    for (name, factor), plain in zip(factors.items(), (w_ee, w_ie, w_ei, alpha, g_e, b_e), strict=True):
        torch.testing.assert_close(getattr(circuit, name).grad, factor * plain.grad, rtol=1e-3, atol=1e-4)


def test_dann_keeps_dale_s_law_and_leaves_alpha_free():
    circuit = DANNCircuit2d(3, 8, 3)
    with torch.no_grad():
        for p in circuit.parameters():
            p.fill_(-1)
    clamp_dale(circuit)
    assert all((p == (-1 if name in ("alpha", "b_e") else 0)).all() for name, p in circuit.named_parameters())


def test_in_dann_nothing_depends_on_time():
    model, once = (build("vgg8", in_channels=1, T=T, kind="dann", width=0.25) for T in (3, 1))
    once.load_state_dict(model.state_dict())
    x = torch.rand(4, 1, 32, 32)
    torch.testing.assert_close(once(x), model(x), rtol=1e-4, atol=1e-4)


def test_bn_normalizes_over_time_samples_and_positions():
    z = bn_conv(3, 8, 3, padding=1)(torch.rand(16, 3, 8, 8) * torch.arange(16.0).view(-1, 1, 1, 1))
    assert z.mean((0, 2, 3)).abs().max() < 1e-5 and (z.std((0, 2, 3)) - 1).abs().max() < 0.01
    assert z[15].std() > 2 * z[1].std()  # not each sample by itself


@pytest.mark.parametrize("make", [bn_conv, plain_conv])
def test_sizes_strides_and_weights_of_the_rivals(make):
    torch.manual_seed(3)
    layer = make(64, 128, 3, stride=2, padding=1)
    conv = layer[0] if make is bn_conv else layer
    assert layer(torch.rand(2, 64, 9, 9)).shape == (2, 128, 5, 5)
    assert make(4, 8, 3)(torch.rand(2, 4, 5, 5)).shape == (2, 8, 3, 3)
    torch.manual_seed(3)
    torch.nn.Conv2d(64, 128, 3, bias=make is plain_conv)  # its own initialisation draws first
    assert torch.equal(conv.weight, torch.nn.init.kaiming_normal_(torch.empty(128, 64, 3, 3)))
    if make is bn_conv:
        assert conv.bias is None and layer[1].num_features == 128 and (layer[1].weight == 1).all()
    else:
        assert not conv.bias.any()
