"""Trains, evaluates and resumes a network of the paper: `python train.py --arch vgg8`.

One function a step: settings -> data and network -> epochs of training and testing -> the run folder's result.
"""

import argparse
import math
import re
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from checkpoint import Run, StopRequest, first_line, free_folder, leave, restore, run_name
from ei_init import initialize
from inhibition import clamp_dale
from model import ARCHS, KINDS, build, first_nonfinite, layers, population

# The paper's recipes: SGD, momentum 0.9, cosine to 0 by iteration after a linear warm-up from `warmup_from`.
RECIPE = dict(epochs=300, batch_size=128, lr=0.001, weight_decay=5e-4, warmup_epochs=30, warmup_from=1e-7, T=4)
RECIPES = {  # what differs, by (data, arch); "cifar" stands for cifar10, cifar100 and folder
    ("cifar", "vgg8"): dict(lr=0.002, warmup_epochs=10),
    ("cifar", "vgg11"): dict(lr=0.002, warmup_epochs=10),
    ("digits", "vgg8"): dict(lr=0.002, epochs=6, batch_size=32, warmup_epochs=0.2),
    ("digits", "vgg11"): dict(lr=0.002, epochs=6, batch_size=32, warmup_epochs=0.2),
    ("digits", None): dict(lr=0.001, epochs=12, batch_size=32, warmup_epochs=1.2),
}
BY_MODEL = {
    "bn": dict(lr=0.1, warmup_epochs=0, weight_decay=1e-4),
    "plain": dict(lr=0.1, warmup_epochs=0),
    "dann": dict(lr=0.1, T=1),  # no spikes, no time
}
MOMENTUM = 0.9
READ_EVERY = 20  # steps between two reads of loss and accuracy: on a GPU each read waits for it


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # so that -1e-6 is a bad value, not an unknown option

    def error(self, message):
        raise ValueError(message)


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
whole = partial(number, int, 0, 2**31 - 1, "a whole number of at least 0 and below 2^31")


def epsilon(text):
    return text if text == "adaptive" else number(float, TINY, HUGE, "a positive number or 'adaptive'", text)


def parse(argv=None):
    """The command line. What is not given is None; `settings` fills it in from the recipe."""
    p = Parser(description="Train a spiking network with lateral inhibition.", allow_abbrev=False)
    p.add_argument("--arch", choices=ARCHS, help="network (vgg8)")
    p.add_argument("--model", choices=KINDS, help="ei: the paper's; bn, plain, dann: its rivals (ei)")
    p.add_argument("--data", choices=data.DATASETS, help="dataset (digits)")
    p.add_argument("--data-root", help="where the dataset is or goes (./data)")
    p.add_argument("--image-size", type=count, help="side of the images in pixels (32)")
    p.add_argument("--epochs", type=count, help="the warm-up is scaled with it")
    p.add_argument("--batch-size", type=count)
    p.add_argument("--lr", type=positive, help="peak learning rate")
    p.add_argument("--weight-decay", type=non_negative)
    p.add_argument("--warmup-epochs", type=non_negative, help="epochs, or a fraction, of linear warm-up")
    p.add_argument("--warmup-from", type=non_negative, help="learning rate of the first step (1e-7)")
    p.add_argument("--T", type=count, help="time steps (4)")
    p.add_argument("--eps", type=epsilon, help="'adaptive', or a constant added to I_div (adaptive)")
    p.add_argument("--ste", action=argparse.BooleanOptionalAction, help="straight-through estimator (yes)")
    p.add_argument("--grad-scaling", action=argparse.BooleanOptionalAction, help="W_EI's, by 1/d (yes)")
    p.add_argument("--init", choices=["ei", "kaiming"], help="E-I Init, or absolute values of Kaiming's (ei)")
    p.add_argument("--seed", type=whole, help="0")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda where there is one, else cpu)")
    p.add_argument("--out", help="run folder (runs/<data>-<arch>-<model>-...)")
    p.add_argument("--resume", metavar="RUN", help="go on with the training in this run folder")
    p.add_argument("--eval", metavar="RUN", help="test the best network of this run folder")
    args = p.parse_args(argv)
    if [] in vars(args).values():
        p.error("'--' is no value")  # argparse lets it pass as an empty list
    return args


def settings(args):
    """Every setting of a run: given, else from the recipe for data, arch and model."""
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("resume", "eval", "out", "device")}
    config = dict(arch="vgg8", model="ei", data="digits", data_root="./data", image_size=32)
    config.update(eps="adaptive", ste=True, grad_scaling=True, init="ei", seed=0)
    config.update({k: given[k] for k in config if k in given})
    kind = "digits" if config["data"] == "digits" else "cifar"
    recipe = RECIPE | RECIPES.get((kind, None), {}) | RECIPES.get((kind, config["arch"]), {})
    recipe |= BY_MODEL.get(config["model"], {})
    if "epochs" in given:  # a shorter run is the same schedule in proportion
        recipe["warmup_epochs"] *= given["epochs"] / recipe["epochs"]
    return config | recipe | given


def pick_device(name):
    """The device by name, or the fastest at hand."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from None
    return device


def make(config, device):
    """The dataset and the network of a configuration, on the device; the network is not initialised yet."""
    dataset = data.load(config["data"], config["data_root"], config["image_size"], device)
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
    if dataset.augmented:
        x = data.augment(x, torch.Generator(x.device).manual_seed((config["seed"] << 32) + step))
    return x, dataset.train_y[indices]


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
    step, sums, history = 0, torch.zeros(2, device=device), []
    per_epoch = len(dataset.train_y) // config["batch_size"]
    if resumed:
        restore(model, resumed["model"], run.folder / "checkpoint.pt")
        restore(optimizer, resumed["optimizer"], run.folder / "checkpoint.pt")
        step, history = resumed["step"], resumed["history"]
        sums = torch.tensor(resumed["epoch_sums"], device=device)
        if step // per_epoch != len(history):
            raise ValueError(f"{run.folder} is at step {step}, not in epoch {len(history) + 1}: its data have changed")
    elif config["init"] == "ei":
        initialize(model, training_batch(config, dataset, epoch_order(config, dataset, 0)[0], 0)[0])

    def save():
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
        run.save(state | dict(epoch_sums=sums.tolist(), history=history))

    if not resumed:
        save()
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
            history.append(row)
            run.keep_best(model, row)
            sums.zero_()
            save()
            print(
                f"epoch {epoch + 1:3d}  loss {row['train_loss']:.4f}  test accuracy {accuracy:.2%}"
                f"  {row['seconds']:.0f} s  firing rates {' '.join(f'{r:.3f}' for r in rates)}",
                flush=True,
            )
            if stop.signal:
                return stop.signal
    run.finish(history, dataset.n_classes, broken)


def header(config, dataset, model, device):
    """What runs: device, data, network and its size, and every setting."""
    n_e, n_i = population(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    size = f"{dataset.in_channels}x{config['image_size']}x{config['image_size']}"
    print(f"device    {device} ({name})")
    n_train, n_test, n_weights = len(dataset.train_y), len(dataset.test_y), sum(p.numel() for p in model.parameters())
    print(f"data      {config['data']}: {n_train:,} training, {n_test:,} test images of {size}")
    print(f"network   {config['arch']} {config['model']}: {n_e:,} excitatory and {n_i:,} inhibitory neurons, ", end="")
    print(f"{n_weights:,} parameters")
    values = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in config.items()]
    print("settings ", " ".join(values), flush=True)


def reopen(args, folder):
    """An existing run and its settings; an option that contradicts them is refused."""
    run = Run(folder)
    return run, run.settings(lambda options: settings(parse(options)), vars(args))


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    try:
        return command(parse(argv))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory", str(error)):
            raise  # an error of the program
        print(f"error: {' '.join(str(error).split())[:1000] or 'not enough memory'}", file=sys.stderr)
        return 2


def command(args):
    """Evaluates, resumes or trains, as asked; returns the exit status."""
    if args.resume is not None and args.eval is not None:
        raise ValueError("--resume goes on with a training and --eval tests one: give one of them")
    device = pick_device(args.device)
    if args.eval is not None:
        run, config = reopen(args, args.eval)
        state = run.load("best.pt")
        dataset, model = make(config, device)
        restore(model, state["model"], run.folder / "best.pt")
        loss, accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
        print(f"{run.folder}, epoch {state['epoch']}: test accuracy {accuracy:.2%}, loss {loss:.4f}")
        print("firing rates by layer:", " ".join(f"{r:.4f}" for r in rates))
        return 0
    state = None
    if args.resume is not None:
        run, config = reopen(args, args.resume)
        state = run.resume()
    else:
        config = settings(args)
    dataset, model = make(config, device)
    size, n = config["batch_size"], len(dataset.train_y)
    if size > n:
        raise ValueError(f"a batch of {size} is larger than the training set of {n}: --batch-size {n} or less")
    if args.resume is None:
        run = Run.create(args.out or free_folder(run_name(config)), config)
    header(config, dataset, model, device)
    stopped = train(run, config, dataset, model, device, state)
    if stopped:
        print(f"stopped and saved; go on with: python train.py --resume {run.folder}")
        return 128 + stopped
    return 0


if __name__ == "__main__":
    leave(main())
