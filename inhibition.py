"""The E-I circuit: what stands in place of batch normalization (paper, Section on the E-I circuit).

In cortex a pyramidal neuron's excitation is matched by fast inhibition from parvalbumin-positive (PV+) interneurons
that listen to the same inputs. They are about a quarter as many, and they act in two ways: through synapses on the
dendrites they subtract (E-I balance), and at the soma they divide (gain control). For presynaptic activity x >= 0:

    I_EE  = W_EE * x                      excitation
    I_IE  = W_IE * x,   s_I = I_IE        drive and activity of the interneurons
    I_sub = W_EI s_I                      subtractive inhibition
    I_div = W_EI (g_I . s_I)              divisive inhibition
    I_int = g_E . (I_EE - I_sub) / I_div + b_E

An interneuron is fast (tau_I << tau_E), so it is at its steady state max(0, I_IE) within one step; as nothing in I_IE
is negative, that is I_IE itself. No ReLU is computed: its derivative at 0 is 0, and would cut off the gradient that the
straight-through estimator of `ei_prop.py` carries to silent positions.

Every weight and gain is non-negative (Dale's law: `clamp_dale`), only b_E is free.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ei_prop import divide, gain_control, scale_gradient


class EICircuit(nn.Module):
    """The circuit with all-to-all synapses: presynaptic activity (N, in_features) -> I_int (N, n_E).

    Args:
        in_features: presynaptic neurons; also the fan-in d.
        n_e: excitatory neurons, n_E.
        ei_ratio: excitatory neurons per inhibitory one; n_I = n_E // ei_ratio, at least 1.
        readout: only the subtractive half, I_EE - I_sub, as in the last layer of a network: no g_I, g_E, b_E.
        eps, ste: how zeros of I_div are handled, see `ei_prop.stabilize`.
        grad_scaling: multiply the gradient of W_EI by 1/d, see `ei_prop.scale_gradient`.

    Parameters:
        w_ee (n_E, in), w_ie (n_I, in), w_ei (n_E, n_I), g_i (n_I,), g_e (n_E,): >= 0. b_e (n_E,).
        They start as absolute values of Kaiming's initialisation, with gains of 1: the paper's control. What makes the
        circuit a normalization is E-I Init, an explicit call (`ei_init.initialize`).

    Raises:
        ValueError: for a size below 1.
    """

    needs_batch = True  # its initialisation (`ei_init`) measures the first training batch

    def __init__(self, in_features, n_e, ei_ratio=4, readout=False, eps="adaptive", ste=True, grad_scaling=True):
        self._setup((in_features,), n_e, ei_ratio, readout, eps, ste, grad_scaling)

    def _setup(self, fan_in_shape, n_e, ei_ratio, readout, eps, ste, grad_scaling):
        super().__init__()
        if min(*fan_in_shape, n_e, ei_ratio) < 1:
            raise ValueError(f"a circuit needs sizes of at least 1, not {fan_in_shape}, n_e={n_e}, ei_ratio={ei_ratio}")
        self.n_e, self.n_i = n_e, max(1, n_e // ei_ratio)
        self.fan_in = torch.Size(fan_in_shape).numel()
        self.readout, self.eps, self.ste, self.grad_scaling = readout, eps, ste, grad_scaling
        self.w_ee = nn.Parameter(torch.empty(self.n_e, *fan_in_shape))
        self.w_ie = nn.Parameter(torch.empty(self.n_i, *fan_in_shape))
        self.w_ei = nn.Parameter(torch.empty(self.n_e, self.n_i))
        if not readout:
            self.g_i = nn.Parameter(torch.ones(self.n_i))
            self.g_e = nn.Parameter(torch.ones(self.n_e))
            self.b_e = nn.Parameter(torch.zeros(self.n_e))
        with torch.no_grad():
            for w in (self.w_ee, self.w_ie, self.w_ei):
                nn.init.kaiming_normal_(w).abs_()

    def _synapses(self, x, w):
        """Presynaptic activity through the weights w, which are shared by all positions where there are positions.

        Exactly 0 where the receptive field is silent, whatever algorithm convolves: Winograd's and the FFT's leave
        rounding noise there, of both signs, which would be taken for the smallest positive I_div.
        """
        current = self._product(x, w)
        with torch.no_grad():  # the forward value only: the gradient still passes to silent positions
            current.mul_(self._heard(x))
        return current

    def _product(self, x, w):
        return F.linear(x, w)

    def _heard(self, x):
        """Whether any neuron of the receptive field is active: (N, 1), with positions (N, 1, H', W')."""
        return x.amax(1, keepdim=True) > 0

    def _local(self, s, w):
        """Lateral connections w (n_E, n_I), which act at each position alone."""
        return torch.einsum("ei,ni...->ne...", w, s)

    def _inhibition(self):
        """W_IE, W_EI and g_I (None in a readout), with what E-I Prop does to their gradients."""
        w_ei = scale_gradient(self.w_ei, 1 / self.fan_in) if self.grad_scaling else self.w_ei
        return self.w_ie, w_ei, None if self.readout else self.g_i

    def currents(self, x):
        """Every current of the circuit, line by line as in the paper: a dict of i_ee, i_ie, i_sub, i_div (not in a
        readout) and i_int.

        `forward` computes the same I_int with fewer operations.
        """
        w_ie, w_ei, g_i = self._inhibition()
        i_ee = self._synapses(x, self.w_ee)
        i_ie = self._synapses(x, w_ie)
        i_sub = self._local(i_ie, w_ei)
        if self.readout:
            return dict(i_ee=i_ee, i_ie=i_ie, i_sub=i_sub, i_int=i_ee - i_sub)
        g_i, g_e, b_e = (p.view(-1, *[1] * (x.dim() - 2)) for p in (g_i, self.g_e, self.b_e))
        i_div = self._local(g_i * i_ie, w_ei)
        i_int = g_e * divide(i_ee - i_sub, i_div, self.eps, self.ste) + b_e
        return dict(i_ee=i_ee, i_ie=i_ie, i_sub=i_sub, i_div=i_div, i_int=i_int)

    def forward(self, x):
        """x, (N, in) or (N, in, H, W), non-negative -> I_int, (N, n_E) or (N, n_E, H', W')."""
        w_ie, w_ei, g_i = self._inhibition()
        # I_EE - I_sub = (W_EE - W_EI W_IE) * x: as s_I is linear in x, both are one kernel with a sign. Exact.
        w_balanced = self.w_ee - (w_ei @ w_ie.flatten(1)).view_as(self.w_ee)
        if self.readout:
            return self._synapses(x, w_balanced)
        w_balanced = self.g_e.view(-1, *[1] * (x.dim() - 1)) * w_balanced  # g_E scales what the division scales
        # One pass over x serves both populations.
        currents = self._synapses(x, torch.cat([w_balanced, w_ie]))
        w_div = w_ei * g_i  # g_I goes with the synapse instead of the activity
        if self.ste or self.eps != "adaptive":
            return gain_control(currents.movedim(1, -1), w_div, self.b_e, self.eps).movedim(-1, 1)
        balanced, s_i = currents.split([self.n_e, self.n_i], 1)
        return divide(balanced, self._local(s_i, w_div), self.eps, self.ste) + self.b_e.view(-1, *[1] * (x.dim() - 2))

    def extra_repr(self):
        return f"fan_in={self.fan_in}, n_e={self.n_e}, n_i={self.n_i}" + ", readout" * self.readout


class EICircuit2d(EICircuit):
    """The circuit with shared weights, a convolution: (N, in_channels, H, W) -> I_int (N, n_E, H', W').

    Args:
        in_channels: presynaptic maps.
        n_e: excitatory maps, n_E.
        kernel_size, stride, padding: of W_EE and W_IE; the fan-in is d = in_channels * kernel_size ** 2. W_EI acts at
            each position alone, as a 1x1 convolution.
        The others: as for `EICircuit`.

    Parameters:
        w_ee (n_E, in, k, k), w_ie (n_I, in, k, k), the others as in `EICircuit`.
    """

    def __init__(
        self,
        in_channels,
        n_e,
        kernel_size,
        stride=1,
        padding=0,
        ei_ratio=4,
        readout=False,
        eps="adaptive",
        ste=True,
        grad_scaling=True,
    ):
        self._setup((in_channels, kernel_size, kernel_size), n_e, ei_ratio, readout, eps, ste, grad_scaling)
        self.stride, self.padding = stride, padding

    def _product(self, x, w):
        if x.is_cpu and x.shape[2:] == (2, 2) and (*w.shape[2:], self.stride, self.padding) == (3, 3, 1, 1):
            return _conv_2x2(x, w)
        return F.conv2d(x, w, stride=self.stride, padding=self.padding)

    def _heard(self, x):
        active = F.pad(x.amax(1, keepdim=True), [self.padding] * 4)  # max_pool2d's own padding is limited to k / 2
        return F.max_pool2d(active, self.w_ee.shape[-1], self.stride) > 0


def _conv_2x2(x, w):
    """A 3x3 convolution with padding on 2x2 maps, where a VGG ends, as one matrix product. Exact: each position q is
    reached from each position p by one of the kernel's weights; the other 20 of its 36 products meet the padding."""
    place = torch.tensor([0, 1, 3, 4])  # of the four positions in a 3x3 grid whose middle is number 4
    tap = 4 + place[:, None] - place  # p, q
    w_pq = w.permute(2, 3, 1, 0).flatten(0, 1).index_select(0, tap.flatten()).unflatten(0, (4, 4))  # p, q, in, out
    rows = x.permute(0, 2, 3, 1).flatten(1) @ w_pq.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return rows.view(-1, 2, 2, w.shape[0]).permute(0, 3, 1, 2)


@torch.no_grad()
def clamp_dale(model):
    """Dale's law: sets what an optimiser step made negative in W_EE, W_IE, W_EI, g_I and g_E back to 0, in place.

    Args:
        model: any module; its `EICircuit`s are found. b_E is left free.
    """
    for circuit in model.modules():
        if isinstance(circuit, EICircuit):
            for name, p in circuit.named_parameters(recurse=False):
                if name not in ("b_e", "alpha"):  # alpha: the logarithm of DANN's gain
                    p.clamp_(min=0)
