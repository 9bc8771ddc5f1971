"""The E-I circuit, which stands in place of batch normalization (paper, E-I circuit).

In cortex, fast parvalbumin-positive (PV+) interneurons listen to the same inputs as the excitatory neurons around
them, and inhibit these neurons laterally. There is about one for every four excitatory neurons. They act in two ways:
synapses on the dendrites subtract (E-I balance), synapses at the cell body divide (gain control). For presynaptic
activity x >= 0:

    I_EE  = W_EE * x                                  excitation, n_E maps
    I_IE  = W_IE * x                                  drive of the interneurons, n_I maps
    s_I   = max(0, I_IE) = I_IE                       their activity
    I_sub = W_EI s_I                                  subtractive inhibition
    I_div = W_EI (g_I . s_I)                          divisive inhibition
    I_int = g_E . (I_EE - I_sub) / I_div + b_E        what the LIF neurons receive

Here * is a convolution (or a matrix product), and . multiplies each map by its gain. W_EI acts at each position alone.

Dale's law: every weight and gain is non-negative, only b_E is free. `clamp_dale` restores this after each training
step.

Why the input must be non-negative: x stands for firing rates or light intensities. With it nothing in I_IE or I_div can
be negative. A negative x could make I_div negative or close to 0, and dividing by it would not be gain control.

Why there is no ReLU on the interneurons: they are fast, so they are at their steady state max(0, I_IE) within one
time step, and I_IE is never negative. In the forward pass a ReLU changes nothing. In the backward pass its derivative
at 0 is 0: at silent positions it would cut the gradient of I_sub to x, while the gradient of I_EE to x passes. The
two nearly cancel, so what is left alone is large. In the first step of VGG-8 on the digits a ReLU changes the gradient
to x in layer 2 by 0.2 to 1.9 times its norm (40 draws of weights and batch; tests/test_explanations.py). In layer 1
it is 1.6 to 4.5 times, but there x is the image, and its gradient goes nowhere.

The readout (the last layer of a network) is the subtractive half alone, as in the paper: its result is the logits,
I_EE - I_sub averaged over time, and no current of neurons that fire. It has no g_I, g_E, b_E and no LIF.

`python inhibition.py` prints every current of a circuit with five inputs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ei_prop import STABILIZERS, divide, scale_gradient, straight_through


class EICircuit(nn.Module):
    """The circuit with all-to-all synapses: presynaptic activity x, (N, in_features) -> I_int, (N, n_E).

    Args:
        in_features: number of presynaptic neurons; it is also the fan-in d.
        n_e: number of excitatory neurons, n_E.
        ei_ratio: excitatory neurons for each inhibitory one; n_I = n_E // ei_ratio, at least 1.
        readout: only the subtractive half, I_EE - I_sub.
        eps, ste: how zeros of I_div are handled, see `ei_prop.stabilize`.
        grad_scaling: multiply the gradient of W_EI by 1/d, see `ei_prop.scale_gradient`.

    Parameters:
        w_ee (n_E, in), w_ie (n_I, in), w_ei (n_E, n_I), g_i (n_I,), g_e (n_E,), all >= 0, and b_e (n_E,). A weight's
        name says where it leads and where it comes from: `w_ie` leads to inhibitory neurons, from excitatory ones.
        They start as the absolute values of Kaiming's initialisation, the gains as 1. This is the paper's control. E-I
        Init (`ei_init.initialize`) is a call of its own.

    Raises:
        ValueError: a size below 1, or an eps that is neither positive nor a name in `STABILIZERS`.
    """

    from_excitatory = ("w_ee", "w_ie")  # weights from excitatory neurons: they act on x
    from_inhibitory = ("w_ei",)  # weights from interneurons, at each position alone
    free = ("b_e",)  # parameters that may be negative; DANN has one more
    needs_batch = True  # E-I Init measures the first training batch; DANN draws its weights without one

    def __init__(self, in_features, n_e, ei_ratio=4, readout=False, eps="adaptive", ste=True, grad_scaling=True):
        super().__init__()
        fan_in_shape = in_features if isinstance(in_features, tuple) else (in_features,)
        if min(*fan_in_shape, n_e, ei_ratio) < 1:
            raise ValueError(f"a circuit needs sizes of at least 1, not {fan_in_shape}, n_e={n_e}, ei_ratio={ei_ratio}")
        if eps not in STABILIZERS and (isinstance(eps, str) or not eps > 0):
            raise ValueError(f"eps is a positive number or one of {', '.join(STABILIZERS)}, not {eps!r}")
        self.n_e, self.n_i = n_e, max(1, n_e // ei_ratio)
        self.fan_in = torch.Size(fan_in_shape).numel()  # d
        self.readout, self.eps, self.ste, self.grad_scaling = readout, eps, ste, grad_scaling
        self.w_ee = nn.Parameter(torch.empty(self.n_e, *fan_in_shape))
        self.w_ie = nn.Parameter(torch.empty(self.n_i, *fan_in_shape))
        self.w_ei = nn.Parameter(torch.empty(self.n_e, self.n_i))
        with torch.no_grad():
            for w in self.parameters():
                nn.init.kaiming_normal_(w).abs_()
        if not readout:
            self.g_i = nn.Parameter(torch.ones(self.n_i))
            self.g_e = nn.Parameter(torch.ones(self.n_e))
            self.b_e = nn.Parameter(torch.zeros(self.n_e))

    def synapses(self, x, w):
        """The current that x sends through the weights w, (n, in, ...): W * x, (N, n, ...).

        It is exactly 0 where no neuron of the receptive field is active. The mask makes sure of that: some algorithms
        of convolution (Winograd, FFT) leave rounding noise of both signs there, and the noise would be taken for the
        smallest positive I_div. The gradient passes as if there were no mask; else silent positions would lose theirs,
        as with a ReLU.
        """
        current = self.product(x, w).to(w.dtype)  # (N, n, ...); with torch.autocast the product alone has 16 bits
        return straight_through(current, current * self.is_reached(x))

    def product(self, x, w):
        return F.linear(x, w)  # (N, n)

    def is_reached(self, x):
        """Whether any presynaptic neuron in the receptive field is active: (N, 1)."""
        return x.amax(1, keepdim=True) > 0

    def lateral(self, w_ei, s):
        """Lateral inhibition W_EI s, at each position alone: (n_E, n_I), (N, n_I, ...) -> (N, n_E, ...)."""
        return torch.einsum("ei,ni...->ne...", w_ei, s).to(w_ei.dtype)

    def scaled(self, w):
        """A weight from interneurons. In the backward pass its gradient is multiplied by 1/d (E-I Prop)."""
        return scale_gradient(w, 1 / self.fan_in) if self.grad_scaling else w

    def inhibitory_parameters(self):
        """W_IE, W_EI and g_I as the equations use them. A readout has no g_I."""
        return self.w_ie, self.scaled(self.w_ei), None if self.readout else self.g_i

    def currents(self, x):
        """Every current of the circuit for presynaptic activity x, in the order of the paper (the equations above).

        Returns:
            A dict of i_ee, i_ie, i_sub, i_div (not in a readout) and i_int. Shapes are given beside each line for a
            convolution; a dense circuit has no H', W'.
        """
        w_ie, w_ei, g_i = self.inhibitory_parameters()  # (n_I, in, k, k), (n_E, n_I), (n_I,)
        # I_EE = W_EE * x: excitation
        i_ee = self.synapses(x, self.w_ee)  # (N, n_E, H', W')
        # I_IE = W_IE * x: drive of the interneurons
        i_ie = self.synapses(x, w_ie)  # (N, n_I, H', W')
        # s_I = max(0, I_IE) = I_IE: their activity
        s_i = i_ie  # (N, n_I, H', W')
        # I_sub = W_EI s_I: subtractive inhibition
        i_sub = self.lateral(w_ei, s_i)  # (N, n_E, H', W')
        if self.readout:
            return dict(i_ee=i_ee, i_ie=i_ie, i_sub=i_sub, i_int=i_ee - i_sub)
        one_a_map = (-1,) + (1,) * (x.dim() - 2)  # gains and bias have one value a map: (n, 1, 1), dense (n,)
        # I_div = W_EI (g_I . s_I): divisive inhibition
        i_div = self.lateral(w_ei, g_i.view(one_a_map) * s_i)  # (N, n_E, H', W')
        # (I_EE - I_sub) / I_div, made safe by E-I Prop
        quotient = divide(i_ee - i_sub, i_div, self.eps, self.ste)  # (N, n_E, H', W')
        # I_int = g_E . quotient + b_E
        i_int = self.g_e.view(one_a_map) * quotient + self.b_e.view(one_a_map)  # (N, n_E, H', W')
        return dict(i_ee=i_ee, i_ie=i_ie, i_sub=i_sub, i_div=i_div, i_int=i_int)

    def forward(self, x):
        """x, (N, in) or (N, in, H, W), not negative -> I_int, (N, n_E) or (N, n_E, H', W')."""
        return self.currents(x)["i_int"]

    def extra_repr(self):
        return f"fan_in={self.fan_in}, n_e={self.n_e}, n_i={self.n_i}" + ", readout" * self.readout


class EICircuit2d(EICircuit):
    """The circuit as a convolution: x, (N, in_channels, H, W) -> I_int, (N, n_E, H', W').

    Args:
        in_channels: presynaptic maps.
        n_e: excitatory maps, n_E.
        kernel_size, stride, padding: of W_EE and W_IE. The fan-in is d = in_channels * kernel_size ** 2.
        The others: as for `EICircuit`.

    Parameters:
        w_ee (n_E, in, k, k) and w_ie (n_I, in, k, k); the others as in `EICircuit`.
    """

    def __init__(self, in_channels, n_e, kernel_size, stride=1, padding=0, ei_ratio=4, readout=False, **options):
        super().__init__((in_channels, kernel_size, kernel_size), n_e, ei_ratio, readout, **options)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def product(self, x, w):
        return F.conv2d(x, w, stride=self.stride, padding=self.padding)  # (N, n, H', W')

    def is_reached(self, x):
        """Whether any presynaptic neuron in the receptive field is active: (N, 1, H', W')."""
        active = F.pad(x.amax(1, keepdim=True), [self.padding] * 4)  # the most active map, (N, 1, H + 2p, W + 2p)
        return F.max_pool2d(active, self.kernel_size, self.stride) > 0


@torch.no_grad()
def clamp_dale(model):
    """Dale's law: sets W_EE, W_IE, W_EI, g_I and g_E to 0 where an optimiser step made them negative, in place.

    Args:
        model: any module. All `EICircuit`s in it are found. b_E stays as it is.
    """
    for circuit in model.modules():
        if isinstance(circuit, EICircuit):
            for name, p in circuit.named_parameters(recurse=False):
                if name not in circuit.free:
                    p.clamp_(min=0)


if __name__ == "__main__":
    print("Five inputs, four excitatory neurons, one interneuron. All weights from the interneuron are 1, g_I = 0.5.\n")
    circuit = EICircuit(in_features=5, n_e=4)
    x = torch.tensor([[1.0, 0, 1, 0, 1], [0.0, 0, 0, 0, 0]])  # (N, 5): two samples, the second is silent
    with torch.no_grad():
        circuit.w_ee.copy_(torch.tensor([[2, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 2, 0], [0, 3, 1, 0, 1]]))
        circuit.w_ie.copy_(torch.tensor([[1, 1, 0, 0, 1]]))
        circuit.w_ei.fill_(1)
        circuit.g_i.fill_(0.5)
        circuit.b_e.copy_(torch.tensor([0.0, 0.0, 0.0, 0.1]))
        found = circuit.currents(x)
    print(f"x     {x.tolist()}\nW_EE  {circuit.w_ee.tolist()}\nW_IE  {circuit.w_ie.tolist()}\nb_E   [0, 0, 0, 0.1]\n")
    names = {"i_ee": "I_EE  = W_EE x", "i_ie": "I_IE  = W_IE x", "i_sub": "I_sub = W_EI s_I"}
    names |= {"i_div": "I_div = W_EI (g_I . s_I)", "i_int": "I_int = g_E . (I_EE - I_sub) / I_div + b_E"}
    for name, equation in names.items():
        print(f"{equation:44}", "   ".join(str([round(v, 3) for v in row]) for row in found[name].tolist()))
    print("\nThe first sample: 3 - 2 = 1 and 1 / 1 = 1. The second is silent, I_div = 0, and only b_E is left.")
    with torch.no_grad():
        twice = [round(v, 3) for v in circuit(2 * x)[0].tolist()]
    print(f"With 2 x in place of x, I_EE - I_sub and I_div both double, so I_int stays the same: {twice}")
