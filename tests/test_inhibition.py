import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

import ei_prop
from ei_init import ei_init
from inhibition import EICircuit, EICircuit2d, clamp_dale


def circuit_and_input(kind, density, **options):
    """A circuit with weights of no symmetry, and spikes for it; the first sample is silent. Neuron 2 has no inhibition,
    as Dale's law may leave it: I_div = 0 where I_EE > 0, so STE matters."""
    if kind == "2d":
        circuit, x = EICircuit2d(6, 8, 3, padding=1, **options), (torch.rand(5, 6, 7, 7) < density).float()
    else:
        circuit, x = EICircuit(20, 8, **options), (torch.rand(5, 20) < density).float()
    ei_init(circuit, x)
    with torch.no_grad():
        for p in circuit.parameters():
            p.mul_(torch.rand_like(p) + 0.5)
        circuit.w_ei[2] = 0
        if not circuit.readout:
            circuit.b_e.normal_()
    x[0] = 0
    return circuit, x.requires_grad_()


def equations(circuit, x):
    """The equations of the paper on their own, without any code of `inhibition.py` and `ei_prop.py`: i_int."""
    dense = x.dim() == 2

    def synapses(w):
        return x @ w.t() if dense else F.conv2d(x, w, stride=circuit.stride, padding=circuit.padding)

    def lateral(s):
        return s @ w_ei.t() if dense else F.conv2d(s, w_ei[:, :, None, None])

    def maps(p):
        return p if dense else p[:, None, None]

    w_ei = circuit.w_ei
    if circuit.grad_scaling:
        w_ei = w_ei / circuit.fan_in + (w_ei * (1 - 1 / circuit.fan_in)).detach()
    i_ee, s_i = synapses(circuit.w_ee), synapses(circuit.w_ie)
    if circuit.readout:
        return i_ee - lateral(s_i)
    i_div = lateral(maps(circuit.g_i) * s_i)
    if circuit.eps == "adaptive":
        smallest = torch.where(i_div > 0, i_div, torch.inf).amin(tuple(range(1, x.dim())), keepdim=True)
        divisor = torch.where(i_div > 0, i_div, smallest)
        i_div = i_div + (divisor - i_div).detach() if circuit.ste else divisor
    else:
        i_div = i_div + circuit.eps
    return maps(circuit.g_e) * (i_ee - lateral(s_i)) / i_div + maps(circuit.b_e)


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("kind", ["dense", "2d"])
@pytest.mark.parametrize("options", [{}, dict(ste=False), dict(eps=1e-2), dict(grad_scaling=False)])
def test_forward_equals_the_equations(kind, density, readout, options):
    circuit, x = circuit_and_input(kind, density, readout=readout, **options)
    out = circuit(x)
    grad = torch.randn_like(out)
    if options == dict(ste=False):  # autograd through inf / inf is NaN in a silent sample of the literal equations
        x = x.detach()[1:].requires_grad_()
        out, grad = circuit(x), grad[1:]
    inputs = [x, *circuit.parameters()]
    grads = torch.autograd.grad(out, inputs, grad)
    assert torch.equal(out, circuit.currents(x)["i_int"])
    literal = equations(circuit, x)
    assert list(circuit.currents(x)) == ["i_ee", "i_ie", "i_sub", *["i_div"] * (not readout), "i_int"]
    assert relative_error(out, literal) < 1e-5
    for a, b in zip(grads, torch.autograd.grad(literal, inputs, grad), strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("kernel, stride, padding, size", [(3, 2, 1, 7), (1, 2, 0, 6), (3, 1, 2, 5), (2, 1, 0, 4)])
def test_strides_paddings_and_kernels(kernel, stride, padding, size):
    circuit = EICircuit2d(3, 8, kernel, stride=stride, padding=padding)
    assert (circuit.kernel_size, circuit.stride, circuit.padding) == (kernel, stride, padding)
    x = torch.rand(4, 3, size, size)
    ei_init(circuit, x)
    x = x * (torch.rand_like(x) < 0.1)
    assert relative_error(circuit(x), equations(circuit, x)) < 1e-5
    reached = F.conv2d(x.sum(1, keepdim=True), torch.ones(1, 1, kernel, kernel), None, stride, padding) > 0
    assert torch.equal(circuit.is_reached(x), reached) and 0 < reached.float().mean() < 1


def test_the_defaults_are_those_of_the_paper():
    circuit, conv = EICircuit(6, 8), EICircuit2d(2, 8, 3)
    for c in (circuit, conv):
        assert (c.n_e, c.n_i, c.readout, c.eps, c.ste, c.grad_scaling) == (8, 2, False, "adaptive", True, True)
        assert not c.b_e.any() and (c.g_e == 1).all() and (c.g_i == 1).all()
    assert (conv.stride, conv.padding) == (1, 0)
    assert repr(circuit) == "EICircuit(fan_in=6, n_e=8, n_i=2)"
    assert repr(EICircuit(6, 8, readout=True)) == "EICircuit(fan_in=6, n_e=8, n_i=2, readout)"
    options = dict(eps=0.5, ste=False, grad_scaling=False, readout=True, ei_ratio=2)
    for c in (EICircuit(6, 8, **options), EICircuit2d(6, 8, 1, **options)):
        assert (c.eps, c.ste, c.grad_scaling, c.readout, c.n_i) == (0.5, False, False, True, 4)
    assert EICircuit2d(1, 8, 3, 2, 1, 8, True).n_i == 1  # all by position


def test_starts_with_the_absolute_values_of_kaiming():
    circuit = EICircuit2d(64, 512, 3)
    for w, fan_in in ((circuit.w_ee, 576), (circuit.w_ie, 576), (circuit.w_ei, 128)):
        assert (w >= 0).all() and w.square().mean().item() == pytest.approx(2 / fan_in, rel=0.02)


@pytest.mark.parametrize("kind", ["dense", "2d"])
def test_shapes_are_those_of_the_design(kind):
    circuit = EICircuit2d(3, 10, 3) if kind == "2d" else EICircuit(27, 10)
    fan_in = (3, 3, 3) if kind == "2d" else (27,)
    assert circuit.fan_in == 27
    shapes = {name: tuple(p.shape) for name, p in circuit.named_parameters()}
    assert shapes == dict(w_ee=(10, *fan_in), w_ie=(2, *fan_in), w_ei=(10, 2), g_i=(2,), g_e=(10,), b_e=(10,))
    assert EICircuit(5, 3).n_i == 1 and EICircuit(5, 12, ei_ratio=3).n_i == 4
    assert list(dict(EICircuit(5, 8, readout=True).named_parameters())) == ["w_ee", "w_ie", "w_ei"]


def test_a_silent_sample_gets_b_e_even_where_excitation_is_left():
    circuit, x = circuit_and_input("2d", 0.5)
    with torch.no_grad():
        circuit.g_i.zero_()  # no divisive inhibition at all, as Dale's clamp may leave it
    out = circuit(x)
    assert torch.equal(out, circuit.b_e.view(-1, 1, 1).expand_as(out))


def test_clamp_dale():
    circuit, _ = circuit_and_input("2d", 0.5)
    with torch.no_grad():
        for p in circuit.parameters():
            p.normal_()
    before = {name: p.detach().clone() for name, p in circuit.named_parameters()}
    clamp_dale(torch.nn.Sequential(circuit, torch.nn.Linear(2, 2)))
    for name, p in circuit.named_parameters():
        assert torch.equal(p, before[name] if name == "b_e" else before[name].clamp(min=0))


@pytest.mark.parametrize("sizes", [(0, 8, 4), (3, 0, 4), (3, 8, 0)])
def test_refuses_empty_sizes(sizes):
    message = rf"^a circuit needs sizes of at least 1, not \({sizes[0]},\), n_e={sizes[1]}, ei_ratio={sizes[2]}$"
    with pytest.raises(ValueError, match=message):
        EICircuit(sizes[0], sizes[1], ei_ratio=sizes[2])
    with pytest.raises(ValueError, match=rf"at least 1, not \({sizes[0]}, 3, 3\)"):
        EICircuit2d(sizes[0], sizes[1], 3, ei_ratio=sizes[2])
    with pytest.raises(ValueError, match="at least 1"):
        EICircuit2d(3, 8, 0)
    assert EICircuit(1, 1, ei_ratio=1).n_i == 1


@pytest.mark.parametrize("eps", [0, 0.0, -1e-8, float("nan"), "adaptiv", ""])
def test_refuses_an_eps_that_is_none(eps):
    with pytest.raises(ValueError, match=f"^eps is a positive number or one of adaptive.*, not {eps!r}$"):
        EICircuit(3, 8, eps=eps)


def test_a_new_stabilizer_is_a_line_in_the_table(monkeypatch):
    monkeypatch.setitem(ei_prop.STABILIZERS, "one", lambda i_div: torch.ones(()))
    circuit, x = EICircuit(3, 8, eps="one"), torch.tensor([[1.0, 0, 2], [0, 0, 0]])
    assert torch.equal(circuit(x)[1], torch.zeros(8))
    with torch.no_grad():
        circuit.w_ei[0] = 0
        circuit.b_e.fill_(0.5)
    torch.testing.assert_close(circuit(x)[0, 0], circuit.w_ee[0] @ x[0] + 0.5)
    with pytest.raises(ValueError, match=r"one of adaptive.*, one, not 'two'"):
        EICircuit(3, 8, eps="two")


@pytest.mark.parametrize("kind", ["dense", "2d"])
def test_second_derivatives_of_the_circuit(kind):
    circuit, x = circuit_and_input(kind, 0.3, grad_scaling=False)
    circuit, x = circuit.double(), x.detach()[1:].double().requires_grad_()
    grad = torch.randn_like(circuit(x))
    found = []
    for form in (circuit, lambda x: equations(circuit, x)):
        inputs = [x, *circuit.parameters()]
        first = torch.autograd.grad(form(x), inputs, grad, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


def test_the_demonstration(demonstration):
    lines, found = demonstration("inhibition.py").splitlines(), {}
    for line in lines:
        found[line.split("  ")[0].strip()] = [json.loads(row) for row in re.findall(r"\[[-0-9., ]*\]", line)]
    w_ee, w_ie, b_e = (torch.tensor(found[name]) for name in ("W_EE", "W_IE", "b_E"))
    x = torch.tensor(found["x"])
    i_ee, i_ie = x @ w_ee.t(), x @ w_ie.t()
    assert found["I_EE"] == i_ee.tolist() == [[3, 2, 1, 2], [0] * 4] and found["I_IE"] == i_ie.tolist() == [[2], [0]]
    assert found["I_sub = W_EI s_I"] == [[2] * 4, [0] * 4]
    assert found["I_div = W_EI (g_I . s_I)"] == [[1] * 4, [0] * 4]
    i_int = [((i_ee[0] - 2) / 1 + b_e[0]).tolist(), b_e[0].tolist()]
    last = found["I_int = g_E . (I_EE - I_sub) / I_div + b_E"]
    assert last[0] == pytest.approx(i_int[0]) and last[1] == pytest.approx(i_int[1])
    assert lines[-1].endswith("so I_int stays the same: [1.0, 0.0, -1.0, 0.1]")
