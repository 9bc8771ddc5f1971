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
from homeostasis import HomeostaticCircuit, HomeostaticCircuit2d
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
    "resnet18": [64, 128, 256, 512],  # maps of its stem and four stages
}
ARCHS = list(PLANS)
KINDS = ["ei", "bn", "plain", "dann", "homeostasis"]
DENSE = dict(ei=EICircuit, bn=bn_dense, plain=plain_dense, dann=DANNCircuit)  # what stands in a layer, by kind
CONV = dict(ei=EICircuit2d, bn=bn_conv, plain=plain_conv, dann=DANNCircuit2d)
DENSE["homeostasis"], CONV["homeostasis"] = HomeostaticCircuit, HomeostaticCircuit2d
NEURON_OPTIONS = ("tau", "threshold", "alpha")  # see `lif.simulate`; those of the circuits by kind: see `EICircuit`
CIRCUIT_OPTIONS = dict(ei=("ei_ratio", "eps", "ste", "grad_scaling"), bn=(), plain=(), dann=("ei_ratio",))
CIRCUIT_OPTIONS["homeostasis"] = CIRCUIT_OPTIONS["ei"]


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
        if stride != 1:
            self.shortcut = layer(in_channels, n_e, 1, stride=stride)

    def forward(self, x):
        spikes = self.conv2(self.conv1(x))  # (T, B, n_E, H', W')
        identity = x if self.shortcut is None else self.shortcut(x)
        return spikes + identity


class ResNet18(nn.Module):
    """SEW-ResNet-18: stem, four stages of two blocks, global average pooling: (T, B, C, S, S) -> features (T, B, F)."""

    def __init__(self, widths, in_channels, layer):
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
        shapes = {4: image, 5: (self.T, *image)}  # of a sample, by the number of axes
        if x.numel() == 0 or x.shape[1:] != shapes.get(x.dim()):
            c, _, size = image
            raise ValueError(
                f"the network takes images (B, {c}, {size}, {size}) or frames (B, {self.T}, {c}, {size}, {size}), B at "
                f"least 1, not {(*x.shape,)}; a single image x is x[None]"
            )
        if not x.is_floating_point():
            raise ValueError(f"the images are {x.dtype}: give intensities in [0, 1], e.g. images.float() / 255")
        looks = x.is_cpu and not torch.compiler.is_compiling()  # on a GPU a look at the values would wait for it
        if looks and circuits(self) and not are_intensities(x.detach()):
            raise ValueError(
                "the images have values that are negative, as after subtracting a mean, or not finite: the circuit "
                "needs intensities in [0, 1], or it would divide by I_div of any sign"
            )


def are_intensities(x):
    """Whether all values are finite and at least 0. Under torch.func.vmap nobody can look at them: True."""
    try:
        return bool(((x >= 0) & (x < torch.inf)).all())
    except RuntimeError:
        return True


def build(arch, in_channels=3, n_classes=10, T=4, kind="ei", image_size=32, plan=None, width=1.0, **options):
    """A network of the paper: images (B, C, S, S) or frames (B, T, C, S, S) -> logits (B, n_classes).

    Its E-I circuits are to be initialised by `ei_init.initialize` with the first batch; before that, the layers are
    silent and learn nothing.

    Args:
        arch: one of `ARCHS`: "mlp", "vgg8", "vgg11", "vgg16", "vgg19", "resnet18".
        in_channels, n_classes, T: sizes, at least 1. T is the number of time steps.
        kind: one of `KINDS`: "ei" (the paper's), "bn", "plain" or "dann" (`baselines.py`), "homeostasis" (its file).
        image_size: side of the square images in pixels; for the VGGs of the paper at least 32.
        plan: replaces the list of layers, e.g. of a VGG [16, "P", 32, "P"], of an MLP [100].
        width: multiplies the number of neurons or maps of each layer, which is then at least 4.
        options: tau, threshold, alpha of the LIF neurons (`lif.simulate`); ei_ratio of the circuits of "ei",
            "dann" and "homeostasis"; eps, ste, grad_scaling of the first and last (`EICircuit`). A kind without
            such a thing leaves it aside.

    Raises:
        ValueError: an unknown arch or kind, a size below 1, a plan that is none, images too small for the poolings.
    """
    if arch not in ARCHS or kind not in KINDS:
        raise ValueError(
            f"arch is one of {', '.join(ARCHS)} and kind one of {', '.join(KINDS)}, not {arch!r}, {kind!r}"
        )
    if min(in_channels, n_classes, T, image_size) < 1 or not width > 0:
        sizes = dict(in_channels=in_channels, n_classes=n_classes, T=T, image_size=image_size, width=width)
        raise ValueError(f"in_channels, n_classes, T and image_size are at least 1, and width is positive, not {sizes}")
    if unknown := options.keys() - {*NEURON_OPTIONS, *CIRCUIT_OPTIONS["ei"]}:
        raise TypeError(f"build has no option {min(unknown)!r}")
    of_neuron = {name: options[name] for name in NEURON_OPTIONS if name in options}
    of_circuit = {name: options[name] for name in CIRCUIT_OPTIONS[kind] if name in options}
    dense = arch.startswith("mlp")
    circuit_class = (DENSE if dense else CONV)[kind]

    def layer(*args, **kwargs):
        neuron = nn.ReLU() if kind == "dann" else LIF(**of_neuron)
        return Layer(circuit_class(*args, **kwargs, **of_circuit), neuron)

    plan = scaled_plan(arch, plan, width)
    if arch == "resnet18":
        encoder = ResNet18(plan, in_channels, layer)
    elif dense:
        encoder = MLP(plan, in_channels * image_size**2, layer)
    else:
        encoder = VGG(plan, in_channels, image_size, layer)
    if kind in ("ei", "dann", "homeostasis"):
        readout_class = DENSE["ei" if kind == "homeostasis" else kind]
        readout = readout_class(encoder.n_features, n_classes, readout=True, **of_circuit)
    else:
        readout = nn.Linear(encoder.n_features, n_classes)
    return Network(encoder, readout, T, in_channels, image_size)


def scaled_plan(arch, plan, width):
    """The list of layers of an architecture, or `plan` in its place, times `width`."""
    plan = PLANS[arch] if plan is None else plan
    sizes = [n for n in plan if n != "P"] if isinstance(plan, list | tuple) else []
    if (
        not sizes
        or any(type(n) is not int or n < 1 for n in sizes)
        or ("P" in plan and arch.startswith(("mlp", "resnet")))
    ):
        raise ValueError(f"a plan is a list of layer sizes, of a VGG also of P, not {plan}")
    return [n if n == "P" or width == 1 else max(4, round(n * width)) for n in plan]


def circuits(model):
    """The E-I circuits of a network in the order in which they run, the readout last: a list of `EICircuit`."""
    return [m for m in model.modules() if isinstance(m, EICircuit)]


def layers(model):
    """The spiking layers (circuit and neurons) of a network in the order in which they run: a list of `Layer`."""
    return [m for m in model.modules() if isinstance(m, Layer)]
