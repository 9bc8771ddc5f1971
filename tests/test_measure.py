"""What `support/measure.py` reports of a network, counted another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as networks
from ei_init import initialize
from inhibition import EICircuit, EICircuit2d
from lif import LIF, Spike
from model import build, circuits, layers
from support import data, measure
from support.fast import accelerate
from support.measure import costs, first_nonfinite, histogram, observe, population
from visualize import contrast_response, currents_of, stabilization

NARROW = [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"]
SIZES = [(16, 32), (16, 16), (32, 8), (32, 4), (32, 2)]  # maps of its layers, and their side in pixels


def network(x, plan=NARROW, T=2, **options):
    """A narrow VGG-8, initialised with x."""
    net = build("vgg8", in_channels=x.shape[1], plan=plan, T=T, **options)
    initialize(net, x)
    return net


class SOM:
    """A second cell type, which subtracts."""

    from_excitatory, from_inhibitory = ("w_ee", "w_ie", "w_se"), ("w_ei", "w_es")

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.w_se = nn.Parameter(torch.rand(3, *self.w_ee.shape[1:]))
        self.w_es = nn.Parameter(torch.rand(self.n_e, 3))

    def currents(self, x):
        found = super().currents(x)
        return found | dict(i_int=found["i_int"] - self.lateral(self.w_es, self.synapses(x, self.w_se)))


def use_som(monkeypatch):
    monkeypatch.setitem(networks.CONV, "ei", type("SOMCircuit2d", (SOM, EICircuit2d), {}))
    monkeypatch.setitem(networks.DENSE, "ei", type("SOMCircuit", (SOM, EICircuit), {}))


@pytest.mark.parametrize("n, T, sizes", [(250, 2, [84, 83, 83]), (100, 2, [100]), (7, 500, [2, 2, 2, 1])])
def test_test_batches_are_equal_and_small_where_T_is_large(n, T, sizes):
    model, found = build("mlp", image_size=2, plan=[4], T=T), []
    model.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    measure.evaluate(model, torch.ones(n, 3, 2, 2).byte(), torch.zeros(n).long())
    assert found == sizes


def test_population_counts_neurons_by_hand():
    model = build("vgg8", plan=NARROW)
    e, i = sum(n * s * s for n, s in SIZES) + 10, sum(n // 4 * s * s for n, s in SIZES) + 2
    assert population(model) == population(build("vgg8", plan=NARROW).double()) == (e, i)
    assert population(build("vgg8", plan=NARROW, kind="bn")) == (e, 0)
    assert len(costs(build("resnet18", T=1, width=0.1), torch.rand(2, 3, 32, 32))) == 21


def test_neurons_and_costs_follow_a_second_cell_type(monkeypatch):
    use_som(monkeypatch)
    x = torch.rand(2, 1, 32, 32)
    net = network(x, [8, "P", 4])
    assert population(net) == (8 * 32**2 + 4 * 16**2 + 10, (2 + 3) * 32**2 + (1 + 3) * 16**2 + 2 + 3)
    first, second, _ = costs(net, x)
    assert second["multiplies"] == 2 * 16**2 * (4 * 3 + 4 * 1 + 1 + 2 * 4)  # W_ES, W_EI, g_I, the division and g_E
    assert (first["parameters_e"], first["parameters_i"]) == (8 * 9 + 16, 2 * 9 + 8 * 2 + 2 + 3 * 9 + 8 * 3)


def test_first_nonfinite_names_the_layer_the_loss_or_the_gradient():
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    model = network(x)
    assert first_nonfinite(model, x, y) == "none left"
    handle = model.encoder.stages[6].circuit.w_ee.register_hook(lambda gradient: gradient * float("inf"))
    assert first_nonfinite(model, x, y) == "encoder.stages.6.circuit.w_ee (its gradient)"
    handle.remove()
    for name in ("readout.w_ee", "encoder.stages.4.circuit.b_e"):  # the later one first
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = float("nan")
        assert first_nonfinite(model, x, y) == name.rpartition(".")[0]


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_costs_are_those_counted_by_hand(form):
    x = torch.rand(3, 1, 32, 32)
    net = network(x, [4, "P", 8])
    if form == "fused":
        assert accelerate(net) == set()
    first, second, readout = costs(net, x)
    reached = 9 * 30 * 30 + 6 * 4 * 30 + 4 * 4  # taps of a 3x3 kernel that do not meet the border
    assert first["accumulates"] == 0
    assert first["multiplies"] == pytest.approx(reached * (4 + 1) + 32 * 32 * (2 * 4 * 1 + 1 + 2 * 4), rel=1e-6)
    repeated = x.expand(2, *x.shape)  # (T, B, C, H, W)
    spikes = net.encoder.stages[0](repeated).flatten(0, 1)
    assert first["firing_rate"] == pytest.approx(spikes.mean().item())
    pooled = F.avg_pool2d(spikes, 2).sum(1)  # (T B, 16, 16); a spike at a border reaches fewer
    taps = torch.tensor([2.0, *[3.0] * 14, 2.0])
    expected = (pooled * taps[:, None] * taps).sum().item() / 3 * (8 + 2)
    assert second["accumulates"] == pytest.approx(expected, rel=1e-5)
    assert second["multiplies"] == 2 * 16 * 16 * (2 * 8 * 2 + 2 + 2 * 8)
    assert list(second.values())[-4:] == [8 * 36 + 16, 2 * 36 + 16 + 2, 8 * 256, 2 * 256]  # parameters, neurons
    of_encoder = net.encoder(repeated).sum().item() / 3
    assert readout["accumulates"] == pytest.approx(of_encoder * 12) and readout["multiplies"] == 2 * 10 * 2
    frames = costs(net, x[:, None].repeat(1, 2, 1, 1, 1))  # the same image at each step, but the network cannot know
    assert frames[0]["multiplies"] == pytest.approx(2 * first["multiplies"])
    assert frames[1]["accumulates"] == pytest.approx(second["accumulates"])


def test_costs_of_the_rivals():
    x = torch.rand(2, 3, 32, 32)
    bn_snn = network(x, kind="bn")
    bn, table = costs(bn_snn, x), measure.cost_table(bn_snn, x)
    assert all(row["neurons_i"] == row["parameters_i"] == 0 for row in bn)
    assert bn[1]["multiplies"] == 2 * 16 * 16 * 16 and bn[1]["accumulates"] > 0
    assert all(row["accumulates"] == 0 for row in costs(network(x, kind="dann", T=1), x))
    assert len(table) == 9 and table[-1].startswith("all")


def test_histograms_count_every_value_once():
    values = torch.cat([torch.randn(3, 500) * 4, torch.tensor([[-100.0, 100, 6, -6, 0]]).expand(3, 5)], 1)
    expected = np.histogram(values.clamp(-6, 6).numpy(), 120, (-6, 6))[0]
    assert np.abs(histogram(values).numpy() - expected).sum() <= 4  # on an edge a value may go to either side
    values[0, :7] = float("nan")
    assert sum(histogram(values)) == values.numel() - 7
    x = torch.rand(3, 3, 32, 32)
    for found, (n, s) in zip(measure.histograms(network(x), x), SIZES, strict=True):
        assert found.sum(1).tolist() == [2 * 3 * n * s * s] * 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bn", "ei", "fused"])
def test_observing_changes_nothing(kind):
    x, found = torch.rand(4, 3, 32, 32), []
    net = network(x, T=3, kind="bn" if kind == "bn" else "ei")
    if kind == "fused":
        assert accelerate(net) == set()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    logits = net.eval()(x)
    net.train().readout.eval()
    observe(net, x, lambda i, current, u, spikes: found.append((i, current, u, spikes)))
    with pytest.raises(ZeroDivisionError):  # an error changes nothing either
        observe(net, x, lambda *seen: 1 / 0)
    assert net.training and not net.readout.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and torch.equal(net.eval()(x), logits)
    assert [i for i, *_ in found] == list(range(5))
    for _, current, u, spikes in found:
        assert torch.equal(spikes, (u >= 1).float()) and current.shape == u.shape and spikes.shape[:2] == (3, 4)


class AdaptiveLIF(LIF):
    """A student's neuron: its threshold is higher by 0.5 after each spike."""

    def simulate(self, current):
        threshold, rest, potentials, spikes = self.threshold, 0, [], []
        for i_t in current:
            potentials.append(rest / 2 + i_t)
            spikes.append(Spike.apply(potentials[-1], threshold, self.alpha))
            rest, threshold = potentials[-1] - threshold * spikes[-1], threshold + 0.5 * spikes[-1]
        return potentials, spikes


@pytest.mark.parametrize("own", [AdaptiveLIF, LIF])
def test_the_potential_is_that_of_the_neuron_as_it_is(own, monkeypatch):
    """As a subclass, and as an edit of `LIF` itself."""
    monkeypatch.setattr(networks, "LIF", own)
    monkeypatch.setattr(LIF, "simulate", AdaptiveLIF.simulate)
    x, found = torch.rand(4, 1, 32, 32), []
    net = network(x, [8], T=6)
    accelerate(net)
    observe(net, x, lambda i, current, u, spikes: found.extend([u, spikes]))
    u, spikes = found
    before = spikes.cumsum(0) - spikes  # how often each neuron has fired until then
    assert torch.equal(spikes, (u >= 1 + 0.5 * before).float()) and before.max() > 1


def test_contrast_response_holds_the_mean_of_i_div():
    x, rates = torch.rand(4, 1, 32, 32), []
    net = network(x, [8, "P", 8])
    responses = contrast_response(net, x, [0.5, 1.0])  # (2, contrasts, layers)
    observe(net, x, lambda i, current, u, spikes: rates.append(spikes.mean().item()))
    assert responses[0, 1].tolist() == pytest.approx(rates)
    assert responses[0, 0, 0] == pytest.approx(responses[0, 1, 0].item())  # the division takes out the contrast
    found = currents_of(net, x, 0)  # the first layer by hand
    mean = found["i_div"].mean((0, 1, 3, 4), keepdim=True)
    for contrast, response in zip((0.5, 1.0), responses[1, :, 0].tolist(), strict=True):
        spikes = layers(net)[0].neuron(contrast * (found["i_ee"] - found["i_sub"]) / mean)
        assert response == pytest.approx(spikes.mean().item(), rel=1e-3)


def test_stabilization_counts_zeros_and_gradients():
    dataset = data.load("digits")
    x, y = data.to_input(dataset.train_x[:8]), dataset.train_y[:8]
    net = network(x, [16, "P", 16, "P"])
    variants = dict(adaptive=("adaptive", True), no_ste=("adaptive", False), small=(1e-6, True), tiny=(1e-8, True))
    first, second = stabilization(net, [(x, y)], variants)
    zeros = (currents_of(net, x, 0)["i_div"] == 0).float().mean().item()
    assert 0.05 < zeros < 0.5 and first["zeros"] == pytest.approx(zeros) and second["layer"] == 2
    assert first["unbalanced"] == 0 and first["no_ste"] == pytest.approx(first["adaptive"], rel=1e-3)
    assert first["tiny"] == pytest.approx(100 * first["small"], rel=0.01)
    assert all(p.grad is None for p in net.parameters())
    assert [(c.eps, c.ste) for c in circuits(net)] == [("adaptive", True)] * 3
    with torch.no_grad():
        net.encoder.stages[0].circuit.w_ie[:, :, :, 0] = 0  # what Dale's law may do: I_div = 0, but I_EE > 0
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    one, other, both = (stabilization(net, part, variants)[0] for part in (halves[:1], halves[1:], halves))
    assert one["unbalanced"] > 0.01 and both["zeros"] == pytest.approx((one["zeros"] + other["zeros"]) / 2)
    shares = [row["unbalanced"] * row["zeros"] for row in (one, other, both)]
    assert shares[2] == pytest.approx((shares[0] + shares[1]) / 2)
    assert all(both[variant] == max(one[variant], other[variant]) for variant in variants)
