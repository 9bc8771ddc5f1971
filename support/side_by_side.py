"""Trains a narrow VGG-8 beside the authors' own program, from the same weights, on the same batches, in float64. A
reader of the paper may skip this file.

    python -m support.official --compare DIR        DIR: a checkout of github.com/vwOvOwv/DeepEISNN, with what it needs
"""

import contextlib
import importlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ei_init import initialize
from inhibition import clamp_dale
from model import PLANS, build, layers
from support import data, recipes
from support.console import first_line
from support.measure import hooked

LR, WEIGHT_DECAY, T = 0.002, 5e-4, 4


@contextlib.contextmanager
def of_theirs(folder):
    """Whatever their program does in a `with` block, an error of it is one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{folder} is not the authors' program, or another version of it, or a package that it needs is not "
            f"installed ({reason}): give a checkout of github.com/vwOvOwv/DeepEISNN that runs"
        ) from None


def authors(folder):
    """Their modules `models.vgg` and `modules.optimizers`, and the function that forgets the membranes' state."""
    sys.path.insert(0, str(folder))
    try:
        try:
            vgg = importlib.import_module("models.vgg")
        except ModuleNotFoundError as error:
            if error.name not in ("models", "models.vgg"):
                raise
            vgg = importlib.import_module("models.VGG")
        optimizers = importlib.import_module("modules.optimizers")
        functional = importlib.import_module("spikingjelly.activation_based.functional")
    finally:
        sys.path.remove(str(folder))
    return vgg, optimizers, functional.reset_net


def theirs_like(state, plan, in_channels, n_classes, vgg):
    """Their network with these weights."""
    before, vgg.layer_config[8] = vgg.layer_config[8], plan
    torch.set_default_dtype(torch.float64)
    try:
        device, rng = torch.device("cpu"), np.random.default_rng(0)
        how = dict(neuron_config=dict(tau=2.0), light_classifier=True, dropout=0.0, seq_input=False, ei_ratio=4)
        network = vgg.SpikingEiVGG(T, 8, in_channels, n_classes, **how, device=device, rng=rng).double()
    finally:
        torch.set_default_dtype(torch.float32)
        vgg.layer_config[8] = before
    network.load_state_dict(state)
    for module in network.modules():  # they initialise themselves at the first batch; here they have weights already
        if hasattr(module, "_inited"):
            module._inited = True
    return network


def their_optimizers(network, kind):
    """One for the biases, and one for the rest, which is clamped.

    Theirs fills the momentum with the first gradient and then adds this gradient again, so that the first step is 1.9
    times too long. Here the momentum starts from 0.
    """
    groups = {True: [], False: []}
    for name, p in network.named_parameters():
        groups["bias" not in name].append(p)
    made = []
    for clamped, parameters in groups.items():
        optimizer = kind(parameters, lr=LR, momentum=recipes.MOMENTUM, weight_decay=WEIGHT_DECAY, clamped=clamped)
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        made.append(optimizer)
    return made


@torch.no_grad()
def distance(ours, theirs):
    """Of two state dicts: the largest difference, and the norm of all differences beside the norm of all values."""
    ours, theirs = (torch.cat([state[name].flatten() for name in ours]) for state in (ours, theirs))
    return (ours - theirs).abs().max().item(), ((ours - theirs).norm() / ours.norm()).item()


def compare(folder, state_of, steps, width, batch_size, data_root, **options):
    """Prints loss, distance of the parameters and differing spikes as both train. Returns 0.

    Args:
        folder: a checkout of the authors' repository.
        state_of: the tensors of a network of ours under their names.
        steps: of training, at a constant learning rate.
        width: of VGG-8.
        batch_size, data, data_root: of the images, 32x32; the first batches of an epoch, over and over.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    with of_theirs(folder):
        vgg, optimizers, reset_net = authors(folder)
    dataset = data.load(options["data"], data_root, 32, torch.device("cpu"), T)
    if dataset.train_x.dim() != 4:
        raise ValueError(f"--data {options['data']} has frames; give a dataset of still images")
    config = dict(seed=0, batch_size=batch_size)
    order = data.epoch_order(config, dataset, 0)
    if not len(order):
        raise ValueError(f"a batch of {batch_size} is larger than the training set of {len(dataset.train_y)}")
    plan = [n if n == "P" else max(4, round(n * width)) for n in PLANS["vgg8"]]
    torch.manual_seed(0)
    ours = build("vgg8", dataset.in_channels, dataset.n_classes, T, plan=plan).double()
    initialize(ours, data.training_batch(config, dataset, order[0], 0)[0].double())
    with of_theirs(folder):
        theirs = theirs_like(state_of(ours), plan, dataset.in_channels, dataset.n_classes, vgg)
        their_sgd = their_optimizers(theirs, optimizers.EiSGD)
        neurons = [layer.neuron for layer in layers(ours)], [m for m in theirs.modules() if "LIF" in type(m).__name__]
        if len(neurons[0]) != len(neurons[1]):
            raise ValueError(f"it has {len(neurons[1])} modules with LIF in their name, not {len(neurons[0])}")
    our_sgd = torch.optim.SGD(ours.parameters(), lr=LR, momentum=recipes.MOMENTUM, weight_decay=WEIGHT_DECAY)
    print(f"VGG-8 of {plan} on {options['data']}, {batch_size} images a step, float64")
    print(
        f"{'step':>5}{'loss, ours':>14}{'theirs':>14}{'largest difference':>20}{'relative':>11}{'spikes differing':>24}"
    )
    shown, differing, all_spikes = {*range(1, 4), *(10**i * k for i in range(6) for k in (1, 2, 5)), steps}, 0, 0
    for step in range(steps):
        x, y = data.training_batch(config, dataset, order[step % len(order)], step)
        x, spikes = x.double(), ([], [])
        hooks = [
            m.register_forward_hook(lambda _, __, s, seen=seen: seen.append(s))
            for several, seen in zip(neurons, spikes, strict=True)
            for m in several
        ]
        with hooked(ours, hooks, training=True):
            losses = [F.cross_entropy(ours(x), y)]
            with of_theirs(folder):
                logits = theirs(x)
                losses.append(F.cross_entropy(logits if logits.dim() == 2 else logits.mean(0), y))
        for a, b in zip(*spikes, strict=True):
            differing += (a != b.view_as(a)).sum().item()
            all_spikes += a.numel()
        with of_theirs(folder):
            for loss, several in zip(losses, ([our_sgd], their_sgd), strict=True):
                for optimizer in several:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in several:
                    optimizer.step()
            reset_net(theirs)
        clamp_dale(ours)
        if step + 1 in shown:
            largest, relative = distance(state_of(ours), theirs.state_dict())
            counted = f"{differing:,} of {all_spikes:,}"
            print(f"{step + 1:5}{losses[0]:14.6f}{losses[1]:14.6f}{largest:20.2e}{relative:11.2e}{counted:>24}")
    return 0
