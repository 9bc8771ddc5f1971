"""E-I Init: weights that make the circuit a normalization at the first batch, and only there (paper, E-I Init).

With E[x], E[x^2] and Var[x] measured on a layer's input, and d its fan-in:

    W_EE, W_IE ~ Exponential(mean = sqrt(Var[x] / (d (E[x^2] + Var[x]))))
    W_EI = 1 / n_I      g_E = 1      b_E = 0
    g_I  = sqrt(E[x^2] + Var[x]) / (sqrt(d) E[x])           for Bernoulli(p) spikes sqrt((2 - p) / (d p))

An exponential variable is non-negative and its variance is the square of its mean. So the interneurons' average is the
excitatory mean, E[I_sub] = E[I_EE]: the balanced current has mean 0. And E[I_div] = std(I_EE): the divided one has a
standard deviation of about 1.
"""

from contextlib import ExitStack

import torch

from inhibition import EICircuit


@torch.no_grad()
def ei_init(circuit, x):
    """Draws the parameters of one circuit for the statistics of its input (paper, E-I Init; above).

    Args:
        circuit: an `EICircuit` or `EICircuit2d`, changed in place. Random numbers come from torch's global generator.
        x: (N, in) or (N, in, H, W), non-negative presynaptic activity with at least 2 entries along N, the time steps
            and samples of the first training batch. Var[x] is the unbiased variance along N, averaged over features.

    Raises:
        ValueError: for a silent input (E[x] = 0), one that never varies, or a single sample.
    """
    if len(x) < 2:
        raise ValueError("E-I Init needs a batch of at least 2 to measure a variance")
    mean, mean_square, var = x.mean(), x.square().mean(), x.var(0).mean()
    if not mean > 0:
        raise ValueError("the input of the layer is silent (E[x] = 0), so E-I Init has nothing to scale to")
    if not var > 0:
        raise ValueError("the input of the layer is the same in every sample (Var[x] = 0): all weights would be 0")
    d = circuit.fan_in
    scale = (var / (d * (mean_square + var))).sqrt()
    circuit.w_ee.exponential_().mul_(scale)
    circuit.w_ie.exponential_().mul_(scale)
    circuit.w_ei.fill_(1 / circuit.n_i)
    if not circuit.readout:
        circuit.g_i.copy_((mean_square + var).sqrt() / (d**0.5 * mean))
        circuit.g_e.fill_(1)
        circuit.b_e.zero_()


@torch.no_grad()
def initialize(model, batch, init=ei_init):
    """E-I Init of a whole network: layer by layer in forward order, each seeing what those before it now send.

    An explicit call, once, before training; never after loading a checkpoint. A network without circuits is left as is,
    and so is DANN, which draws its weights without a batch.

    Args:
        model: a network of `model.build`.
        batch: the first training batch, (B, C, H, W) or frames (B, T, C, H, W), values >= 0, B at least 2.
        init: what draws the parameters of a circuit, given the circuit and its input.

    Raises:
        ValueError: names the layer that cannot be initialised.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, EICircuit) and m.needs_batch}
    if not names:
        return

    def before_forward(circuit, args):
        try:
            init(circuit, args[0])
        except ValueError as error:
            raise ValueError(f"layer {names[circuit]}: {error}") from None

    if len(batch) < 2:
        raise ValueError("E-I Init measures a variance: it needs a batch of at least 2 samples")
    if batch.dim() == 4:  # a static image is the same frame at each time step, and counts as often
        batch = batch.unsqueeze(1).expand(-1, model.T, -1, -1, -1)
    with ExitStack() as hooks:
        for circuit in names:
            hooks.enter_context(circuit.register_forward_pre_hook(before_forward))
        model(batch)
