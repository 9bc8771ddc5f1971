"""Looking into a network, which nothing here changes: testing it, neurons and operations, currents, zeros of I_div."""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from baselines import DANN
from inhibition import EICircuit
from model import layers
from support import data, parallel, recipes


@contextmanager
def hooked(model, hooks, training=False):
    """In a `with` block the network is as in testing (or in training) and has these hooks; then it is as before."""
    others = [module for module in model.modules() if module.training != training]
    try:
        model.train(training)
        yield
    finally:
        for module in others:
            module.training = not training
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def evaluate(model, x, y):
    """Tests a network on x, (N, ...), and y, (N,), as `data.Dataset` holds them. Returns mean loss (NaN if a parameter
    is not finite), accuracy in [0, 1], and the firing rate (spikes per neuron and time step) of each layer."""
    most = max(1, min(100 if x.is_cpu else 1000, 1000 // getattr(model, "module", model).T))  # T costs memory
    n = max(1, -(-len(parallel.share(y)) // most))  # batches, nearly equal: kernels are compiled for each size
    sums = torch.zeros(2 + len(layers(model)), device=x.device)  # of the loss, correct answers, firing rates

    def count(layer, inputs, spikes, i):  # spikes: (T, B, n_E, H, W)
        sums[2 + i] += spikes.float().mean() * spikes.shape[1]

    parallel.same_buffers(model)
    if not is_finite(model):
        sums[0] = torch.nan  # a potential that is NaN is no spike, so the logits may be finite
    batches = zip(*(parallel.share(samples).tensor_split(n) for samples in (x, y)), strict=True)
    with hooked(model, [m.register_forward_hook(partial(count, i=i)) for i, m in enumerate(layers(model))]):
        for images, labels in batches:
            logits = model(data.to_input(images).to(next(model.parameters()))).float()
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
    loss, accuracy, *rates = (parallel.total(sums) / len(y)).tolist()
    return loss, accuracy, rates


def is_finite(model):
    """Whether all parameters and running statistics are."""
    return all(value.isfinite().all() for value in model.state_dict().values())


def first_nonfinite(model, x, y):
    """The name of what is not finite in a training step with images x and labels y.
    The first layer, in forward order, with such a parameter or value; else "loss", if it is not finite; else, since
    gradients run backwards, the last parameter with such a gradient: "readout.w_ee (its gradient)"; or "none left"."""
    found = []

    def check(module, _, out, name):
        if not all(t.isfinite().all() for t in (out, *module.parameters(recurse=False))):
            found.append(name)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hooks = [module.register_forward_hook(partial(check, name=n)) for n, module in model.named_modules() if n]
    with hooked(model, hooks, training=True):
        loss = F.cross_entropy(model(x), y)
        if found or not loss.isfinite():
            return [*found, "loss"][0]
        gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    bad = [name for name, gradient in zip(trained, gradients, strict=True) if not gradient.isfinite().all()]
    return f"{bad[-1]} (its gradient)" if bad else "none left"


@torch.no_grad()
def costs(model, x):
    """What a network costs on images x where it runs by spikes, as its equations say: a list of dicts, a layer each.
    firing_rate: spikes per neuron and time step; of the readout, None. neurons_e, neurons_i: one a map and position.
    accumulates: per image, each presynaptic spike (or the mean of pooled ones) once at each of its targets, E and I.
    multiplies: multiply-accumulates per image. The synapses of the first layer, once where the image stands still, and
        all of DANN's; at each position and time step n_E n_I for I_sub, n_E n_I + n_I for I_div, n_E for the division,
        n_E for g_E; in BN-SNN, n_E. Of several weights from interneurons each acts in one of I_sub and I_div.
    parameters_e, parameters_i: W_EE, g_E, b_E, or all where there are no interneurons; and all others."""
    rows = []

    def count(module, args, out):
        ei, conv = isinstance(module, EICircuit), module[0] if isinstance(module, nn.Sequential) else module
        weight = conv.w_ee if ei else conv.weight
        n_e, n_i = len(weight), 0
        local = 0 if conv is module else n_e  # multiplications at each position
        if ei:
            n_i = sum(len(getattr(module, key)) for key in module.from_excitatory if key != "w_ee")
            lateral = [getattr(module, key).numel() for key in module.from_inhibitory]
            twice = lateral[0] if len(lateral) == 1 else 0  # W_EI acts in I_sub and in I_div
            local = sum(lateral) + (0 if module.readout else twice + module.n_i + 2 * n_e)
        spiking = bool(rows) and not isinstance(module, DANN)
        images = len(args[0]) if not rows and x.dim() == 4 else len(x)  # a still image counts once in the first layer
        active = args[0].to(weight.dtype) if spiking else torch.ones_like(args[0])
        if weight.dim() == 4:  # how much activity reaches each position
            with torch.autocast(x.device.type, enabled=False):
                active = F.conv2d(active, torch.ones_like(weight[:1]), stride=conv.stride, padding=conv.padding)
        synaptic = active.flatten(1).sum(1).cpu().double().sum().item() * (n_e + n_i) / images
        row = dict(layer="readout" if module is model.readout else str(len(rows) + 1), firing_rate=None)
        row["accumulates"] = synaptic if spiking else 0.0
        row["multiplies"] = (0 if spiking else synaptic) + local * out.numel() / n_e / images
        sizes = {key: p.numel() for key, p in module.named_parameters()}
        row["parameters_e"] = sum(size for key, size in sizes.items() if key in ("w_ee", "g_e", "b_e") or not ei)
        row["parameters_i"] = sum(sizes.values()) - row["parameters_e"]
        rows.append(row | dict(neurons_e=out[0].numel(), neurons_i=n_i * out[0].numel() // n_e))

    def fire(layer, args, spikes):
        rows[-1]["firing_rate"] = spikes.float().mean().item()

    counted = [*(layer.circuit for layer in layers(model)), model.readout]
    hooks = [module.register_forward_hook(count) for module in counted]
    with hooked(model, hooks + [layer.register_forward_hook(fire) for layer in layers(model)]):
        model(x)
    return rows


def cost_table(model, x):
    """`costs` of a network on x and their sum, as lines of text: operations in thousands per image."""
    rows = costs(model, x)
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key not in ("layer", "firing_rate")}
    spikes = sum(row["firing_rate"] * row["neurons_e"] for row in rows[:-1])
    neurons = sum(row["neurons_e"] for row in rows[:-1])
    rows.append(dict(layer="all", firing_rate=spikes / neurons) | total)
    columns = "{:8}{:>7}{:>14}{:>13}{:>15}{:>11}{:>12}{:>9}"
    titles = columns.format("layer", "rate", "accumulates", "multiplies", "parameters E", "I", "neurons E", "I")
    lines = [f"what {len(x)} of the test images cost, operations for each:", titles]
    for layer, rate, *numbers in map(dict.values, rows):
        operations, sizes = [f"{n / 1e3:,.0f}k" for n in numbers[:2]], [f"{n:,}" for n in numbers[2:]]
        lines.append(columns.format(layer, "" if rate is None else f"{rate:.4f}", *operations, *sizes))
    return lines


def population(model):
    """Numbers of excitatory and inhibitory neurons of a network; the readout's units and interneurons count too."""
    rows = costs(model, next(model.parameters()).new_zeros(1, model.in_channels, model.image_size, model.image_size))
    return sum(row["neurons_e"] for row in rows), sum(row["neurons_i"] for row in rows)


def header(config, dataset, model, device):
    """Says what runs: device, data, network and its size, and every setting that this kind of network has."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    lacks = recipes.LACKS[config["kind"]]
    values = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in config.items() if k not in lacks]
    n_training, n_test, size = len(dataset.train_y), len(dataset.test_y), "x".join(map(str, dataset.train_x.shape[1:]))
    print(f"device    {device} ({name})")
    print(f"data      {config['data']}: {n_training:,} training, {n_test:,} test samples of {size}")
    n_e, n_i, n_weights = *population(model), sum(p.numel() for p in model.parameters())
    sizes = f"{n_e:,} excitatory and {n_i:,} inhibitory neurons, {n_weights:,} parameters"
    print(f"augment   {dataset.augment_name}\nnetwork   {config['arch']} {config['kind']}: {sizes}")
    print("settings ", *values, flush=True)


@torch.no_grad()
def observe(model, x, see):
    """Runs the network on x, as in testing, and calls see(i, I_int, u, spikes), (T, B, n_E, H', W') each, for each
    spiking layer i. u: the membrane potential before the reset (in DANN, which has none, I_int again)."""

    def hook(neuron, args, spikes, i):
        u = neuron.membrane_potential(args[0]) if hasattr(neuron, "membrane_potential") else args[0]
        see(i, args[0], u, spikes)

    neurons = [layer.neuron for layer in layers(model)]
    with hooked(model, [neuron.register_forward_hook(partial(hook, i=i)) for i, neuron in enumerate(neurons)]):
        model(x)


BINS = dict(low=-6.0, high=6.0, n=120)  # of the histograms below, in the units of the currents


def histogram(values):
    """Counts of values in `BINS`, (bins,). What lies outside is counted in the outermost bins, NaN nowhere."""
    low, high, n = BINS.values()
    values = values[~values.isnan()].clamp(low, high)
    return torch.bincount(((values - low) * (n / (high - low))).long().clamp(max=n - 1), minlength=n)


def histograms(model, x):
    """How I_int and the membrane potential of each layer are distributed on x: counts (layers, 2, bins) on the CPU."""
    found = []
    observe(model, x, lambda i, current, u, spikes: found.append(torch.stack([histogram(current), histogram(u)])))
    return torch.stack(found).cpu()
