import math

import pytest
import torch
from torch.nn.utils import prune

from ei_init import ei_init, initialize
from inhibition import EICircuit, EICircuit2d
from model import build, circuits, layers
from support import data

NARROW = [8, "P", 8, "P", 8, "P"]


def batch_of(images):
    if images == "digits":
        return data.to_input(data.load("digits").train_x[:8])
    return torch.rand(8, 3, 32, 32)


@torch.no_grad()
def statistics(model, run):
    """Mean and standard deviation of I_int, and the firing rate, of each layer while `run` runs the network."""
    means, stds, rates = [], [], []
    for circuit in circuits(model)[:-1]:
        circuit.register_forward_hook(
            lambda _, __, i_int: (means.append(i_int.mean()), stds.append(i_int.std())) and None
        )
    for layer in layers(model):
        layer.register_forward_hook(lambda _, __, spikes: rates.append(spikes.mean()))
    run()
    return torch.stack(means), torch.stack(stds), torch.stack(rates)


@pytest.mark.parametrize("images", ["digits", "random"])
def test_every_layer_is_normalized_and_alive(images):
    # With n_I interneurons the mean of I_int over a batch varies from draw to draw of the weights, about
    # sqrt(1 / n_E + 1 / n_I) E[x] / sqrt(E[x^2] + Var[x]), 0.1 to 0.2 here; what E-I Init centres is its expectation.
    batch, draws = batch_of(images), []
    for _ in range(8):
        model = build("vgg8", in_channels=batch.shape[1], T=1)
        # each layer is initialised before it runs, and sees what it would see in the initialised network
        means, stds, rates = statistics(model, lambda model=model: initialize(model, batch))
        assert ((stds > 0.5) & (stds < 1.6)).all() and (rates > 0.01).all(), (stds, rates)
        draws.append(means)
    mean, spread = torch.stack(draws).mean(0).abs(), torch.stack(draws).std(0)
    assert (mean[:2] < 0.25).all() and (mean[2:] < 0.1).all(), mean
    assert (spread[:2] > 0.06).all() and (spread[:2] < 0.3).all() and (spread[2:] < 0.2).all(), spread


@pytest.mark.parametrize("images", ["digits", "random"])
def test_deep_networks_are_alive_and_with_kaiming_s_weights_silent(images):
    batch = batch_of(images)
    model = build("vgg16", in_channels=batch.shape[1], T=1, width=0.5)  # |Kaiming| is what a circuit starts with
    _, stds, rates = statistics(model, lambda: model(batch))
    assert rates[-1] < 0.001 and stds[-1] < 0.5, (rates, stds)
    _, stds, rates = statistics(model, lambda: initialize(model, batch))
    assert ((stds > 0.3) & (stds < 1.6)).all() and (rates > 0.01).all(), (stds, rates)


def test_is_an_explicit_call():
    model, batch = build("resnet18", in_channels=1, width=0.1), torch.rand(2, 1, 32, 32)
    for call in (lambda: None, lambda: initialize(model, batch)):
        call()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model(batch)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="batch of at least 2"):
        ei_init(EICircuit(5, 8), torch.rand(1, 5))
    # T time steps of one image are not several samples
    with pytest.raises(ValueError, match=r"^E-I Init measures a variance: it needs a batch of at least 2 samples$"):
        initialize(build("vgg8", plan=NARROW), torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"^E-I Init measures a variance"):
        initialize(build("vgg8", plan=NARROW, T=2), torch.rand(1, 2, 3, 32, 32))


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_input_that_is_no_activity_is_refused(value):
    message = "negative values, .*: give images as intensities" if value < 0 else "values that are not finite"
    x = torch.rand(4, 3, 32, 32)
    x[1, 2, 5, 6] = value
    circuit = EICircuit2d(3, 8, 3)
    before = {k: v.clone() for k, v in circuit.state_dict().items()}
    with pytest.raises(ValueError, match=f"^its input has {message}"):
        ei_init(circuit, x)
    assert all(torch.equal(v, before[k]) for k, v in circuit.state_dict().items())
    with pytest.raises(ValueError, match=r"^the images have values that are negative, .*, or not finite"):
        initialize(build("vgg8", plan=NARROW), x)


def test_a_silent_and_a_constant_input_are_named_and_leave_no_hook():
    silent = r"the input of the layer is silent \(E\[x\] = 0\), so E-I Init has nothing to scale to$"
    constant = r"the input of the layer is the same in every sample .* likely cause: in the first layer, images that"
    for x, message in ((torch.zeros(4, 3, 32, 32), silent), (torch.rand(1, 3, 32, 32).expand(4, 3, 32, 32), constant)):
        with pytest.raises(ValueError, match=f"^{message}"):
            ei_init(EICircuit2d(3, 8, 3), x)
        model = build("vgg8", plan=NARROW)
        with pytest.raises(ValueError, match=rf"^layer encoder\.stages\.0\.circuit: {message}"):
            initialize(model, x)
        assert not any(m._forward_pre_hooks for m in model.modules())
    initialize(model, torch.rand(4, 3, 32, 32))
    assert not any(m._forward_pre_hooks for m in model.modules())
    prune.random_unstructured(model.readout, "w_ie", amount=0.5)
    with pytest.raises(ValueError, match="layer readout: w_ie is pruned"):
        initialize(model, torch.rand(4, 3, 32, 32))


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("kind", ["dense", "2d"])
def test_the_statistics_are_those_of_the_equations(kind, readout):
    shape = (30, 6) if kind == "dense" else (30, 6, 4, 4)
    x = torch.rand(shape) * torch.linspace(0.1, 2, 6).view(-1, *[1] * (len(shape) - 2))  # features of unequal size
    circuit = EICircuit(6, 6000, 4, readout) if kind == "dense" else EICircuit2d(6, 6000, 3, readout=readout)
    with torch.no_grad():
        for p in circuit.parameters():
            p.fill_(-3)  # nothing of what stood there before is left
    ei_init(circuit, x)
    d, values = (6 if kind == "dense" else 54), x.double()
    mean, mean_square = values.sum().item() / x.numel(), (values**2).sum().item() / x.numel()
    var = (((values - values.mean(0)) ** 2).sum(0) / (len(x) - 1)).mean().item()  # unbiased, of each feature
    m = math.sqrt(var / (d * (mean_square + var)))
    for w in (circuit.w_ee, circuit.w_ie):
        assert w.min() >= 0 and w.mean().item() == pytest.approx(m, rel=0.04)
        assert w.std().item() == pytest.approx(m, rel=0.06)
        assert (w > m).float().mean().item() == pytest.approx(math.exp(-1), abs=0.02)  # of an exponential variable
    assert (circuit.w_ei == 1 / 1500).all()
    if not readout:
        assert circuit.g_i.tolist() == pytest.approx(
            [math.sqrt(mean_square + var) / (math.sqrt(d) * mean)] * 1500, rel=1e-5
        )
        assert (circuit.g_e == 1).all() and not circuit.b_e.any()


def test_another_initialisation_can_be_given():
    seen = []
    model = build("vgg8", plan=NARROW, T=2)
    initialize(model, torch.rand(3, 3, 32, 32), init=lambda circuit, x: seen.append((circuit, len(x))))
    assert [c for c, _ in seen] == circuits(model) and [n for _, n in seen] == [6] * 4  # T B each


def test_each_layer_sees_what_the_initialised_ones_send():
    model, x = build("vgg8", in_channels=1, plan=NARROW, T=2), torch.rand(6, 1, 32, 32)
    initialize(model, x)
    g_i = [circuit.g_i[0].item() for circuit in circuits(model)[:-1]]
    inputs = []
    for circuit in circuits(model)[:-1]:
        circuit.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(x)
    for circuit, given, g in zip(circuits(model), inputs, g_i, strict=False):
        mean, second = given.mean(), given.square().mean() + given.var(0).mean()
        assert g == pytest.approx((second.sqrt() / (circuit.fan_in**0.5 * mean)).item(), rel=1e-4)


def test_the_demonstration(demonstration):
    lines = demonstration("ei_init.py").splitlines()
    rows = [[float(v) for v in line.split()] for line in lines if line[:1].isdigit()]
    assert [row[0] for row in rows] == [1, 2, 3, 4]
    for _, mean, std, rate, kaiming_mean, kaiming_std, kaiming_rate in rows:
        assert abs(mean) < 0.3 and 0.05 < rate < 0.3  # other versions of PyTorch draw other weights
        assert 0.7 < std < 1.02  # the docstring says 0.78 to 0.96
        assert kaiming_mean < 0.01 and kaiming_std < 0.1 and kaiming_rate == 0


@pytest.mark.parametrize("kind", ["bn", "plain", "dann"])
def test_networks_without_circuits_stay_as_they_are(kind):
    model = build("vgg8", in_channels=1, kind=kind, plan=NARROW)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    initialize(model, torch.rand(2, 1, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
