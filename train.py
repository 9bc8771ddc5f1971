"""Trains, tests and resumes a network of the paper: `python train.py --arch vgg8`.

Read `train`, the loop over epochs and batches. Everything beside it is the command line; recipes are a table in
`support/recipes.py` (`python train.py --recipes` prints it).
"""

import argparse
import math

import torch
import torch.nn.functional as F

from inhibition import clamp_dale
from support import console, data, official, parallel, recipes
from support.fast import accelerate, keep_memory
from support.measure import cost_table, evaluate, header
from support.progress import Progress, check_data, longer
from support.runs import Run, load_data_and_model, prepare, reopen, restore


def learning_rate(config, step, steps_per_epoch):
    """Linear warm-up, then a cosine to 0, by step (paper, training details)."""
    warmup, total = config["warmup_epochs"] * steps_per_epoch, config["epochs"] * steps_per_epoch
    if step < warmup:
        return config["warmup_from"] + (config["lr"] - config["warmup_from"]) * step / warmup
    return config["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


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
        prepare(config, dataset, model)
    if not plain:
        accelerate(model, data.first_batch(config, dataset)[0])
    sgd = dict(lr=config["lr"], momentum=recipes.MOMENTUM, weight_decay=config["weight_decay"], fused=True)
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    progress = Progress(run, config, dataset, model, optimizer, state, give_up)
    network = parallel.wrap(model)

    for epoch in progress.epochs():
        for step, x, y in progress.batches(epoch):  # x: (B, C, H, W) or frames (B, T, C, H, W), y: (B,)
            lr = learning_rate(config, step, progress.steps_per_epoch)
            optimizer.param_groups[0]["lr"] = lr

            logits = network(x)  # (B, classes), averaged over the time steps
            loss = F.cross_entropy(logits, y)

            optimizer.zero_grad()
            loss.backward()  # through time, with surrogate gradients
            progress.add(loss, logits, y)
            if config["clip_norm"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
            optimizer.step()
            clamp_dale(model)  # Dale's law

        if progress.interrupted:
            break
        test_loss, test_accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
        progress.end_epoch(lr, test_loss, test_accuracy, rates)

    return progress.finish()


# ---- the command line ------------------------------------------------------------------------------------------------


def train_run(run, config, args, device, folder=None, after_epoch=None):
    """Goes on with a run, or starts one in a new folder. Returns the exit status."""
    with parallel.first_process_first():  # it makes the run folder whole, and decodes and caches the data
        state = None
        if run:
            state = run.load() if parallel.rank() else run.resume()
            config = longer(run, config, state, args.epochs)
        dataset, model = load_data_and_model(config, device)
    size = data.epoch_order(config, dataset, 0).shape[1]  # refuses one that is too large, before there is a run
    if size % parallel.world():
        raise ValueError(f"a batch of {size} cannot be shared by {parallel.world()} processes")
    if run is None:
        if parallel.rank():
            run = Run(folder or ".", config)  # only the first process writes
        else:
            run = Run.create(folder or f"runs/{recipes.run_name(config)}", config, choose=folder is None)
    run.after_epoch = after_epoch
    header(config, dataset, model, device)
    try:
        stopped = train(run, config, dataset, model, state, args.plain, args.give_up)
    finally:
        run.close()
    if stopped:
        print(f"stopped and saved; go on with: python train.py --resume {run.quoted}")
        return 128 + stopped
    return 0


def test_run(args, device):
    """--eval: tests the best network of a run, counts its costs, and does the same for BN-SNN beside it."""
    run, config = reopen(vars(args), args.eval, free=("data_root", "T"))
    state = run.load("best.pt")
    dataset, model = load_data_and_model(config, device)
    other_frames = dataset.train_x.dim() == 5 and args.T is not None
    check_data(run, state["data"], dataset, other_frames, args.other_data)
    restore(model, state["model"], run.folder / "best.pt")
    sample, _ = data.sample(dataset, config["T"])
    if not args.plain:
        accelerate(model, sample)
    loss, accuracy, rates = evaluate(model, dataset.test_x, dataset.test_y)
    print(f"{run.folder}, epoch {state['epoch']}: test accuracy {accuracy:.2%}, loss {loss:.4f}, T={config['T']}")
    print("firing rates by layer:", " ".join(f"{r:.4f}" for r in rates))
    print("\n".join(cost_table(model, sample)))
    if config["model"] == "bn":
        return 0
    rival = run.folder.resolve().with_name(recipes.run_name(config | recipes.FULL | dict(model="bn", ei_ratio=4)))
    if (rival / "best.pt").exists():
        other = Run(rival).config
        if differing := [key for key in ("image_size", "epochs") if other.get(key) != config[key]]:
            print(f"the BN-SNN beside it, {rival}, was made with other {' and '.join(differing)}: not compared")
            return 0
        print("beside it, BN-SNN:")
        same = dict(eval=rival, T=args.T, data_root=args.data_root, plain=args.plain, other_data=args.other_data)
        return test_run(argparse.Namespace(**vars(recipes.parse([])) | same), device)
    print(f"no BN-SNN with a finished epoch beside it: it would be in {rival}, with the same data and network")
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
            return train_run(*reopen(vars(args), args.resume, free=("data_root", "epochs")), args, device)
        return train_run(None, recipes.settings(args), args, device, args.out)


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return console.status(lambda: command(recipes.parse(argv)), parallel.rank_asked())


if __name__ == "__main__":
    keep_memory()
    console.leave(main())
