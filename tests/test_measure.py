"""What `support/measure.py` reports of a network, counted another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ei_init import initialize
from model import build, circuits, layers
from support import data, measure
from support.fast import accelerate
from support.measure import (
    VARIANTS,
    contrast_response,
    cost_table,
    costs,
    currents_of,
    describe,
    first_nonfinite,
    histogram,
    histograms,
    hooked,
    inhibitory,
    observe,
    population,
    stabilization,
)

NARROW = [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"]


def test_population_counts_neurons_by_hand():
    model = build("vgg8", plan=NARROW)
    sizes = [(16, 32), (16, 16), (32, 8), (32, 4), (32, 2)]
    assert population(model) == (
        sum(n * s * s for n, s in sizes) + 10,
        sum(n // 4 * s * s for n, s in sizes) + 2,
    )
    assert population(build("vgg8", plan=NARROW, kind="bn")) == (sum(n * s * s for n, s in sizes) + 10, 0)
    with torch.no_grad():
        net = build("vgg8", plan=NARROW).double()
    assert population(net) == population(model)
    e, i = population(model)
    n = sum(p.numel() for p in model.parameters())
    assert describe(model) == f"{e:,} excitatory and {i:,} inhibitory neurons, {n:,} parameters"
    assert [inhibitory(c) for c in circuits(model)] == [4, 4, 8, 8, 8, 2] and inhibitory(torch.nn.Linear(2, 2)) == 0


def test_first_nonfinite_names_the_layer():
    model = build("vgg8", plan=NARROW)
    x = torch.rand(2, 3, 32, 32)
    initialize(model, x)
    assert first_nonfinite(model, x) == "loss"
    with torch.no_grad():
        model.encoder.stages[4].circuit.b_e[3] = float("nan")
    assert first_nonfinite(model, x) == "encoder.stages.4.circuit"
    with torch.no_grad():
        model.encoder.stages[4].circuit.b_e[3] = 0
        model.readout.w_ee[0, 0] = float("inf")
    assert first_nonfinite(model, x) == "readout"


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_costs_are_those_counted_by_hand(form):
    net = build("vgg8", in_channels=1, plan=[4, "P", 8], T=2)
    x = torch.rand(3, 1, 32, 32)
    initialize(net, x)
    if form == "fused":
        assert accelerate(net, x) == set()
    first, second, readout = costs(net, x)
    reached = 9 * 30 * 30 + 6 * 4 * 30 + 4 * 4  # taps of a 3x3 kernel that do not meet the border
    assert first["accumulates"] == 0
    assert first["multiplies"] == pytest.approx(reached * (4 + 1) + 32 * 32 * (2 * 4 * 1 + 1 + 2 * 4), rel=1e-6)
    repeated = x.expand(2, *x.shape)  # (T, B, C, H, W)
    spikes = net.encoder.stages[0](repeated).flatten(0, 1)
    assert first["firing_rate"] == pytest.approx(spikes.mean().item())
    pooled = F.avg_pool2d(spikes, 2).sum(1)  # (T B, 16, 16); a spike at a border reaches fewer
    taps = torch.full((16,), 3.0)
    taps[0] = taps[-1] = 2
    expected = (pooled * taps[:, None] * taps).sum().item() / 3 * (8 + 2)
    assert second["accumulates"] == pytest.approx(expected, rel=1e-5)
    assert second["multiplies"] == 2 * 16 * 16 * (2 * 8 * 2 + 2 + 2 * 8)
    assert (second["parameters_e"], second["parameters_i"]) == (8 * 36 + 16, 2 * 36 + 16 + 2)
    assert (second["neurons_e"], second["neurons_i"]) == (8 * 256, 2 * 256)
    of_encoder = net.encoder(repeated).sum().item() / 3
    assert readout["accumulates"] == pytest.approx(of_encoder * 12) and readout["multiplies"] == 2 * 10 * 2
    total = sum(row["parameters_e"] + row["parameters_i"] for row in (first, second, readout))
    assert total == sum(p.numel() for p in net.parameters())


def test_costs_of_the_rivals():
    x = torch.rand(2, 3, 32, 32)
    bn_snn = build("vgg8", plan=NARROW, kind="bn", T=2)
    bn, table = costs(bn_snn, x), cost_table(bn_snn, x)
    assert all(row["neurons_i"] == row["parameters_i"] == 0 for row in bn)
    assert bn[1]["multiplies"] == 2 * 16 * 16 * 16 and bn[1]["accumulates"] > 0
    dann = costs(build("vgg8", plan=NARROW, kind="dann", T=1), x)
    assert all(row["accumulates"] == 0 for row in dann)
    assert len(table) == 9 and table[-1].startswith("all")
    assert len(costs(build("resnet18", T=1, width=0.1), x)) == 21


def test_a_still_image_costs_the_same_in_both_forms_and_less_than_frames():
    x = torch.rand(2, 1, 32, 32)
    net = build("vgg8", in_channels=1, plan=[4, "P", 8], T=3)
    initialize(net, x)
    plain = costs(net, x)
    frames = costs(net, x[:, None].repeat(1, 3, 1, 1, 1))
    assert frames[0]["multiplies"] == pytest.approx(3 * plain[0]["multiplies"])
    assert frames[1]["accumulates"] == pytest.approx(plain[1]["accumulates"])
    assert accelerate(net, x) == set()
    for a, b in zip(costs(net, x), plain, strict=True):
        assert a.keys() == b.keys() and a["layer"] == b["layer"]
        for name in a.keys() - {"layer"}:
            assert a[name] == (b[name] if b[name] is None else pytest.approx(b[name], rel=1e-5)), name


def test_histograms_count_every_value_once():
    values = torch.cat([torch.randn(3, 500) * 4, torch.tensor([[-100.0, 100, 6, -6, 0]]).expand(3, 5)], 1)
    expected = np.histogram(values.clamp(-6, 6).numpy(), 120, (-6, 6))[0]
    counts = histogram(values)
    assert sum(counts) == values.numel() and len(counts) == measure.BINS["n"] == 120
    assert np.abs(np.array(counts) - expected).sum() <= 4  # values on an edge may be rounded to either side
    values[0, :7] = float("nan")
    assert sum(histogram(values)) == values.numel() - 7
    net = build("vgg8", plan=NARROW, T=2)
    x = torch.rand(3, 3, 32, 32)
    initialize(net, x)
    found = histograms(net, x)
    assert len(found) == 5 and all(sum(h["u"]) == sum(h["i_int"]) == n for h, n in zip(found, [
        2 * 3 * c * s * s for c, s in ((16, 32), (16, 16), (32, 8), (32, 4), (32, 2))
    ], strict=True))  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bn", "ei", "fused"])
def test_observing_changes_nothing(kind):
    net = build("vgg8", plan=NARROW, kind="bn" if kind == "bn" else "ei", T=3)
    x = torch.rand(4, 3, 32, 32)
    initialize(net, x)
    if kind == "fused":
        with torch.enable_grad():
            assert accelerate(net, x) == set()
    before, found = {k: v.clone() for k, v in net.state_dict().items()}, []
    net.eval()
    logits = net(x)
    net.train()
    observe(net, x, lambda i, current, u, spikes: found.append((i, current, u, spikes)))
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    assert torch.equal(net(x), logits)
    assert [f[0] for f in found] == list(range(5))
    for (_, current, u, spikes), layer in zip(found, layers(net), strict=True):
        assert torch.equal(spikes, (u >= layer.neuron.threshold).float())
        assert current.shape == u.shape == spikes.shape and spikes.shape[:2] == (3, 4)


def test_hooks_are_gone_after_an_error():
    net, seen = build("vgg8", plan=NARROW, T=1), []
    with pytest.raises(RuntimeError), hooked(net, [net.readout.register_forward_hook(lambda *_: seen.append(1))]):
        assert not net.training
        net(torch.rand(1, 3, 32, 32))
        raise RuntimeError
    assert net.training and seen == [1] and not net.readout._forward_hooks
    with hooked(net, [], training=True):
        assert net.training


@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("index", [0, 2, 5])
def test_currents_of_a_layer(index, form):
    net, x = build("vgg8", plan=NARROW, T=2), torch.rand(3, 3, 32, 32)
    initialize(net, x)
    seen = []
    with hooked(net, [circuits(net)[index].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]):
        net(x)
    wanted = circuits(net)[index].currents(seen[0])
    if form == "fused":
        assert accelerate(net, x) == set()
    found = currents_of(net, x, index)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name].flatten(0, 1), values, rtol=1e-3, atol=1e-4)


def test_contrast_response_holds_the_mean_of_i_div():
    net, x = build("vgg8", plan=[8, "P", 8], T=2, in_channels=1), torch.rand(4, 1, 32, 32)
    initialize(net, x)
    responses = contrast_response(net, x, [0.5, 1.0])
    assert responses.shape == (2, 2, 2)
    rates = []
    observe(net, x, lambda i, current, u, spikes: rates.append(spikes.mean().item()))
    assert responses[0, 1].tolist() == pytest.approx(rates)
    assert responses[0, 0, 0] == pytest.approx(responses[0, 1, 0].item())  # the division takes out the contrast
    assert responses[1, 0, 0] < responses[1, 1, 0]
    found = currents_of(net, x, 0)  # the first layer by hand
    mean = found["i_div"].mean((0, 1, 3, 4), keepdim=True)
    spikes = layers(net)[0].neuron((found["i_ee"] - found["i_sub"]) / mean)
    assert responses[1, 1, 0].item() == pytest.approx(spikes.mean().item(), rel=1e-3)


def test_stabilization_counts_zeros_and_gradients():
    dataset = data.load("digits")
    x, y = data.to_input(dataset.train_x[:8]), dataset.train_y[:8]
    net = build("vgg8", in_channels=1, plan=[16, "P", 16, "P"], T=2)
    initialize(net, x)
    rows = stabilization(net, [(x, y)])
    assert [row["layer"] for row in rows] == [1, 2] and all(p.grad is None for p in net.parameters())
    zeros = (currents_of(net, x, 0)["i_div"] == 0).float().mean().item()
    assert 0.05 < zeros < 0.5 and rows[0]["zeros"] == pytest.approx(zeros)
    for row in rows:
        assert row["unbalanced"] == 0 and row["\u03b5=1e-4"] > 0
        assert row["adaptive, no STE"] == pytest.approx(row["adaptive"], rel=1e-3)
    assert rows[0]["\u03b5=1e-8"] == pytest.approx(100 * rows[0]["\u03b5=1e-6"], rel=0.01)
    assert [(c.eps, c.ste) for c in circuits(net)] == [("adaptive", True)] * 3
    with torch.no_grad():
        net.encoder.stages[0].circuit.w_ie[:, :, :, 0] = 0  # what Dale's law may do: I_div = 0, but I_EE > 0
    assert stabilization(net, [(x, y)])[0]["unbalanced"] > 0.01
    alone = [stabilization(net, [(x[i : i + 4], y[i : i + 4])]) for i in (0, 4)]
    for row, one, other in zip(stabilization(net, [(x[:4], y[:4]), (x[4:], y[4:])]), *alone, strict=True):
        assert row["zeros"] == pytest.approx((one["zeros"] + other["zeros"]) / 2)
        shares = one["unbalanced"] * one["zeros"] + other["unbalanced"] * other["zeros"]
        assert row["unbalanced"] * row["zeros"] == pytest.approx(shares / 2)
        for variant in VARIANTS:
            assert row[variant] == max(one[variant], other[variant])
