"""What the paper compares with: the same spiking network with batch normalization (BN-SNN), the same without any
normalization (plain SNN), and DANN, a non-spiking network of E-I circuits (Cornford et al., ICLR 2021).

Each is what stands in one layer: presynaptic activity (N, C, H, W) -> current (N, n_E, H', W'), or (N, in) -> (N, n_E).
N merges time steps and samples.
"""

import math

import torch
from torch import nn

from ei_prop import scale_gradient
from inhibition import EICircuit, EICircuit2d


def kaiming(synapses):
    """A convolution or a linear map with weights of any sign: Kaiming's initialisation, and a bias, if any, of 0."""
    nn.init.kaiming_normal_(synapses.weight)
    if synapses.bias is not None:
        nn.init.zeros_(synapses.bias)
    return synapses


def bn_conv(in_channels, n_e, kernel_size, stride=1, padding=0):
    """BN-SNN: batch-normalized over time steps, samples and positions."""
    conv = nn.Conv2d(in_channels, n_e, kernel_size, stride, padding, bias=False)
    return nn.Sequential(kaiming(conv), nn.BatchNorm2d(n_e))


def bn_dense(in_features, n_e):
    """BN-SNN with all-to-all synapses."""
    return nn.Sequential(kaiming(nn.Linear(in_features, n_e, bias=False)), nn.BatchNorm1d(n_e))


def plain_conv(in_channels, n_e, kernel_size, stride=1, padding=0):
    """Plain SNN: no normalization, a bias."""
    return kaiming(nn.Conv2d(in_channels, n_e, kernel_size, stride, padding))


def plain_dense(in_features, n_e):
    """Plain SNN with all-to-all synapses."""
    return kaiming(nn.Linear(in_features, n_e))


class DANN:
    """Dale's ANN: the equations of `inhibition.py`, initialised for the input x = max(0, N(0, s^2)). What differs:

        g_I = exp(alpha) with a free alpha, and I_div + 1e-8 in place of E-I Prop
        W_EE, W_IE ~ Exponential(mean = sqrt(2 pi / (d (2 pi - 1))))
        W_EI = 1 / n_I
        exp(alpha) = sqrt((2 pi - 1) / d)

    Its corrected SGD multiplies the gradient of W_IE by 1 / sqrt(n_E), of W_EI by 1 / d, of alpha by 1 / (d sqrt(n_E)).
    Here this happens in the backward pass, so any optimiser can be used.
    """

    free = ("b_e", "alpha")
    needs_batch = False  # it draws its weights here

    def __init__(self, *args, **options):
        super().__init__(*args, **options, eps=1e-8)
        d = self.fan_in
        with torch.no_grad():
            for name in self.from_excitatory:  # W_EE, W_IE
                getattr(self, name).exponential_().mul_(math.sqrt(2 * math.pi / (d * (2 * math.pi - 1))))
            for name in self.from_inhibitory:  # W_EI
                getattr(self, name).fill_(1 / self.n_i)
        if not self.readout:
            del self.g_i
            self.alpha = nn.Parameter(torch.full((self.n_i,), 0.5 * math.log((2 * math.pi - 1) / d)))

    def inhibitory_parameters(self):
        """W_IE, W_EI and g_I, with the corrected gradients."""
        w_ie = scale_gradient(self.w_ie, 1 / math.sqrt(self.n_e))
        w_ei = scale_gradient(self.w_ei, 1 / self.fan_in)
        if self.readout:
            return w_ie, w_ei, None
        return w_ie, w_ei, scale_gradient(self.alpha, 1 / (self.fan_in * math.sqrt(self.n_e))).exp()


class DANNCircuit(DANN, EICircuit):
    """DANN with all-to-all synapses, (N, in) -> (N, n_E). Arguments as for `EICircuit`, without eps, ste and
    grad_scaling. Parameters: `alpha` (n_I,), of any sign, in place of g_i."""


class DANNCircuit2d(DANN, EICircuit2d):
    """DANN as a convolution, (N, C, H, W) -> (N, n_E, H', W'). Arguments as for `EICircuit2d`, the rest as above."""
