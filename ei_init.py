"""E-I Init: weights that make the circuit a normalization for the first batch, and only for it (paper, E-I Init).

Measured on the layer's input x, with d the fan-in of one neuron: E[x] and E[x^2] over all elements, and Var[x], the
variance over the time steps and samples of the batch, averaged over the features. Then

    W_EE, W_IE ~ Exponential(mean m),   m = sqrt(Var[x] / (d (E[x^2] + Var[x])))
    W_EI = 1 / n_I,   g_E = 1,   b_E = 0
    g_I = sqrt(E[x^2] + Var[x]) / (sqrt(d) E[x])

Why these values give I_int the mean 0 and a standard deviation near 1:

Weights are non-negative (Dale's law). An exponential variable is, and its variance is the square of its mean:

    E[w] = m,   E[w^2] = 2 m^2

For one input x, which is independent of w, E[x]^2 = E[x^2] - Var[x], so the product w x has the variance

    Var[w x] = E[w^2] E[x^2] - E[w]^2 E[x]^2 = 2 m^2 E[x^2] - m^2 (E[x^2] - Var[x]) = m^2 (E[x^2] + Var[x])

E[x^2] and Var[x] are then averaged over the inputs. I_EE sums d of these products, taken as independent, and m is
chosen so that it varies as much as x does:

    Var[I_EE] = d m^2 (E[x^2] + Var[x]) = Var[x]

W_IE has the same distribution as W_EE, and W_EI takes the mean over the interneurons. So I_EE - I_sub has the mean 0
(E-I balance):

    E[I_sub] = E[I_EE] = d m E[x]

The same sum times g_I is the standard deviation of I_EE, by which I_EE - I_sub is divided (gain control):

    E[I_div] = g_I d m E[x] = sqrt(Var[x]) = std(I_EE)

For spikes that are 1 with probability p, E[x] = E[x^2] = p and Var[x] = p (1 - p), so g_I = sqrt((2 - p) / (d p)).

Two things are approximate. The mean is 0 over many draws of the weights; a single draw with few interneurons is off by
0.1 to 0.2. And only the variance of I_EE went into the derivation, while I_sub varies too, partly together with I_EE:
the standard deviation is near 1, not 1. In the demonstration below it is 0.78 to 0.96 (40 draws), and in VGG-8 and
VGG-19 on the digits 0.69 to 1.40 (figures/init.csv).

`python ei_init.py` prints mean and standard deviation of I_int by layer, with and without E-I Init.
"""

from contextlib import ExitStack

import torch

from inhibition import EICircuit


@torch.no_grad()
def ei_init(circuit, x):
    """Draws the parameters of one circuit for the statistics of its input (paper, E-I Init).

    Args:
        circuit: an `EICircuit` or `EICircuit2d`; it is changed in place. Random numbers come from torch's global
            generator.
        x: the layer's input, (N, in) or (N, in, H, W), finite and not negative. N counts the time steps and samples of
            the first training batch, at least 2. Var[x] is the unbiased variance along N, averaged over the features.

    Raises:
        ValueError: x has negative or non-finite values, is silent (E[x] = 0), never varies, or is a single sample.
    """
    if len(x) < 2:
        raise ValueError("E-I Init needs a batch of at least 2 to measure a variance")
    if not x.isfinite().all():
        raise ValueError("its input has values that are not finite (NaN or infinity)")
    if x.min() < 0:
        raise ValueError(
            "its input has negative values, but the circuit needs non-negative activity, or it would divide by I_div "
            "of any sign: give images as intensities in [0, 1], without subtracting a mean"
        )
    mean, mean_square = x.mean(), x.square().mean()  # E[x], E[x^2]
    var = x.var(0).mean()  # Var[x]
    if not mean > 0:
        raise ValueError("the input of the layer is silent (E[x] = 0), so E-I Init has nothing to scale to")
    if not var > 0:
        raise ValueError(
            "the input of the layer is the same in every sample (Var[x] = 0), so all weights would be 0; the likely "
            "cause: in the first layer, images that are all the same; in another one, the layer before it, whose "
            "neurons fire at each time step, or never, whatever the image is"
        )
    d = circuit.fan_in
    m = (var / (d * (mean_square + var))).sqrt()
    for name in circuit.from_excitatory:  # W_EE, W_IE
        getattr(circuit, name).exponential_().mul_(m)
    for name in circuit.from_inhibitory:  # W_EI
        w = getattr(circuit, name)
        w.fill_(1 / w.shape[1])  # 1 / n_I
    if not circuit.readout:
        circuit.g_i.fill_((mean_square + var).sqrt() / (d**0.5 * mean))
        circuit.g_e.fill_(1)
        circuit.b_e.zero_()


@torch.no_grad()
def initialize(model, batch, init=ei_init):
    """E-I Init of a whole network, layer by layer in forward order. Each layer sees what the layers before it, which
    are initialised already, send to it.

    Call it once, before training, with the first training batch; never after loading a checkpoint. A network without
    circuits stays as it is. So does DANN, which draws its weights without a batch.

    Args:
        model: a network of `model.build`.
        batch: images (B, C, H, W) or frames (B, T, C, H, W), finite and not negative, B at least 2.
        init: the function that draws the parameters of a circuit, given the circuit and its input.

    Raises:
        ValueError: names the layer that cannot be initialised, and says why.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, EICircuit) and m.needs_batch}
    if not names:
        return
    if len(batch) < 2:
        raise ValueError("E-I Init measures a variance: it needs a batch of at least 2 samples")
    for circuit, name in names.items():
        for weight in (*circuit.from_excitatory, *circuit.from_inhibitory):
            if not isinstance(getattr(circuit, weight), torch.nn.Parameter):  # it is computed anew in each forward pass
                raise ValueError(f"layer {name}: {weight} is pruned or parametrized: do that after E-I Init")

    def before_forward(circuit, args):
        try:
            init(circuit, args[0])
        except ValueError as error:
            error.args = (f"layer {names[circuit]}: {error}",)
            raise

    with ExitStack() as hooks:
        for circuit in names:
            hooks.enter_context(circuit.register_forward_pre_hook(before_forward))
        model(batch)


if __name__ == "__main__":
    from lif import lif

    T, B, sizes = 4, 64, [100, 400, 400, 400, 400]
    print(f"Four dense layers of 400 neurons on {B} samples of 100 random inputs, T = {T}: I_int of each layer\n")
    print(f"{'layer':8}{'with E-I Init: mean':>22}{'std':>8}{'rate':>8}{'|Kaiming|: mean':>22}{'std':>8}{'rate':>8}")
    torch.manual_seed(0)
    images = torch.rand(B, sizes[0])
    x = {how: images.repeat(T, 1) for how in ("E-I Init", "|Kaiming|")}  # (T B, in), the same at each time step
    for layer in range(1, 5):
        line = f"{layer:<8}"
        for how in x:
            circuit = EICircuit(sizes[layer - 1], sizes[layer])
            if how == "E-I Init":
                ei_init(circuit, x[how])
            i_int = circuit(x[how]).detach()  # (T B, n_E)
            spikes = lif(i_int.unflatten(0, (T, B)))  # (T, B, n_E)
            line += f"{i_int.mean():22.2f}{i_int.std():8.2f}{spikes.mean():8.3f}"
            x[how] = spikes.flatten(0, 1)  # what the next layer receives
        print(line)
    print("\nWith |Kaiming| weights and gains of 1 the current is far below the threshold, and the layers fall silent.")
