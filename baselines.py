"""What the paper compares with: the same spiking network with batch normalization (BN-SNN), and with nothing in its
place; and DANN, the non-spiking network of E-I circuits (Cornford et al., ICLR 2021).

Each is one layer, presynaptic activity (N, C, H, W) -> current (N, n_E, H', W'), where N merges time steps and samples.
"""

import math

import torch
from torch import nn

from ei_prop import scale_gradient
from inhibition import EICircuit, EICircuit2d


def bn_conv(in_channels, n_e, kernel_size, stride=1, padding=0):
    """BN-SNN: a convolution of free sign, batch-normalized over time steps, samples and positions."""
    conv = nn.Conv2d(in_channels, n_e, kernel_size, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, nn.BatchNorm2d(n_e))


def plain_conv(in_channels, n_e, kernel_size, stride=1, padding=0):
    """Un-normalized SNN: a convolution of free sign with Kaiming's initialisation, and a bias."""
    conv = nn.Conv2d(in_channels, n_e, kernel_size, stride, padding)
    nn.init.kaiming_normal_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class _DANN:
    """Dale's ANN: the circuit of `inhibition.py` for rectified activity, initialised once for x = max(0, N(0, s^2)).

    Where it differs: divisive gains g_I = exp(alpha) with a free alpha, a fixed epsilon of 1e-8 added to I_div, and

        W_EE, W_IE ~ Exponential(mean = sqrt(2 pi / (d (2 pi - 1))))
        W_EI = 1 / n_I                      exp(alpha) = sqrt((2 pi - 1) / d)

    Its corrected SGD multiplies the gradients of W_IE by 1 / sqrt(n_E), of W_EI by 1 / d, of alpha by
    1 / (d sqrt(n_E)); here that happens backward, so that any optimiser is a corrected one.
    """

    needs_batch = False

    def _setup(self, fan_in_shape, n_e, ei_ratio, readout, *_):
        super()._setup(fan_in_shape, n_e, ei_ratio, readout, eps=1e-8, ste=True, grad_scaling=True)
        d = self.fan_in
        with torch.no_grad():
            for w in (self.w_ee, self.w_ie):
                w.exponential_().mul_(math.sqrt(2 * math.pi / (d * (2 * math.pi - 1))))
            self.w_ei.fill_(1 / self.n_i)
        if not readout:
            del self.g_i
            self.alpha = nn.Parameter(torch.full((self.n_i,), 0.5 * math.log((2 * math.pi - 1) / d)))

    def _inhibition(self):
        by_n_e = 1 / math.sqrt(self.n_e)
        w_ie, w_ei = scale_gradient(self.w_ie, by_n_e), scale_gradient(self.w_ei, 1 / self.fan_in)
        return w_ie, w_ei, None if self.readout else scale_gradient(self.alpha, by_n_e / self.fan_in).exp()


class DANNCircuit(_DANN, EICircuit):
    """DANN with all-to-all synapses, (N, in) -> (N, n_E). Arguments as for `EICircuit`; eps, ste and grad_scaling have
    no effect. Parameters: `alpha` (n_I,), of any sign, in place of g_i."""


class DANNCircuit2d(_DANN, EICircuit2d):
    """DANN as a convolution, (N, C, H, W) -> (N, n_E, H', W'). Arguments as for `EICircuit2d`, else as above."""
