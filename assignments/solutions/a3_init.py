"""Assignment 3 (20 points): E-I Init (paper, E-I Init).

    W_EE, W_IE ~ Exponential(mean m),   m = sqrt(Var[x] / (d (E[x^2] + Var[x])))
    W_EI = 1 / n_I,   g_E = 1,   b_E = 0
    g_I = sqrt(E[x^2] + Var[x]) / (sqrt(d) E[x])

Here x is the input of the layer for the first training batch, (N, ...), where N counts time steps and samples. E[x] and
E[x^2] are means over all its elements. Var[x] is the variance along N (unbiased: it divides by N - 1), averaged over
everything else. d is the fan-in: how many inputs one neuron has. `python check.py a3` checks it.
"""

import torch

ANSWERS = {
    # Question 3 (2 points), with your own lambda and d of `python check.py setup --id YOUR_ID`: g_I for an input of
    # Poisson spike counts of mean lambda. A number. First derive the formula, for `poisson_gain` below.
    "gain_for_poisson": None,
}


def fan_in(w):
    """d, from the weights of a dense layer, (n, in), or of a convolution, (n, in, k, k). A whole number. (3 points)"""
    return w[0].numel()


def weight_mean(x, d):
    """m, for the layer's input x, (N, ...), and the fan-in d. A number. (5 points)"""
    square, var = x.square().mean(), x.var(0).mean()
    return (var / (d * (square + var))) ** 0.5


def gain(x, d):
    """g_I, for the layer's input x, (N, ...), and the fan-in d. A number. (4 points)"""
    mean, square, var = x.mean(), x.square().mean(), x.var(0).mean()
    return (square + var) ** 0.5 / (d**0.5 * mean)


def poisson_gain(rate, d):
    """g_I where each input is a Poisson spike count of mean `rate`, independent of the others. A number. (2 points)

    The formula holds for a batch of any size: put in the exact E[x], E[x^2] and Var[x] of a Poisson variable.
    """
    return ((2 + rate) / (d * rate)) ** 0.5


def ei_init(p, x):
    """E-I Init of one layer, in place. (4 points)

    Args:
        p: a dict of parameters that require gradients: w_ee (n_E, in), w_ie (n_I, in), or of a convolution
            (n_E, in, k, k), (n_I, in, k, k); w_ei (n_E, n_I), g_i (n_I,), g_e (n_E,), b_e (n_E,). The readout of a
            network has w_ee, w_ie and w_ei only.
        x: the input of the layer, (N, in) or (N, in, H, W).
    """
    d = fan_in(p["w_ee"])
    m = weight_mean(x, d)
    with torch.no_grad():
        for name in ("w_ee", "w_ie"):
            p[name].exponential_().mul_(m)
        p["w_ei"].fill_(1 / p["w_ei"].shape[1])
        if "g_i" in p:
            p["g_i"].fill_(gain(x, d))
            p["g_e"].fill_(1)
            p["b_e"].fill_(0)


def initialize(layers, batch, init=ei_init):
    """E-I Init of a network, layer by layer: each layer sees what the layers before it send, initialised. (2 points)

    Args:
        layers: a list of pairs (p, forward): forward(p, x) is what the layer sends to the next one.
        batch: the input of the first layer.
        init: what initialises one layer, init(p, x).
    """
    x = batch
    for p, forward in layers:
        init(p, x)
        with torch.no_grad():
            x = forward(p, x)
