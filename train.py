"""Trains, evaluates and resumes a network of the paper: `python train.py --arch vgg8`.

One function a step: settings -> data and network -> epochs of training and testing -> the run folder's result.
"""

import argparse
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from checkpoint import Run, StopRequest, free_folder, outcome, restore, run_name
from ei_init import initialize
from inhibition import clamp_dale
from model import ARCHS, KINDS, build, first_nonfinite, histograms, layers, population

# The paper's recipes: SGD, momentum 0.9, cosine to 0 by iteration after a linear warm-up from `warmup_from`.
RECIPE = dict(epochs=300, batch_size=128, lr=0.001, weight_decay=5e-4, T=4, image_size=32)
RECIPE |= dict(warmup_epochs=30, warmup_from=1e-7)
RECIPES = {  # what differs, by (data, arch); data without a (data, None) start from "cifar"
    ("cifar", "vgg8"): dict(lr=0.002, warmup_epochs=10),
    ("cifar", "vgg11"): dict(lr=0.002, warmup_epochs=10),
    ("digits", "vgg8"): dict(lr=0.002, epochs=6, batch_size=32, warmup_epochs=0.2),
    ("digits", "vgg11"): dict(lr=0.002, epochs=6, batch_size=32, warmup_epochs=0.2),
    ("digits", None): dict(lr=0.001, epochs=12, batch_size=32, warmup_epochs=1.2),
    ("tinyimagenet", "resnet18"): dict(lr=0.003, warmup_epochs=10, warmup_from=0.001),
    ("cifar10-dvs", None): dict(warmup_epochs=10, batch_size=32, T=10, image_size=48),
    ("dvs-gesture", None): dict(warmup_epochs=10, batch_size=32, T=16, image_size=48),
}
BY_MODEL = {
    "bn": dict(lr=0.1, warmup_epochs=0, weight_decay=1e-4),
    "plain": dict(lr=0.1, warmup_epochs=0),
    "dann": dict(lr=0.1, T=1),  # no spikes, no time
}
SUITES = {  # options of each run: what the paper's figures compare (VGG-8 unless --arch)
    "paper": [
        *[["--model", kind] for kind in ("ei", "bn", "plain", "dann")],
        *[["--eps", eps] for eps in ("1e-8", "1e-7", "1e-6", "1e-5", "1e-4")],
        *[["--no-ste"], ["--no-grad-scaling"], ["--init", "kaiming"]],
    ]
}
COMMANDS = ("suite", "resume", "eval", "out", "device")  # options that are no setting of a run
MOMENTUM = 0.9
READ_EVERY = 20  # steps between two reads of loss and accuracy: on a GPU each read waits for it


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # so that -1e-6 is a bad value, not an unknown option

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def number(kind, low, name, text):
    """A finite number of at least `low` (0: above it, for a float), as an argparse type."""
    try:
        value = kind(text)
        if math.isfinite(value) and value >= low:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not {name}")


count = partial(number, int, 1, "a whole number of at least 1")
positive = partial(number, float, sys.float_info.min, "a positive number")
non_negative = partial(number, float, 0, "a number of at least 0")
whole = partial(number, int, 0, "a whole number of at least 0")


def epsilon(text):
    return text if text == "adaptive" else number(float, sys.float_info.min, "a positive number or 'adaptive'", text)


def parse(argv=None):
    """The command line. What is not given is None; `settings` fills it in from the recipe."""
    p = Parser(description="Train a spiking network with lateral inhibition.", allow_abbrev=False)
    p.add_argument("--arch", choices=ARCHS, help="network (vgg8)")
    p.add_argument("--model", choices=KINDS, help="ei: the paper's; bn, plain, dann: its rivals (ei)")
    p.add_argument("--data", choices=data.DATASETS, help="dataset (digits)")
    p.add_argument("--data-root", help="where the dataset is or goes (./data)")
    p.add_argument("--image-size", type=count, help="side in pixels (32; of event frames 48)")
    p.add_argument("--epochs", type=count, help="the warm-up is scaled with it")
    p.add_argument("--batch-size", type=count)
    p.add_argument("--lr", type=positive, help="peak learning rate")
    p.add_argument("--weight-decay", type=non_negative)
    p.add_argument("--warmup-epochs", type=non_negative, help="epochs, or a fraction, of linear warm-up")
    p.add_argument("--T", type=count, help="time steps (4), frames of events (10, 16)")
    p.add_argument("--eps", type=epsilon, help="'adaptive', or a constant added to I_div (adaptive)")
    p.add_argument("--no-ste", dest="ste", action="store_const", const=False, help="no straight-through estimator")
    p.add_argument("--no-grad-scaling", dest="grad_scaling", action="store_const", const=False, help="W_EI's, by 1/d")
    p.add_argument("--init", choices=["ei", "kaiming"], help="E-I Init, or absolute values of Kaiming's (ei)")
    p.add_argument("--seed", type=whole, help="0")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda where there is one, else cpu)")
    p.add_argument("--out", help="run folder (runs/<data>-<arch>-<model>-...)")
    p.add_argument(
        "--suite", choices=SUITES, help="train all that the paper's figures need, into the folder --out (runs)"
    )
    p.add_argument("--resume", metavar="RUN", help="go on with the training in this run folder")
    p.add_argument("--eval", metavar="RUN", help="test the best network of this run folder")
    return p.parse_args(argv)


def settings(args):
    """Every setting of a run: given, else from the recipe for data, arch and model."""
    given = {k: v for k, v in vars(args).items() if v is not None and k not in COMMANDS}
    config = dict(arch="vgg8", model="ei", data="digits", data_root="./data")
    config.update(eps="adaptive", ste=True, grad_scaling=True, init="ei", seed=0)
    config.update({k: given[k] for k in config if k in given})
    kind = config["data"] if (config["data"], None) in RECIPES else "cifar"
    recipe = RECIPE | RECIPES.get((kind, None), {}) | RECIPES.get((kind, config["arch"]), {})
    recipe |= RECIPES.get((config["data"], config["arch"]), {}) | BY_MODEL.get(config["model"], {})
    if "epochs" in given:  # a shorter run is the same schedule in proportion
        recipe["warmup_epochs"] *= given["epochs"] / recipe["epochs"]
    return config | recipe | given


def pick_device(name):
    """The device by name, or the fastest at hand."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def make(config, device):
    """The dataset and the network of a configuration, on the device; the network is not initialised yet."""
    dataset = data.load(config["data"], config["data_root"], config["image_size"], device, config["T"])
    torch.manual_seed(config["seed"])
    options = {k: config[k] for k in ("T", "image_size", "eps", "ste", "grad_scaling")}
    model = build(config["arch"], dataset.in_channels, dataset.n_classes, kind=config["model"], **options)
    return dataset, model.to(device)


def epoch_order(config, dataset, epoch):
    """The batches of an epoch, indices of samples, the incomplete last one left out: (batches, batch size)."""
    n, size = len(dataset.train_y), config["batch_size"]
    generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)[: n // size * size]
    return order.view(-1, size).to(dataset.train_y.device)


def training_batch(config, dataset, indices, step):
    """Input and labels of a step. The augmentation depends on seed and step alone, so a resumed run repeats it."""
    x = data.to_input(dataset.train_x[indices])
    if dataset.augment:
        x = dataset.augment(x, torch.Generator(x.device).manual_seed((config["seed"] << 32) + step))
    return x, dataset.train_y[indices]


def prepare(config, dataset, model):
    """E-I Init from the first training batch, once, before the first step; a control keeps its Kaiming weights."""
    if config["init"] == "ei":
        initialize(model, training_batch(config, dataset, epoch_order(config, dataset, 0)[0], 0)[0])


def learning_rate(config, step, steps_per_epoch):
    """Linear warm-up, then cosine to 0, by iteration."""
    warmup, total = config["warmup_epochs"] * steps_per_epoch, config["epochs"] * steps_per_epoch
    if step < warmup:
        return config["warmup_from"] + (config["lr"] - config["warmup_from"]) * step / warmup
    return config["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train_step(model, optimizer, x, y, lr):
    """One step of SGD, then Dale's law. Returns loss and number of correct answers, left on the device."""
    optimizer.param_groups[0]["lr"] = lr
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    clamp_dale(model)
    return torch.stack([loss.detach(), (logits.detach().argmax(1) == y).sum()])


@torch.no_grad()
def evaluate(model, x, y, batch_size=250):
    """Mean loss, accuracy, and mean firing rate (spikes per neuron and time step) of each layer, on a test set."""
    model.eval()
    batch_size = max(1, min(batch_size, 1000 // model.T))  # frames take memory in proportion to T
    rates = torch.zeros(len(layers(model)), device=x.device)

    def count_spikes(_, __, spikes, i):
        rates[i] += spikes.mean() * len(spikes)

    hooks = [layer.register_forward_hook(partial(count_spikes, i=i)) for i, layer in enumerate(layers(model))]
    sums = torch.zeros(2, device=x.device)
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        logits = model(data.to_input(images))
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()])
    for hook in hooks:
        hook.remove()
    model.train()
    loss, correct = sums.tolist()
    return loss / len(y), correct / len(y), (rates / (len(y) * model.T)).tolist()


def train(run, config, dataset, model, device, resumed=None):
    """Trains from the start, or from the state of a checkpoint, to the end. Returns a signal's number if stopped."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config["lr"], momentum=MOMENTUM, weight_decay=config["weight_decay"], fused=True
    )
    step, sums, history, recorded = 0, torch.zeros(2, device=device), [], []
    sample = data.to_input(dataset.test_x[:: -(-len(dataset.test_x) // 64)])  # for the histograms: of every class
    if resumed:
        restore(model, resumed["model"], run.folder / "checkpoint.pt")
        restore(optimizer, resumed["optimizer"], run.folder / "checkpoint.pt")
        step, history, recorded = resumed["step"], resumed["history"], resumed["histograms"]
        sums = torch.tensor(resumed["epoch_sums"], device=device)
        run.write_history(resumed)
    else:
        prepare(config, dataset, model)
        recorded.append(histograms(model, sample))

    def save():
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
        run.save(state | dict(epoch_sums=sums.tolist(), history=history, histograms=recorded))

    per_epoch = len(dataset.train_y) // config["batch_size"]
    broken = None
    with StopRequest() as stop:
        while step < config["epochs"] * per_epoch and not broken:
            epoch, start = step // per_epoch, time.perf_counter()
            batches = epoch_order(config, dataset, epoch)
            first, name = step % per_epoch, f"epoch {epoch + 1}/{config['epochs']}"
            bar = tqdm(total=per_epoch, initial=first, desc=name, leave=False, disable=None)
            for i in range(first, per_epoch):
                x, y = training_batch(config, dataset, batches[i], step)
                sums += train_step(model, optimizer, x, y, learning_rate(config, step, per_epoch))
                step += 1
                if (i + 1) % READ_EVERY == 0 or i + 1 == per_epoch:
                    loss, correct = sums.tolist()
                    if not math.isfinite(loss):
                        broken = first_nonfinite(model, x)
                        break
                    seen, rate = (i + 1) * len(y), (bar.n + READ_EVERY) * len(y) / (time.perf_counter() - start)
                    bar.set_postfix_str(f"loss {loss / (i + 1):.3f}, acc {correct / seen:.3f}, {rate:.0f} images/s")
                    bar.update(i + 1 - bar.n)
                if stop.signal and i + 1 < per_epoch:
                    bar.close()
                    save()
                    return stop.signal
            bar.close()
            if broken:
                print(f"epoch {epoch + 1}: the loss is not finite; first layer with such values: {broken}")
                break
            test_loss, accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
            row = dict(epoch=epoch + 1, lr=optimizer.param_groups[0]["lr"], train_loss=loss / per_epoch)
            row |= dict(train_accuracy=correct / batches.numel(), test_loss=test_loss, test_accuracy=accuracy)
            row |= dict(seconds=round(time.perf_counter() - start, 2))
            row |= {f"rate_{i + 1}": round(r, 5) for i, r in enumerate(rates)}
            best = max((r["test_accuracy"] for r in history), default=-1)
            history.append(row)
            recorded.append(histograms(model, sample))
            if accuracy > best:
                run.save_best(dict(model=model.state_dict(), epoch=epoch + 1, accuracy=accuracy))
            sums.zero_()
            save()
            print(
                f"epoch {epoch + 1:3d}  loss {row['train_loss']:.4f}  test accuracy {accuracy:.2%}"
                f"  {row['seconds']:.0f} s  firing rates {' '.join(f'{r:.3f}' for r in rates)}",
                flush=True,
            )
            if stop.signal:
                return stop.signal
    finish(run, config, dataset, history, broken)


def finish(run, config, dataset, history, broken):
    """Writes result.json and says how the run ended."""
    accuracies = [row["test_accuracy"] for row in history]
    result = dict(outcome=outcome(accuracies, dataset.n_classes, nonfinite=broken is not None))
    if broken:
        result["first_nonfinite_layer"] = broken
    if history:
        best = max(history, key=lambda row: row["test_accuracy"])
        result |= dict(test_accuracy=accuracies[-1], best_test_accuracy=best["test_accuracy"], best_epoch=best["epoch"])
        result |= dict(epochs=len(history), train_seconds=round(sum(row["seconds"] for row in history), 1))
    result |= dict(torch=torch.__version__, config=config)
    run.write_result(result)
    last = f", test accuracy {accuracies[-1]:.2%}" if history else ""
    print(f"{result['outcome']}{last}, {sum(row['seconds'] for row in history):.0f} s of training")
    print(f"run folder: {run.folder}   its figures: python visualize.py all {run.folder}")


def header(config, dataset, model, device):
    """What runs: device, data, network and its size, and every setting."""
    n_e, n_i = population(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    size = "x".join(map(str, dataset.train_x.shape[1:]))
    print(f"device    {device} ({name})")
    n_train, n_test, n_weights = len(dataset.train_y), len(dataset.test_y), sum(p.numel() for p in model.parameters())
    print(f"data      {config['data']}: {n_train:,} training, {n_test:,} test samples of {size}")
    print(f"network   {config['arch']} {config['model']}: {n_e:,} excitatory and {n_i:,} inhibitory neurons, ", end="")
    print(f"{n_weights:,} parameters")
    values = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in config.items()]
    print("settings ", " ".join(values), flush=True)


def reopen(args, folder):
    """An existing run; an option that contradicts it is refused. The data may have moved."""
    run = Run(folder)
    try:
        config = settings(argparse.Namespace(**run.config))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{run.folder / 'config.json'} is not of this version: {error}") from None
    for key, value in vars(args).items():
        if value is not None and key in config and key != "data_root" and value != config[key]:
            raise ValueError(f"{folder} was made with {key}={config[key]}, not {value}")
    return run, config | ({"data_root": args.data_root} if args.data_root else {})


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    args = parse(argv)
    try:
        return command(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def command(args):
    """Evaluates, resumes or trains, as asked; returns the exit status."""
    if sum(map(bool, (args.resume, args.eval, args.suite))) > 1:
        raise ValueError("--resume goes on with a training, --eval tests one, --suite trains many: give one of them")
    device = pick_device(args.device)
    if args.suite:
        return suite(args, device)
    if args.eval:
        run, config = reopen(args, args.eval)
        state = run.load("best.pt")
        dataset, model = make(config, device)
        restore(model, state["model"], run.folder / "best.pt")
        loss, accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
        print(f"{run.folder}, epoch {state['epoch']}: test accuracy {accuracy:.2%}, loss {loss:.4f}")
        print("firing rates by layer:", " ".join(f"{r:.4f}" for r in rates))
        return 0
    if args.resume:
        run, config = reopen(args, args.resume)
        return work(config, device, run)
    config = settings(args)
    return work(config, device, folder=args.out or free_folder(run_name(config)))


def work(config, device, run=None, folder=None):
    """Trains in a new folder, or goes on in a run's; returns the exit status."""
    state = run.load() if run else None
    dataset, model = make(config, device)
    size, n = config["batch_size"], len(dataset.train_y)
    if size > n:
        raise ValueError(f"a batch of {size} is larger than the training set of {n}: --batch-size {n} or less")
    run = run or Run.create(folder, config)
    header(config, dataset, model, device)
    stopped = train(run, config, dataset, model, device, state)
    if stopped:
        print(f"stopped and saved; go on with: python train.py --resume {run.folder}")
        return 128 + stopped
    return 0


def suite(args, device):
    """Trains every run of a suite that is not finished yet, each where it was; returns the exit status."""
    runs = SUITES[args.suite]
    for i, options in enumerate(runs):
        variant = parse(options)
        each = argparse.Namespace(**{k: v if v is not None else getattr(args, k) for k, v in vars(variant).items()})
        config = settings(each)
        folder = Path(args.out or "runs") / Path(run_name(config)).name
        print(f"\nrun {i + 1} of {len(runs)}: {' '.join(options)}")
        run = reopen(each, folder)[0] if (folder / "checkpoint.pt").exists() else None
        if run and (folder / "result.json").exists():
            print(f"finished before, in {folder}")
        elif status := work(config, device, run, folder):
            return status
    print(
        f"\nall {len(runs)} runs are in {args.out or 'runs'}   their figures: python visualize.py all {args.out or ''}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
