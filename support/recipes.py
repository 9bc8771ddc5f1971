"""The table of training recipes, and the options of the command line. A reader of the paper may skip this file, but may
want to look at the table.
"""

import argparse
import re
from functools import partial
from pathlib import Path

from ei_prop import STABILIZERS
from model import ARCHS, KINDS
from support.data import LOADERS

# SGD with momentum 0.9; the learning rate rises linearly from `warmup_from` to `lr` during the warm-up, then falls
# along a cosine to 0, by iteration. The first row that fits data, arch and model is the recipe; "*" fits all.
COLUMNS = ("epochs", "batch_size", "lr", "warmup_epochs", "warmup_from", "weight_decay", "clip_norm", "T", "image_size")
IMAGES = "cifar10 cifar100 tinyimagenet folder mnist fashion-mnist"
RECIPES = [
    # data, arch, model: epochs, batch, lr, warm-up epochs, from, weight decay, clip norm, T, image size
    ("tinyimagenet", "resnet18", "ei", (300, 128, 0.003, 10, 1e-3, 5e-4, 0, 4, 32)),
    # Not in the paper: (Fashion-)MNIST with the MLP. Nobody has run it yet.
    ("mnist fashion-mnist", "mlp", "ei", (20, 128, 0.01, 0.5, 1e-7, 5e-4, 0, 4, 28)),
    ("mnist fashion-mnist", "mlp", "bn", (20, 128, 0.1, 0, 1e-7, 1e-4, 0, 4, 28)),
    ("mnist fashion-mnist", "mlp", "plain", (20, 128, 0.1, 0, 1e-7, 5e-4, 0, 4, 28)),
    ("mnist fashion-mnist", "mlp", "dann", (20, 128, 0.02, 0.5, 1e-7, 5e-4, 1, 1, 28)),
    (IMAGES, "mlp vgg8 vgg11", "ei", (300, 128, 0.002, 10, 1e-7, 5e-4, 0, 4, 32)),
    (IMAGES, "vgg16 vgg19 resnet18", "ei", (300, 128, 0.001, 30, 1e-7, 5e-4, 0, 4, 32)),
    (IMAGES, "*", "bn", (300, 128, 0.1, 0, 1e-7, 1e-4, 0, 4, 32)),
    (IMAGES, "*", "plain", (300, 128, 0.1, 0, 1e-7, 5e-4, 0, 4, 32)),
    (IMAGES, "mlp vgg8 vgg11", "dann", (300, 128, 0.02, 10, 1e-7, 5e-4, 1, 1, 32)),
    (IMAGES, "vgg16 vgg19 resnet18", "dann", (300, 128, 0.02, 30, 1e-7, 5e-4, 1, 1, 32)),
    ("cifar10-dvs", "*", "ei", (300, 32, 0.001, 10, 1e-7, 5e-4, 0, 10, 48)),
    ("cifar10-dvs", "*", "bn", (300, 32, 0.1, 0, 1e-7, 1e-4, 0, 10, 48)),
    ("cifar10-dvs", "*", "plain", (300, 32, 0.1, 0, 1e-7, 5e-4, 0, 10, 48)),
    ("cifar10-dvs", "*", "dann", (300, 32, 0.02, 10, 1e-7, 5e-4, 1, 1, 48)),
    ("dvs-gesture", "*", "ei", (300, 32, 0.001, 10, 1e-7, 5e-4, 0, 16, 48)),
    ("dvs-gesture", "*", "bn", (300, 32, 0.1, 0, 1e-7, 1e-4, 0, 16, 48)),
    ("dvs-gesture", "*", "plain", (300, 32, 0.1, 0, 1e-7, 5e-4, 0, 16, 48)),
    ("dvs-gesture", "*", "dann", (300, 32, 0.02, 10, 1e-7, 5e-4, 1, 1, 48)),
    # The digits are not in the paper: short trainings, found by trying.
    ("digits", "mlp", "ei", (6, 32, 0.01, 0.2, 1e-7, 5e-4, 0, 4, 8)),
    ("digits", "mlp", "bn", (6, 32, 0.1, 0, 1e-7, 1e-4, 0, 4, 8)),
    ("digits", "mlp", "plain", (6, 32, 0.1, 0, 1e-7, 5e-4, 0, 4, 8)),
    ("digits", "mlp", "dann", (6, 32, 0.02, 0.2, 1e-7, 5e-4, 1, 1, 8)),
    ("digits", "vgg8 vgg11", "ei", (6, 32, 0.002, 0.2, 1e-7, 5e-4, 0, 4, 32)),
    ("digits", "vgg16", "ei", (12, 32, 0.001, 1.2, 1e-7, 5e-4, 0, 4, 32)),
    ("digits", "vgg19", "ei", (16, 32, 0.001, 1.6, 1e-7, 5e-4, 0, 4, 32)),
    ("digits", "resnet18", "ei", (12, 32, 0.003, 1.2, 1e-7, 5e-4, 0, 4, 32)),
    ("digits", "vgg8 vgg11", "bn", (6, 32, 0.1, 0, 1e-7, 1e-4, 0, 4, 32)),
    ("digits", "vgg16 resnet18", "bn", (12, 32, 0.1, 0, 1e-7, 1e-4, 0, 4, 32)),
    ("digits", "vgg19", "bn", (16, 32, 0.1, 0, 1e-7, 1e-4, 0, 4, 32)),
    ("digits", "vgg8 vgg11", "plain", (6, 32, 0.1, 0, 1e-7, 5e-4, 0, 4, 32)),
    ("digits", "vgg16 resnet18", "plain", (12, 32, 0.1, 0, 1e-7, 5e-4, 0, 4, 32)),
    ("digits", "vgg19", "plain", (16, 32, 0.1, 0, 1e-7, 5e-4, 0, 4, 32)),
    # DANN has no time, so T = 1. Its division has a gradient of 1 / x, and ReLUs send x as small as one likes: clipped.
    ("digits", "vgg8 vgg11", "dann", (6, 32, 0.02, 0.2, 1e-7, 5e-4, 1, 1, 32)),
    ("digits", "vgg16 resnet18", "dann", (12, 32, 0.02, 1.2, 1e-7, 5e-4, 1, 1, 32)),
    ("digits", "vgg19", "dann", (16, 32, 0.02, 1.6, 1e-7, 5e-4, 1, 1, 32)),
    # For everything else, e.g. a dataset that you add: the paper's recipe for deeper networks.
    ("*", "*", "ei", (300, 128, 0.001, 30, 1e-7, 5e-4, 0, 4, 32)),
    ("*", "*", "bn", (300, 128, 0.1, 0, 1e-7, 1e-4, 0, 4, 32)),
    ("*", "*", "plain", (300, 128, 0.1, 0, 1e-7, 5e-4, 0, 4, 32)),
    ("*", "*", "dann", (300, 128, 0.02, 30, 1e-7, 5e-4, 1, 1, 32)),
]
MOMENTUM = 0.9
# The paper's method, nothing left out and nothing changed.
FULL = dict(model="ei", eps="adaptive", ste=True, grad_scaling=True, init="ei")
NEURONS = dict(ei_ratio=4, tau=2.0, threshold=1.0, alpha=4.0, width=1.0)
WHAT = dict(arch="vgg8", plan="") | FULL | NEURONS | dict(data="digits", data_root="./data", seed=0)
COMMANDS = ("resume", "eval", "other_data", "out", "device", "plain", "give_up", "official", "recipes")  # no settings


def recipe(data, arch, model):
    """The row of the table for data, arch and model."""

    def fits(names, name):
        return names == "*" or name in names.split()

    return next(row for row in RECIPES if fits(row[0], data) and fits(row[1], arch) and fits(row[2], model))


def table():
    """`RECIPES` as lines of text."""
    cells = [("data", "arch", "model", *COLUMNS)]
    cells += [(*row[:3], *(f"{value:g}" for value in row[3])) for row in RECIPES]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["The first row that fits data, arch and model is the recipe; * fits all.", ""]
    return lines + [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]


def settings(args):
    """Every setting of a run: what is given on the command line, else from the recipe for data, arch and model.

    Raises:
        ValueError: an option that this kind of network does not have.
    """
    given = {k: v for k, v in vars(args).items() if v is not None and k not in COMMANDS}
    config = WHAT | {k: given[k] for k in WHAT if k in given}
    kind = config["model"]
    if kind != "ei" and any(config[k] != v for k, v in FULL.items() if k != "model"):
        raise ValueError("--eps, --no-ste, --no-grad-scaling and --init kaiming are ablations of --model ei only")
    if kind == "dann" and any(config[k] != NEURONS[k] for k in ("tau", "threshold", "alpha")):
        raise ValueError("--tau, --threshold and --alpha are of spiking neurons: --model dann has none")
    if kind in ("bn", "plain") and config["ei_ratio"] != NEURONS["ei_ratio"]:
        raise ValueError(f"--ei-ratio is of E-I circuits: --model {kind} has none")
    if config["plan"] and config["arch"] == "resnet18":
        raise ValueError("--plan is the list of layers of a VGG or an MLP: --arch resnet18 takes none")
    values = dict(zip(COLUMNS, recipe(config["data"], config["arch"], kind)[3], strict=True))
    if "epochs" in given:  # a shorter run is the same schedule in proportion
        values["warmup_epochs"] *= given["epochs"] / values["epochs"]
    return config | values | given


# ---- the command line ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A command line whose errors are ValueErrors of one line, as those of a config.json are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # so that -1e-6 is a bad value, not an unknown option

    def error(self, message):
        raise ValueError(message)

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        if [] in vars(args).values():
            self.error("'--' is no value")  # argparse lets it pass as an empty list
        return args


def number(kind, low, high, name, text):
    """A number from `low` to `high`, as an argparse type."""
    try:
        value = kind(text)
        if low <= value <= high:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {name}")


TINY, HUGE = 1e-30, 1e30  # what float32 can hold, and its square nearly
count = partial(number, int, 1, 10**6, "a whole number of at least 1 and at most a million")
positive = partial(number, float, TINY, HUGE, "a positive number")
non_negative = partial(number, float, 0, HUGE, "a number of at least 0")
at_least_1 = partial(number, float, 1, HUGE, "a number of at least 1")
whole = partial(number, int, 0, 2**31 - 1, "a whole number of at least 0 and below 2^31")
times = partial(number, float, 0.001, 100, "a number from 0.001 to 100")


def epsilon(text):
    names = ", ".join(STABILIZERS)
    return text if text in STABILIZERS else number(float, TINY, HUGE, f"a positive number or one of: {names}", text)


def folder(text):
    """A path at which there may be a folder, or nothing yet."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    path = Path(text).expanduser()
    if path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    return path


def layer_sizes(text):
    """A plan of layers as one word, 16-P-32-P. Empty: the architecture's own."""
    words = re.split(r"[\s,-]+", text.strip()) if text.strip() else []
    if not all(word == "P" or (re.fullmatch("[0-9]+", word) and 0 < int(word) <= 10**6) for word in words):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no list of layer sizes and P")
    return "-".join(words)


def plan_of(config):
    """The plan of a run's settings as `model.build` takes it."""
    return [word if word == "P" else int(word) for word in config["plan"].split("-")] if config["plan"] else None


def add_settings(p):
    """The options that are settings of a run. What is not given is None; `settings` fills it in from the recipe."""
    p.add_argument("--arch", choices=ARCHS, help="network (vgg8)")
    p.add_argument("--plan", type=layer_sizes, help='other layers for a VGG or an MLP, e.g. "16 P 32 P"')
    p.add_argument("--model", choices=KINDS, help="ei: the paper's; bn, plain, dann: its rivals (ei)")
    p.add_argument("--data", choices=LOADERS, help="dataset (digits)")
    p.add_argument("--data-root", help="where the dataset is or goes (./data)")
    p.add_argument("--image-size", type=count, help="side in pixels (mostly 32; see --recipes)")
    p.add_argument("--width", type=times, help="multiplies the number of maps of each layer (1)")
    p.add_argument("--ei-ratio", type=count, help="excitatory neurons for each inhibitory one (4)")
    p.add_argument("--tau", type=at_least_1, help="membrane time constant, in time steps (2)")
    p.add_argument("--threshold", type=positive, help="theta of the LIF neurons (1)")
    p.add_argument("--alpha", type=positive, help="steepness of the surrogate gradient (4)")
    p.add_argument("--epochs", type=count, help="the warm-up is scaled with it")
    p.add_argument("--batch-size", type=count, help="samples a step")
    p.add_argument("--lr", type=positive, help="peak learning rate")
    p.add_argument("--weight-decay", type=non_negative, help="of all parameters")
    p.add_argument("--warmup-epochs", type=non_negative, help="epochs, or a fraction, of linear warm-up")
    p.add_argument("--warmup-from", type=non_negative, help="learning rate of the first step (1e-7)")
    p.add_argument("--clip-norm", type=non_negative, help="largest norm of the gradient, 0: any (dann 1, else 0)")
    p.add_argument("--T", type=count, help="time steps (4), frames of events (10, 16)")
    p.add_argument("--eps", type=epsilon, help=f"{', '.join(STABILIZERS)}, or a constant added to I_div (adaptive)")
    p.add_argument("--ste", action=argparse.BooleanOptionalAction, help="straight-through estimator (yes)")
    p.add_argument("--grad-scaling", action=argparse.BooleanOptionalAction, help="W_EI's, by 1/d (yes)")
    p.add_argument("--init", choices=["ei", "kaiming"], help="E-I Init, or absolute values of Kaiming's (ei)")
    p.add_argument("--seed", type=whole, help="0")


def add_ways(p):
    """The options that say how a run is made, and are no setting of it."""
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda where there is one, else cpu)")
    p.add_argument("--plain", action="store_true", default=None, help="the plain equations only, no fused forms")
    p.add_argument(
        "--give-up", action="store_true", default=None, help="end a run that is at chance for a third of its epochs"
    )


def parse(argv=None):
    """The command line of train.py."""
    p = Parser(prog="train.py", description="Train a spiking network with lateral inhibition.", allow_abbrev=False)
    add_settings(p)
    add_ways(p)
    p.add_argument("--out", type=folder, help="run folder (runs/<data>-<arch>-<model>-...)")
    p.add_argument("--resume", metavar="RUN", help="go on with the training in this run folder")
    p.add_argument("--eval", metavar="RUN", help="test the best network of this run folder")
    p.add_argument("--other-data", action="store_true", default=None, help="with --eval: also on data of another run")
    p.add_argument("--official", metavar="NAME|DIR", help="test the authors' trained network, e.g. CIFAR10-VGG8")
    p.add_argument("--recipes", action="store_true", default=None, help="print the table of recipes")
    return p.parse_args(argv)


def option(key, value):
    """A setting as the command-line option that gives it."""
    name = key.replace("_", "-")
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"


def run_name(config):
    """<data>-<arch>-<model>-<what differs from the paper's method>-seed<n>."""
    parts = [config["data"], config["arch"], config["model"]]
    parts += [f"plan{config['plan']}"] if config.get("plan") else []
    parts += [] if config["width"] == 1 else [f"width{config['width']:g}"]
    if config["eps"] != "adaptive":
        parts.append(f"eps{config['eps']}" if isinstance(config["eps"], str) else f"eps{config['eps']:g}")
    parts += ["noste"] * (not config["ste"]) + ["noscaling"] * (not config["grad_scaling"])
    parts += ["kaiming"] * (config["init"] == "kaiming")
    parts += [f"{k.replace('_', '')}{config[k]:g}" for k in NEURONS if k != "width" and config[k] != NEURONS[k]]
    return "-".join([*parts, f"seed{config['seed']}"])
