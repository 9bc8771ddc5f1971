"""Trains, tests and resumes a network of the paper: `python train.py --arch vgg8`.

Read `train`, the loop over epochs and batches, and `train_step`. Everything below them is the command line; recipes are
a table in `support/recipes.py` (`python train.py --recipes` prints it).
"""

import argparse
import math
import os
import sys

import torch
import torch.nn.functional as F

from homeostasis import conserve_synapses
from inhibition import clamp_dale
from support import data, official, parallel, recipes
from support.fast import Recorded, accelerate, keep_memory
from support.measure import cost_table, evaluate, header
from support.progress import Progress
from support.runs import OWN, Run, differing, load_data_and_model, prepare, restore


def learning_rate(config, step, steps_per_epoch):
    """Linear warm-up, then a cosine to 0, by step (paper, training details)."""
    warmup, total = config["warmup_epochs"] * steps_per_epoch, config["epochs"] * steps_per_epoch
    if step < warmup:
        return config["warmup_from"] + (config["lr"] - config["warmup_from"]) * step / warmup
    return config["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def guard_gradients(loss, model):
    """Keeps the parameters finite: if the loss or a gradient is NaN or infinite, all gradients become 0.

    Returns:
        Whether they were finite: a tensor (), which is not read here, for that would wait for a GPU.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    extremes = torch.stack([value for gradient in gradients for value in torch.aminmax(gradient)])  # NaN passes through
    finite = loss.detach().isfinite() & extremes.isfinite().all()
    if finite.is_cuda or not finite:
        bad = ~finite  # ()
        for gradient in gradients:
            gradient.masked_fill_(bad, 0)
    return finite


def train_step(network, optimizer, x, y, clip_norm=0.0):
    """One step of training: forward, backward, and Dale's law.

    On a GPU its operations are recorded and then repeated (`support.fast.Recorded`), so what changes from step to step
    must be a tensor there. With `--plain`, or an equation that was changed, nothing is recorded.

    Args:
        x: images (B, C, H, W) or frames (B, T, C, H, W), intensities >= 0.
        y: labels (B,).
        clip_norm: the largest norm of the gradient; 0: any.

    Returns:
        Loss, accuracy in [0, 1], and whether loss and gradients were finite: three tensors ().
    """
    logits = network(x)  # (B, classes), averaged over the time steps
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()  # through time, with surrogate gradients
    finite = guard_gradients(loss, network)
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    with conserve_synapses(network):  # of --kind homeostasis
        if finite.is_cuda or finite:  # on a GPU a look would wait for it; the gradients are 0 there
            optimizer.step()
        clamp_dale(network)  # Dale's law
    return loss.detach(), (logits.argmax(1) == y).float().mean(), finite


def train(run, config, dataset, model, state=None, plain=False, give_up=False):
    """Trains a network to the end of its schedule, testing and saving it after each epoch.

    Args:
        run: the `Run` that keeps everything.
        config: its settings.
        dataset, model: as from `load_data_and_model`, on one device.
        state: of a training that was stopped, to go on with. None: from the start, with E-I Init.
        plain: only the plain equations, no fused forms.
        give_up: end when the network is at chance for a third of its epochs.

    Returns:
        The number of the signal that stopped it, or None.
    """
    if state is None:
        prepare(config, dataset, model)  # E-I Init
    steps = config["epochs"] * (len(dataset.train_y) // config["batch_size"])
    edited = plain or accelerate(model, compiled=steps > 5000)  # the names of changed equations; compiled: on a GPU
    sgd = dict(lr=config["lr"], momentum=recipes.MOMENTUM, weight_decay=config["weight_decay"], fused=True)
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    progress = Progress(run, config, dataset, model, optimizer, state, give_up)
    network = parallel.wrap(model)
    alone_on_gpu = dataset.train_x.is_cuda and parallel.world() == 1
    take_step = Recorded(train_step) if alone_on_gpu and not edited else train_step  # the same, in one CUDA graph

    for epoch in progress.epochs():
        for step, x, y in progress.batches(epoch):
            lr = learning_rate(config, step, progress.steps_per_epoch)
            for group, rate in zip(optimizer.param_groups, progress.rates, strict=True):
                group["lr"] = lr * (rate / config["lr"])  # each group in proportion to its own rate
            progress.count(*take_step(network, optimizer, x, y, config["clip_norm"]))

        if progress.interrupted:
            break
        test_loss, test_accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
        progress.end_epoch(lr, test_loss, test_accuracy, rates)

    return progress.finish()


# ---- the command line ------------------------------------------------------------------------------------------------


def train_run(run, config, args, device, folder=None):
    """Goes on with a run, or (run is None) starts one in a new folder. Returns the exit status."""
    state = None
    try:
        with parallel.first_process_first():  # it locks or makes the run folder, and decodes and caches the data
            if run:
                state = run.resume(config)
            dataset, model = load_data_and_model(config, device, args.plain)
            size = data.epoch_order(config, dataset, 0).shape[1]  # refuses one that is too large
            n = parallel.world()
            if size % n:
                raise ValueError(f"a batch of {size} cannot be shared by {n} processes: give another --batch-size")
            if run is None:
                run = Run.create(folder or f"runs/{recipes.run_name(config)}", config, choose=folder is None)
        header(config, dataset, model, device)
        stopped = train(run, config, dataset, model, state, args.plain, args.give_up)
    finally:
        if run:
            run.close()
    if stopped:
        print(f"stopped and saved; go on with: python train.py --resume {run.quoted}")
    return 128 + stopped if stopped else 0


def test_run(args, device):
    """--eval: tests the best network of a run, counts its costs, and does the same for BN-SNN beside it."""
    run = Run(args.eval)
    config = run.settings(vars(args), free=("data_root", "T", "precision"))
    state = run.load("best.pt")
    run.say_other_equations()
    dataset, model = load_data_and_model(config, device, args.plain)
    other_frames = dataset.train_x.dim() == 5 and args.T is not None  # the samples differ in any case
    but = ("train", "test", "shape") if other_frames else ("train",)
    if different := data.differences(state["data"], data.identity(dataset), but):
        if not args.other_data or len(state["data"]["classes"]) != dataset.n_classes:
            advice = "--other-data tests on other data with as many classes"
            raise ValueError(f"these data are not those of {run.folder}: {different}; {advice}")
        print(f"other data than those of the training: {different}")
    restore(model, state["model"], run.folder / "best.pt")
    sample, _ = data.sample(dataset, config["T"])
    if not args.plain:
        accelerate(model)
    loss, accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
    print(f"{run.folder}, epoch {state['epoch']}: test accuracy {accuracy:.2%}, loss {loss:.4f}, T={config['T']}")
    print("firing rates by layer:", " ".join(f"{r:.4f}" for r in rates))
    print("\n".join(cost_table(model, sample)))
    if config["kind"] == "bn":
        return 0
    rival = run.folder.resolve().with_name(recipes.run_name(run.config | recipes.FULL | dict(kind="bn", ei_ratio=4)))
    if not (rival / "best.pt").exists():
        print(f"no BN-SNN with a finished epoch beside it: it would be in {rival}, with the same data and network")
        return 0
    try:
        other = Run(rival)
        if differ := differing(run, other):
            print(f"the BN-SNN beside it, {rival}, was made with other {', '.join(differ)}: not compared")
            return 0
        own = [f"{key}={other.config[key]:g}" for key in OWN if other.config[key] != config[key]]
        own += ["a training that has not ended"] * (not (rival / "result.json").exists())
        print(f"beside it, BN-SNN{', with ' * bool(own)}{', '.join(own)}:")
        how = {key: vars(args)[key] for key in ("data_root", "T", "precision", "other_data", "plain")}
        return test_run(argparse.Namespace(**vars(recipes.parse(["--eval", str(rival)])) | how), device)
    except Exception as error:  # this run's own test is done; a damaged file fails in many ways
        print(f"the BN-SNN beside it is not compared: {error}")
        return 0


def command(args):
    """Tests, resumes or trains, as asked. Returns the exit status."""
    if args.recipes:
        print("\n".join(recipes.table()))
        return 0
    if sum(asked is not None for asked in (args.resume, args.eval, args.official or args.out)) > 1:
        raise ValueError("--resume goes on with a run, --eval tests it, --out is for a new one: give one of them")
    device = parallel.pick_device(args.device)
    with parallel.joined(device), torch.random.fork_rng():
        if args.eval is not None:
            return test_run(args, device)
        if args.official is not None:
            return official.command(args, device)
        if args.resume is not None:
            run = Run(args.resume)
            return train_run(run, run.settings(vars(args), free=("data_root", "epochs")), args, device)
        return train_run(None, recipes.settings(args), args, device, args.out)


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return recipes.status(lambda: command(recipes.parse(argv)), os.environ.get("RANK", "0"))


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
