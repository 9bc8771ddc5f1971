import pytest
import torch
from conftest import relative_error

from ei_init import ei_init
from inhibition import EICircuit, EICircuit2d, clamp_dale

SIGNED = {"b_e"}


def circuit_and_input(kind, density, **options):
    """A circuit with weights of no symmetry, and spikes for it; the first sample is silent."""
    if kind == "2d":
        circuit, x = EICircuit2d(6, 8, 3, padding=1, **options), (torch.rand(5, 6, 7, 7) < density).float()
    else:
        circuit, x = EICircuit(20, 8, **options), (torch.rand(5, 20) < density).float()
    ei_init(circuit, x)
    with torch.no_grad():
        for p in circuit.parameters():
            p.mul_(torch.rand_like(p) + 0.5)
        if not circuit.readout:
            circuit.b_e.normal_()
    x[0] = 0
    return circuit, x.requires_grad_()


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("kind", ["dense", "2d"])
@pytest.mark.parametrize("options", [{}, dict(ste=False), dict(eps=1e-2), dict(grad_scaling=False)])
def test_forward_equals_the_equations(kind, density, readout, options):
    circuit, x = circuit_and_input(kind, density, readout=readout, **options)
    fast = circuit(x)
    grad = torch.randn_like(fast)
    inputs = [x, *circuit.parameters()]
    fast_grads = torch.autograd.grad(fast, inputs, grad)
    literal = circuit.currents(x)["i_int"]
    assert relative_error(fast, literal) < 1e-5
    for a, b in zip(fast_grads, torch.autograd.grad(literal, inputs, grad), strict=True):
        assert relative_error(a, b) < 1e-4


def test_a_2x2_map_as_one_product_equals_the_convolution():
    x = torch.rand(3, 5, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    circuit = EICircuit2d(5, 8, 3, padding=1)
    w = torch.randn(7, 5, 3, 3, requires_grad=True)
    fast, slow = circuit._synapses(x, w), torch.nn.functional.conv2d(x, w, padding=1)
    assert not torch.equal(fast, slow)  # rounded differently, so the other form was taken
    assert relative_error(fast, slow) < 1e-6
    grad = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad(out, (x, w), grad) for out in (fast, slow)), strict=True):
        assert relative_error(a, b) < 1e-6


def test_currents_are_the_equations_by_hand():
    circuit = EICircuit(3, 2)  # one inhibitory neuron
    with torch.no_grad():
        for name, value in dict(
            w_ee=[[1.0, 2, 3], [4, 5, 6]],
            w_ie=[[1.0, 1, 0]],
            w_ei=[[1.0], [0.5]],
            g_i=[2.0],
            g_e=[1.0, 3.0],
            b_e=[0.0, 1],
        ).items():
            getattr(circuit, name).copy_(torch.tensor(value))
    got = circuit.currents(torch.tensor([[1.0, 0.5, 0]]))
    assert got["i_ee"].tolist() == [[2, 6.5]]
    assert got["i_ie"].tolist() == [[1.5]]
    assert got["i_sub"].tolist() == [[1.5, 0.75]]
    assert got["i_div"].tolist() == [[3, 1.5]]
    assert got["i_int"][0].tolist() == pytest.approx([0.5 / 3, 3 * 5.75 / 1.5 + 1])


@pytest.mark.parametrize("kind", ["dense", "2d"])
def test_shapes_are_those_of_the_design(kind):
    circuit = EICircuit2d(3, 10, 3) if kind == "2d" else EICircuit(27, 10)
    fan_in = (3, 3, 3) if kind == "2d" else (27,)
    assert circuit.fan_in == 27
    shapes = {name: tuple(p.shape) for name, p in circuit.named_parameters()}
    assert shapes == dict(w_ee=(10, *fan_in), w_ie=(2, *fan_in), w_ei=(10, 2), g_i=(2,), g_e=(10,), b_e=(10,))
    assert EICircuit(5, 3).n_i == 1 and EICircuit(5, 12, ei_ratio=3).n_i == 4
    assert set(dict(EICircuit(5, 8, readout=True).named_parameters())) == {"w_ee", "w_ie", "w_ei"}


def test_a_silent_sample_gets_b_e_even_where_excitation_is_left():
    circuit, x = circuit_and_input("2d", 0.5)
    with torch.no_grad():
        circuit.g_i.zero_()  # no divisive inhibition at all, as Dale's clamp may leave it
    out = circuit(x)
    assert torch.equal(out, circuit.b_e.view(-1, 1, 1).expand_as(out))


def test_the_gradient_reaches_x_through_a_silent_position():
    circuit, _ = circuit_and_input("2d", 0.5)
    x = torch.zeros(1, 6, 7, 7)
    x[0, :, :3] = 1  # the last rows see nothing: there s_I = 0, where a ReLU would pass no gradient
    x.requires_grad_()
    assert circuit.currents(x)["i_ie"][0, :, 6].eq(0).all()
    inhibition_only = circuit.currents(x)["i_div"]
    (grad,) = torch.autograd.grad(inhibition_only[0, :, 6].sum(), x)
    assert (grad[0, :, 6] > 0).all()
    (grad,) = torch.autograd.grad(circuit(x)[0, :, 6].sum(), x)
    assert grad[0, :, 6].ne(0).all()


def test_gradient_scaling_is_one_over_the_fan_in():
    scaled, x = circuit_and_input("2d", 0.5)
    unscaled = EICircuit2d(6, 8, 3, padding=1, grad_scaling=False)
    unscaled.load_state_dict(scaled.state_dict())
    scaled(x).sum().backward()
    unscaled(x).sum().backward()
    torch.testing.assert_close(scaled.w_ei.grad * 54, unscaled.w_ei.grad)
    torch.testing.assert_close(scaled.w_ie.grad, unscaled.w_ie.grad)


def test_clamp_dale():
    circuit, _ = circuit_and_input("2d", 0.5)
    with torch.no_grad():
        for p in circuit.parameters():
            p.normal_()
    before = {name: p.detach().clone() for name, p in circuit.named_parameters()}
    clamp_dale(torch.nn.Sequential(circuit, torch.nn.Linear(2, 2)))
    for name, p in circuit.named_parameters():
        assert torch.equal(p, before[name] if name in SIGNED else before[name].clamp(min=0))


@pytest.mark.parametrize("sizes", [(0, 8, 4), (3, 0, 4), (3, 8, 0)])
def test_refuses_empty_sizes(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        EICircuit(sizes[0], sizes[1], ei_ratio=sizes[2])
