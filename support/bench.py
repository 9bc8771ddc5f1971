"""Speed and memory: `python -m support.bench` measures training steps and forward passes side by side in one process.
plain: the equations of `lif.py` and `inhibition.py`. fast: the fused forms, as in `train.py`. homeostasis, bn and dann:
other kinds, accelerated too; DANN has no time, T = 1, and is not clipped here. bf16: as with `--precision bf16`.
graph: the training step is recorded, as on a GPU. authors, authors bn: theirs, of a checkout that --authors DIR names.
A ratio to `fast` is the median of the rounds' ratios, so that what disturbs the machine for a while disturbs both.
`plain` and the authors' networks run with the C library's usual management of memory, others by `fast.keep_memory`."""

import copy
import os
import sys
import time
from itertools import accumulate
from statistics import median

import torch
import torch.nn.functional as F

from ei_init import initialize
from homeostasis import conserve_synapses
from inhibition import clamp_dale
from model import ARCHS, build
from support.fast import Recorded, accelerate, keep_memory, use_bfloat16
from support.official import SGD, theirs_like
from support.parallel import pick_device
from support.recipes import Parser, count, folder, positive, status


def networks(x, arch, T, authors=None):
    """What is measured: name -> network, on the device of the images x. `plain`, `fast` and `authors` start equal."""
    forms = {}
    for name, kind in dict(fast="ei", homeostasis="homeostasis", bn="bn", dann="dann").items():
        net = build(arch, kind=kind, T=1 if kind == "dann" else T).to(x.device)
        if kind in ("ei", "homeostasis"):
            initialize(net, x)
        if kind == "ei":
            forms["plain"] = copy.deepcopy(net)
        accelerate(net, x, compiled=True)
        forms |= {name: net, f"{name} bf16": copy.deepcopy(net)}
        use_bfloat16(forms[f"{name} bf16"])
    if authors:
        forms |= {f"authors{' bn' * bn}": theirs_like(forms["plain"], authors, bn) for bn in (False, True)}
    return forms


def train_step(network, optimizer, x, y):
    """As in `train.py`, but no number is looked at."""
    loss = F.cross_entropy(network(x), y)
    optimizer.zero_grad()
    loss.backward()
    with conserve_synapses(network):
        optimizer.step()
        clamp_dale(network)
    return [loss.detach()]


class Contender:
    """A network with a batch and its optimiser, the authors' own for theirs. graph: its step is recorded."""

    def __init__(self, model, x, graph=False):
        self.model, self.x, self.y = model, x, torch.arange(len(x), device=x.device) % 10
        self.optimizer = getattr(model, "sgd", None) or torch.optim.SGD(model.parameters(), **SGD, fused=True)
        self.take_step = Recorded(train_step) if graph else train_step
        for _ in range(Recorded.EAGER_CALLS + 1 if graph else 0):
            self.train()

    def train(self):
        self.take_step(self.model.train(), self.optimizer, self.x, self.y)

    @torch.no_grad()
    def forward(self):
        self.model.eval()(self.x)


def peak_memory(work, device):
    """MiB that PyTorch hands out at the worst moment of `work`, beyond what was held before; NaN: not known."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    if device.type != "cpu":
        return float("nan")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports on itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 2**20


def measure(contenders, seconds, device):
    """One round that warms up, then rounds until the time is up: {(name, "train" or "forward"): ms of each round}."""
    wait = getattr(torch, device.type).synchronize  # until a GPU has done its work; on a CPU it does nothing
    times = {(name, kind): [] for name in contenders for kind in ("train", "forward")}
    for rounds in range(10**9):  # the first one warms up and is left out
        if rounds < 2:
            begin = time.perf_counter()
        elif (time.perf_counter() - begin) * rounds / (rounds - 1) > seconds:
            return {key: ms[1:] for key, ms in times.items()}
        for (name, kind), ms in times.items():
            keep_memory(name not in ("plain", "authors", "authors bn"))
            wait()
            start = time.perf_counter()
            getattr(contenders[name], kind)()
            wait()
            ms.append(1e3 * (time.perf_counter() - start))


def show(contenders, times, device):
    """Prints a line for each form; no ratio from fewer than five rounds, which says little."""
    rounds = len(times["fast", "train"])
    print(f"{rounds} rounds: median (fastest to slowest) in ms, ratio to fast, peak memory of a training step in MiB\n")
    print(f"{'':16}{'training step':>30}{'ratio':>7}{'forward':>30}{'ratio':>7}{'memory':>8}")
    for name, contender in contenders.items():
        cells = f"{name:16}"
        for kind in ("train", "forward"):
            ms, fast = times[name, kind], times["fast", kind]
            ratio = f"{median(a / b for a, b in zip(ms, fast, strict=True)):.2f}" if rounds >= 5 else ""
            cells += f"{f'{median(ms):.4g} ({min(ms):.4g} to {max(ms):.4g})':>30}{ratio:>7}"
        contender.optimizer.zero_grad()  # so that the step makes what it frees
        print(f"{cells}{peak_memory(contender.train, device):8.0f}", flush=True)


def run(argv):
    p = Parser(prog="bench", description="Speed and memory of the E-I circuit and its rivals.")
    p.add_argument("--arch", choices=ARCHS, default="vgg8", help="network (vgg8)")
    p.add_argument("--batch-size", type=count, default=64, help="64")
    p.add_argument("--T", type=count, default=4, help="time steps (4)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda where there is one, else cpu)")
    p.add_argument("--seconds", type=positive, default=60, help="measure for so long, at least one round (60)")
    p.add_argument("--authors", metavar="DIR", type=folder, help="also the networks of a checkout of their repository")
    args = p.parse_args(argv)
    if args.authors and not args.arch.startswith("vgg"):
        raise ValueError(f"--authors measures VGGs, and --arch {args.arch} is none")
    device = pick_device(args.device)
    print(f"{args.arch}, batch {args.batch_size}, T = {args.T}, {device}, {torch.get_num_threads()} CPU threads")
    torch.manual_seed(0)
    x = torch.rand(args.batch_size, 3, 32, 32, device=device)
    contenders = {name: Contender(net, x) for name, net in networks(x, args.arch, args.T, args.authors).items()}
    if device.type == "cuda":
        ours = [name for name in contenders if not name.startswith(("plain", "authors"))]
        contenders |= {f"{n} graph": Contender(copy.deepcopy(contenders[n].model), x, graph=True) for n in ours}
    show(contenders, measure(contenders, args.seconds, device), device)
    return 0


def main(argv=None):
    """The command line; returns the exit status."""
    return status(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
