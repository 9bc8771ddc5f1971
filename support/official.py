"""The authors' trained networks: reading and writing their files, and training beside their program.

    model = official.load("model.safetensors", T=4, image_size=32)     a network of `model.build`
    official.save(model, "model.safetensors")                          runs in the authors' program
    python train.py --official CIFAR10-VGG8 --data cifar10             downloads one, tests it, makes a run folder
    python -m support.official --compare DIR                           DIR is a checkout of the authors' repository
First: pip install -r requirements-official.txt. Nothing in such a file is executed."""

import argparse
import contextlib
import importlib
import json
import re
import sys
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F

from ei_init import initialize
from inhibition import EICircuit2d, clamp_dale
from model import MLP, PLANS, ResNet18, build, circuits
from support import data, explained, parallel, recipes
from support.fast import accelerate
from support.measure import evaluate, header
from support.runs import Run, load_data_and_model, write_atomically

REPOSITORY = "vwOvOwv/DeepEISNN"  # at Hugging Face and at GitHub
# Top-1 accuracy in % that the authors report.
PUBLISHED = {"CIFAR10-VGG8": 87.03, "CIFAR10-VGG11": 88.43, "CIFAR10-VGG16": 91.01, "CIFAR10-VGG19": 91.36}
PUBLISHED |= {"CIFAR10-ResNet18": 92.06, "CIFAR100-VGG16": 65.90, "CIFAR100-VGG19": 64.06, "DVSGesture-VGG8": 95.83}
PUBLISHED |= {"TinyImageNet200-ResNet18": 50.29, "CIFAR10DVS-VGG8": 78.40, "CIFAR10DVS-VGG11": 78.40}
DATA = {"tinyimagenet200": "tinyimagenet", "cifar10dvs": "cifar10-dvs", "dvsgesture": "dvs-gesture"}  # others: the same
# What config.json may say of a neuron beside tau and v_threshold: ours is like this and cannot be another.
NEURON = dict(surrogate_function="sigmoid", step_mode="m", decay_input=False, v_reset=None, detach_reset=True)
SGD = dict(lr=0.002, momentum=recipes.MOMENTUM, weight_decay=5e-4)
# A circuit is two modules there, {0} and {1}. The readout's {1} has gains and a bias, too, which it does not use.
CONV = dict(w_ee="{0}.conv_ee.weight", w_ie="{0}.conv_ie.weight", w_ei="{1}.weight_ei")
CONV.update(g_i="{1}.gain_i", g_e="{1}.gain_e", b_e="{1}.bias")  # (n, 1, 1), in a dense layer (1, n)
DENSE = {**CONV, "w_ee": "{0}.weight_ee", "w_ie": "{0}.weight_ie"}


def modules_of(encoder, frames):
    """The authors' names for the two modules of each circuit, in the order of `circuits`.
    In a VGG and an MLP they number all steps: the image repeated over time (not with frames), time merged into the
    batch; of each layer its two modules, time split off, LIF, dropout, time merged; each pooling; flattening. (An MLP
    has no dropout and no flattening.)"""
    if isinstance(encoder, ResNet18):
        pairs = [("conv1", "norm1")]
        for i, block in enumerate(encoder.blocks):
            name = f"layer{i // 2 + 1}.{i % 2}"
            pairs += [(f"{name}.conv1", f"{name}.norm1"), (f"{name}.conv2", f"{name}.norm2")]
            pairs += [(f"{name}.downsample.0", f"{name}.downsample.1")] if block.shortcut is not None else []
        return [*pairs, ("fc", "final_ei_norm")]
    steps = 5 if isinstance(encoder, MLP) else 6  # of a circuit
    places = [i for i, stage in enumerate(encoder.stages) if hasattr(stage, "circuit")]
    places.append(len(encoder.stages) + steps - 5)  # the readout
    numbers = [2 - bool(frames) + place + n * (steps - 1) for n, place in enumerate(places)]
    return [(f"layers.{number}", f"layers.{number + 1}") for number in numbers]


def state_of(model, frames=False):
    """The parameters of a network under the authors' names and in their shapes: a dict of tensors that share memory."""
    known = getattr(model, "official", {"frames": frames})  # of a network from `load`
    found, modules = {}, modules_of(model.encoder, known["frames"])
    for circuit, pair in zip(circuits(model), modules, strict=False):
        names, shape = (CONV, (-1, 1, 1)) if isinstance(circuit, EICircuit2d) else (DENSE, (1, -1))
        if more := circuit.state_dict().keys() - names.keys():
            raise ValueError(f"the authors' program has no circuit with a parameter {min(more)}")
        for ours, name in names.items():
            name, p = name.format(*pair), getattr(circuit, ours, None)
            if p is None:  # not used: what was in the file, or neutral values
                n = circuit.n_i if ours == "g_i" else circuit.n_e
                p = known.setdefault(name, torch.full((n,), 0.0 if ours == "b_e" else 1.0).to(circuit.w_ee))
            found[name] = p.detach().view(shape) if p.dim() == 1 else p.detach()
    return found


def package(name):
    with explained("the authors' files need packages more: pip install -r requirements-official.txt"):
        return importlib.import_module(name)


def read(path):
    """The tensors of their file, or of that in a folder: a dict. What is before all names ("module.") is cut."""
    path, load_bytes = Path(path).expanduser(), package("safetensors.torch").load
    path = path / "model.safetensors" if path.is_dir() else path
    content = data.content_of(path)
    with explained(f"{path} is damaged or no safetensors file, a pickle is not read"):
        tensors = load_bytes(content)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all() or (not name.endswith("bias") and (tensor < 0).any()):
            raise ValueError(f"{path}: {name!r} has values that are not finite, or below 0, which Dale's law forbids")
    cut = len(commonprefix(list(tensors)).partition("layers.")[0])  # noqa: RUF071
    return {name[cut:]: tensor for name, tensor in tensors.items()}


@torch.no_grad()
def fill(model, tensors):
    """Puts the tensors of a file into a network, which remembers those that it does not use, for `save`."""
    model.official = {"frames": any(name.startswith("layers.1.") for name in tensors)}
    expected = state_of(model)
    for name, p in expected.items():
        if name not in tensors or tensors[name].shape != p.shape:
            what = f"of shape {(*tensors[name].shape,)}" if name in tensors else "missing"
            raise ValueError(f"the tensor {name!r} is {what}, not of shape {(*p.shape,)}")
        p.copy_(tensors[name])
    if more := tensors.keys() - expected.keys():
        raise ValueError(f"the tensor {min(more)!r} has no place in this network")
    return model


def describe(tensors, image_size=32):
    """What `model.build` is to be told of a file's network. Its poolings are where the paper has them."""
    names = [name for name in tensors if re.fullmatch(r"layers\.\d+\.(conv_ee\.weight|weight_ee)", name)]
    names.sort(key=lambda name: int(name.split(".")[1]))
    if "fc.weight_ee" in tensors:
        arch, names = "resnet18", ["conv1.conv_ee.weight", "fc.weight_ee"]
    elif len(names) > 1 and tensors[names[0]].dim() == 2:
        arch = "mlp"
    else:
        arch = {6: "vgg8", 9: "vgg11", 14: "vgg16", 17: "vgg19"}.get(len(names))
    if arch is None:
        raise ValueError(f"{len(names)} layers are no E-I network of the authors")
    first, *between, last = [tensors[name] for name in names]
    sizes = iter([len(first), *map(len, between)])
    plan = list(sizes) if arch == "mlp" else [n if n == "P" else next(sizes, n) for n in PLANS[arch]]
    plan = None if plan == PLANS[arch] else plan
    channels = first.shape[1] // image_size**2 if arch == "mlp" else first.shape[1]
    shapes = [tensor.shape for name, tensor in tensors.items() if name.endswith("weight_ei")]  # (n_E, n_I)
    ratio = next((r for r in range(1, 10**4) if all(max(1, n_e // r) == n_i for n_e, n_i in shapes)), 4)
    return dict(arch=arch, plan=plan, in_channels=channels, n_classes=len(last), ei_ratio=ratio)


def load(path, arch=None, **options):
    """One of the authors' networks, from their model.safetensors or its folder: a network of `model.build`.
    options: of `model.build`, e.g. T and image_size. With an `arch` they say all; else sizes are those of the file.
    ValueError: a tensor is missing, too many, or of another shape. OSError: there is no file."""
    tensors = read(path)
    told = dict(arch=arch) if arch else describe(tensors, options.get("image_size", 32))
    return fill(build(**told | options), tensors)


def save(model, path, frames=False):
    """Writes an E-I network of `model.build` as the authors' program does; tau, theta and eps are not in such a file.
    frames: for their event networks, which count their layers from one less. A network from `load` keeps its names.
    ValueError: their program has no such circuits. OSError: the file cannot be written."""
    if not circuits(model):
        raise ValueError("only networks with E-I circuits are saved for the authors' program")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state_of(model, frames).items()}
    write_atomically(Path(path).expanduser(), package("safetensors.torch").save(tensors, metadata={"format": "pt"}))


def fetch(name):
    """The folder with config.json and model.safetensors: `name` is one, or one of `PUBLISHED`, which is downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is no folder and none of the published networks: {', '.join(PUBLISHED)}")
    download = package("huggingface_hub").hf_hub_download
    there = f"huggingface.co/{REPOSITORY}/tree/main/{name}"
    with explained(f"get both files of {there}, and give --official FOLDER: the download failed"):
        download(REPOSITORY, "config.json", subfolder=name)
        return Path(download(REPOSITORY, "model.safetensors", subfolder=name)).parent


def settings_of(folder, told, args):
    """The settings of a run: what is given on the command line, else what config.json and (told) the file say."""
    with explained(f"{folder / 'config.json'} cannot be used"):
        theirs = json.loads(data.content_of(folder / "config.json"))
        dataset, plan = theirs["dataset"].lower(), "-".join(map(str, told["plan"] or ()))
        said = dict(arch=told["arch"], plan=plan, ei_ratio=told["ei_ratio"], data=DATA.get(dataset, dataset))
        neuron = NEURON | {key: theirs[key] for key in ("tau", "v_threshold", *NEURON) if key in theirs}
        neuron |= theirs.get("neuron_config", {}) | theirs.get("neuron", {})
        said.update(tau=float(neuron.pop("tau", 2)), threshold=float(neuron.pop("v_threshold", 1)), T=int(theirs["T"]))
        if neuron != NEURON:
            raise ValueError(f"a neuron of {neuron} is not the one of this program, {NEURON}")
    given = {key: value for key, value in vars(args).items() if value is not None}
    return recipes.settings(argparse.Namespace(**said | given))


def command(args, device):
    """`train.py --official`: tests one of the authors' networks, and makes a run folder of it. Returns 0."""
    if parallel.world() > 1 or args.kind not in (None, "ei"):
        raise ValueError("--official is for one process, and of --kind ei: leave torchrun and other kinds out")
    folder = fetch(args.official)
    tensors = read(folder)
    config = settings_of(folder, describe(tensors), args)
    dataset, model = load_data_and_model(config, device, args.plain)
    with explained(f"{folder} is not of the network that its config.json, the options and the data make"):
        fill(model, tensors)
    name = folder.resolve().name
    run = Run.create(args.out or f"runs/official-{name}", config, choose=args.out is None)
    with contextlib.closing(run):
        header(config, dataset, model, device)
        if not args.plain:
            accelerate(model)
        _, accuracy, _ = evaluate(model, dataset.test_x, dataset.test_y)
        run.data = data.identity(dataset)
        run.keep_best(model, 0, accuracy)
    published = f"; the authors report {PUBLISHED[name]:.2f}% on {name.partition('-')[0]}" if name in PUBLISHED else ""
    print(f"test accuracy {accuracy:.2%}{published}\nrun folder: {run.folder}")
    print(f"its costs: python train.py --eval {run.quoted}   its figures: python visualize.py all {run.quoted}")
    return 0


def theirs_like(model, folder, bn=False):
    """A VGG of the authors' program with sizes and weights of `model`, or their BN-SNN. Its `sgd`: their optimiser."""
    plan = [stage.circuit.n_e if hasattr(stage, "circuit") else "P" for stage in model.encoder.stages]
    depth, like = len(plan) - plan.count("P") + 3, model.readout.w_ee  # they count three dense layers
    how = dict(T=model.T, num_layers=depth, in_channels=model.in_channels, n_outputs=model.readout.n_e)
    how.update(neuron_config=dict(tau=2.0), light_classifier=True, dropout=0.0, seq_input=False)
    sys.path.insert(0, str(folder))
    with explained(f"{folder} is no checkout of github.com/{REPOSITORY} that runs"):
        vgg, optimizers = (importlib.import_module(name) for name in ("models.vgg", "modules.optimizers"))
        reset = importlib.import_module("spikingjelly.activation_based.functional").reset_net
        vgg.layer_config[depth] = plan
        if bn:
            network = vgg.SpikingVGG(**how, BN=True).to(like)
        else:
            network = vgg.SpikingEiVGG(**how, ei_ratio=4, device=like.device, rng=None).to(like)
            network.load_state_dict(state_of(model))
        for module in network.modules():  # they would draw weights at the first batch
            module._inited = True
        network.register_forward_pre_hook(lambda *_: reset(network))  # the membranes of the batch before
        network(torch.zeros(2, model.in_channels, 32, 32).to(like))
        groups = [dict(params=p, clamped="bias" not in n and not bn) for n, p in network.named_parameters()]  # to >= 0
        network.sgd = optimizers.EiSGD(groups, **SGD)
        return network


def compare(folder, steps=100, width=0.25, batch_size=16):
    """Trains a narrow VGG-8 on the digits beside the authors' program, from the same weights, on the same batches, in
    float64. Prints the losses and how far any parameter is apart. Returns 0."""
    dataset, config = data.load("digits"), dict(seed=0, batch_size=batch_size)
    torch.manual_seed(0)
    ours = build("vgg8", dataset.in_channels, dataset.n_classes, width=width).double()
    initialize(ours, data.first_batch(config, dataset)[0].double())
    theirs = theirs_like(ours, folder)
    for p in theirs.parameters():  # else their first step is 1.9 times the gradient: it is added to itself
        theirs.sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    optimizers, order = [torch.optim.SGD(ours.parameters(), **SGD), theirs.sgd], data.epoch_order(config, dataset, 0)
    print(f"{'step':>5}{'loss, ours':>14}{'theirs':>14}{'parameters apart by':>24}")
    for step in range(1, steps + 1):
        x, y = data.training_batch(config, dataset, order[step % len(order)], step)
        losses = [F.cross_entropy(network(x.double()), y) for network in (ours, theirs)]
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        clamp_dale(ours)
        if step == 1 or step % 10 == 0:
            apart = max((p - theirs.get_parameter(name)).abs().max() for name, p in state_of(ours).items())
            print(f"{step:5}{losses[0]:14.6f}{losses[1]:14.6f}{apart:24.1e}")
    return 0


def main(argv=None):
    """The command line of side-by-side training; returns the exit status."""
    p = recipes.Parser(prog="support.official", description="Train beside the authors' program.")
    p.add_argument("--compare", metavar="DIR", type=recipes.folder, required=True, help="checkout of their repository")
    return recipes.status(lambda: compare(p.parse_args(argv).compare))


if __name__ == "__main__":
    sys.exit(main())
