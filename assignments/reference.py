"""The right solutions of A1 to A4: the repository itself, called as the students' functions are.

For `lecturer.py`; it is not part of the handout.
"""

import contextlib
import types

import torch

import ei_init
import ei_prop
import lif
from inhibition import EICircuit, EICircuit2d, clamp_dale


@contextlib.contextmanager
def zeros_become_half():
    """For a `with` block, "half" is a stabilizer of the repository: what the check gives to students."""
    ei_prop.STABILIZERS["half"] = lambda i_div: torch.full_like(i_div[:, :1], 0.5)
    try:
        yield
    finally:
        del ei_prop.STABILIZERS["half"]


class Given(EICircuit2d):
    """A 1x1 circuit with given parameters."""

    def __init__(self, w_ee, w_ie, w_ei, **rest):
        super().__init__(w_ee.shape[1], len(w_ee), 1, grad_scaling=False)  # that is A4
        self.eps = "half"
        for name, value in dict(w_ee=w_ee[..., None, None], w_ie=w_ie[..., None, None], w_ei=w_ei, **rest).items():
            delattr(self, name)
            setattr(self, name, value)

    def at(self, x):
        """The currents for x, (N, in, P)."""
        with zeros_become_half():
            return {name: value[..., 0] for name, value in self.currents(x[..., None]).items()}


def currents(x, p, stabilize):
    return Given(**p).at(x)


def pv_som_currents(x, p, stabilize):
    gains = dict(g_i=p["g_p"], g_e=p["g_e"], b_e=p["b_e"])
    som = Given(p["w_ee"], p["w_se"], p["w_es"], **gains | dict(g_i=torch.ones(len(p["w_se"])))).at(x)
    pv = Given(p["w_ee"], p["w_pe"], p["w_ep"], **gains).at(x)
    with zeros_become_half():
        quotient = ei_prop.divide(som["i_ee"] - som["i_sub"], pv["i_div"], "half")
    i_int = p["g_e"][:, None] * quotient + p["b_e"][:, None]
    return dict(i_ee=som["i_ee"], i_sub=som["i_sub"], i_div=pv["i_div"], i_int=i_int)


def clamp(p):
    circuit = EICircuit(*reversed(p["w_ee"].shape), readout="b_e" not in p)
    for name, value in p.items():
        circuit.register_parameter(name, torch.nn.Parameter(value.detach()))  # the same memory
    clamp_dale(circuit)


class Layer(EICircuit):
    """What `ei_init.initialize` meets: a circuit that sends what a given function says."""

    def __init__(self, p, forward):
        super().__init__(1, 1)
        self.p, self.send = p, forward

    def forward(self, x):
        return self.send(self.p, x)


def initialize(layers, batch, init):
    model = torch.nn.Sequential(*(Layer(p, forward) for p, forward in layers))
    ei_init.initialize(model, batch, lambda circuit, x: init(circuit.p, x))


class Ones(torch.nn.Parameter):
    """Weights of which `ei_init` says that they are drawn with the mean m: they become m."""

    def exponential_(self):
        return self.fill_(1)


def initialised(x, fan_in):
    """A dense circuit of this fan-in after E-I Init with x, in which every weight is the mean of its distribution."""
    circuit = EICircuit(fan_in, 1)
    circuit.w_ee = circuit.w_ie = Ones(circuit.w_ee.data)
    ei_init.ei_init(circuit, x)
    return circuit


def init(p, x):
    n_e, n_i, shape = len(p["w_ee"]), len(p["w_ie"]), p["w_ee"].shape[1:]
    circuit = EICircuit(tuple(shape), n_e, readout="b_e" not in p)
    circuit.n_i = n_i
    for name, value in p.items():
        circuit.register_parameter(name, torch.nn.Parameter(value.detach()))
    ei_init.ei_init(circuit, x)


def fan_in(w):
    return (EICircuit2d(w.shape[1], len(w), w.shape[2]) if w.dim() == 4 else EICircuit(w.shape[1], len(w))).fan_in


def poisson_gain(rate, d):
    n, active = round(200_000 * (1 + rate)), round(200_000 * rate)  # the rates of the probes are multiples of 1/20
    x = torch.zeros(n, 1, dtype=torch.float64)
    x[:active] = 1 + rate  # 0 or 1 + lambda: the mean and the variance are lambda, as those of Poisson counts
    return initialised(x, d).g_i[0]


def simulate(current, tau, threshold, alpha):
    u, s = lif.simulate(current, tau, threshold, alpha)
    return torch.stack(u), torch.stack(s)


def surrogate(u, threshold, alpha):
    u = u.clone().requires_grad_()
    return torch.autograd.grad(lif.lif(u[None], 1.0, threshold, alpha).sum(), u)[0]  # the first step: u = I


def lateral_weights(w_ei, fan_in):
    circuit = EICircuit(fan_in, len(w_ei))
    del circuit.w_ei
    circuit.w_ei = w_ei
    return circuit.inhibition()[1]


REFERENCE = types.SimpleNamespace(
    spike=lambda u, threshold: lif.lif(u[None], 1.0, threshold)[0],
    surrogate=surrogate,
    simulate=simulate,
    f_i_curve=lambda currents, tau, threshold, steps: lif.lif(currents.expand(steps, -1), tau, threshold).mean(0),
    currents=currents,
    clamp_dale=clamp,
    pv_som_currents=pv_som_currents,
    fan_in=fan_in,
    weight_mean=lambda x, d: initialised(x, d).w_ee[0, 0],
    gain=lambda x, d: initialised(x, d).g_i[0],
    poisson_gain=poisson_gain,
    ei_init=init,
    initialize=initialize,
    stabilize=ei_prop.stabilize,
    scale_gradient=ei_prop.scale_gradient,
    lateral_weights=lateral_weights,
)
