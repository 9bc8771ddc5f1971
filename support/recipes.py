"""The table of training recipes, and the command line: its options, and how a command ends."""

import argparse
import contextlib
import io
import os
import re
import sys
import traceback
from functools import partial
from pathlib import Path

from ei_prop import STABILIZERS
from model import ARCHS, KINDS
from support.augment import AUGMENTATIONS
from support.data import LOADERS

# Each row says what differs from the rows above it, for the data, architectures and kinds of network that it names;
# "*" is all. The learning rate rises linearly from `warmup_from` to `lr` in the first part of the training, one epoch
# in `warmup_1_in` (0: in none), then falls along a cosine to 0, by iteration.
RECIPES = [
    ("*", "*", "*", dict(epochs=300, batch_size=128, lr=0.001, warmup_1_in=10, warmup_from=1e-7)),
    ("*", "*", "*", dict(weight_decay=5e-4, clip_norm=0.0, T=4, image_size=32)),
    ("*", "*", "bn", dict(lr=0.1, warmup_1_in=0, weight_decay=1e-4)),
    ("*", "*", "plain", dict(lr=0.1, warmup_1_in=0)),
    # DANN has no time, so T = 1. Its division has a gradient of 1 / x, and ReLUs send x as small as one likes: clipped.
    ("*", "*", "dann", dict(lr=0.02, T=1, clip_norm=1.0)),
    ("*", "mlp vgg8 vgg11", "ei", dict(lr=0.002, warmup_1_in=30)),
    ("*", "mlp vgg8 vgg11", "dann", dict(warmup_1_in=30)),
    ("*", "*", "homeostasis", dict(lr=0.025, warmup_1_in=30)),
    ("tinyimagenet", "resnet18", "ei", dict(lr=0.003, warmup_1_in=30, warmup_from=1e-3)),
    ("cifar10-dvs dvs-gesture", "*", "*", dict(batch_size=32, image_size=48, T=10)),
    ("dvs-gesture", "*", "*", dict(T=16)),
    ("cifar10-dvs dvs-gesture", "*", "ei", dict(lr=0.001, warmup_1_in=30)),
    ("cifar10-dvs dvs-gesture", "*", "dann", dict(T=1, warmup_1_in=30)),
    # The digits and (Fashion-)MNIST are not in the paper: short trainings. Nobody has run those of MNIST yet.
    ("mnist fashion-mnist", "mlp", "*", dict(epochs=20, image_size=28)),
    ("digits", "*", "*", dict(epochs=12, batch_size=32)),
    ("digits", "vgg19", "*", dict(epochs=16)),
    ("digits", "mlp vgg8 vgg11", "*", dict(epochs=6)),
    ("digits", "mlp", "*", dict(image_size=8)),
    ("mnist fashion-mnist digits", "mlp", "ei", dict(lr=0.01)),
    ("digits", "resnet18", "ei", dict(lr=0.003)),
]
MOMENTUM = 0.9
# The paper's method, nothing left out and nothing changed; and what a kind of network does not have.
FULL = dict(kind="ei", eps="adaptive", ste=True, grad_scaling=True, init="ei")
NEURONS = dict(ei_ratio=4, tau=2.0, threshold=1.0, alpha=4.0, width=1.0)
ABLATIONS = ("eps", "ste", "grad_scaling", "init")
LACKS = dict(ei=(), homeostasis=(), bn=(*ABLATIONS, "ei_ratio"), plain=(*ABLATIONS, "ei_ratio"))
LACKS["dann"] = (*ABLATIONS, "tau", "threshold", "alpha", "T")
DATA = dict(data="digits", data_root="./data", augment="auto")
WHAT = dict(arch="vgg8", plan="") | FULL | NEURONS | DATA | dict(seed=0, precision="float32")
FLAG = dict(action="store_true", default=None)  # an option that is given or not
WAYS = ("resume", "eval", "other_data", "out", "device", "plain", "give_up", "official", "recipes")  # no settings


def recipe(data, arch, kind):
    """What the table says of data, arch and kind: a dict."""
    found = {}
    for *names, differing in RECIPES:
        pairs = zip(names, (data, arch, kind), strict=True)
        if all(several == "*" or name in several.split() for several, name in pairs):
            found.update(differing)
    return found


def table():
    """`RECIPES` as lines of text."""
    rows = [("data", "arch", "kind", "what differs from the rows above it; * is all"), *RECIPES]
    return ["{:28}{:16}{:13}{}".format(*row) for row in rows]


def settings(args):
    """Every setting of a run: what is given, else from the recipe for data, arch and kind. ValueError: it cannot be."""
    given = {k: v for k, v in vars(args).items() if v is not None and k not in WAYS}
    data, arch, kind = (given.get(key, WHAT[key]) for key in ("data", "arch", "kind"))
    usual = WHAT | recipe(data, arch, kind)
    config = usual | given
    if odd := [key for key in LACKS[kind] if config[key] != usual[key]]:
        raise ValueError(f"a network of --kind {kind} has no --{odd[0].replace('_', '-')}: leave it out")
    one_in = config.pop("warmup_1_in")
    config.setdefault("warmup_epochs", config["epochs"] / one_in if one_in else 0.0)
    if config["warmup_epochs"] > config["epochs"]:
        raise ValueError("the warm-up is longer than the training: give fewer --warmup-epochs or more --epochs")
    if config["warmup_epochs"] and config["warmup_from"] > config["lr"]:
        raise ValueError(f"a warm-up from {config['warmup_from']:g} to {config['lr']:g}: give a lower --warmup-from")
    return config


SETTINGS = settings(argparse.Namespace())  # their names and defaults
HOUSE = Path(__file__).parents[1], Path(__file__).parent


class Parser(argparse.ArgumentParser):
    """A command line whose errors are ValueErrors of one line."""

    def error(self, message):
        raise ValueError(message)


def number(kind, low, high, name, text):
    """A number from `low` to `high`, as an argparse type."""
    with contextlib.suppress(ValueError):
        value = kind(text)
        if low <= value <= high:
            return value
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
    if not text or Path(text).expanduser().is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text).expanduser()


def add_settings(p):
    """The options that are settings of a run. What is not given is None; `settings` fills it in from the recipe."""
    p.add_argument("--arch", choices=ARCHS, help="network (vgg8)")
    p.add_argument("--plan", type=lambda text: "-".join(re.findall(r"[^\s,-]+", text)), help='layers, "16 P 32 P"')
    p.add_argument("--kind", choices=KINDS, help="ei: the paper's; bn, plain, dann: rivals; homeostasis: added (ei)")
    p.add_argument("--data", choices=LOADERS, help="dataset (digits)")
    p.add_argument("--data-root", type=lambda text: folder(text) and text, help="where the dataset is or goes (./data)")
    p.add_argument("--augment", choices=["auto", *AUGMENTATIONS], help="of training data (auto: the paper's)")
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
    p.add_argument("--precision", choices=["float32", "bf16"], help="of convolutions and products (float32)")


def add_ways(p):
    """The options that say how a run is made, and are no setting of it."""
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda where there is one, else cpu)")
    p.add_argument("--plain", **FLAG, help="the plain equations only, no fused forms")
    p.add_argument("--give-up", **FLAG, help="end a run that is at chance for a third of its epochs")


def parse(argv=None):
    """The command line of train.py."""
    p = Parser(prog="train.py", description="Train a spiking network with lateral inhibition.")
    add_settings(p)
    add_ways(p)
    p.add_argument("--out", type=folder, help="run folder (runs/<data>-<arch>-<kind>-...)")
    p.add_argument("--resume", metavar="RUN", help="go on with the training in this run folder")
    p.add_argument("--eval", metavar="RUN", help="test the best network of this run folder")
    p.add_argument("--other-data", **FLAG, help="with --eval: also on data of another run")
    p.add_argument("--official", metavar="NAME|DIR", help="test the authors' trained network, e.g. CIFAR10-VGG8")
    p.add_argument("--recipes", **FLAG, help="print the table of recipes")
    return p.parse_args(argv)


def run_name(config):
    """<data>-<arch>-<kind>-<what differs from the paper's method>-seed<n>."""
    parts = [config["data"], config["arch"], config["kind"]]
    words = dict(ste="noste", grad_scaling="noscaling", init="kaiming", precision=config["precision"])
    for key in ("plan", "width", *ABLATIONS, "ei_ratio", "tau", "threshold", "alpha", "precision"):
        value = f"{config[key]:g}" if isinstance(config[key], float) else config[key]
        if config[key] != WHAT[key]:
            parts.append(words.get(key, f"{key.replace('_', '')}{value}"))
    return "-".join([*parts, f"seed{config['seed']}"])


class Forgiving:
    """A stream that never ends a training: where nobody can read any more (`| head`, a full disk), the text is lost."""

    def __init__(self, stream):
        self.stream = stream or io.StringIO()  # None: there is no console
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a console cannot encode

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # what is left goes nowhere, or Python would complain at its end
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        """Every `write` has done it."""

    def __getattr__(self, name):  # encoding, fileno, isatty, ...
        return getattr(self.stream, name)


def status(command, rank="0"):
    """Calls a command line's function and returns its exit status; what the user can mend ends in one line and 2."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Forgiving, before)
    try:
        return command()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror and not error.filename2:
            text = f"{error.filename} cannot be used ({error.strerror}): mend that, or give another path"
        said = " ".join(text.split())[:1000]
        if isinstance(error, MemoryError) or re.search("(allocate|out of) memory", said):
            said = f"not enough memory; take a smaller network, image, --batch-size or --T. {said}"
        elif isinstance(error, RuntimeError) and "home directory" not in said:  # that is of a path ~nobody/...
            raise  # an error of the program
        elif type(error) is ValueError:  # of Python or torch, in a line that a reader changed: it names no place
            frames = traceback.extract_tb(error.__traceback__)
            last = [frame for frame in frames if Path(frame.filename).parent in HOUSE][-1]
            place = f" ({Path(last.filename).name}, line {last.lineno})"
            said += "" if last.line.startswith("raise") or "fast.py" in place else place
        sys.stderr.write(f"error: {said}\n" if rank == "0" else f"process {rank}: {said}\n")  # at once
        return 2
    finally:
        sys.stdout, sys.stderr = before
