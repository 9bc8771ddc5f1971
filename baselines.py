"""What the paper compares with: the same spiking network with batch normalization, and with nothing in its place.

Each is one layer, presynaptic activity (N, C, H, W) -> current (N, n_E, H', W'), where N merges time steps and samples.
"""

from torch import nn


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
