"""Looking into a network: histograms, populations, costs, zeros of I_div. A reader of the paper may skip this file.

Nothing here changes a network. What is measured is the same for the plain and for the fused forms.
"""

from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from baselines import DANN
from inhibition import EICircuit
from lif import LIF
from model import circuits, layers
from support import data, parallel


@contextmanager
def hooked(model, hooks, training=False):
    """The network as in testing (or in training) and with hooks on, for a `with` block; then as it was before.

    hooks: what `register_forward_hook` and its like return.
    """
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as after:
        for hook in hooks:
            after.enter_context(hook)
        model.train(training)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@torch.no_grad()
def evaluate(model, x, y, batch_size=100):
    """Tests a network.

    Args:
        x, y: a test set as `data.Dataset` holds it, (N, C, H, W) or (N, T, C, H, W), and (N,).

    Returns:
        Mean loss, accuracy in [0, 1], and the firing rate (spikes per neuron and time step) of each layer.
    """
    batch_size = max(1, min(batch_size, 1000 // model.T))  # frames take memory in proportion to T
    sums = torch.zeros(2 + len(layers(model)), device=x.device)  # of the loss, correct answers, firing rates

    def count_spikes(layer, inputs, spikes, i):  # spikes: (T, B, n_E, H, W)
        sums[2 + i] += spikes.mean() * spikes.shape[1]

    parallel.same_buffers(model)
    hooks = [layer.register_forward_hook(partial(count_spikes, i=i)) for i, layer in enumerate(layers(model))]
    with hooked(model, hooks):  # in evaluation mode; afterwards the hooks are gone
        for images, labels in zip(
            parallel.share(x).split(batch_size), parallel.share(y).split(batch_size), strict=True
        ):
            logits = model(data.to_input(images))
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
    loss, accuracy, *rates = (parallel.total(sums) / len(y)).tolist()
    return loss, accuracy, rates


# ---- populations -----------------------------------------------------------------------------------------------------


def inhibitory(circuit):
    """How many interneurons a circuit has at each position: the rows of all weights from x to interneurons."""
    if not isinstance(circuit, EICircuit):
        return 0
    names = circuit.from_excitatory
    return sum(len(getattr(circuit, name)) for name in names if name != "w_ee")


@torch.no_grad()
def population(model):
    """Numbers of excitatory and inhibitory neurons of a network: one for each map and position of each layer.

    The readout's units and interneurons count too.
    """
    found = []

    def note(circuit, args, out):
        found.append((out[0].numel(), inhibitory(circuit) * out[0].numel() // out.shape[1]))

    measured = [*(layer.circuit for layer in layers(model)), model.readout]
    with hooked(model, [m.register_forward_hook(note) for m in measured]):
        p = next(model.parameters())
        model(torch.zeros(1, model.in_channels, model.image_size, model.image_size, device=p.device, dtype=p.dtype))
    return sum(e for e, _ in found), sum(i for _, i in found)


def describe(model):
    """The size of a network in words."""
    n_e, n_i = population(model)
    n_weights = sum(p.numel() for p in model.parameters())
    return f"{n_e:,} excitatory and {n_i:,} inhibitory neurons, {n_weights:,} parameters"


def header(config, dataset, model, device):
    """Says what runs: device, data, network and its size, and every setting."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    values = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in config.items()]
    print(f"device    {device} ({name})\ndata      {config['data']}: {data.describe(dataset)}")
    print(f"network   {config['arch']} {config['kind']}: {describe(model)}")
    print("settings ", *values, flush=True)


# ---- currents and potentials -----------------------------------------------------------------------------------------


@torch.no_grad()
def observe(model, x, see):
    """Runs the network on x, as in testing, and calls see(i, current, u, spikes) for each spiking layer i.

    current: I_int, u: membrane potential before the reset (DANN, which has no membrane: its current again), spikes:
    each (T, B, n_E, H', W'). Nothing of the network changes, and without this call nothing is recorded.
    """

    def hook(neuron, args, spikes, i):
        u = neuron.membrane_potential(args[0]) if isinstance(neuron, LIF) else args[0]
        see(i, args[0], u, spikes)

    neurons = [layer.neuron for layer in layers(model)]
    with hooked(model, [neuron.register_forward_hook(partial(hook, i=i)) for i, neuron in enumerate(neurons)]):
        model(x)


BINS = dict(low=-6.0, high=6.0, n=120)  # of the histograms below, in the units of the currents


def histogram(values):
    """Counts of values (T, ...) in `BINS`: a list. What lies outside is counted in the outermost bins, NaN nowhere."""
    low, high, n = BINS.values()
    if values.device.type == "mps":  # which has no histc
        values = values.cpu()
    steps = (v[~v.isnan()].clamp(low, high) for v in values)  # one by one: histc counts in float32, up to 2^24
    return sum(torch.histc(v, n, low, high).long() for v in steps).tolist()


def histograms(model, x):
    """How I_int and the membrane potential of each layer are distributed on x: a list of dicts of counts."""
    found = []
    observe(model, x, lambda i, current, u, spikes: found.append(dict(i_int=histogram(current), u=histogram(u))))
    return found


@torch.no_grad()
def currents_of(model, x, index):
    """The currents of one circuit, each (T, B, ...), for an input x of the network."""
    found = {}

    def record(circuit, args):
        T = 1 if len(args[0]) == len(x) else model.T  # a still image may pass the first circuit once
        for name, values in circuit.currents(args[0]).items():
            values = values.unflatten(0, (T, -1))
            found[name] = values.expand(model.T, *values.shape[1:])

    with hooked(model, [circuits(model)[index].register_forward_pre_hook(record)]):
        model(x)
    return found


@torch.no_grad()
def contrast_response(model, x, contrasts):
    """Mean response of each layer at each contrast: with divisive inhibition, and with I_div held at its mean.

    Returns:
        (2, contrasts, layers). The mean of I_div is taken for each excitatory map over images, time and positions of x
        at full contrast, in the intact network.
    """
    divided = circuits(model)[:-1]
    means = {}

    def measure(circuit, args):
        i_div = circuit.currents(args[0])["i_div"]
        means[circuit] = i_div.mean((0, *range(2, i_div.dim())), keepdim=True)

    with hooked(model, [circuit.register_forward_pre_hook(measure) for circuit in divided]):
        model(x)

    def undivided(circuit, args, _):
        found = circuit.currents(args[0])
        g_e, b_e = (p.view(-1, *[1] * (found["i_ee"].dim() - 2)) for p in (circuit.g_e, circuit.b_e))
        return g_e * (found["i_ee"] - found["i_sub"]) / means[circuit] + b_e

    responses = torch.zeros(2, len(contrasts), len(divided))
    for which in range(2):
        with hooked(model, [circuit.register_forward_hook(undivided) for circuit in divided * which]):
            for k, contrast in enumerate(contrasts):

                def see(i, current, u, spikes, which=which, k=k):
                    responses[which, k, i] = spikes.mean()

                observe(model, contrast * x, see)
    return responses


# ---- zeros of I_div --------------------------------------------------------------------------------------------------

VARIANTS = {  # of the stabilization: eps, ste
    "adaptive": ("adaptive", True),
    "adaptive, no STE": ("adaptive", False),
    "\u03b5=1e-4": (1e-4, True),
    "\u03b5=1e-6": (1e-6, True),
    "\u03b5=1e-8": (1e-8, True),
}


def stabilization(model, batches):
    """Where I_div is 0, and what that does to the gradient: a list of dicts, one for each circuit that divides.

    The network computes the loss of each batch, (images, labels), as it is. Each circuit then gets its own input and
    its own incoming gradient dL/dI_int again, with each of `VARIANTS` in turn.

    Returns:
        layer: from 1.
        zeros: the share of I_div that is exactly 0.
        unbalanced: the share of these with I_EE other than I_sub; only there can STE change a gradient.
        For each variant the norm of the gradient to x, the largest of the batches.
    """
    divided, seen = circuits(model)[:-1], {}
    rows = [dict(layer=i, zeros=0, unbalanced=0) | dict.fromkeys(VARIANTS, 0.0) for i, _ in enumerate(divided, 1)]
    sizes = [0] * len(rows)

    def record(circuit, args, i_int):
        seen[circuit] = args[0].detach(), i_int
        i_int.retain_grad()

    for images, labels in batches:
        with hooked(model, [circuit.register_forward_hook(record) for circuit in divided]):
            F.cross_entropy(model(images), labels).backward()
        model.zero_grad()
        for i, (circuit, row) in enumerate(zip(divided, rows, strict=True)):
            x, i_int = seen.pop(circuit)
            with torch.no_grad():
                found = circuit.currents(x)
            zero = found["i_div"] == 0
            # I_EE and I_sub sum many products in another order; a difference below 1e-5 of their size is rounding
            size = found["i_ee"].abs().amax(tuple(range(1, zero.dim())), keepdim=True)
            unbalanced = (found["i_ee"] - found["i_sub"]).abs() > 1e-5 * size
            row["zeros"] += zero.sum().item()
            row["unbalanced"] += (zero & unbalanced).sum().item()
            sizes[i] += zero.numel()
            usual = circuit.eps, circuit.ste
            for name, (circuit.eps, circuit.ste) in VARIANTS.items():
                leaf = x.clone().requires_grad_()
                (grad,) = torch.autograd.grad(circuit.currents(leaf)["i_int"], leaf, i_int.grad)
                row[name] = max(row[name], grad.norm().item())
            circuit.eps, circuit.ste = usual
    for row, size in zip(rows, sizes, strict=True):
        row["unbalanced"] /= max(1, row["zeros"])
        row["zeros"] /= size
    return rows


# ---- costs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def costs(model, x):
    """What a network costs on images x where it runs by spikes, as its equations say: a list of dicts, a layer each.

    firing_rate: spikes per neuron and time step; of the readout, None.
    accumulates: synaptic operations per image: each presynaptic spike is added once at each of its targets, excitatory
        and inhibitory (W_EE, W_IE). Spikes that are pooled first count as one where they are all there, else by their
        average: firing rate times operations.
    multiplies: multiply-accumulates per image of what is not spikes. The synapses of the first layer and all of DANN's;
        at each position and time step n_E n_I for I_sub, as many and n_I more for I_div, n_E for the division and n_E
        for g_E; in BN-SNN, n_E for the normalization. An image that is the same at each step passes the first layer
        once.
    parameters_e, parameters_i: of excitatory neurons (W_EE, g_E, b_E; all where there are no others) and of inhibitory
        neurons (W_IE, W_EI, g_I).
    neurons_e, neurons_i: of each population. The state is a membrane potential for each of the first, but not in the
        readout and in DANN; the second, at their steady state, keep none.
    """
    rows = []

    def count(module, args, out, name):
        ei, conv = isinstance(module, EICircuit), module[0] if isinstance(module, nn.Sequential) else module
        weight = conv.w_ee if ei else conv.weight
        n_e, n_i = len(weight), inhibitory(conv)
        spiking = bool(rows) and not isinstance(module, DANN)
        images = len(args[0]) if not rows and x.dim() == 4 else len(x)  # a still image counts once in the first layer
        active = args[0] if spiking else torch.ones_like(args[0])
        if weight.dim() == 4:  # how much activity reaches each position
            active = F.conv2d(active, torch.ones_like(weight[:1]), stride=conv.stride, padding=conv.padding)
        synaptic = active.flatten(1).sum(1).cpu().double().sum().item() * (n_e + n_i) / images
        local = n_e if isinstance(module, nn.Sequential) else 0
        if ei:
            local = n_e * n_i if conv.readout else 2 * n_e * n_i + n_i + 2 * n_e
        sizes = {k: p.numel() for k, p in module.named_parameters()}
        excitatory = sum(n for k, n in sizes.items() if k in ("w_ee", "g_e", "b_e") or not ei)
        row = dict(layer=name, firing_rate=None, accumulates=synaptic if spiking else 0.0)
        row["multiplies"] = (0 if spiking else synaptic) + local * out.numel() / n_e / images
        row |= dict(parameters_e=excitatory, parameters_i=sum(sizes.values()) - excitatory)
        row |= dict(neurons_e=out[0].numel(), neurons_i=n_i * out[0].numel() // n_e)
        rows.append(row)

    def fire(layer, args, spikes):
        rows[-1]["firing_rate"] = spikes.mean().item()

    hooks = [model.readout.register_forward_hook(partial(count, name="readout"))]
    for i, layer in enumerate(layers(model), 1):
        hooks += [layer.circuit.register_forward_hook(partial(count, name=str(i))), layer.register_forward_hook(fire)]
    with hooked(model, hooks):
        model(x)
    return rows


def cost_table(model, x):
    """`costs` of a network on x and their sum, as lines of text: operations in thousands per image."""
    rows = costs(model, x)
    lines = [f"what {len(x)} of the test images cost, operations for each:"]
    lines += [f"{'layer':8}{'rate':>7}{'accumulates':>14}{'multiplies':>13}{'parameters E':>15}{'I':>11}"]
    lines[1] += f"{'neurons E':>12}{'I':>9}"
    total = {k: sum(row[k] for row in rows) for k in rows[0] if k not in ("layer", "firing_rate")}
    spikes = sum(row["firing_rate"] * row["neurons_e"] for row in rows[:-1])
    rate = spikes / sum(row["neurons_e"] for row in rows[:-1])
    for row in [*rows, dict(layer="all", firing_rate=rate) | total]:
        rate = "" if row["firing_rate"] is None else f"{row['firing_rate']:.4f}"
        operations = f"{row['accumulates'] / 1e3:>13,.0f}k{row['multiplies'] / 1e3:>12,.0f}k"
        sizes = f"{row['parameters_e']:>15,}{row['parameters_i']:>11,}{row['neurons_e']:>12,}{row['neurons_i']:>9,}"
        lines.append(f"{row['layer']:8}{rate:>7}{operations}{sizes}")
    return lines


def first_nonfinite(model, x, y=None):
    """The name of the first layer, in forward order, whose parameters or values on x are not finite.

    With labels y, where all these are finite, the parameter with the first gradient that is not: of the last layer that
    has one, for gradients run backwards. "loss" if there is none either.
    """
    found = []

    def check(module, _, out, name):
        if not all(t.isfinite().all() for t in (out, *module.parameters(recurse=False))):
            found.append(name)

    leaves = {name: m for name, m in model.named_modules() if name and not list(m.children())}
    with hooked(model, [m.register_forward_hook(partial(check, name=n)) for n, m in leaves.items()], training=True):
        logits = model(x)
        if not found and y is not None and (loss := F.cross_entropy(logits, y)).isfinite():
            parameters = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            pairs = zip(parameters, gradients, strict=True)
            found = [f"{name} (its gradient)" for name, g in pairs if g is not None and not g.isfinite().all()][::-1]
    return found[0] if found else "loss"
