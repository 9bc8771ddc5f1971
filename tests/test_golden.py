"""The circuit, the LIF neuron and a small VGG-8 against an independent implementation, in float32, plain and fused."""

import pytest
import torch
import torch.nn.functional as F
from conftest import golden, relative_error

from ei_init import ei_init
from inhibition import EICircuit2d
from lif import LIF, lif
from model import build, circuits, layers
from support.fast import FORMS, FastCircuit2d, FastLIF, accelerate

PARAMETERS = ["w_ee", "w_ie", "w_ei", "g_i", "g_e", "b_e"]


def load(circuit, arrays, prefix=""):
    with torch.no_grad():
        for name, p in circuit.named_parameters():
            p.copy_(arrays[prefix + name])


@pytest.mark.parametrize("form", ["forward", "currents", "fused"])
@pytest.mark.parametrize("name", ["circuit_dense", "circuit_sparse"])
def test_circuit(name, form):
    g = golden(name)
    circuit = EICircuit2d(6, 8, 3, padding=1)
    load(circuit, g)
    if form == "fused":
        circuit.__class__ = FastCircuit2d
    x = g["x"].requires_grad_()
    i_int = circuit.currents(x)["i_int"] if form == "currents" else circuit(x)
    i_int.backward(g["grad_out"])
    assert relative_error(i_int, g["out"]) < 1e-5
    assert relative_error(x.grad, g["grad_x"]) < 1e-4
    for p in PARAMETERS:
        assert relative_error(getattr(circuit, p).grad, g[f"grad_{p}"]) < 1e-4, p


@pytest.mark.parametrize("name", ["circuit_dense", "circuit_sparse"])
def test_statistics_of_ei_init(name):
    g = golden(name)
    circuit = EICircuit2d(6, 4000, 3, padding=1)
    ei_init(circuit, g["x_init"])
    assert circuit.g_i.detach().numpy() == pytest.approx(float(g["g_i_init"]), rel=1e-5)
    for w in (circuit.w_ee, circuit.w_ie):
        assert w.mean().item() == pytest.approx(float(g["exp_scale"]), rel=0.01)
        assert w.std().item() == pytest.approx(float(g["exp_scale"]), rel=0.02)  # exponential: std = mean
        assert w.min() >= 0
    assert (circuit.w_ei == 1 / circuit.n_i).all() and (circuit.g_e == 1).all() and (circuit.b_e == 0).all()


@pytest.mark.parametrize("form", ["function", "layer", "fused"])
def test_lif(form):
    g = golden("lif")
    current, settings = g["current"].requires_grad_(), (float(g["tau"]), float(g["threshold"]))
    neurons = dict(function=lambda current: lif(current, *settings), layer=LIF(*settings), fused=FastLIF(*settings))
    spikes = neurons[form](current)
    spikes.backward(g["grad_spikes"])
    assert torch.equal(spikes, g["spikes"])
    assert relative_error(current.grad, g["grad_current"]) < 1e-4


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_vgg8(form):
    g = golden("vgg8_narrow")
    model = build("vgg8", T=int(g["T"]), plan=[16, "P", 16, "P", 32, "P", 32, "P", 32, "P"])
    assert len(circuits(model)) == int(g["n_layers"])
    for i, circuit in enumerate(circuits(model)):
        load(circuit, g, f"l{i}_")
    if form == "fused":
        assert accelerate(model, g["x"]) == set() and not any(type(m) in FORMS for m in model.modules())
    rates = []
    for layer in layers(model):
        layer.register_forward_hook(lambda _, __, spikes: rates.append(spikes.mean().item()))
    logits = model(g["x"])
    loss = F.cross_entropy(logits, g["y"])
    loss.backward()
    assert relative_error(logits, g["logits"]) < 1e-5
    assert loss.item() == pytest.approx(float(g["loss"]), rel=1e-5)
    assert rates == pytest.approx(g["firing_rates"].tolist(), abs=1e-7)  # of the same number of spikes
    for i, circuit in enumerate(circuits(model)):
        for name, p in circuit.named_parameters():
            want = g[f"l{i}_grad_{name}"]
            if circuit.readout and name == "w_ie":  # zero by symmetry at E-I Init, so both are rounding noise
                assert (p.grad - want).norm() < 1e-4 * g[f"l{i}_grad_w_ee"].norm()
            else:
                assert relative_error(p.grad, want) < 1e-4, (i, name)
