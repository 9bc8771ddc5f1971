"""Homeostasis. It is not in the paper: an option, with which an E-I network learns nearly as fast as with a batch norm
(CIFAR-10, a quarter of the width, 3 epochs; results/learning.md says how it was found, and what is not known yet).

E-I Init gives I_int the mean 0 and the standard deviation 1 in each map, once. After that nothing holds them. In cortex
much does, slowly: a neuron that fires too much becomes less excitable within hours (intrinsic plasticity), and the
strength of all its synapses together is kept (synaptic scaling).

Intrinsic plasticity: each map keeps slow averages, m and s, of the mean and the standard deviation of its current

    m <- m + k (mean of I_int - m)        s <- s + k (sd of I_int - s)        in each forward pass in training, k = 0.1
    I_int' = g_E (I_int - m) / s + b_E                                        what the LIF neurons receive

(g_E and b_E are in I_int, too, but there the correction takes them away.) Forward, samples of a batch meet in these
averages alone. Backward, the gradient is that of a batch norm: the part of an error that would move or stretch the
whole map is left out, for homeostasis would only undo it.

Synaptic scaling: after each step the weights of W_EE and W_IE that lead to one neuron have the sum that they had before
it. In a training loop of your own, step inside `conserve_synapses`.

Intrinsic plasticity needs a division that cannot be by nearly nothing. With the adaptive epsilon a position that hardly
a neuron drives is divided by a tiny I_div, and such positions decide the standard deviation of the map. So epsilon is
0.3 here: more than I_div, which has a mean of 0.09 to 0.27 in the layers of VGG-8 after E-I Init (CIFAR-10, a quarter
of the width). So half to three quarters of the divisor is the same everywhere, and gain control is weaker.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ei_prop import straight_through
from inhibition import EICircuit, EICircuit2d


class Homeostasis:
    """What a circuit becomes with it: x as for the circuit -> I_int', of the shape of I_int.

    Buffers: mean, sd (n_E,), m and s above. They are 0 before the first batch in training, which counts whole (with
    E-I Init it is its batch). `currents` gives I_int before it. A network's readout is an `EICircuit`.
    """

    rate = 0.1  # k

    def __init__(self, *args, eps=0.3, **options):
        super().__init__(*args, eps=eps, **options)
        self.register_buffer("mean", torch.zeros(self.n_e))
        self.register_buffer("sd", torch.zeros(self.n_e))

    @torch.no_grad()
    def adapt(self, i_int):
        """Moves m and s towards those of a batch of currents, (N, n_E, ...), where these are finite."""
        sd, mean = torch.std_mean(i_int, [0, *range(2, i_int.dim())], correction=0)  # (n_E,)
        rate = torch.where(self.sd > 0, self.rate, 1.0)  # of a map that was silent until now: 1
        for slow, now in (self.mean, mean), (self.sd, sd):
            slow += rate * torch.where((mean + sd).isfinite(), now - slow, 0)

    def forward(self, x):
        i_int = super().forward(x)  # (N, n_E, ...)
        if self.training:
            self.adapt(i_int)
        one_a_map = (-1,) + (1,) * (i_int.dim() - 2)
        held = (i_int - self.mean.view(one_a_map)) / self.sd.clamp(min=1e-5).view(one_a_map)
        if self.training:
            held = straight_through(F.batch_norm(i_int, None, None, training=True), held)
        return self.g_e.view(one_a_map) * held + self.b_e.view(one_a_map)


class HomeostaticCircuit(Homeostasis, EICircuit):
    """With all-to-all synapses. Arguments and parameters as for `EICircuit`."""


class HomeostaticCircuit2d(Homeostasis, EICircuit2d):
    """As a convolution. Arguments and parameters as for `EICircuit2d`."""


def strength(w):
    """The sum of the weights that lead to each neuron: (n, ...) -> (n, 1, ...)."""
    return w.sum(tuple(range(1, w.dim())), keepdim=True)


@contextmanager
def conserve_synapses(model):
    """Synaptic scaling: `with conserve_synapses(model): optimizer.step(); clamp_dale(model)`. What all synapses of a
    neuron gained alike is taken away, what the bound at 0 then leaves is scaled away. In other circuits: nothing."""
    circuits = [m for m in model.modules() if isinstance(m, Homeostasis)]
    weights = [w.detach() for c in circuits for w in (c.w_ee, c.w_ie)]
    totals = [strength(w) for w in weights]
    yield
    for w, total in zip(weights, totals, strict=True):
        w.sub_((strength(w) - total) / w[0].numel()).clamp_(min=0)
        w.mul_(total / strength(w).clamp(min=1e-12))
