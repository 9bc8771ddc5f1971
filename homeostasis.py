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

Synaptic scaling: after each step the weights of W_EE and W_IE that lead to one neuron have the sum that they had at
first. In a training loop of your own, call `conserve_synapses` after `clamp_dale`.

Intrinsic plasticity needs a division that cannot be by nearly nothing. With the adaptive epsilon a position that hardly
a neuron drives is divided by a tiny I_div, and such positions decide the standard deviation of the map. So epsilon is
0.3 here: more than I_div, which has a mean of 0.09 to 0.27 in the layers of VGG-8 after E-I Init (CIFAR-10, a quarter
of the width). So half to three quarters of the divisor is the same everywhere, and gain control is weaker.
"""

import torch
import torch.nn.functional as F

from ei_prop import straight_through
from inhibition import EICircuit, EICircuit2d


class Homeostasis:
    """What a circuit becomes with it: x as for the circuit -> I_int', of the shape of I_int.

    Buffers: mean, sd (n_E,), m and s above; total_ee (n_E,), total_ie (n_I,), the sums of weights. They are 0 before
    the first batch in training, which counts whole (with E-I Init it is its batch). A readout has no homeostasis, and
    `currents` gives I_int before it.
    """

    rate = 0.1  # k

    def __init__(self, *args, eps=0.3, **options):
        super().__init__(*args, eps=eps, **options)
        for name, n in dict(mean=self.n_e, sd=self.n_e, total_ee=self.n_e, total_ie=self.n_i).items():
            self.register_buffer(name, torch.zeros(n))

    def rows(self):
        """The weights that are scaled, as rows (n, d), each with its sums, (n,)."""
        return [(self.w_ee.flatten(1), self.total_ee), (self.w_ie.flatten(1), self.total_ie)]

    @torch.no_grad()
    def adapt(self, i_int):
        """Moves m and s towards those of a batch of currents, (N, n_E, ...)."""
        sd, mean = torch.std_mean(i_int, [0, *range(2, i_int.dim())], correction=0)  # (n_E,)
        mean, sd = torch.where((mean + sd).isfinite(), torch.stack([mean, sd]), torch.stack([self.mean, self.sd]))
        rate = torch.where(self.sd > 0, self.rate, 1.0)  # of a map that was silent until now: 1
        self.mean += rate * (mean - self.mean)
        self.sd += rate * (sd - self.sd)
        for w, total in self.rows():
            total.copy_(torch.where(total > 0, total, w.sum(1)))

    def forward(self, x):
        i_int = super().forward(x)  # (N, n_E, ...)
        if self.readout:
            return i_int
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


@torch.no_grad()
def conserve_synapses(model):
    """Synaptic scaling, after a step: what all synapses of a neuron gained alike is taken away, and what the bound at 0
    then leaves is scaled away. Other networks stay as they are."""
    for module in model.modules():
        if isinstance(module, Homeostasis) and not module.readout:
            for w, total in module.rows():
                total = torch.where(total > 0, total, w.sum(1))  # before the first batch: as they are
                w.sub_((w.sum(1) - total)[:, None] / w.shape[1]).clamp_(min=0)
                w.mul_((total / w.sum(1).clamp(min=1e-12))[:, None])
