"""Homeostasis. It is not in the paper: an option, with which an E-I network learns nearly as fast as BN-SNN
(CIFAR-10, VGG-8 of half the width, 20 epochs, three seeds: results/learning.md, which says how it was found, too).

E-I Init aims at the mean 0 and the standard deviation 1 of I_int, once. After that nothing holds them. In cortex much
does, slowly: a neuron that fires too much becomes less excitable within hours (intrinsic plasticity), and where some of
its synapses grow, others shrink, so that their total strength hardly changes (heterosynaptic plasticity).

Intrinsic plasticity: each map keeps slow averages, m and v, of the mean and the variance of its quotient q. They start
at 0 and 1, which E-I Init makes true of a layer roughly, not of each map.

    q = 2 (I_EE - I_sub) / (I_div + mean of I_div over the sample)            in place of (I_EE - I_sub) / I_div
    m <- m + k (mean of q - m)        v <- v + k (variance of q - v)          in each forward pass in training, k = 0.1
    I_int = g_E (q - m) / sqrt(v) + b_E                                       what the LIF neurons receive

In training a batch norm divides by the statistics of the batch at hand. Here, forward, samples of a batch meet in the
slow averages alone, of which this batch, once it is counted, is a tenth. Backward, the gradient is that of a batch
norm: the part of an error that would move or stretch the whole map is left out.

The mean in the divisor is a wider pool of interneurons (a normalization pool: Carandini and Heeger, 2012). As two
things of about the same size are added, the quotient is doubled. Without the pool, a position that hardly a neuron
drives is divided by nearly nothing, and a few such positions hold much of the variance of a map. The divisor is 0 in a
silent sample only, so the adaptive epsilon and STE change nothing here. Gain control stays: with 2 x in place of x, q
is the same. But where nothing comes in, I_int is not b_E: q is 0, and q - m is not.

Synaptic normalization: after each step the weights of W_EE and W_IE that lead to one neuron have the sum that they had
before it. So weight decay pulls them towards their mean, not towards 0. In a training loop of your own, step inside
`conserve_synapses`, and call `model.eval()` before you test: in training each forward pass moves m and v, also that of
`initialize`.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ei_prop import divide, straight_through
from inhibition import EICircuit, EICircuit2d


class Homeostasis:
    """What a circuit becomes with it: x as for the circuit -> I_int, of the same shape.

    Buffers: mean, var (n_E,), m and v above. `currents` gives the paper's I_int. A network's readout is an `EICircuit`.
    """

    rate = 0.1  # k

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mean", torch.zeros(self.n_e))
        self.register_buffer("var", torch.ones(self.n_e))

    def quotient(self, x):
        """q, (N, n_E, ...)."""
        found = self.currents(x)
        i_div = found["i_div"]  # (N, n_E, ...)
        pool = i_div.mean(tuple(range(1, i_div.dim())), keepdim=True)  # (N, 1, ...)
        return 2 * divide(found["i_ee"] - found["i_sub"], i_div + pool, self.eps, self.ste)

    def forward(self, x):
        q = self.quotient(x)
        if self.training:  # a batch norm, which also returns mean and 1 / sqrt(variance + 1e-5) of each map, (n_E,)
            learned, mean, inverse = torch.native_batch_norm(q, self.g_e, self.b_e, None, None, True, 0.0, 1e-5)
            self.mean.lerp_(mean, self.rate)
            self.var.lerp_(inverse**-2, self.rate)
        i_int = F.batch_norm(q, self.mean, self.var, self.g_e, self.b_e)  # g_E (q - m) / sqrt(v) + b_E
        return straight_through(learned, i_int) if self.training else i_int  # value: i_int, gradient: a batch norm's


class HomeostaticCircuit(Homeostasis, EICircuit):
    """With all-to-all synapses. Arguments and parameters as for `EICircuit`."""


class HomeostaticCircuit2d(Homeostasis, EICircuit2d):
    """As a convolution. Arguments and parameters as for `EICircuit2d`."""


def strength(w):
    """The mean of the weights that lead to each neuron: (n, ...) -> (n, 1, ...)."""
    return w.mean(tuple(range(1, w.dim())), keepdim=True)


@contextmanager
def conserve_synapses(model):
    """Around a step: `with conserve_synapses(model): optimizer.step(); clamp_dale(model)`. What all synapses of
    a neuron gained alike is taken away; then, since no weight falls below 0, what is still too much is scaled away. In
    other circuits, and where the weights are pruned or parametrized: nothing."""
    circuits = [m for m in model.modules() if isinstance(m, Homeostasis)]
    weights = [getattr(c, name).detach() for c in circuits for name in c.from_excitatory]
    before = [strength(w) for w in weights]
    yield
    for w, kept in zip(weights, before, strict=True):
        w.sub_(strength(w) - kept).clamp_(min=0)
        w.mul_(kept / strength(w).clamp(min=1e-12))
