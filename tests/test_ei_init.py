import pytest
import torch

import data
from ei_init import ei_init, initialize
from inhibition import EICircuit
from model import build, circuits, layers


def batch_of(images):
    if images == "digits":
        return data.to_input(data.load("digits").train_x[:8])
    return torch.rand(8, 3, 32, 32)


@torch.no_grad()
def statistics(model, batch):
    """Mean and standard deviation of I_int, and the firing rate, of each layer on a batch."""
    means, stds, rates = [], [], []
    for circuit in circuits(model)[:-1]:
        circuit.register_forward_hook(
            lambda _, __, i_int: (means.append(i_int.mean()), stds.append(i_int.std())) and None
        )
    for layer in layers(model):
        layer.register_forward_hook(lambda _, __, spikes: rates.append(spikes.mean()))
    model(batch)
    return torch.stack(means), torch.stack(stds), torch.stack(rates)


@pytest.mark.parametrize("images", ["digits", "random"])
@pytest.mark.parametrize("arch", ["vgg8", "vgg16"])
def test_every_layer_is_normalized_and_alive(arch, images):
    # With n_I interneurons the mean of I_int over a batch varies from draw to draw of the weights, about
    # sqrt(1 / n_E + 1 / n_I) E[x] / sqrt(E[x^2] + Var[x]), 0.1 to 0.2 here; what E-I Init centres is its expectation.
    batch, draws = batch_of(images), []
    for _ in range(24):
        model = build(arch, in_channels=batch.shape[1], T=2)
        initialize(model, batch)
        means, stds, rates = statistics(model, batch)
        assert ((stds > 0.5) & (stds < 2)).all(), stds
        assert (rates > 0.01).all(), rates
        draws.append(means)
    mean, spread = torch.stack(draws).mean(0).abs(), torch.stack(draws).std(0)
    assert mean[0] < 0.5 and (mean[1:] < 0.15).all(), mean  # the fan-in of the first is only 9 or 27
    assert (spread < 0.3).all(), spread


@pytest.mark.parametrize("images", ["digits", "random"])
@pytest.mark.parametrize("arch", ["vgg8", "vgg16"])
def test_kaiming_weights_do_not(arch, images):
    batch = batch_of(images)
    model = build(arch, in_channels=batch.shape[1])  # |Kaiming| is what a circuit starts with
    _, stds, rates = statistics(model, batch)
    assert rates[-1] < 0.001, rates  # the deep layers are silent
    assert stds[-1] < 0.5


def test_the_gain_is_the_paper_s_for_bernoulli_spikes():
    p, d = 0.2, 300
    circuit = EICircuit(d, 40)
    ei_init(circuit, (torch.rand(4000, d) < p).float())
    assert circuit.g_i[0].item() == pytest.approx(((2 - p) / (d * p)) ** 0.5, rel=0.01)


def test_static_images_count_at_every_time_step():
    batch = torch.rand(3, 1, 32, 32)
    image, frames = build("vgg8", in_channels=1), build("vgg8", in_channels=1)
    torch.manual_seed(1)
    initialize(image, batch)
    torch.manual_seed(1)
    initialize(frames, batch.unsqueeze(1).repeat(1, 4, 1, 1, 1))
    for a, b in zip(image.parameters(), frames.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("arch", ["vgg8", "resnet18"])
def test_is_an_explicit_call_and_leaves_nothing_behind(arch):
    model = build(arch, in_channels=1)
    batch = torch.rand(2, 1, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    initialize(model, batch)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model(batch)
    assert all(torch.equal(v, after[k]) for k, v in model.state_dict().items())
    assert not torch.equal(before["readout.w_ee"], after["readout.w_ee"])


def test_a_silent_batch_names_the_layer():
    with pytest.raises(ValueError, match=r"layer encoder\.stages\.0\.circuit: .*silent"):
        initialize(build("vgg8"), torch.zeros(4, 3, 32, 32))


def test_a_constant_batch_or_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="same in every sample"):
        ei_init(EICircuit(5, 8), torch.ones(4, 5))
    with pytest.raises(ValueError, match="batch of at least 2"):
        ei_init(EICircuit(5, 8), torch.rand(1, 5))


def test_networks_without_circuits_stay_as_they_are():
    model = build("vgg8", in_channels=1, kind="bn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    initialize(model, torch.rand(2, 1, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
