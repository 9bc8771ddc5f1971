"""The authors' trained networks: reading them, writing such files, and training side by side with the authors' program.
A reader of the paper may skip this file.

    from support import official
    model = official.load("model.safetensors", T=4, image_size=32)     a network of `model.build`
    official.save(model, "model.safetensors")                          runs in the authors' program

    python train.py --official CIFAR10-VGG8 --data cifar10             downloads one, tests it, makes a run folder
    python -m support.official --compare DIR                           DIR is a checkout of the authors' repository

First: pip install -r requirements-official.txt. A file is read as numbers with names; nothing in it is executed.

Their names for the parts of a circuit, and ours (a dense layer has weight_ee and weight_ie):

    conv_ee.weight, conv_ie.weight   w_ee, w_ie        weight_ei   w_ei
    gain_i, gain_e, bias             g_i, g_e, b_e     (n, 1, 1) after a convolution, (1, n) in a dense layer

The norm of their readout stores a gain_i, a gain_e and a bias that it does not use.
"""

import argparse
import json
import re
from pathlib import Path

import torch

from inhibition import EICircuit2d
from model import MLP, PLANS, ResNet18, build, circuits
from support import data, parallel, recipes
from support.console import first_line, leave, status
from support.fast import accelerate
from support.measure import cost_table, evaluate, header
from support.runs import Run, load_data_and_model, write_atomically

REPOSITORY = "vwOvOwv/DeepEISNN"  # at Hugging Face
PUBLISHED = {  # top-1 accuracy in % that the authors report
    "CIFAR10-VGG8": 87.03,
    "CIFAR10-VGG11": 88.43,
    "CIFAR10-VGG16": 91.01,
    "CIFAR10-VGG19": 91.36,
    "CIFAR10-ResNet18": 92.06,
    "CIFAR100-VGG16": 65.90,
    "CIFAR100-VGG19": 64.06,
    "TinyImageNet200-ResNet18": 50.29,
    "CIFAR10DVS-VGG8": 78.40,
    "CIFAR10DVS-VGG11": 78.40,
    "DVSGesture-VGG8": 95.83,
}
DATA = {name: name for name in data.LOADERS} | dict(fashionmnist="fashion-mnist")  # theirs, in lower case, and ours
DATA |= dict(tinyimagenet200="tinyimagenet", cifar10dvs="cifar10-dvs", dvsgesture="dvs-gesture")
NO_USE = ("epochs", "lr", "warmup_epochs", "warmup_from", "weight_decay", "clip_norm", "init", "give_up", "other_data")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def safetensors():
    """The package, or a line that says how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("the authors' files need a package more: pip install -r requirements-official.txt") from None
    return safetensors.torch


# ---- names -----------------------------------------------------------------------------------------------------------

RESNET = [("conv1", "norm1")]  # where the weights from x of each circuit are, and the rest; in the order of `circuits`
for _block in [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]:
    RESNET += [(f"{_block}.conv{i}", f"{_block}.norm{i}") for i in (1, 2)]
    if _block in ("layer2.0", "layer3.0", "layer4.0"):
        RESNET.append((f"{_block}.downsample.0", f"{_block}.downsample.1"))
RESNET.append(("fc", "final_ei_norm"))


def numbered(encoder, frames):
    """The same pairs for a VGG or an MLP: the authors number all steps of their forward pass.

    Those are: repeating the image over time (not with frames), merging time into the batch; for each convolution that,
    its norm, splitting off time, LIF, dropout, merging; a pooling is one step, flattening another. Their MLP has no
    dropout and does not flatten.
    """
    number, pairs = (1 if frames else 2), []
    for stage in encoder.stages:
        if hasattr(stage, "circuit"):
            pairs.append((f"layers.{number}", f"layers.{number + 1}"))
            number += 5 if isinstance(encoder, MLP) else 6
        else:
            number += 1
    number += not isinstance(encoder, MLP)
    return [*pairs, (f"layers.{number}", f"layers.{number + 1}")]


def names(circuit, pair):
    """The tensors of a circuit in the authors' file: name -> (our parameter or None, shape).

    Raises:
        ValueError: the circuit has a parameter that theirs has not.
    """
    conv = isinstance(circuit, EICircuit2d)
    n_e, n_i = circuit.n_e, circuit.n_i
    synapses, norm = pair
    w_ee, w_ie = ("conv_ee.weight", "conv_ie.weight") if conv else ("weight_ee", "weight_ie")
    found = {f"{synapses}.{w_ee}": ("w_ee", circuit.w_ee.shape), f"{synapses}.{w_ie}": ("w_ie", circuit.w_ie.shape)}
    found[f"{norm}.weight_ei"] = ("w_ei", circuit.w_ei.shape)
    for name, ours, n in (("gain_i", "g_i", n_i), ("gain_e", "g_e", n_e), ("bias", "b_e", n_e)):
        shape = torch.Size((n, 1, 1) if conv else (1, n))
        found[f"{norm}.{name}"] = (None if circuit.readout else ours, shape)
    if more := dict(circuit.named_parameters()).keys() - {ours for ours, _ in found.values()}:
        raise ValueError(f"the circuit here has a parameter {min(more)}, which has no place in the authors' program")
    return found


def part(name):
    """ "synapses" or "norm", the part of their names before it, and what it is."""
    for kind, pattern in (("synapses", r"(conv_|weight_)(ee|ie)(\.weight)?"), ("norm", r"weight_ei|gain_[ie]|bias")):
        if found := re.fullmatch(rf"(.+)\.({pattern})", name):
            return kind, found[1]
    raise ValueError(f"the tensor {name!r} is no part of one of the authors' networks")


# ---- reading and writing ---------------------------------------------------------------------------------------------


def read(path):
    """The tensors of a safetensors file by name: a dict.

    Raises:
        ValueError: it is something else or damaged, or holds something else than finite numbers, which are not
            negative where Dale's law holds.
    """
    path = Path(path).expanduser()
    path = path / WEIGHTS if path.is_dir() else path
    package = safetensors()
    try:
        tensors = package.load(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # the package's own exception is a plain one
        raise ValueError(
            f"{path} is damaged or no safetensors file (a pickle is not read): {first_line(error)}"
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise ValueError(f"{path}: the tensor {name!r} is of {tensor.dtype}, not of float32")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path}: the tensor {name!r} has values that are no finite float32 numbers")
        if not name.endswith("bias") and tensor.numel() and tensor.min() < 0:
            raise ValueError(f"{path}: the tensor {name!r} has values below 0, which Dale's law forbids")
    return tensors


def pairs_of(tensors):
    """The pairs of `numbered` or `RESNET` for the tensors of a file, in the order of the forward pass."""
    if any(name.startswith("conv1.") for name in tensors):
        return RESNET
    prefixes = dict(synapses={}, norm={})
    for name in tensors:
        kind, prefix = part(name)
        prefixes[kind][prefix] = [int(digits) for digits in re.findall(r"\d+", prefix)]
    synapses, norms = (sorted(found, key=found.get) for found in prefixes.values())
    if len(synapses) != len(norms):
        raise ValueError(f"there are tensors of {len(synapses)} layers and of {len(norms)} norms: some are missing")
    if not synapses:
        raise ValueError("there are no tensors in it")
    return list(zip(synapses, norms, strict=True))


def describe(tensors, image_size, ei_ratio=4):
    """What `model.build` is to be told, from the names and shapes alone: a dict.

    Small layers may fit several E:I ratios. Then it is `ei_ratio` if that is one of them.
    """
    if image_size < 1:
        raise ValueError(f"the side of the images must be at least 1 pixel, not {image_size}")
    pairs = pairs_of(tensors)

    def shape(pair, population):
        for name in (f"{pair[0]}.conv_{population}.weight", f"{pair[0]}.weight_{population}"):
            if name in tensors:
                if tensors[name].dim() not in (2, 4):
                    raise ValueError(f"the tensor {name!r} has the shape {(*tensors[name].shape,)}, which no layer has")
                return tensors[name].shape
        raise ValueError(f"a tensor is missing: the weights {population} of {pair[0]}")

    w_ee, w_ie = ([shape(pair, population) for pair in pairs] for population in ("ee", "ie"))
    sizes = [s[0] for s in w_ee[:-1]]
    ratios = [r for r in range(1, max(sizes, default=0) + 1)]
    ratios = [r for r in ratios if all(max(1, e[0] // r) == i[0] for e, i in zip(w_ee, w_ie, strict=True))]
    if not ratios:
        raise ValueError("the numbers of excitatory and inhibitory neurons of its layers follow no one E:I ratio")
    ei_ratio = ei_ratio if ei_ratio in ratios else ratios[0]
    found = dict(n_classes=w_ee[-1][0], in_channels=w_ee[0][1], ei_ratio=ei_ratio, plan=None)
    n_conv = sum(len(s) == 4 for s in w_ee)
    if pairs is RESNET:
        stages = zip(sizes[::5], (64, 128, 256, 512), strict=True)  # each n is 64, ... times the width, rounded
        lowest, highest = zip(
            *(((n - 0.5) / full if n > 4 else 0, (n + 0.5) / full) for n, full in stages), strict=True
        )
        return found | dict(arch="resnet18", width=(max(lowest) + min(highest)) / 2)
    if n_conv == 0:
        channels, rest = divmod(w_ee[0][1], image_size**2)
        if rest or not channels:
            raise ValueError(f"it takes {w_ee[0][1]} inputs, which are no images of {image_size}x{image_size} pixels")
        return found | dict(arch="mlp", in_channels=channels, plan=None if sizes == PLANS["mlp"] else sizes)
    by_depth = {len(plan) - plan.count("P"): arch for arch, plan in PLANS.items() if not arch.startswith("mlp")}
    if n_conv != len(w_ee) - 1 or n_conv not in by_depth:
        raise ValueError(f"{n_conv} convolutions and {len(w_ee) - n_conv} dense layers are no network of the paper")
    arch, left = by_depth[n_conv], iter(sizes)
    plan = [n if n == "P" else next(left) for n in PLANS[arch]]
    return found | dict(arch=arch, plan=None if plan == PLANS[arch] else plan)


@torch.no_grad()
def fill(model, tensors):
    """Puts the tensors of a file into a network. Each must be there, of the right shape, and there may be no other.

    The network remembers the names, and the numbers that it has no use for, so that `save` can write them again.
    """
    pairs, expected = pairs_of(tensors), {}
    for circuit, pair in zip(circuits(model), pairs, strict=True):
        for name, (ours, shape) in names(circuit, pair).items():
            if name not in tensors:
                raise ValueError(f"the tensor {name!r} is missing")
            if tensors[name].shape != shape:
                raise ValueError(f"the tensor {name!r} has the shape {(*tensors[name].shape,)}, not {(*shape,)}")
            expected[name] = circuit, ours
    if extra := tensors.keys() - expected.keys():
        raise ValueError(f"the tensor {min(extra)!r} has no place in this network")
    for name, (circuit, ours) in expected.items():
        if ours:
            p = getattr(circuit, ours)
            p.copy_(tensors[name].view_as(p))
    unused = {name: tensors[name].clone() for name, (_, ours) in expected.items() if ours is None}
    model.official = dict(pairs=pairs, unused=unused)
    return model


def network(tensors, T, image_size, ei_ratio=4):
    """A network of `model.build` with these tensors."""
    return fill(build(T=T, image_size=image_size, **describe(tensors, image_size, ei_ratio)), tensors)


def load(path, T=4, image_size=32):
    """One of the authors' networks, for use and for further training.

    Args:
        path: their model.safetensors, or the folder that it is in.
        T: time steps.
        image_size: side of the images. It is not in the file; of an MLP it decides about the number of channels.

    Returns:
        A network of `model.build`, in float32. Architecture, number of layers, maps, channels and classes, and the E:I
        ratio are those of the file.

    Raises:
        ValueError: no such file, a tensor that is missing, too many, or of another shape; a network for other images.
    """
    tensors = read(path)
    try:
        return network(tensors, T, image_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def state_of(model, frames=False):
    """The tensors of a network under the authors' names: a dict."""
    if not circuits(model) or any(not hasattr(c, "g_i") and not c.readout for c in circuits(model)):
        raise ValueError("only an E-I network (kind 'ei') has a place in the authors' program")
    pairs = RESNET if isinstance(model.encoder, ResNet18) else numbered(model.encoder, frames)
    known = getattr(model, "official", dict(pairs=pairs, unused={}))
    found = {}
    for circuit, pair in zip(circuits(model), known["pairs"], strict=True):
        for name, (ours, shape) in names(circuit, pair).items():
            if ours:
                found[name] = getattr(circuit, ours).detach().reshape(shape).cpu().contiguous()
            else:  # not used: what was in the file, or the neutral values
                neutral = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
                found[name] = known["unused"].get(name, neutral).to(circuit.w_ee.dtype)
    return found


def save(model, path, frames=False):
    """Writes a network as the authors' program does, model.safetensors. Such a file does not say tau, threshold or eps.

    Args:
        model: an E-I network of `model.build`, a VGG, an MLP or a ResNet-18, in float32, of any width; a VGG with its
            poolings where the paper has them.
        path: the file.
        frames: for their event networks, which count their layers from one less. A network from `load` keeps its names.

    Raises:
        ValueError: a network of another kind. OSError: it cannot be written.
    """
    tensors = state_of(model, frames)
    try:
        again = network(tensors, model.T, model.image_size)
    except ValueError as error:
        raise ValueError(f"the authors' program has no such network: {error}") from None
    if not isinstance(model.encoder, ResNet18) and numbered(again.encoder, frames) != numbered(model.encoder, frames):
        raise ValueError("the authors' program has no such network: its poolings are at other places")
    write_atomically(Path(path).expanduser(), safetensors().save(tensors, metadata={"format": "pt"}))


# ---- python train.py --official --------------------------------------------------------------------------------------


def fetch(name):
    """The folder with config.json and model.safetensors: `name` is one, or one of `PUBLISHED`, which is downloaded."""
    folder = Path(name).expanduser()
    if folder.name == WEIGHTS and folder.is_file():
        return folder.parent
    if folder.is_dir():
        return folder
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is no folder and none of the published networks: {', '.join(PUBLISHED)}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError:
        raise ValueError("downloading needs a package more: pip install -r requirements-official.txt") from None
    logging.set_verbosity_error()  # without its remarks on each of its attempts
    try:
        files = [Path(hf_hub_download(REPOSITORY, file, subfolder=name)) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # of several packages: no network, a proxy, a full disk
        raise OSError(
            f"{name} cannot be downloaded ({first_line(error)[:300]}): put {CONFIG} and {WEIGHTS} of "
            f"huggingface.co/{REPOSITORY}, folder {name}, into a folder DIR, and give --official DIR"
        ) from None
    return files[0].parent


def settings_of(folder, tensors, args):
    """The settings of a run for the network in a folder: what is given on the command line, else what its config.json
    says, and what its tensors tell."""
    try:
        theirs = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(theirs, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from None
    given = {key: value for key, value in vars(args).items() if value is not None and key != "official"}
    if given.get("model", "ei") != "ei":
        raise ValueError(f"--model {given['model']} is given, but the authors' networks are E-I networks")
    if idle := next((key for key in NO_USE if given.get(key)), None):
        raise ValueError(f"--official trains nothing: leave --{idle.replace('_', '-')} out")
    T, name = theirs.get("T"), str(theirs.get("dataset")).lower()
    if "T" not in given and (type(T) is not int or not 1 <= T <= 10**6):
        raise ValueError(f"{CONFIG}: T is to be a whole number of at least 1, not {T!r}; or give --T")
    if "data" not in given and name not in DATA:
        raise ValueError(
            f"{CONFIG} says dataset {theirs.get('dataset')!r}: give --data, one of {', '.join(data.LOADERS)}"
        )
    tau = theirs["neuron"].get("tau", 2.0) if isinstance(theirs.get("neuron"), dict) else 2.0
    if type(tau) not in (int, float) or not 1 <= tau <= recipes.HUGE:
        raise ValueError(f"{CONFIG}: tau is to be a number of at least 1, not {tau!r}")
    chosen = argparse.Namespace(**dict(T=T, tau=float(tau), data=DATA.get(name)) | given)
    chosen.arch = "mlp" if all(t.dim() < 4 for t in tensors.values()) else "vgg8"  # for the size of the images
    size = given.get("image_size", recipes.settings(chosen)["image_size"])
    said = theirs.get("ei_ratio", 4)
    found = describe(tensors, size, said)
    if "ei_ratio" in theirs and said != found["ei_ratio"]:
        raise ValueError(f"{CONFIG} says ei_ratio {said!r}, but the tensors are of {found['ei_ratio']}")
    n_layers = dict(mlp=4, resnet18=18).get(found["arch"]) or int(found["arch"].removeprefix("vgg"))
    said = theirs.get("num_layers", n_layers)
    if said != n_layers and found["arch"] != "mlp":
        raise ValueError(f"{CONFIG} says num_layers {said!r}, but the tensors are of {found['arch']}")
    told = {key: found.get(key, 1.0) for key in ("arch", "ei_ratio", "width")}
    told["plan"] = "-".join(map(str, found["plan"] or ()))
    for key, value in told.items():
        if given.get(key, value) != value:
            raise ValueError(
                f"{recipes.option(key, given[key])} is given, but the tensors say {value or 'no other plan'}"
            )
        setattr(chosen, key, value)
    return recipes.settings(chosen)


def command(args, device):
    """`train.py --official`: tests one of the authors' networks, and makes a run folder of it. Returns 0."""
    with parallel.first_process_first():
        folder = fetch(args.official)
    tensors = read(folder)
    try:
        config = settings_of(folder, tensors, args)
        trained = network(tensors, config["T"], config["image_size"], config["ei_ratio"])
    except ValueError as error:
        raise ValueError(f"{args.official}: {error}") from None
    dataset, model = load_data_and_model(config, device)
    channels, classes = trained.in_channels, trained.readout.n_e
    if (channels, classes) != (dataset.in_channels, dataset.n_classes):
        raise ValueError(
            f"{args.official} is a network for {channels} channels and {classes} classes, but these data have "
            f"{dataset.in_channels} and {dataset.n_classes}"
            + (f" (with --image-size {config['image_size']}, which decides about an MLP's channels)")
            * (config["arch"] == "mlp")
        )
    model.load_state_dict(trained.state_dict())
    config["batch_size"] = min(config["batch_size"], len(dataset.train_y))  # nothing is trained; figures use a batch
    name = args.official if args.official in PUBLISHED else folder.resolve().name
    run = None
    if not parallel.rank():
        run = Run.create(args.out or Path("runs") / f"official-{name}", config, choose=args.out is None)
    try:
        header(config, dataset, model, device)
        sample, _ = data.sample(dataset, config["T"])
        if not args.plain:
            accelerate(model, sample)
        _, accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
        if run:
            run.data = data.identity(dataset)
            run.keep_trained(model, accuracy)
    finally:
        if run:
            run.close()
    published = f"; the authors report {PUBLISHED[name]:.2f}% on {name.partition('-')[0]}" if name in PUBLISHED else ""
    print(f"test accuracy {accuracy:.2%}{published}\nfiring rates by layer:", " ".join(f"{r:.4f}" for r in rates))
    print("\n".join(cost_table(model, sample)))
    if run:
        print(f"run folder: {run.folder}   its figures: python visualize.py all {run.quoted}")
    return 0


def main(argv=None):
    """The command line of side-by-side training; returns the exit status."""
    p = recipes.Parser(prog="support.official", description="Train beside the authors' program.", allow_abbrev=False)
    p.add_argument("--compare", metavar="DIR", required=True, help="a checkout of the authors' repository")
    p.add_argument("--steps", type=recipes.count, default=100, help="of training (100)")
    p.add_argument("--width", type=recipes.times, default=0.25, help="times the maps of VGG-8 (0.25)")
    p.add_argument("--batch-size", type=recipes.count, default=16, help="(16)")
    p.add_argument("--data", choices=data.LOADERS, default="digits", help="(digits)")
    p.add_argument("--data-root", default="./data", help="where the dataset is (./data)")

    def run():
        from support.side_by_side import compare

        args = p.parse_args(argv)
        return compare(
            Path(args.compare).expanduser(), state_of, **{k: v for k, v in vars(args).items() if k != "compare"}
        )

    return status(run)


if __name__ == "__main__":
    leave(main())
