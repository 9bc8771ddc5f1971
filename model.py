"""Deep spiking networks of E-I circuits: MLP, VGG and SEW-ResNet-18, as the paper trains them (paper, Experiments).

A layer is a circuit and its excitatory neurons: presynaptic spikes -> circuit -> I_int -> LIF -> spikes.

Between the layers, time is the first axis: (T, B, C, H, W) for T time steps and B samples. A circuit does not depend
on time, so inside a layer both axes are merged into one, (T B, C, H, W); only the LIF neurons take them apart again.
A still image is a constant current: it is the same at each of the T steps.

To get the spikes of layer 3 for some images:

    layers(model)[2].register_forward_hook(lambda layer, inputs, spikes: print(spikes.shape))    # (T, B, C, H, W)
    model(images)
"""

import torch
import torch.nn.functional as F
from torch import nn

from baselines import DANNCircuit, DANNCircuit2d, bn_conv, bn_dense, plain_conv, plain_dense
from inhibition import EICircuit, EICircuit2d
from lif import LIF

# A number is a circuit of so many excitatory neurons (MLP) or maps (VGG: 3x3 convolutions), and its LIF neurons. "P" is
# 2x2 average pooling. The names VGG-8 to VGG-19 count three dense layers at the end, of the original VGG; here one
# readout stands in their place.
PLANS = {
    "mlp": [500, 500, 300],
    "vgg8": [64, "P", 128, "P", 256, "P", 512, "P", 512, "P"],
    "vgg11": [64, "P", 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P"],
    "vgg16": [64, 64, "P", 128, 128, "P", *[256] * 3, "P", *[512] * 3, "P", *[512] * 3, "P"],
    "vgg19": [64, 64, "P", 128, 128, "P", *[256] * 4, "P", *[512] * 4, "P", *[512] * 4, "P"],
}
ARCHS = [*PLANS, "resnet18"]
KINDS = ["ei", "bn", "plain", "dann"]
DENSE = dict(ei=EICircuit, bn=bn_dense, plain=plain_dense, dann=DANNCircuit)  # what stands in a layer, by kind
CONV = dict(ei=EICircuit2d, bn=bn_conv, plain=plain_conv, dann=DANNCircuit2d)


class Layer(nn.Module):
    """A circuit, or what is compared with it, and its neurons: activity (T, B, C, H, W) -> spikes (T, B, n_E, H', W').

    In an MLP (T, B, F) -> (T, B, n_E). The neurons are LIF, in DANN rectifiers without memory.
    """

    def __init__(self, circuit, neuron):
        super().__init__()
        self.circuit, self.neuron = circuit, neuron

    def forward(self, x):
        T, B = x.shape[:2]
        current = self.circuit(x.flatten(0, 1))  # I_int, (T B, n_E, H', W')
        return self.neuron(current.unflatten(0, (T, B)))  # s, (T, B, n_E, H', W')


class AvgPool(nn.Module):
    """2x2 average pooling: (T, B, C, H, W) -> (T, B, C, H // 2, W // 2)."""

    def forward(self, x):
        return F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])


class MLP(nn.Module):
    """A chain of layers with all-to-all synapses: (T, B, C, S, S) -> features (T, B, F)."""

    def __init__(self, plan, in_features, layer):
        super().__init__()
        self.stages = nn.Sequential(*(layer(n_in, n_e) for n_in, n_e in zip([in_features, *plan], plan, strict=False)))
        self.n_features = plan[-1]

    def forward(self, x):
        return self.stages(x.flatten(2))


class VGG(nn.Module):
    """A chain of layers and poolings: (T, B, C, S, S) -> features (T, B, F)."""

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

    def forward(self, x):
        return self.stages(x).flatten(2)


class Block(nn.Module):
    """A basic block of SEW-ResNet: the spikes of two layers, added to the block's input, or to the spikes of a shortcut
    layer where the shape changes. The sum is a whole number >= 0, no longer 0 or 1; the next circuit needs no more."""

    def __init__(self, in_channels, n_e, stride, layer):
        super().__init__()
        self.conv1 = layer(in_channels, n_e, 3, stride=stride, padding=1)
        self.conv2 = layer(n_e, n_e, 3, padding=1)
        self.shortcut = None
        if stride != 1 or in_channels != n_e:
            self.shortcut = layer(in_channels, n_e, 1, stride=stride)

    def forward(self, x):
        spikes = self.conv2(self.conv1(x))  # (T, B, n_E, H', W')
        identity = x if self.shortcut is None else self.shortcut(x)
        return spikes + identity


class ResNet18(nn.Module):
    """SEW-ResNet-18: stem, four stages of two blocks, global average pooling: (T, B, C, S, S) -> features (T, B, F)."""

    def __init__(self, in_channels, layer, widths=(64, 128, 256, 512)):
        super().__init__()
        self.stem = layer(in_channels, widths[0], 3, padding=1)
        blocks, n_in = [], widths[0]
        for stage, n_e in enumerate(widths):
            blocks += [Block(n_in, n_e, 1 if stage == 0 else 2, layer), Block(n_e, n_e, 1, layer)]
            n_in = n_e
        self.blocks = nn.Sequential(*blocks)
        self.n_features = widths[-1]

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((3, 4))


class Network(nn.Module):
    """An encoder of spiking layers, and a readout whose output is averaged over time.

    forward: images (B, C, S, S), or frames (B, T, C, S, S), intensities or counts >= 0 -> logits (B, classes).
    """

    check_values = True  # a training looks at its numbers by itself

    def __init__(self, encoder, readout, T, in_channels, image_size):
        super().__init__()
        self.encoder, self.readout = encoder, readout
        self.T, self.in_channels, self.image_size = T, in_channels, image_size

    def forward(self, x):
        self.check(x)
        frames = x.dim() == 5
        x = x.transpose(0, 1) if frames else x.expand(self.T, *x.shape)  # (T, B, C, S, S)
        features = self.encoder(x)  # (T, B, F)
        logits = self.readout(features.flatten(0, 1)).unflatten(0, features.shape[:2])  # (T, B, classes)
        return logits.mean(0)  # (B, classes)

    def check(self, x):
        """Refuses what is no input of this network, and says why."""
        image = (self.in_channels, self.image_size, self.image_size)
        if x.shape[-3:] != image or x.dim() not in (4, 5):
            single = ": a single image needs a batch axis, x[None]" if x.dim() == 3 else ""
            raise ValueError(
                f"the network was built for images of {image} (channels, height, width), not {(*x.shape,)}{single}"
            )
        if x.dim() == 5 and x.shape[1] != self.T:
            raise ValueError(f"the network runs for T={self.T} time steps, but the data have {x.shape[1]} frames")
        if len(x) == 0:
            raise ValueError("the batch is empty: its first axis has no sample")
        wanted = next(self.parameters()).dtype
        if not x.is_floating_point():
            raise ValueError(f"the images are {x.dtype}: give intensities in [0, 1], e.g. images.float() / 255")
        if x.dtype != wanted and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"the images are {x.dtype}, but the network is {wanted}: convert one of them")
        if self.check_values and x.device.type == "cpu":  # elsewhere it would wait for the device
            try:
                finite, low = bool(x.isfinite().all()), float(x.min())
            except RuntimeError:  # under torch.func.vmap no value can be looked at
                return
            if not finite:
                raise ValueError("the images have values that are not finite (NaN or infinity)")
            if low < 0 and circuits(self):
                raise ValueError(
                    f"the images have negative values (down to {low:.3g}), as after subtracting a mean: the circuit "
                    "needs intensities in [0, 1], or it would divide by I_div of any sign"
                )


def build(
    arch,
    in_channels=3,
    n_classes=10,
    T=4,
    kind="ei",
    image_size=32,
    plan=None,
    width=1.0,
    tau=2.0,
    threshold=1.0,
    alpha=4.0,
    ei_ratio=4,
    eps="adaptive",
    ste=True,
    grad_scaling=True,
):
    """A network of the paper.

    Args:
        arch: one of `ARCHS`: "mlp", "vgg8", "vgg11", "vgg16", "vgg19", "resnet18".
        in_channels, n_classes, T: sizes, at least 1. T is the number of time steps.
        kind: "ei" (the paper's), "bn" (BN-SNN), "plain" (nothing in place of normalization) or "dann" (E-I circuits
            without spikes), see `baselines.py`.
        image_size: side of the square images in pixels; for the VGGs and the ResNet of the paper at least 32.
        plan: replaces the list of layers, e.g. of a VGG [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"], of an MLP [100].
        width: multiplies the number of neurons or maps of each layer, which is then at least 4. Positive; 1: the
            paper's network.
        tau, threshold, alpha: of all LIF neurons, see `lif.simulate`.
        ei_ratio: excitatory neurons for each inhibitory one, of "ei" and "dann".
        eps, ste, grad_scaling: of the circuits of "ei", see `EICircuit`.

    Returns:
        A module: images (B, C, S, S) or frames (B, T, C, S, S) -> logits (B, n_classes). Its E-I circuits are to be
        initialised by `ei_init.initialize` with the first batch; before that, the layers are silent and learn nothing.

    Raises:
        ValueError: an unknown arch or kind, a size below 1, a plan that is none of this architecture, images too
            small, a neuron or circuit that cannot be (see `lif.simulate`, `EICircuit`).
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHS)}")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
    if min(in_channels, n_classes, T, image_size) < 1 or not width > 0:
        raise ValueError(
            f"sizes must be at least 1 and the width positive, not in_channels={in_channels}, n_classes={n_classes}, "
            f"T={T}, image_size={image_size}, width={width}"
        )
    needed = 32 if arch == "resnet18" else 2 ** PLANS[arch].count("P")  # each pooling halves the side
    if plan is None and image_size < needed:
        raise ValueError(
            f"images of {image_size}x{image_size} pixels are too small: {arch} needs {needed}x{needed} or more"
        )

    def maps(n):
        return n if width == 1 else max(4, round(n * width))

    options = dict(ei_ratio=ei_ratio, eps=eps, ste=ste, grad_scaling=grad_scaling) if kind == "ei" else {}
    if kind == "dann":
        options = dict(ei_ratio=ei_ratio)
    dense = arch.startswith("mlp")
    standing = (DENSE if dense else CONV)[kind]

    def layer(*args, **kwargs):
        neuron = nn.ReLU() if kind == "dann" else LIF(tau, threshold, alpha)
        return Layer(standing(*args, **kwargs, **options), neuron)

    if arch == "resnet18":
        if plan is not None:
            raise ValueError("a plan is a list of layers of a VGG or an MLP; resnet18 takes none")
        encoder = ResNet18(in_channels, layer, [maps(n) for n in (64, 128, 256, 512)])
    else:
        plan = PLANS[arch] if plan is None else plan
        pooling = [] if dense else ["P"]
        sizes = [n for n in plan if n not in pooling] if isinstance(plan, list | tuple) else []
        if not sizes or any(type(n) is not int or n < 1 for n in sizes):
            also = " and P, one of them a size" if pooling else ""
            raise ValueError(f"a plan of {arch} is a list of layer sizes{also}, not {plan}")
        plan = [n if n == "P" else maps(n) for n in plan]
        if dense:
            encoder = MLP(plan, in_channels * image_size**2, layer)
        else:
            encoder = VGG(plan, in_channels, image_size, layer)
    if kind in ("ei", "dann"):
        readout = DENSE[kind](encoder.n_features, n_classes, readout=True, **options)
    else:
        readout = nn.Linear(encoder.n_features, n_classes)
    return Network(encoder, readout, T, in_channels, image_size)


def circuits(model):
    """The E-I circuits of a network in the order in which they run, the readout last: a list of `EICircuit`."""
    return [m for m in model.modules() if isinstance(m, EICircuit)]


def layers(model):
    """The spiking layers (circuit and neurons) of a network in the order in which they run: a list of `Layer`."""
    return [m for m in model.modules() if isinstance(m, Layer)]
