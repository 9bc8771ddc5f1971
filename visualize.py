"""The paper's figures: `python visualize.py all`, after `python train.py --suite paper`.

Each subcommand draws one figure from a folder of runs (or from one run), as PNG and PDF, and writes the numbers that it
drew beside it as CSV. Orange is excitation and blue is inhibition, wherever they are told apart.
"""

import copy
import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.ticker import MaxNLocator, NullFormatter
from sklearn.decomposition import PCA

import data
import train
from checkpoint import Parser, holds_run, misfit, option, quoted, restore, status, whole
from ei_init import ei_init, initialize
from model import ARCHS, BINS, build, circuits, histogram, hooked, layers, observe
from train import FULL

EXC, INH, GREY = "#D55E00", "#0072B2", "#777777"  # excitation, inhibition (palette of Okabe and Ito, also below)
STYLES = [  # told apart by dash and marker in grey
    dict(color="#000000", marker="o", ls="-"),
    dict(color="#009E73", marker="s", ls="--"),
    dict(color="#CC79A7", marker="^", ls="-."),
    dict(color="#56B4E9", marker="D", ls=":"),
    dict(color="#E69F00", marker="v", ls=(0, (4, 1, 1, 1, 1, 1))),
    dict(color="#999999", marker="x", ls=(0, (1, 2))),
]
NAMES = dict(ei="E-I SNN", bn="BN-SNN", plain="plain SNN", dann="DANN")
SYMBOLS = dict(w_ee="$W_{EE}$", w_ie="$W_{IE}$", w_ei="$W_{EI}$", g_i="$g_I$", g_e="$g_E$", b_e="$b_E$")
STYLE = {"font.size": 8, "lines.linewidth": 1.2, "lines.markersize": 3.5, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
PAGE = 6.8  # inches, the width of a page; half of it is a column


class Missing(ValueError):
    """There is no run that a figure needs; the message says how to get one."""


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save(figure, name, rows, out):
    """Writes name.png, name.pdf and the rows (dicts) behind them as name.csv."""
    out.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        undated = dict(CreationDate=None) if suffix == "pdf" else None  # the same picture is the same file
        figure.savefig(out / f"{name}.{suffix}", dpi=200, metadata=undated)
    plt.close(figure)
    write_csv(out / f"{name}.csv", rows)


class Trained:
    """A run, read for drawing: settings, and what it wrote, each when it is asked for."""

    def __init__(self, folder, data_root=None):
        self.run, self.config = train.reopen(dict(data_root=data_root), folder)
        self.folder = self.run.folder

    def _read(self, name, reader):
        resume = f"python train.py --resume {self.run.quoted}"
        try:
            with open(self.folder / name) as file:
                return reader(file)
        except FileNotFoundError:
            raise Missing(f"{self.folder} is not finished: {resume}") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.folder / name} cannot be read ({said}): {resume} writes it again") from None

    def metrics(self):
        """metrics.csv: a dict of numbers for each epoch; none, if the first one was not finite."""
        needed = dict(epoch=int, train_loss=float, test_loss=float, test_accuracy=float)

        def read(file):
            return [{k: of(row[k]) for k, of in needed.items()} for row in csv.DictReader(file)]

        return self._read("metrics.csv", read)

    def result(self):
        """Outcome, best epoch and best accuracy (None and None if there was no epoch) in result.json."""

        def read(file):
            result = dict(best_epoch=0, best_test_accuracy=0.0) | json.load(file)
            if part := misfit(result, dict(outcome=str, best_epoch=int, best_test_accuracy=float)):
                raise ValueError(f"{part} is missing or not what it should be")
            epoch = result["best_epoch"] or None
            return result["outcome"], epoch, result["best_test_accuracy"] if epoch else None

        return self._read("result.json", read)

    def histograms(self):
        """histograms.json as an array of counts: (epochs + 1, layers, 2: I_int and u, bins)."""

        def read(file):
            counts = np.array([[[h["i_int"], h["u"]] for h in epoch] for epoch in json.load(file)], dtype=float)
            if counts.ndim != 4 or counts.shape[3] != BINS["n"]:
                raise ValueError("not of this version")
            return counts

        return self._read("histograms.json", read)

    def networks(self):
        """The dataset, and the network "at initialisation" and "after training" (at its best epoch).

        The initialisation is drawn again from the run's seed; on another kind of device it is another draw.
        """
        device = train.pick_device(None)
        dataset, before = train.make(self.config, device)
        train.prepare(self.config, dataset, before)
        after = copy.deepcopy(before)
        restore(after, self.run.load("best.pt")["model"], self.folder / "best.pt")
        return dataset, {"at initialisation": before.eval(), "after training": after.eval()}


def trained_runs(args):
    """Every run in a folder of runs, or the one that the folder is: of one network, dataset and seed.

    Those that are asked for, or else VGG-8, the digits and seed 0 where there is a choice.
    """
    folder = Path(args.runs)
    alone, runs = holds_run(folder), []
    for path in [folder] if alone else sorted(filter(holds_run, folder.glob("*/"))):
        try:
            runs.append(Trained(path, args.data_root))
        except ValueError as error:
            if alone:
                raise
            print(f"left out: {error}")
    command = ["python train.py --suite paper"]
    for key, usual in (("data", "digits"), ("arch", "vgg8"), ("seed", 0)):
        there = {run.config[key] for run in runs}
        wanted = getattr(args, key)
        if wanted is None:
            wanted = there.pop() if len(there) == 1 else usual
        runs = [run for run in runs if run.config[key] == wanted]
        command += [f"--{key} {wanted}"] * (wanted != usual)
    if runs:
        command += [f"--epochs {runs[0].config['epochs']}"]
        root = runs[0].config["data_root"]
        command += [f"--data-root {quoted(root)}"] * (root != "./data")
    command += [f"--out {quoted(folder)}"] * (str(folder) != "runs" and not alone)
    if not runs:
        raise Missing(f"{folder} has no such run in it: {' '.join(command)}")
    for run in runs:
        run.suite = " ".join(command)
    return runs


def pick(runs, **settings):
    """The run with these settings, and those of the paper's method where nothing else is said.

    A single run is what it is.
    """
    if len(runs) == 1 and not settings:
        return runs[0]
    for run in runs:
        if all(run.config[k] == v for k, v in (FULL | settings).items()):
            return run
    said = " ".join(f"{k}={v}" for k, v in settings.items()) or "the paper's settings"
    raise Missing(f"no run with {said} in {runs[0].folder.parent}: {runs[0].suite}")


def with_circuits(network):
    if not circuits(network):
        raise Missing("this network has no E-I circuits: draw it from a run with --model ei")
    return network


def by_layer(axis, n):
    axis.set_xlabel("layer")
    axis.set_xticks(range(1, n + 1) if n <= 8 else range(1, n + 1, 3))


def by_epoch(axis):
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


# ---- without training ------------------------------------------------------------------------------------------------


def usual_settings(args):
    """The paper's method with data and network of the runs, if there are any, or with those that are asked for."""
    try:
        configs = [run.config for run in trained_runs(args)]
        config = next((c for c in configs if c["model"] != "dann"), configs[0])
        keys = ("arch", "data", "data_root", "image_size", "batch_size", "seed")
        given = {k: config[k] for k in keys + ("T",) * (config["model"] != "dann")}  # DANN has no time
    except Missing:
        given = {k: getattr(args, k) for k in ("arch", "data", "data_root", "seed")}
    config = train.settings(train.parse([option(k, v) for k, v in given.items() if v is not None]))
    print(f"with {config['arch']}, {config['data']}, T={config['T']}, seed {config['seed']}")
    return config


@torch.no_grad()
def initialised(model, batch, how):
    """The network initialised: "E-I Init", "without its gain" (g_I = 1) or "|Kaiming|" (what `build` leaves)."""

    def without_gain(circuit, x):
        ei_init(circuit, x)
        if not circuit.readout:
            circuit.g_i.fill_(1)

    if how != "|Kaiming|":
        initialize(model, batch, ei_init if how == "E-I Init" else without_gain)
    return model


def draw_init(args):
    """Mean and standard deviation of I_int and firing rate by layer, for three initialisations."""
    config = usual_settings(args)
    dataset, _ = train.make(config, torch.device("cpu"))
    torch.manual_seed(0)
    batch = data.to_input(dataset.train_x[torch.randperm(len(dataset.train_x))[:32]])
    archs, quantities = ("vgg8", "vgg19"), ("mean of $I_{int}$", "std of $I_{int}$", "firing rate")
    figure, axes = plt.subplots(3, 2, figsize=(PAGE, 4.8), sharex="col", sharey="row")
    rows = []
    for column, arch in enumerate(archs):
        for how, style in zip(("E-I Init", "without its gain", "|Kaiming|"), STYLES, strict=False):
            torch.manual_seed(0)
            found = []

            def see(i, current, u, spikes, found=found):
                found.append([current.mean().item(), current.std().item(), spikes.mean().item()])

            size = dict(T=config["T"], image_size=config["image_size"])
            model = build(arch, dataset.in_channels, dataset.n_classes, **size)
            try:
                initialised(model, batch, how)
            except ValueError:  # a silent layer has nothing to initialise the next with: the silence is what we draw
                pass
            observe(model, batch, see)
            for layer, (mean, std, rate) in enumerate(found, 1):
                rows.append(dict(arch=arch, init=how, layer=layer, mean=mean, std=std, firing_rate=rate))
            for axis, values in zip(axes[:, column], zip(*found, strict=True), strict=True):
                axis.plot(range(1, len(found) + 1), values, label=how, **style)
        axes[0, column].set_title(arch.replace("vgg", "VGG-"))
        by_layer(axes[2, column], len(found))
    for axis, quantity, ideal in zip(axes[:, 0], quantities, (0, 1, None), strict=True):
        axis.set_ylabel(quantity)
        if ideal is not None:
            axis.axhline(ideal, color=GREY, lw=0.6, zorder=0)
    axes[0, 0].legend()
    save(figure, "init", rows, args.out)


def draw_gradients(args):
    """Norm of each parameter's gradient by layer in the first step: STE, gradient scaling, adaptive and fixed eps."""
    variants = {
        "E-I Prop": {},
        "no STE": dict(ste=False),
        "no scaling": dict(grad_scaling=False),
        "\u03b5=1e-6": dict(eps=1e-6),
        "\u03b5=1e-8": dict(eps=1e-8),
    }
    config = usual_settings(args)
    figure, axes = plt.subplots(2, 3, figsize=(PAGE, 3.6), sharex=True)
    rows = []
    for (name, options), style in zip(variants.items(), STYLES, strict=False):
        dataset, model = train.make(config | options, torch.device("cpu"))
        train.prepare(config, dataset, model)
        x, y = train.training_batch(config, dataset, train.epoch_order(config, dataset, 0)[0], 0)
        F.cross_entropy(model(x), y).backward()
        for parameter, axis in zip(SYMBOLS, axes.flat, strict=True):
            found = [(i, getattr(c, parameter, None)) for i, c in enumerate(circuits(model), 1)]
            norms = [(i, p.grad.norm().item()) for i, p in found if p is not None]
            rows += [dict(variant=name, parameter=parameter, layer=i, gradient_norm=n) for i, n in norms]
            axis.plot(*zip(*norms, strict=True), label=name, **style)
    for parameter, axis in zip(SYMBOLS, axes.flat, strict=True):
        axis.set(yscale="log", title=f"gradient of {SYMBOLS[parameter]}")
        low, high = axis.get_ylim()
        axis.set_ylim(
            10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high))
        )  # whole decades, so that two are marked
        axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in axes[1]:
        by_layer(axis, len(circuits(model)))
    for axis in axes[:, 0]:
        axis.set_ylabel("norm")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(variants))
    save(figure, "gradients", rows, args.out)


# ---- the course of the training --------------------------------------------------------------------------------------


def draw_curves(args):
    """Training loss and test accuracy by epoch: the E-I SNN and its rivals."""
    runs = trained_runs(args)
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.5))
    rows = []
    for (model, name), style in zip(NAMES.items(), STYLES, strict=False):
        metrics = pick(runs, model=model).metrics()
        epochs = [m["epoch"] for m in metrics]
        left.plot(epochs, [m["train_loss"] for m in metrics], label=name, **style)
        right.plot(epochs, [100 * m["test_accuracy"] for m in metrics], label=name, **style)
        keys = ("epoch", "train_loss", "test_loss", "test_accuracy")
        rows += [dict(model=model) | {k: m[k] for k in keys} for m in metrics]
    left.set_ylabel("training loss")
    right.set(ylabel="test accuracy (%)", ylim=(0, 102))
    by_epoch(left)
    by_epoch(right)
    right.legend(loc="center right")
    save(figure, "curves", rows, args.out)


def table(name, first, runs, out):
    """Outcome, epoch and accuracy of each run (label -> Trained), as text, Markdown and picture, loss curves below."""
    cells, rows = [[first, "outcome", "best epoch", "best accuracy"]], []
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(5, 3.3 + 0.2 * len(runs)), height_ratios=(1, 1.6))
    for (label, run), style in zip(runs.items(), STYLES, strict=False):
        (outcome, epoch, best), metrics = run.result(), run.metrics()
        cells.append([label, outcome, str(epoch or "-"), "-" if best is None else f"{best:.2%}"])
        for m in metrics:
            rows.append({"run": label, "outcome": outcome, "epoch": m["epoch"]})
            rows[-1] |= dict(train_loss=m["train_loss"], test_accuracy=m["test_accuracy"], best_test_accuracy=best)
        bottom.plot([m["epoch"] for m in metrics], [m["train_loss"] for m in metrics], label=label, **style)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[c.ljust(w).replace("|", "\\|") for c, w in zip(row, widths, strict=True)] for row in cells]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    print("\n".join(lines))
    top.axis("off")
    top.table(cells[1:], colLabels=cells[0], bbox=(0, 0, 1, 1), cellLoc="center", edges="horizontal")
    bottom.set_ylabel("training loss")
    by_epoch(bottom)
    bottom.legend(ncols=2)
    save(figure, name, rows, out)
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")


def draw_epsilon(args):
    """The talk's table: what becomes of the training with a fixed epsilon, and with the adaptive one."""
    runs = trained_runs(args)
    fixed = {f"{eps:.0e}".replace("e-0", "e-"): pick(runs, eps=eps) for eps in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)}
    table("epsilon", "epsilon", fixed | {"adaptive": pick(runs)}, args.out)


def draw_ablation(args):
    """What becomes of the training when one part of the method is left out."""
    runs = trained_runs(args)
    without = {"no STE": dict(ste=False), "no gradient scaling": dict(grad_scaling=False)}
    without |= {"|Kaiming| for E-I Init": dict(init="kaiming")}
    found = {"all of it": pick(runs)} | {name: pick(runs, **settings) for name, settings in without.items()}
    table("ablation", "method", found, args.out)


# ---- what the circuit represents -------------------------------------------------------------------------------------

CENTRES = np.linspace(BINS["low"], BINS["high"], 2 * BINS["n"] + 1)[1::2]


def shown_layers(n):
    """At most five layers, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, 5))})


def density(counts):
    """Counts -> probability density, along the last axis."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1) / (CENTRES[1] - CENTRES[0])


def draw_representation(args):
    """Distributions of I_int and u before and after the training, and the last layer's firing rates in the plane."""
    run = pick(trained_runs(args))
    dataset, networks = run.networks()
    x, y = data.sample(dataset, run.config["T"])
    n = len(layers(networks["after training"]))
    shown = shown_layers(n)
    figure = plt.figure(figsize=(PAGE, 5.6))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = upper.subplots(2, len(shown), sharex=True, squeeze=False)
    planes = lower.subplots(1, 2)
    rows, points = [], []
    low, high, bins = BINS.values()
    for (when, network), color, plane in zip(networks.items(), (GREY, "black"), planes, strict=True):
        rates = {}

        def see(i, current, u, spikes, rates=rates, when=when, color=color):
            rates[i] = spikes.mean(0).flatten(1)  # of the last layer in the end
            rates.pop(i - 1, None)
            for row, (quantity, values) in enumerate((("i_int", current), ("u", u))):
                counts = np.array(histogram(values), dtype=float)
                rows.extend(
                    dict(when=when, layer=i + 1, quantity=quantity, bin_centre=c, density=d)
                    for c, d in zip(CENTRES, density(counts), strict=True)
                )
                if i in shown:
                    axes[row, shown.index(i)].stairs(
                        density(counts), np.linspace(low, high, bins + 1), color=color, label=when, lw=1
                    )

        observe(network, x, see)
        plane_of = PCA(2, random_state=0).fit(rates[n - 1].cpu().numpy())
        projected = plane_of.transform(rates[n - 1].cpu().numpy())
        points += [dict(when=when, label=int(label), pc1=a, pc2=b) for label, (a, b) in zip(y, projected, strict=True)]
        explained = plane_of.explained_variance_ratio_.sum()
        plane.scatter(*projected.T, c=y.cpu(), cmap="viridis", s=6, lw=0)
        for label in range(dataset.n_classes) if dataset.n_classes <= 10 else ():
            plane.annotate(str(label), projected[(y == label).cpu().numpy()].mean(0), ha="center", va="center")
        plane.set(title=f"{when} ({explained:.0%} of the variance)", xlabel="PC 1", ylabel="PC 2", xticks=[], yticks=[])
    for row, name in enumerate(("$I_{int}$", "$u$")):
        axes[row, 0].set_ylabel("density")
        for i, axis in zip(shown, axes[row], strict=True):
            axis.axvline(1, color=GREY, ls="--", lw=0.8)
            axis.set(yscale="log", ylim=(1e-3, 10), title=f"layer {i + 1}" if row == 0 else "")
            axis.set_xlabel(f"{name} ($\\theta$)")
            if axis is not axes[row, 0]:
                axis.tick_params(labelleft=False)
    upper.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    save(figure, "representation", rows, args.out)
    write_csv(args.out / "representation-pca.csv", points)


def draw_evolution(args):
    """The same distributions through the training: a picture with the epochs along x, and an animated GIF."""
    run = pick(trained_runs(args))
    densities = density(run.histograms())  # (epochs + 1, layers, 2, bins)
    n_epochs, n = densities.shape[:2]
    shown = shown_layers(n)
    rows = [
        dict(epoch=epoch, layer=layer + 1, quantity=quantity, bin_centre=centre, density=d)
        for epoch, of_epoch in enumerate(densities)
        for layer, of_layer in enumerate(of_epoch)
        for quantity, values in zip(("i_int", "u"), of_layer, strict=True)
        for centre, d in zip(CENTRES, values, strict=True)
    ]
    figure, axes = plt.subplots(2, len(shown), figsize=(PAGE, 3.2), sharey=True, sharex=True, squeeze=False)
    for row, name in enumerate(("$I_{int}$", "$u$")):
        axes[row, 0].set_ylabel(f"{name} ($\\theta$)")
        for i, axis in zip(shown, axes[row], strict=True):
            extent = (-0.5, n_epochs - 0.5, BINS["low"], BINS["high"])
            shade = np.log10(densities[:, i, row].T + 1e-3)
            axis.imshow(
                shade,
                origin="lower",
                extent=extent,
                aspect="auto",
                cmap="Greys",
                vmin=-3,
                vmax=0.5,
                interpolation="nearest",
            )
            axis.axhline(1, color="black", ls="--", lw=0.8)
            axis.set_title("" if row else f"layer {i + 1}")
            if row:
                by_epoch(axis)
    save(figure, "evolution", rows, args.out)

    figure, axes = plt.subplots(2, len(shown), figsize=(PAGE, 3), sharex=True, sharey=True, squeeze=False)
    lines = {}
    for row, name in enumerate(("$I_{int}$", "$u$")):
        axes[row, 0].set_ylabel("density")
        for i, axis in zip(shown, axes[row], strict=True):
            (lines[row, i],) = axis.plot(CENTRES, densities[0, i, row], color="black")
            axis.axvline(1, color=GREY, ls="--", lw=0.8)
            axis.set(yscale="log", ylim=(1e-3, 10), xlabel=f"{name} ($\\theta$)", title="" if row else f"layer {i + 1}")
    title = figure.suptitle("epoch 0")

    def frame(epoch):
        title.set_text(f"epoch {epoch}")
        for (row, i), line in lines.items():
            line.set_ydata(densities[epoch, i, row])

    every = max(1, n_epochs // 60)
    frames = sorted({*range(0, n_epochs, every), n_epochs - 1})
    FuncAnimation(figure, frame, frames).save(
        args.out / "evolution.gif", PillowWriter(fps=max(2, len(frames) // 15)), dpi=100
    )
    plt.close(figure)


@torch.no_grad()
def currents_of(network, x, index):
    """The currents of one circuit, each (T, B, ...), for an input of the network."""
    found = {}
    circuit = circuits(network)[index]

    def record(circuit, args):
        found.update({k: v.unflatten(0, (network.T, -1)) for k, v in circuit.currents(args[0]).items()})

    with circuit.register_forward_pre_hook(record):
        network(x)
    return found


def middle(values):
    """Of maps (..., H, W), the position in the middle: so that a neuron is a map."""
    return values[..., values.shape[-2] // 2, values.shape[-1] // 2]


def draw_balance(args):
    """Excitation against subtractive inhibition of single neurons, and their currents and spikes through time."""
    run = pick(trained_runs(args))
    dataset, networks = run.networks()
    x, _ = data.sample(dataset, run.config["T"], 16)
    trained = with_circuits(networks["after training"])
    layer, found = len(layers(trained)) // 2, {}
    for when, network in networks.items():
        if x.dim() == 4:
            network.T = 24  # longer than it was trained for, to see the traces
        of_circuit, potential = currents_of(network, x, layer), {}
        observe(network, x, lambda i, current, u, spikes, potential=potential: potential.update({i: middle(u)}))
        found[when] = [middle(of_circuit["i_ee"]).cpu(), middle(of_circuit["i_sub"]).cpu(), potential[layer].cpu()]
    rates = (found["after training"][2] >= 1).float().mean(0)  # (images, maps)
    neurons = (rates.mean(0) - 0.3).abs().argsort()[:3].tolist()  # neither silent nor always firing
    image = (rates[:, neurons[0]] - 0.3).abs().argmin().item()
    time = range(1, trained.T + 1)

    figure, axes = plt.subplots(2, 3, figsize=(PAGE, 4), width_ratios=(1, 1.2, 1.2), sharex="col")
    rows = []
    for (when, (i_ee, i_sub, u)), (scatter, currents, membrane) in zip(found.items(), axes, strict=True):
        for neuron, style in zip(neurons, STYLES, strict=False):
            style = dict(marker=style["marker"], color=style["color"], s=4, lw=0, alpha=0.5)
            scatter.scatter(i_ee[..., neuron], i_sub[..., neuron], label=f"map {neuron}", **style)
            rows += [
                dict(
                    when=when, layer=layer + 1, neuron=neuron, image=k, step=t, i_ee=e, i_sub=i, u=v, spike=int(v >= 1)
                )
                for k in range(len(x))
                for t, e, i, v in zip(time, *(of[:, k, neuron].tolist() for of in (i_ee, i_sub, u)), strict=True)
            ]
        limit = max(scatter.get_xlim()[1], scatter.get_ylim()[1])
        scatter.plot([0, limit], [0, limit], color=GREY, lw=0.6)
        scatter.set_ylabel(f"{when}\n$I_{{sub}}$")
        currents.plot(time, i_ee[:, image, neurons[0]], color=EXC, label="$I_{EE}$")
        currents.plot(time, i_sub[:, image, neurons[0]], color=INH, ls="--", label="$I_{sub}$")
        currents.set_ylabel("current")
        currents.margins(y=0.2)  # room for the legend
        trace = u[:, image, neurons[0]]
        membrane.plot(time, trace, color="black")
        membrane.axhline(1, color=GREY, ls="--", lw=0.8)
        fired = [t for t, v in zip(time, trace, strict=True) if v >= 1]
        membrane.plot(fired, [trace.max().item() * 1.15 + 0.2] * len(fired), "|", color=EXC, ms=7)
        membrane.set_ylabel("$u$ ($\\theta$)")
    axes[1, 0].set_xlabel("$I_{EE}$")
    for axis in axes[1, 1:]:
        axis.set_xlabel("time step")
    axes[0, 0].legend(markerscale=2, handletextpad=0, borderpad=0)
    axes[0, 1].legend(ncols=2, loc="upper center")
    axes[0, 0].set_title(f"three neurons of layer {layer + 1}")
    axes[0, 1].set_title(f"map {neurons[0]}, one image")
    axes[0, 2].set_title("its membrane and spikes")
    save(figure, "balance", rows, args.out)


@torch.no_grad()
def contrast_response(network, x, contrasts):
    """Mean response of each layer at each contrast: with divisive inhibition, and with I_div held at its mean.

    Returns:
        (2, contrasts, layers). The mean of I_div is taken for each excitatory map over images, time and positions of x
        at full contrast, in the intact network.
    """
    divided = circuits(network)[:-1]
    means = {}

    def measure(circuit, args):
        i_div = circuit.currents(args[0])["i_div"]
        means[circuit] = i_div.mean((0, 2, 3), keepdim=True)

    with hooked(network, [circuit.register_forward_pre_hook(measure) for circuit in divided]):
        network(x)

    def undivided(circuit, args, _):
        found = circuit.currents(args[0])
        g_e, b_e = circuit.g_e[:, None, None], circuit.b_e[:, None, None]
        return g_e * (found["i_ee"] - found["i_sub"]) / means[circuit] + b_e

    responses = torch.zeros(2, len(contrasts), len(divided))
    for which in range(2):
        with hooked(network, [circuit.register_forward_hook(undivided) for circuit in divided * which]):
            for k, contrast in enumerate(contrasts):

                def see(i, current, u, spikes, which=which, k=k):
                    responses[which, k, i] = spikes.mean()

                observe(network, contrast * x, see)
    return responses


def draw_gain(args):
    """Contrast response of each layer of the trained network: what PV+ divisive inhibition is for."""
    run = pick(trained_runs(args))
    dataset, networks = run.networks()
    contrasts = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    responses = contrast_response(
        with_circuits(networks["after training"]), data.sample(dataset, run.config["T"], 64)[0], contrasts
    )
    conditions = ("divisive inhibition", "its mean instead")
    shown = shown_layers(responses.shape[2])
    figure, axes = plt.subplots(1, len(shown), figsize=(PAGE, 1.9), sharey=True, squeeze=False)
    for i, axis in zip(shown, axes[0], strict=True):
        for values, name, style in zip(responses, conditions, (("black", "o", "-"), (GREY, "s", "--")), strict=True):
            axis.plot(contrasts, values[:, i], label=name, **dict(zip(("color", "marker", "ls"), style, strict=True)))
        axis.set(
            title=f"layer {i + 1}", xlabel="contrast", xticks=(0, 1), ylim=(0, 1.1 * responses.max().item() + 1e-3)
        )
    axes[0, 0].set_ylabel("firing rate\n(spikes/neuron/step)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    rows = [
        dict(condition=name, contrast=contrast, layer=i + 1, firing_rate=rate.item())
        for name, of_condition in zip(conditions, responses, strict=True)
        for contrast, of_contrast in zip(contrasts, of_condition, strict=True)
        for i, rate in enumerate(of_contrast)
    ]
    save(figure, "gain", rows, args.out)


def draw_weights(args):
    """Distributions of weights and gains before and after the training, each in units of its layer's initial mean."""
    run = pick(trained_runs(args))
    _, networks = run.networks()
    with_circuits(networks["after training"])
    figure, axes = plt.subplots(1, 5, figsize=(PAGE, 1.9), sharey=True)
    scale, edges, rows = {}, np.arange(0, 5.1, 0.08), []  # 1 is in the middle of a bin, the last is 5 and more
    for (when, network), filled in zip(networks.items(), (True, False), strict=True):
        for parameter, axis in zip(list(SYMBOLS)[:5], axes, strict=True):
            sign = -1 if parameter == "w_ei" or parameter == "g_i" else 1  # what inhibition does to the membrane
            values = []
            for i, circuit in enumerate(circuits(network)):
                if hasattr(circuit, parameter):
                    p = getattr(circuit, parameter).detach().flatten().cpu()
                    unit = scale.setdefault((i, parameter), p.mean().item())
                    values.append(p / unit)
            if not values:  # DANN has another g_I
                continue
            values = torch.cat(values).numpy()
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            of_bin = counts / counts.sum()
            color = INH if sign < 0 else EXC
            style = dict(fill=True, alpha=0.35, lw=0) if filled else dict(lw=1)
            if sign < 0:
                axis.stairs(of_bin[::-1], -edges[::-1], color=color, label=when, **style)
            else:
                axis.stairs(of_bin, edges, color=color, label=when, **style)
            rows += [
                dict(when=when, parameter=parameter, sign=sign, bin_low=low, bin_high=high, fraction=f,
                     smallest=values.min(), zeros=(values == 0).mean())
                for low, high, f in zip(edges, edges[1:], of_bin, strict=False)
            ]  # fmt: skip
            axis.set(xlabel=("$-$" if sign < 0 else "") + SYMBOLS[parameter], yscale="log", ylim=(1e-5, 2))
            axis.axvline(0, color="black", lw=0.6)
    axes[0].set_ylabel("fraction")
    figure.supxlabel("in units of the layer's mean at initialisation", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    save(figure, "weights", rows, args.out)


FIGURES = dict(
    init=draw_init,
    curves=draw_curves,
    epsilon=draw_epsilon,
    ablation=draw_ablation,
    representation=draw_representation,
    evolution=draw_evolution,
    balance=draw_balance,
    gain=draw_gain,
    gradients=draw_gradients,
    weights=draw_weights,
)


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return status(lambda: command(argv))


def command(argv):
    p = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    p.add_argument("figure", choices=[*FIGURES, "all"], help="; ".join(f"{k}: {f.__doc__}" for k, f in FIGURES.items()))
    p.add_argument("runs", nargs="?", default="runs", help="a folder of runs, or one run (runs)")
    p.add_argument("--out", type=Path, help="where the figures go (figures; of one run, its own folder)")
    p.add_argument("--arch", choices=ARCHS, help="network, where there are runs of several (vgg8)")
    p.add_argument("--data", choices=data.DATASETS, help="dataset, where there are runs of several (digits)")
    p.add_argument("--seed", type=whole, help="seed, where there are runs of several (0)")
    p.add_argument("--data-root", help="where the data are now (where the run had them; without one, ./data)")
    args = p.parse_args(argv)
    if args.runs != "runs" and not Path(args.runs).is_dir():
        raise ValueError(f"there is no folder {args.runs}")
    alone = holds_run(args.runs)
    args.out = args.out or (Path(args.runs, "figures") if alone else Path("figures"))
    drawn = 0
    for name in FIGURES if args.figure == "all" else [args.figure]:
        torch.manual_seed(0)
        try:
            with plt.rc_context(STYLE):
                FIGURES[name](args)
        except (ValueError, OSError) as error:
            if args.figure != "all":
                raise
            print(f"{name}: not drawn. {' '.join(str(error).split())}")
        else:
            drawn += 1
            print(f"{name}: {args.out / name}.png, .pdf, .csv")
    return 0 if drawn else 2


if __name__ == "__main__":
    sys.exit(main())
