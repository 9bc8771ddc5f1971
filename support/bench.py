"""Speed and memory: `python -m support.bench` measures what the circuit costs, side by side in one process. A reader of
the paper may skip this file.

    plain         the plain equations of `lif.py` and `inhibition.py`, in PyTorch's usual layout and memory management
    fast          what `train.py` uses: the fused forms of `fast.py`, with the same parameters
    bn            BN-SNN, the same network with batch normalization, accelerated too
    dann          DANN, which has no time (T = 1), accelerated too
    spikingjelly  `fast` with the LIF neurons of spikingjelly, where that is installed

One round measures each form once, forward (as in testing) and as a training step, and the rates of a matrix product and
of a memory copy. Rounds follow one another until the time is up; a ratio is the median of the rounds' ratios, so that
what disturbs the machine for a while disturbs both sides. Other options: `--help`.
"""

import copy
import csv
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from ei_init import initialize
from inhibition import EICircuit, clamp_dale
from model import ARCHS, Layer, build
from support.console import status
from support.fast import accelerate, keep_memory
from support.measure import hooked
from support.parallel import pick_device
from support.recipes import MOMENTUM, Parser, count, folder, positive

N_CLASSES, IMAGE = 10, (3, 32, 32)


class SpikingJelly(nn.Module):
    """Their LIF with the settings of ours, in its fastest form for many steps."""

    def __init__(self, device):
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate

        options = dict(tau=2.0, decay_input=False, v_threshold=1.0, v_reset=None, detach_reset=True, step_mode="m")
        self.node = neuron.LIFNode(surrogate_function=surrogate.Sigmoid(alpha=4.0), **options)
        if device.type == "cuda" and "cupy" in sys.modules:
            self.node.backend = "cupy"

    def forward(self, current):
        self.node.reset()
        return self.node(current)


def networks(arch, batch, T):
    """The forms by name. The E-I ones start from the same E-I Init on this batch."""
    options = dict(n_classes=N_CLASSES, T=T)
    plain = build(arch, **options).to(batch.device)
    initialize(plain, batch)
    forms = dict(plain=plain, fast=copy.deepcopy(plain), bn=build(arch, kind="bn", **options).to(batch.device))
    forms["dann"] = build(arch, kind="dann", **options | dict(T=1)).to(batch.device)
    for name in ("fast", "bn", "dann"):
        accelerate(forms[name], batch)
    try:
        theirs = copy.deepcopy(forms["fast"])
        for layer in theirs.modules():
            if isinstance(layer, Layer):
                layer.neuron = SpikingJelly(batch.device)
        forms["spikingjelly"] = theirs
    except ImportError:
        pass
    return forms


class Contender:
    """A network with what trains it."""

    def __init__(self, model, x, y):
        self.model, self.x, self.y = model, x, y
        options = dict(lr=1e-3, momentum=MOMENTUM, weight_decay=5e-4, fused=True)
        self.optimizer = torch.optim.SGD(model.parameters(), **options)

    def train(self):
        loss = F.cross_entropy(self.model.train()(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        clamp_dale(self.model)

    @torch.no_grad()
    def forward(self):
        self.model.eval()(self.x)


def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def seconds(work, device):
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(work, device):
    """Bytes that PyTorch's allocator hands out at the worst moment of `work`, beyond what was held before; None where
    there is no such count. On the CPU they are added up from the profiler's record of every allocation."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - held
    if device.type != "cpu":
        return None
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Rates:
    """Multiply-adds a second of a large matrix product, bytes a second (read and written) of a copy beyond caches."""

    def __init__(self, device):
        n, size = (2048, 1 << 25) if device.type == "cpu" else (8192, 1 << 28)
        self.a, self.source = torch.rand(n, n, device=device), torch.rand(size, device=device)
        self.out, self.target, self.device = torch.empty_like(self.a), torch.empty_like(self.source), device

    def product(self):
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions do
        rate = self.a.shape[0] ** 3 / seconds(lambda: torch.mm(self.a, self.a, out=self.out), self.device)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return rate

    def copy(self):
        return 2 * self.source.nbytes / seconds(lambda: self.target.copy_(self.source), self.device)


@torch.no_grad()
def arithmetic(model, x):
    """Counted from the layers, for a batch: multiply-adds forward, in training, and in training without those that meet
    the zeros of the padding; and bytes that training moves at least.

    Training multiplies three times as much as the forward pass: for the gradients of input and of weights, but for the
    first layer, whose input needs none. The folding of two kernels into one is not counted. Each layer's input and
    output is moved once forward and twice backward.
    """
    forward, training, unpadded, values = [], [], [], []

    def hook(layer, args, out):
        values.append(args[0].numel() + out.numel())
        if isinstance(layer, EICircuit):
            n, d = (layer.n_e if layer.readout else layer.n_e + layer.n_i), layer.fan_in
            local = 0 if layer.readout else layer.n_e * layer.n_i
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            n, d, local = layer.weight.shape[0], layer.weight[0].numel(), 0
        else:
            return
        positions, inside = out.numel() // out.shape[1], 1.0
        if out.dim() == 4:
            k = (layer.w_ee if isinstance(layer, EICircuit) else layer.weight).shape[-1]
            ones, kernel = torch.ones_like(args[0][:1, :1]), torch.ones(1, 1, k, k, device=x.device)
            inside = F.conv2d(ones, kernel, stride=layer.stride, padding=layer.padding).mean().item() / k**2
        passes = 3 if forward else 2
        forward.append(positions * (n * d + local))
        training.append(passes * positions * n * d + 3 * positions * local)
        unpadded.append(passes * positions * n * d * inside + 3 * positions * local)

    with hooked(model, [m.register_forward_hook(hook) for m in model.modules() if not list(m.children())]):
        model(x)
    return sum(forward), sum(training), sum(unpadded), 3 * sum(values) * x.element_size()


def measure(args, device):
    """Everything of a run but its presentation: a dict that JSON can hold."""
    torch.manual_seed(0)
    x, y = torch.rand(args.batch_size, *IMAGE, device=device), torch.randint(N_CLASSES, (args.batch_size,))
    y = y.to(device)
    start = time.perf_counter()
    contenders = {name: Contender(model, x, y) for name, model in networks(args.arch, x, args.T).items()}
    rates = Rates(device)
    result = dict(arch=args.arch, batch_size=args.batch_size, T=args.T, device=str(device), torch=torch.__version__)
    result |= dict(threads=torch.get_num_threads(), forms={}, product_rate=[], copy_rate=[])
    for name, contender in contenders.items():  # these are the warm-up, too
        contender.forward()
        contender.train()
        contender.optimizer.zero_grad()  # so that the step makes what it frees
        peak = peak_memory(contender.train, device)
        result["forms"][name] = dict(peak_bytes=peak, forward_s=[], train_s=[])
    longest, now = 0, time.perf_counter()
    while not longest or now + longest < start + args.seconds:
        for name, contender in contenders.items():
            keep_memory(name != "plain")
            for kind in ("forward", "train"):
                result["forms"][name][f"{kind}_s"].append(seconds(getattr(contender, kind), device))
        result["product_rate"].append(rates.product())
        result["copy_rate"].append(rates.copy())
        longest, now = max(longest, time.perf_counter() - now), time.perf_counter()
    names = ("forward_products", "training_products", "unpadded_training_products", "training_bytes")
    result |= dict(zip(names, arithmetic(contenders["fast"].model, x), strict=True))
    compute = result["unpadded_training_products"] / max(result["product_rate"])
    memory = result["training_bytes"] / max(result["copy_rate"])
    result["bound_s"] = max(compute, memory)
    result["fraction_of_bound"] = result["bound_s"] / min(result["forms"]["fast"]["train_s"])
    for kind in ("forward", "train"):
        for rival in ("plain", "bn"):
            times = [result["forms"][name][f"{kind}_s"] for name in ("fast", rival)]
            result[f"{kind}_fast_to_{rival}"] = median(a / b for a, b in zip(*times, strict=True))
    if hasattr(os, "getloadavg"):
        result["load_average"] = os.getloadavg()[0]
    return result


def show(result):
    """The table."""
    size, forms = result["batch_size"], result["forms"]
    tf32 = " (convolutions in TF32)" if "cuda" in result["device"] and torch.backends.cudnn.allow_tf32 else ""
    print(
        f"{result['arch']}, batch {size}, T = {result['T']}, float32{tf32}, {result['device']}, {result['threads']} CPU"
        f" threads, {len(result['copy_rate'])} rounds: median (fastest to slowest) in ms\n\n"
        f"{'':14}{'training step':>26}{'images/s':>10}{'forward':>26}{'peak memory':>14}"
    )
    for name, form in forms.items():
        train, forward = ([1e3 * s for s in form[key]] for key in ("train_s", "forward_s"))
        cells = [f"{median(t):.4g} ({min(t):.4g} to {max(t):.4g})" for t in (train, forward)]
        peak = f"{form['peak_bytes'] / 2**20:.0f} MiB" if form["peak_bytes"] else "?"
        print(f"{name:14}{cells[0]:>26}{1e3 * size / median(train):>10.1f}{cells[1]:>26}{peak:>14}")
    fast, plain = (forms[name]["peak_bytes"] for name in ("fast", "plain"))
    print(
        f"\nfast against plain: training {1 / result['train_fast_to_plain']:.2f} times as fast,"
        f" forward {1 / result['forward_fast_to_plain']:.2f} times"
        + (f", {fast / plain:.2f} of the memory" if fast else "")
    )
    products, padded = result["unpadded_training_products"], result["training_products"]
    print(
        f"fast against bn: training takes {result['train_fast_to_bn']:.2f} of its time,"
        f" forward {result['forward_fast_to_bn']:.2f}\n"
        f"roofline: a step is {products / 1e9:.1f} G multiply-adds ({padded / 1e9:.1f} with the zeros of the padding)"
        f" and {result['training_bytes'] / 1e9:.2f} GB at least;\n"
        f"  measured {max(result['product_rate']) / 1e9:.1f} G/s in a matrix product and"
        f" {max(result['copy_rate']) / 1e9:.1f} GB/s in a copy: {1e3 * result['bound_s']:.4g} ms,"
        f" {size / result['bound_s']:.1f} images/s;\n  the fastest step reaches {result['fraction_of_bound']:.0%}"
    )


def profile(args, device):
    """Prints the costliest operations of a training step of `fast`."""
    x = torch.rand(args.batch_size, *IMAGE, device=device)
    y = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    model = build(args.arch, n_classes=N_CLASSES, T=args.T).to(device)
    initialize(model, x)
    accelerate(model, x)
    contender = Contender(model, x, y)
    contender.train()
    with torch.profiler.profile() as p:
        contender.train()
        synchronize(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [
        e for e in p.key_averages() if e.device_type == torch.autograd.DeviceType.CPU
    ]  # kernels with their caller
    events.sort(key=lambda e: getattr(e, key), reverse=True)
    total = sum(getattr(e, key) for e in events)
    print(f"{'ms':>9} {'share':>6} {'calls':>6}  operation, in a training step of {1e-3 * total:.4g} ms")
    for e in events[:15]:
        print(f"{1e-3 * getattr(e, key):9.2f} {getattr(e, key) / total:6.1%} {e.count:6}  {e.key}")


def sweeps(args):
    """What `--scaling` varies, one thing at a time: name -> [(value, arguments of build, batch size)]."""
    size, chain = max(4, args.batch_size // 4), [64, "P", 128, "P"]  # then circuits of the same cost each
    return {
        "time steps T": [(T, dict(arch=args.arch, T=T), size) for T in (1, 2, 4, 6, 8)],
        "batch size": [(n, dict(arch=args.arch, T=args.T), n) for n in (size // 2, size, 2 * size, 3 * size, 4 * size)],
        "circuits": [
            (2 + n, dict(arch="vgg8", T=args.T, plan=[*chain, *[256] * n, "P", "P"]), size) for n in (1, 2, 4, 6, 8)
        ],
    }


def scaling(args, device):
    """Training steps of `fast` over T, batch size and depth: a picture with a straight line through each sweep."""
    from matplotlib.figure import Figure

    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, points in sweeps(args).items():
        contenders = []
        for value, options, size in points:
            x, y = torch.rand(size, *IMAGE, device=device), torch.randint(N_CLASSES, (size,)).to(device)
            model = build(n_classes=N_CLASSES, **options).to(device)
            initialize(model, x)
            accelerate(model, x)
            contenders.append((value, Contender(model, x, y)))
        times = {value: [] for value, _ in contenders}
        for i in range(6):
            for value, contender in contenders:
                t = seconds(contender.train, device)
                if i:  # the first round warms up
                    times[value].append(1e3 * t)
        rows += [(name, value, median(t), min(t), max(t)) for value, t in times.items()]
    with open(args.out / "scaling.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sweep", "value", "median_ms", "min_ms", "max_ms"), *rows])
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes, sweeps(args), strict=True):
        x, t, low, high = (torch.tensor([row[i] for row in rows if row[0] == name]).double() for i in (1, 2, 3, 4))
        design = torch.stack([torch.ones_like(x), x], 1)
        offset, slope = torch.linalg.lstsq(design, t[:, None]).solution.flatten().tolist()
        r2 = 1 - (t - offset - slope * x).square().sum().item() / (t - t.mean()).square().sum().item()
        axis.errorbar(x, t, [t - low, high - t], fmt="o", color="C0", capsize=2)
        axis.plot(x, offset + slope * x, color="C1", label=f"{offset:.3g} + {slope:.3g} n\n$R^2$ = {r2:.4f}")
        axis.set(xlabel=name, ylabel="training step (ms)", xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False)
        print(f"{name:14} {offset:8.1f} ms + {slope:8.2f} ms each   R^2 = {r2:.4f}")
    for kind in ("png", "pdf"):
        figure.savefig(args.out / f"scaling.{kind}", dpi=150)
    print(f"{args.out / 'scaling.png'}, scaling.pdf, scaling.csv")


def parse(argv=None):
    p = Parser(
        prog="bench", description="Measure speed and memory of the E-I circuit and its rivals.", allow_abbrev=False
    )
    p.add_argument("--arch", choices=ARCHS, default="vgg8", help="network (vgg8)")
    p.add_argument("--batch-size", type=count, default=64, help="64")
    p.add_argument("--T", type=count, default=4, help="time steps (4)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda where there is one, else cpu)")
    p.add_argument("--seconds", type=positive, default=100, help="measure for so long, at least one round (100)")
    p.add_argument("--json", metavar="FILE", help="write every time of every round, and what follows from them")
    p.add_argument("--profile", action="store_true", help="instead: the costliest operations of a training step")
    p.add_argument("--scaling", action="store_true", help="instead: cost over T, batch size and depth, with a picture")
    p.add_argument("--out", type=folder, default="figures", help="folder of the picture (figures)")
    return p.parse_args(argv)


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return status(lambda: command(parse(argv)))


def command(args):
    device = pick_device(args.device)
    keep_memory()
    if args.profile or args.scaling:
        (profile if args.profile else scaling)(args, device)
        return 0
    if args.json:
        open(args.json, "a", encoding="utf-8").close()  # better to fail now than after the measurement
    result = measure(args, device)
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
