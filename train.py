"""Trains, evaluates and resumes a network of the paper: `python train.py --arch vgg8`.

One function a step: settings -> data and network -> epochs of training and testing -> the run folder's result.
"""

import argparse
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint as cp
import data
from checkpoint import Parser, Run, StopRequest, first_line, free_folder, holds_run, leave, restore, run_name
from data import epoch_order, training_batch
from ei_init import initialize
from inhibition import clamp_dale
from model import ARCHS, KINDS, build, cost_table, describe, first_nonfinite, histograms, hooked, keep_memory, layers

# The paper's recipes: SGD, momentum 0.9, cosine to 0 by iteration after a linear warm-up from `warmup_from`.
RECIPE = dict(epochs=300, batch_size=128, lr=0.001, weight_decay=5e-4, T=4, image_size=32)
RECIPE |= dict(warmup_epochs=30, warmup_from=1e-7, clip_norm=0.0)
RECIPES = {  # what differs, by (data, arch); data without a (data, None) start from "cifar"
    ("cifar", "vgg8"): dict(lr=0.002, warmup_epochs=10),
    ("cifar", "vgg11"): dict(lr=0.002, warmup_epochs=10),
    ("digits", None): dict(lr=0.002, epochs=6, batch_size=32, warmup_epochs=0.2),
    ("digits", "vgg16"): dict(lr=0.001, epochs=12, warmup_epochs=1.2),
    ("digits", "vgg19"): dict(lr=0.001, epochs=16, warmup_epochs=1.6),
    ("digits", "resnet18"): dict(lr=0.003, epochs=12, warmup_epochs=1.2),
    ("tinyimagenet", "resnet18"): dict(lr=0.003, warmup_epochs=10, warmup_from=0.001),
    ("cifar10-dvs", None): dict(warmup_epochs=10, batch_size=32, T=10, image_size=48),
    ("dvs-gesture", None): dict(warmup_epochs=10, batch_size=32, T=16, image_size=48),
}
BY_MODEL = {
    "bn": dict(lr=0.1, warmup_epochs=0, weight_decay=1e-4),
    "plain": dict(lr=0.1, warmup_epochs=0),
    # No spikes, no time. Its division has a gradient of 1 / x, and ReLUs send x as small as one likes: clipped.
    "dann": dict(lr=0.02, clip_norm=1.0, T=1),
}
SUITES = {  # options of each run; paper: what its figures compare
    "paper": [
        *[["--model", kind] for kind in ("ei", "bn", "plain", "dann")],
        *[["--eps", eps] for eps in ("1e-8", "1e-7", "1e-6", "1e-5", "1e-4")],
        *[["--no-ste"], ["--no-grad-scaling"], ["--init", "kaiming"]],
    ],
    "rivals": [["--model", kind] for kind in ("ei", "bn", "dann")],
    "depth": [["--arch", arch, "--model", kind] for arch in ARCHS[1:] for kind in ("ei", "bn")],
}
COMMANDS = ("suite", "resume", "eval", "out", "device")  # options that are no setting of a run
FULL = dict(model="ei", eps="adaptive", ste=True, grad_scaling=True, init="ei")  # the paper's method, nothing left out
MOMENTUM = 0.9


def parse(argv=None):
    """The command line. What is not given is None; `settings` fills it in from the recipe."""
    p = Parser(description="Train a spiking network with lateral inhibition.", allow_abbrev=False)
    p.add_argument("--arch", choices=ARCHS, help="network (vgg8)")
    p.add_argument("--model", choices=KINDS, help="ei: the paper's; bn, plain, dann: its rivals (ei)")
    p.add_argument("--data", choices=data.DATASETS, help="dataset (digits)")
    p.add_argument("--data-root", help="where the dataset is or goes (./data)")
    p.add_argument("--image-size", type=cp.count, help="side in pixels (32; of event frames 48)")
    p.add_argument("--epochs", type=cp.count, help="the warm-up is scaled with it")
    p.add_argument("--batch-size", type=cp.count, help="samples a step")
    p.add_argument("--lr", type=cp.positive, help="peak learning rate")
    p.add_argument("--weight-decay", type=cp.non_negative, help="of all parameters")
    p.add_argument("--warmup-epochs", type=cp.non_negative, help="epochs, or a fraction, of linear warm-up")
    p.add_argument("--warmup-from", type=cp.non_negative, help="learning rate of the first step (1e-7)")
    p.add_argument("--clip-norm", type=cp.non_negative, help="largest norm of the gradient, 0: any (dann 1, else 0)")
    p.add_argument("--T", type=cp.count, help="time steps (4), frames of events (10, 16)")
    p.add_argument("--eps", type=cp.epsilon, help="'adaptive', or a constant added to I_div (adaptive)")
    p.add_argument("--ste", action=argparse.BooleanOptionalAction, help="straight-through estimator (yes)")
    p.add_argument("--grad-scaling", action=argparse.BooleanOptionalAction, help="W_EI's, by 1/d (yes)")
    p.add_argument("--init", choices=["ei", "kaiming"], help="E-I Init, or absolute values of Kaiming's (ei)")
    p.add_argument("--seed", type=cp.whole, help="0")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda where there is one, else cpu)")
    p.add_argument("--out", help="run folder (runs/<data>-<arch>-<model>-...)")
    p.add_argument("--suite", choices=SUITES, help="train all that a table or the figures need, into --out (runs)")
    p.add_argument("--resume", metavar="RUN", help="go on with the training in this run folder")
    p.add_argument("--eval", metavar="RUN", help="test the best network of this run folder")
    args = p.parse_args(argv)
    if [] in vars(args).values():
        p.error("'--' is no value")  # argparse lets it pass as an empty list
    return args


def settings(args):
    """Every setting of a run: given, else from the recipe for data, arch and model."""
    given = {k: v for k, v in vars(args).items() if v is not None and k not in COMMANDS}
    config = dict(arch="vgg8") | FULL | dict(data="digits", data_root="./data", seed=0)
    config.update({k: given[k] for k in config if k in given})
    kind = config["data"] if (config["data"], None) in RECIPES else "cifar"
    recipe = RECIPE | RECIPES.get((kind, None), {}) | RECIPES.get((kind, config["arch"]), {})
    recipe |= RECIPES.get((config["data"], config["arch"]), {}) | BY_MODEL.get(config["model"], {})
    if config["model"] != "ei" and any(config[k] != v for k, v in FULL.items() if k != "model"):
        raise ValueError("--eps, --no-ste, --no-grad-scaling and --init kaiming are ablations of --model ei only")
    if "epochs" in given:  # a shorter run is the same schedule in proportion
        recipe["warmup_epochs"] *= given["epochs"] / recipe["epochs"]
    return config | recipe | given


def pick_device(name):
    """The device by name, or the fastest at hand. Under torchrun, each process's own, and it joins the others."""
    try:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return device


def make(config, device):
    """The dataset and the network of a configuration, on the device; the network is not initialised yet."""
    dataset = data.load(config["data"], config["data_root"], config["image_size"], device, config["T"])
    torch.manual_seed(config["seed"])
    options = {k: config[k] for k in ("T", "image_size", "eps", "ste", "grad_scaling")}
    model = build(config["arch"], dataset.in_channels, dataset.n_classes, kind=config["model"], **options)
    return dataset, model.to(device)


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


def train_step(model, optimizer, x, y, lr, clip_norm=0):
    """One step of a fused SGD, then Dale's law. Returns loss and accuracy, left on the device."""
    optimizer.param_groups[0]["lr"] = lr
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.found_inf = (~loss.detach().isfinite()).float()  # then fused SGD does nothing, and nobody has to wait
    if dist.is_initialized():
        dist.all_reduce(optimizer.found_inf, dist.ReduceOp.MAX)  # one process is enough, for gradients are shared
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    clamp_dale(model)
    return torch.stack([loss.detach(), (logits.detach().argmax(1) == y).float().mean()])


@torch.no_grad()
def evaluate(model, x, y, batch_size=100):
    """Mean loss, accuracy, and mean firing rate (spikes per neuron and time step) of each layer, on a test set."""
    batch_size = max(1, min(batch_size, 1000 // model.T))  # frames take memory in proportion to T
    rates = torch.zeros(len(layers(model)), device=x.device)

    def count_spikes(_, __, spikes, i):
        rates[i] += spikes.mean() * len(spikes)

    sums = torch.zeros(2, device=x.device)
    with hooked(model, [m.register_forward_hook(partial(count_spikes, i=i)) for i, m in enumerate(layers(model))]):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = model(data.to_input(images))
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()])
    loss, correct = sums.tolist()
    return loss / len(y), correct / len(y), (rates / (len(y) * model.T)).tolist()


def train(run, config, dataset, model, device, resumed=None):
    """Trains from the start, or from the state of a checkpoint, to the end. Returns a signal's number if stopped."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options = dict(lr=config["lr"], momentum=MOMENTUM, weight_decay=config["weight_decay"], fused=True)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    # A read waits for a GPU, hence one in 20 steps: sums over steps of loss and accuracy, and whether to stop.
    read_every, per_epoch = 1 if device.type == "cpu" else 20, len(dataset.train_y) // config["batch_size"]
    step, spent, history, recorded, sums = 0, 0.0, [], [], torch.zeros(3, device=device)
    sample, checksum = data.sample(dataset, config["T"], 64)[0], data.fingerprint(dataset)  # sample: for histograms

    def save(totals, seconds):
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, histograms=recorded)
        run.save(state | dict(epoch_sums=totals, epoch_seconds=seconds, history=history, data=checksum))

    if resumed:
        restore(model, resumed["model"], run.folder / "checkpoint.pt")
        restore(optimizer, resumed["optimizer"], run.folder / "checkpoint.pt")
        step, spent, history, recorded = (resumed[k] for k in ("step", "epoch_seconds", "history", "histograms"))
        sums[:2] = torch.tensor(resumed["epoch_sums"], device=device)
        if resumed["data"] != checksum or step // per_epoch != len(history):
            raise ValueError(f"the data in {config['data_root']} are not those with which {run.folder} was begun")
    else:
        prepare(config, dataset, model)
        recorded.append(histograms(model, sample))
        save([0.0, 0.0], 0.0)
    parallel = DistributedDataParallel(model) if world > 1 else model  # every process starts from the first one's
    with StopRequest() as stop:
        while step < config["epochs"] * per_epoch:
            epoch, start, spent = step // per_epoch, time.perf_counter() - spent, 0.0
            batches, first = epoch_order(config, dataset, epoch), step % per_epoch
            bar = tqdm(total=per_epoch, initial=first, leave=False, disable=bool(rank) or None)
            bar.set_description(f"epoch {epoch + 1}/{config['epochs']}")
            for i in range(first, per_epoch):
                x, y = training_batch(config, dataset, batches[i], step)
                lr = learning_rate(config, step, per_epoch)
                sums[:2] += train_step(parallel, optimizer, x[rank::world], y[rank::world], lr, config["clip_norm"])
                step += 1
                if (i + 1) % read_every and i + 1 < per_epoch:
                    continue
                sums[2] = stop.signal is not None
                totals = sums / world
                if world > 1:
                    dist.all_reduce(totals)
                loss, accuracy, stopped = totals.tolist()
                if not math.isfinite(loss):
                    bar.close()
                    broken = first_nonfinite(model, x)
                    print(f"epoch {epoch + 1}: the loss is not finite; first layer with such values: {broken}")
                    return run.finish(history, dataset.n_classes, broken)
                bar.update(i + 1 - bar.n)
                rate = (i + 1) * len(y) / (time.perf_counter() - start)
                bar.set_postfix_str(f"loss {loss / (i + 1):.3f}, acc {accuracy / (i + 1):.3f}, {rate:.0f} images/s")
                if stopped and i + 1 < per_epoch:
                    bar.close()
                    save([loss, accuracy], time.perf_counter() - start)
                    return stop.signal or signal.SIGTERM  # of another process
            bar.close()
            row = dict(epoch=epoch + 1, lr=lr, train_loss=loss / per_epoch, train_accuracy=accuracy / per_epoch)
            test_loss, accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
            row |= dict(test_loss=test_loss, test_accuracy=accuracy, seconds=round(time.perf_counter() - start, 2))
            history.append(row | {f"rate_{i + 1}": round(r, 5) for i, r in enumerate(rates)})
            recorded.append(histograms(model, sample))
            run.keep_best(model, row)
            sums.zero_()
            save([0.0, 0.0], 0.0)
            print(f"epoch {epoch + 1:3d}  loss {row['train_loss']:.4f}  test accuracy {accuracy:.2%}", end="  ")
            print(f"{row['seconds']:.0f} s  firing rates", " ".join(f"{r:.3f}" for r in rates), flush=True)
            if stopped or (world == 1 and stop.signal):
                return stop.signal or signal.SIGTERM
    return run.finish(history, dataset.n_classes)


def header(config, dataset, model, device):
    """What runs: device, data, network and its size, and every setting."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    values = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in config.items()]
    print(f"device    {device} ({name})\ndata      {config['data']}: {data.describe(dataset)}")
    print(f"network   {config['arch']} {config['model']}: {describe(model)}\nsettings ", *values, flush=True)


def reopen(given, folder, free=("data_root",)):
    """An existing run and its settings; an option given that contradicts them, other than the free ones, is refused."""
    run = Run(folder)
    return run, run.settings(lambda options: settings(parse(options)), given, free)


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return cp.status(lambda: command(parse(argv)))


def command(args):
    """Evaluates, resumes or trains, as asked; returns the exit status."""
    if sum(asked is not None for asked in (args.resume, args.eval, args.suite or args.out)) > 1:
        raise ValueError("--resume goes on with a run, --eval tests it, --suite and --out make new: give one of them")
    device = pick_device(args.device)
    keep_memory()
    if args.suite:
        return suite(args, device)
    if args.resume is not None:
        return work(*reopen(vars(args), args.resume), device)
    if args.eval is None:
        return work(None, config := settings(args), device, args.out or free_folder(run_name(config)))
    run, config = reopen(vars(args), args.eval, free=("data_root", "T"))
    state = run.load("best.pt")
    dataset, model = make(config, device)
    restore(model, state["model"], run.folder / "best.pt")
    loss, accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
    print(f"{run.folder}, epoch {state['epoch']}: test accuracy {accuracy:.2%}, loss {loss:.4f}, T={config['T']}")
    print("firing rates by layer:", " ".join(f"{r:.4f}" for r in rates))
    print("\n".join(cost_table(model, data.sample(dataset, config["T"])[0])))
    if config["model"] == "bn":
        return 0
    rival = run.folder.resolve().with_name(Path(run_name(config | FULL | dict(model="bn"))).name)
    if (rival / "best.pt").exists():  # beside it
        same = dict(eval=rival, T=args.T, data_root=args.data_root, device=args.device)
        return command(argparse.Namespace(**vars(parse([])) | same))
    print(f"no BN-SNN with a finished epoch beside it: it would be in {rival}, with the same data and network")
    return 0


def work(run, config, device, folder=None):
    """Goes on with a run, or where there is none starts one in a new folder; returns the exit status."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    state = run.resume() if run and rank == 0 else None  # only the first process writes, also what data are cached
    if rank:
        dist.barrier()
        state = run.load() if run else None
    dataset, model = make(config, device)
    if world > 1 and rank == 0:
        dist.barrier()
    size, n = config["batch_size"], len(dataset.train_y)
    if size > n:
        raise ValueError(f"a batch of {size} is larger than the training set of {n}: --batch-size {n} or less")
    if size % world:
        raise ValueError(f"a batch of {size} cannot be shared by {world} processes")
    run = run or (Run(folder, config) if rank else Run.create(folder, config))
    header(config, dataset, model, device)
    if stopped := train(run, config, dataset, model, device, state):
        print(f"stopped and saved; go on with: python train.py --resume {run.quoted}")
        return 128 + stopped
    return 0


def suite(args, device):
    """Trains every run of a suite that is not finished yet, each where it was; returns the exit status."""
    runs, out = SUITES[args.suite], args.out or "runs"
    chosen = [{k: v for k, v in vars(parse(options)).items() if v is not None} for options in runs]
    if clash := {k for own in chosen for k in own if vars(args)[k] is not None}:
        raise ValueError(f"--suite {args.suite} chooses --{min(clash).replace('_', '-')} itself: leave it out")
    configs = [settings(argparse.Namespace(**vars(args) | own)) for own in chosen]
    for i, config in enumerate(configs):
        print(f"\nrun {i + 1} of {len(runs)}: {' '.join(runs[i])}")
        folder = Path(out) / Path(run_name(config)).name
        if run := Run(folder) if holds_run(folder) else None:  # an older one with other settings is refused
            config = run.settings(lambda options: settings(parse(options)), config)
        if run and (folder / "result.json").exists():
            print(f"finished before, in {folder}")
        elif status := work(run, config, device, folder):
            return status
    print(f"\nall {len(runs)} runs are in {out}   their figures: python visualize.py all {cp.quoted(out)}")
    return 0


if __name__ == "__main__":
    leave(main())
