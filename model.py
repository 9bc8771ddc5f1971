"""Deep spiking networks of E-I circuits: VGG and SEW-ResNet, as the paper trains them (paper, Experiments).

A layer is a circuit and its excitatory neurons: presynaptic spikes -> `EICircuit2d` -> I_int -> `LIF` -> spikes.
Time is the leading axis and merged into the batch, (T B, C, H, W), wherever nothing depends on time; only the LIF
neurons take it apart. A static image is a constant current, so its first circuit is computed once for all T steps.
"""

import ctypes
import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from baselines import DANNCircuit, DANNCircuit2d, bn_conv, plain_conv
from inhibition import EICircuit, EICircuit2d
from lif import LIF, membrane_potential

# 3x3 convolutions; "P" is 2x2 average pooling; each number is a circuit of so many excitatory maps and its LIF.
PLANS = {
    "vgg8": [64, "P", 128, "P", 256, "P", 512, "P", 512, "P"],
    "vgg11": [64, "P", 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P"],
    "vgg16": [64, 64, "P", 128, 128, "P", *[256] * 3, "P", *[512] * 3, "P", *[512] * 3, "P"],
    "vgg19": [64, 64, "P", 128, 128, "P", *[256] * 4, "P", *[512] * 4, "P", *[512] * 4, "P"],
}
ARCHS = [*PLANS, "resnet18"]
KINDS = ["ei", "bn", "plain", "dann"]


class Layer(nn.Module):
    """A circuit (or what is compared with it) and its neurons: LIF, or in DANN rectifiers without memory.

    Presynaptic activity (T B, C, H, W), or (B, C, H, W) that is the same at every step, -> spikes (T B, n_E, H', W').
    """

    def __init__(self, circuit, neuron):
        super().__init__()
        self.circuit, self.neuron = circuit, neuron

    def forward(self, x, T, static=False):
        current = self.circuit(x)
        if static:  # the sum over time that is its gradient runs fast where the channels, innermost in memory, are last
            current = current.movedim(1, -1).expand(T, -1, -1, -1, -1).movedim(-1, 2)
        else:
            current = current.unflatten(0, (T, -1))
        return self.neuron(current).flatten(0, 1)


class _AvgPool(torch.autograd.Function):
    """2x2 average pooling. PyTorch's own keeps its input for the backward pass, which needs no more than its size: here
    that is the spikes of every layer."""

    @staticmethod
    def forward(ctx, x):
        ctx.odd = x.shape[2] % 2, x.shape[3] % 2
        return F.avg_pool2d(x, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad = F.interpolate(grad / 4, scale_factor=2, mode="nearest")
        return F.pad(grad, (0, ctx.odd[1], 0, ctx.odd[0])) if any(ctx.odd) else grad  # the last row met no window


class AvgPool(nn.Module):
    """2x2 average pooling with stride 2: (N, C, H, W) -> (N, C, H // 2, W // 2)."""

    def forward(self, x):
        return _AvgPool.apply(x)


class VGG(nn.Module):
    """A chain of layers and poolings: (T B, C, S, S) -> features (T B, F)."""

    def __init__(self, plan, in_channels, image_size, layer):
        super().__init__()
        stages, size = [], image_size
        for n_e in plan:
            if n_e == "P":
                stages.append(AvgPool())
                size //= 2
            else:
                stages.append(layer(in_channels, n_e, 3, padding=1))
                in_channels = n_e
        if size < 1:
            raise ValueError(f"images of {image_size}x{image_size} pixels are too small for this network's poolings")
        self.stages = nn.Sequential(*stages)
        self.n_features = in_channels * size * size

    def forward(self, x, T, static):
        for stage in self.stages:
            if isinstance(stage, Layer):
                x, static = stage(x, T, static), False
            else:
                x = stage(x)
        return x.flatten(1)


class Block(nn.Module):
    """A basic block of SEW-ResNet: the spikes of two layers, added to the identity or to those of a shortcut layer."""

    def __init__(self, in_channels, n_e, stride, layer):
        super().__init__()
        self.conv1 = layer(in_channels, n_e, 3, stride=stride, padding=1)
        self.conv2 = layer(n_e, n_e, 3, padding=1)
        self.shortcut = None
        if stride != 1 or in_channels != n_e:
            self.shortcut = layer(in_channels, n_e, 1, stride=stride)

    def forward(self, x, T):
        spikes = self.conv2(self.conv1(x, T), T)
        return spikes + (x if self.shortcut is None else self.shortcut(x, T))


class ResNet18(nn.Module):
    """SEW-ResNet-18: stem, four stages of two blocks, global average pooling: (T B, C, S, S) -> features (T B, 512)."""

    def __init__(self, in_channels, layer):
        super().__init__()
        self.stem = layer(in_channels, 64, 3, padding=1)
        widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nn.Sequential(*[Block(n_in, n_e, stride, layer) for n_in, n_e, stride in widths])
        self.n_features = 512

    def forward(self, x, T, static):
        x = self.stem(x, T, static)
        for block in self.blocks:
            x = block(x, T)
        return x.mean((2, 3))


class Network(nn.Module):
    """Encoder of spiking layers and a readout that is averaged over time.

    forward: images (B, C, S, S) or frames (B, T, C, S, S), values in [0, 1] or counts >= 0 -> logits (B, classes).
    """

    def __init__(self, encoder, readout, T, in_channels, image_size):
        super().__init__()
        self.encoder, self.readout = encoder, readout
        self.T, self.in_channels, self.image_size = T, in_channels, image_size

    def forward(self, x):
        image = (self.in_channels, self.image_size, self.image_size)
        frames = x.dim() == 5
        if x.shape[-3:] != image or x.dim() != 4 + frames:
            raise ValueError(
                f"the network was built for images of {image} (channels, height, width), not {(*x.shape,)}"
            )
        if frames and x.shape[1] != self.T:
            raise ValueError(f"the network runs for T={self.T} time steps, but the data have {x.shape[1]} frames")
        if frames:
            x = x.transpose(0, 1).flatten(0, 1)
        x = x.contiguous(memory_format=torch.channels_last)  # fastest for convolutions; what follows keeps it
        features = self.encoder(x, self.T, static=not frames)
        return self.readout(features).unflatten(0, (self.T, -1)).mean(0)


def keep_memory(keep=True):
    """On Linux, has the C library keep the memory that tensors give back, for the next step needs the same again.

    By default blocks above 32 MB go back to the system, which clears every page before it lends them again: a quarter
    and more of a training step on a CPU. Changes no result; `keep=False` is the default's behaviour again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_MMAP_MAX, 0 if keep else 65536)
        mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 << 20)


def build(
    arch,
    in_channels=3,
    n_classes=10,
    T=4,
    kind="ei",
    image_size=32,
    plan=None,
    ei_ratio=4,
    eps="adaptive",
    ste=True,
    grad_scaling=True,
):
    """A network of the paper.

    Args:
        arch: one of `ARCHS`: "vgg8", "vgg11", "vgg16", "vgg19", "resnet18".
        in_channels, n_classes, T: sizes, at least 1. T is the number of time steps.
        kind: "ei" (the paper's), "bn" (BN-SNN), "plain" (nothing in place of normalization) or "dann" (E-I circuits
            without spikes), see `baselines.py`.
        image_size: side of the square images, at least 32 for the plans of the paper.
        plan: replaces a VGG's list of layers, e.g. [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"].
        ei_ratio, eps, ste, grad_scaling: of every circuit of kind "ei", see `EICircuit`; `ei_ratio` also of "dann".

    Returns:
        A module: images (B, C, S, S) or frames (B, T, C, S, S) -> logits (B, n_classes). Its E-I circuits are to be
        initialised by `ei_init.initialize` with the first batch.

    Raises:
        ValueError: for an unknown arch or kind, a size below 1, a plan for a ResNet, images too small.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHS)}")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
    if min(in_channels, n_classes, T) < 1:
        raise ValueError(f"sizes must be at least 1, not in_channels={in_channels}, n_classes={n_classes}, T={T}")
    if plan is None and image_size < 32:
        raise ValueError(f"images of {image_size}x{image_size} pixels are too small: {arch} needs 32x32 or more")
    options = dict(ei_ratio=ei_ratio, eps=eps, ste=ste, grad_scaling=grad_scaling)
    conv = dict(ei=EICircuit2d, bn=bn_conv, plain=plain_conv, dann=DANNCircuit2d)[kind]
    options = options if kind == "ei" else dict(ei_ratio=ei_ratio) if kind == "dann" else {}

    def layer(*args, **kwargs):
        return Layer(conv(*args, **kwargs, **options), nn.ReLU() if kind == "dann" else LIF())

    if arch == "resnet18":
        if plan is not None:
            raise ValueError("a plan is a list of VGG layers; resnet18 takes none")
        encoder = ResNet18(in_channels, layer)
    else:
        encoder = VGG(plan or PLANS[arch], in_channels, image_size, layer)
    if kind in ("ei", "dann"):
        circuit = EICircuit if kind == "ei" else DANNCircuit
        readout = circuit(encoder.n_features, n_classes, readout=True, **options)
    else:
        readout = nn.Linear(encoder.n_features, n_classes)
    return Network(encoder, readout, T, in_channels, image_size)


def circuits(model):
    """The E-I circuits of a network in the order in which they run, the readout last: a list of `EICircuit`."""
    return [m for m in model.modules() if isinstance(m, EICircuit)]


def layers(model):
    """The spiking layers (circuit and LIF) of a network in the order in which they run: a list of `Layer`."""
    return [m for m in model.modules() if isinstance(m, Layer)]


@contextmanager
def hooked(model, hooks, training=False):
    """The network as in testing (or in training) and with hooks on, for a `with` block; then as it was before.

    hooks: what `register_forward_hook` and its like return.
    """
    with ExitStack() as after:
        after.callback(model.train, model.training)
        for hook in hooks:
            after.enter_context(hook)
        model.train(training)
        yield


@torch.no_grad()
def population(model):
    """Numbers of excitatory and inhibitory neurons of a network: one for each map and position of each layer.

    The readout's units and interneurons count too.
    """
    shapes = {}

    def note(m, _, out):
        shapes[m] = out.shape[1:]

    with hooked(model, [m.register_forward_hook(note) for m in (*layers(model), model.readout)]):
        device = next(model.parameters()).device
        model(torch.zeros(1, model.in_channels, model.image_size, model.image_size, device=device))
    n_e = sum(shape.numel() for shape in shapes.values())
    n_i = 0
    for m, (_, *positions) in shapes.items():
        circuit = m.circuit if isinstance(m, Layer) else m
        if isinstance(circuit, EICircuit):
            n_i += circuit.n_i * torch.Size(positions).numel()
    return n_e, n_i


@torch.no_grad()
def observe(model, x, see):
    """Runs the network on x, as in testing, and calls see(i, current, u, spikes) for each spiking layer i.

    current: I_int, u: membrane potential before the reset (DANN, which has no membrane: its current again), spikes:
    each (T, B, n_E, H', W'). Nothing of the network changes, and without this call nothing is recorded.
    """

    def hook(neuron, args, spikes, i):
        u = membrane_potential(args[0], neuron.tau, neuron.threshold) if isinstance(neuron, LIF) else args[0]
        see(i, args[0], u, spikes)

    neurons = [layer.neuron for layer in layers(model)]
    with hooked(model, [neuron.register_forward_hook(partial(hook, i=i)) for i, neuron in enumerate(neurons)]):
        model(x)


def describe(model):
    """The size of a network in words."""
    n_e, n_i = population(model)
    n_weights = sum(p.numel() for p in model.parameters())
    return f"{n_e:,} excitatory and {n_i:,} inhibitory neurons, {n_weights:,} parameters"


BINS = dict(low=-6.0, high=6.0, n=120)  # of the histograms below, in units of the threshold


def histogram(values):
    """Counts of values (T, ...) in `BINS`: a list. What lies outside is counted in the outermost bins, NaN nowhere."""
    low, high, n = BINS.values()
    steps = (v[~v.isnan()].clamp(low, high) for v in values)  # one by one: histc counts in float32, up to 2^24
    return sum(torch.histc(v, n, low, high).long() for v in steps).tolist()


def histograms(model, x):
    """How I_int and the membrane potential of each layer are distributed on x: a list of dicts of counts."""
    found = []
    observe(model, x, lambda i, current, u, spikes: found.append(dict(i_int=histogram(current), u=histogram(u))))
    return found


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
        n_e, n_i = len(weight), conv.n_i if ei else 0
        spiking = bool(rows) and not isinstance(module, (DANNCircuit, DANNCircuit2d))
        active = args[0] if spiking else torch.ones_like(args[0])
        if weight.dim() == 4:  # how much activity reaches each position
            active = F.conv2d(active, torch.ones_like(weight[:1]), stride=conv.stride, padding=conv.padding)
        synaptic = active.flatten(1).sum(1).cpu().double().sum().item() * (n_e + n_i) / len(x)
        local = n_e if isinstance(module, nn.Sequential) else 0
        if ei:
            local = n_e * n_i if conv.readout else 2 * n_e * n_i + n_i + 2 * n_e
        sizes = {k: p.numel() for k, p in module.named_parameters()}
        inhibitory = sum(n for k, n in sizes.items() if k in ("w_ie", "w_ei", "g_i", "alpha"))
        rows.append(dict(layer=name, firing_rate=None, accumulates=synaptic if spiking else 0.0))
        rows[-1] |= dict(multiplies=(0 if spiking else synaptic) + local * out.numel() / n_e / len(x))
        rows[-1] |= dict(parameters_e=sum(sizes.values()) - inhibitory, parameters_i=inhibitory)
        rows[-1] |= dict(neurons_e=out[0].numel(), neurons_i=n_i * out[0].numel() // n_e)

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


@torch.no_grad()
def first_nonfinite(model, x):
    """The name of the first layer, in forward order, whose parameters or values on x are not finite."""
    found = []

    def check(module, _, out, name):
        if not all(t.isfinite().all() for t in (out, *module.parameters(recurse=False))):
            found.append(name)

    leaves = {name: m for name, m in model.named_modules() if name and not list(m.children())}
    hooks = [m.register_forward_hook(partial(check, name=name)) for name, m in leaves.items()]
    with hooked(model, hooks, training=True):
        model(x)
    return found[0] if found else "loss"
