"""The paper's figures: `python visualize.py all`, after `python reproduce.py`.

Each subcommand writes a PNG, a PDF, and the numbers of the figure as a CSV. Orange: excitation; blue: inhibition.
"""

import contextlib
import copy
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F

from ei_init import ei_init, initialize
from model import KINDS, build, circuits, layers
from support import data, measure, plots, recipes
from support import runs as stored
from support.fast import keep_memory
from support.parallel import pick_device
from support.plots import EXC, GREY, INH, STYLES, by_epoch, by_layer, long_rows, panels, save, symbol

NAMES = dict(ei="E-I SNN", bn="BN-SNN", plain="plain SNN", dann="DANN", homeostasis="homeostasis")
BEFORE, ANEW, AFTER = "at initialisation", "E-I Init with these data", "after training"


def networks_of(runs, end=False, kinds=("ei", "homeostasis", "dann"), **wanted):
    """The run to draw, its dataset, and its network at initialisation and after training: a dict.

    The initialisation is drawn again from the run's seed; on another kind of device it is another draw. end: as the
    training left the network, if that is kept, else at its best epoch. ValueError: another kind, or other data.
    """
    run = runs.pick(**wanted)
    if run.config["kind"] not in kinds:
        raise ValueError(f"{run.folder} is of kind {run.config['kind']}: draw this figure from a run of --kind ei")
    name = stored.CHECKPOINT if end and stored.saved(run.folder) else stored.BEST
    state = run.load(name)
    dataset, before = stored.load_data_and_model(run.config, pick_device())
    if different := data.differences(state["data"], data.identity(dataset)):
        raise ValueError(f"these data are not those of {run.folder}: {different}; say with --data-root where they are")
    stored.prepare(run.config, dataset, before)
    after = copy.deepcopy(before)
    stored.restore(after, state["model"], run.folder / name)
    return run, dataset, {ANEW if state.get("epoch") == 0 else BEFORE: before.eval(), AFTER: after.eval()}


@torch.no_grad()
def without_gain(circuit, x):
    """E-I Init, but with g_I = 1."""
    ei_init(circuit, x)
    if not circuit.readout:
        circuit.g_i.fill_(1)


def draw_init(args, runs):
    """Mean and standard deviation of I_int, and firing rate, by layer, for three initialisations."""
    config = recipes.settings(args)
    with contextlib.suppress(ValueError):  # there may be no run
        config = runs.pick().config
    options = {key: config[key] for key in ("T", *recipes.NEURONS)}
    options["image_size"] = max(32, config["image_size"])  # an MLP may have smaller images than these networks take
    dataset = data.load(config["data"], config["data_root"], options["image_size"], T=config["T"])
    batch = data.to_input(dataset.train_x[torch.randperm(len(dataset.train_x))[:32]])
    figure, axes = panels(4.8, 3, 2, sharex="col", sharey="row")
    rows, inits = [], {"E-I Init": ei_init, "without its gain": without_gain, "|Kaiming|": None}
    for arch, of_arch in zip(("vgg8", "vgg19"), axes.T, strict=True):
        for (how, init), style in zip(inits.items(), STYLES, strict=False):
            torch.manual_seed(0)
            model = build(arch, dataset.in_channels, dataset.n_classes, **options)
            with contextlib.suppress(ValueError):  # E-I Init stops after a silent layer. We draw this silence.
                if init:
                    initialize(model, batch, init)
            found = []

            def see(i, current, u, spikes, found=found):
                found.append((current.mean().item(), current.std().item(), spikes.mean().item()))

            measure.observe(model, batch, see)
            for layer, (mean, std, rate) in enumerate(found, 1):
                rows.append(dict(arch=arch, init=how, layer=layer, mean=mean, std=std, firing_rate=rate))
            for axis, values in zip(of_arch, zip(*found, strict=True), strict=True):
                axis.plot(range(1, len(found) + 1), values, label=how, **style)
        of_arch[0].set_title(arch.replace("vgg", "VGG-"))
        by_layer(of_arch[2], len(found))
    for axis, quantity in zip(axes[:, 0], ("mean of $I_{int}$", "std of $I_{int}$", "firing rate"), strict=True):
        axis.set_ylabel(quantity)
    for axis, ideal in zip(axes[:2].flat, (0, 0, 1, 1), strict=True):  # what E-I Init aims at
        axis.axhline(ideal, color=GREY, lw=0.6, zorder=0)
    save(figure, "init", rows, args.out, legend=axes[0, 0])


def with_own(variants, network):
    """Variants of the stabilization, name -> (eps, ste), and the network's own where its eps is not among them."""
    own = circuits(network)[0]
    known = own.eps in [eps for eps, _ in variants.values()]
    return variants if known else variants | {f"\u03b5={own.eps}".replace("e-0", "e-"): (own.eps, own.ste)}


def draw_gradients(args, runs):
    """Norm of each parameter's gradient by layer in the first step: STE, gradient scaling, adaptive and fixed eps."""
    run, dataset, networks = networks_of(runs, kinds=["ei"])
    network = next(iter(networks.values()))  # at initialisation
    x, y = data.first_batch(run.config, dataset)
    variants = {"E-I Prop": ("adaptive", True), "no STE": ("adaptive", False), "no scaling": ("adaptive", True)}
    variants = with_own(variants | {"\u03b5=1e-6": (1e-6, True), "\u03b5=1e-8": (1e-8, True)}, network)
    parameters, rows = dict(circuits(network)[0].named_parameters()), []
    figure, axes = panels(3.6, 2, -(-len(parameters) // 2), sharex=True)
    for (name, (eps, ste)), style in zip(variants.items(), STYLES, strict=False):
        for circuit in circuits(network):
            circuit.eps, circuit.ste, circuit.grad_scaling = eps, ste, name != "no scaling"
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        for parameter, axis in zip(parameters, axes.flat, strict=False):
            found = {i: getattr(c, parameter, None) for i, c in enumerate(circuits(network), 1)}
            by = [i for i, p in found.items() if p is not None and p.grad is not None]  # not all in the readout
            norms = [found[i].grad.norm().item() for i in by]
            rows += long_rows("gradient_norm", norms, variant=[name], parameter=[parameter], layer=by)
            axis.plot(by, norms, label=name, **style)
            axis.set(title=f"gradient of {symbol(parameter)}", yscale="log")
    for axis in axes[1]:
        by_layer(axis, len(circuits(network)))
    figure.supylabel("norm", fontsize=8)
    save(figure, "gradients", rows, args.out, legend=axes[0, 0])


def stabilization(model, batches, variants):
    """Where I_div is 0, and what that does to the gradient: a list of dicts, one for each circuit that divides.

    In each batch, (images, labels), all of one size, each circuit's own incoming gradient dL/dI_int is sent back to its
    input x with each of the variants, name -> (eps, ste); under this name is the largest norm of the gradient to x.
    layer: from 1. zeros: the share of I_div that is exactly 0. unbalanced: the share of these with I_EE other than
    I_sub; only there can STE change a gradient.
    """
    divided, seen = circuits(model)[:-1], {}
    rows = [dict(layer=i, zeros=0.0, unbalanced=0.0) for i, _ in enumerate(divided, 1)]

    def record(circuit, args, i_int):
        seen[circuit] = args[0].detach(), i_int

    for images, labels in batches:
        with measure.hooked(model, [circuit.register_forward_hook(record) for circuit in divided]):
            loss = F.cross_entropy(model(images), labels)
        incoming = torch.autograd.grad(loss, [seen[circuit][1] for circuit in divided])
        for circuit, row, grad_int in zip(divided, rows, incoming, strict=True):
            x = seen[circuit][0]
            found = circuit.currents(x)
            zero = found["i_div"] == 0
            rounding = 1e-5 * found["i_ee"].amax()
            unbalanced = zero & ((found["i_ee"] - found["i_sub"]).abs() > rounding)
            row["zeros"] += zero.sum().item() / zero.numel() / len(batches)
            row["unbalanced"] += unbalanced.sum().item() / zero.numel() / len(batches)
            usual = circuit.eps, circuit.ste
            for name, (circuit.eps, circuit.ste) in variants.items():
                leaf = x.clone().requires_grad_()
                (grad,) = torch.autograd.grad(circuit.currents(leaf)["i_int"], leaf, grad_int)
                row[name] = max(row.get(name, 0.0), grad.norm().item())
            circuit.eps, circuit.ste = usual
    for row in rows:
        row["unbalanced"] /= row["zeros"] or 1
    return rows


def draw_stabilizer(args, runs):
    """Where I_div is 0, and what each stabilization does to the gradient, before the training and at its end."""
    run, dataset, networks = networks_of(runs, end=True, kinds=("ei", "dann"))
    variants = {"adaptive": ("adaptive", True), "adaptive, no STE": ("adaptive", False)}
    variants.update({f"\u03b5={eps}": (float(eps), True) for eps in ("1e-4", "1e-6", "1e-8")})
    variants, rows = with_own(variants, networks[AFTER]), []
    order = data.epoch_order(run.config, dataset, 0)[: args.batches]
    batches = [data.training_batch(run.config, dataset, chosen, step) for step, chosen in enumerate(order)]
    figure, axes = panels(4.4, 2, 2, sharex=True, sharey="row")
    for (when, network), (top, bottom) in zip(networks.items(), axes.T, strict=True):
        found = stabilization(network, batches, variants)
        by = [row["layer"] for row in found]
        top.plot(by, [100 * row["zeros"] for row in found], color=INH, marker="o", label="$I_{div} = 0$")
        unbalanced = [100 * row["unbalanced"] if row["zeros"] else np.nan for row in found]  # no zeros: no share
        top.plot(by, unbalanced, color=EXC, marker="s", ls="--", label="of these, $I_{EE} \\neq I_{sub}$")
        top.set_title(when)
        for variant, style in zip(variants, STYLES, strict=False):
            bottom.plot(by, [row[variant] for row in found], label=variant, **style)
            for row in found:
                counted = {key: row[key] for key in ("layer", "zeros", "unbalanced")}
                rows.append(dict(when=when, **counted, variant=variant, gradient_norm=row[variant]))
        by_layer(bottom, len(found))
    axes[0, 0].set(ylabel="share (%)", ylim=(-3, 103))
    axes[0, 0].legend()
    axes[1, 0].set(ylabel="largest norm of the gradient to $x$", yscale="log")
    save(figure, "stabilizer", rows, args.out, legend=axes[1, 0], place="lower")


def side_by_side(runs, take):
    """take(run) of each run, label -> run. Left out, with a line: those that are damaged or not made as the first."""
    first, found = None, {}
    for label, run in runs.items():
        try:
            values, others = take(run), stored.differing(first or run, run)
            if others:
                raise ValueError(f"{run.folder} was made with other {', '.join(others)} than {first.folder}")
            first, found[label] = first or run, values
        except (ValueError, OSError) as error:
            print(f"left out: {error}")
    if not found:
        raise ValueError("none of the runs can be drawn")
    return found


def of_kinds(runs, kinds, take):
    """`side_by_side` of a run of each of these kinds of network, as far as there is one: kind -> take(run)."""
    picked = {}
    for kind in kinds:
        with contextlib.suppress(ValueError):
            picked[kind] = runs.pick(kind=kind)
    if not picked:
        said = f"{runs.folder} has no run with kind={' or '.join(kinds)} and these settings"
        raise ValueError(f"{said}: reproduce.py trains them")
    return side_by_side(picked, take)


def draw_curves(args, runs):
    """Training loss and test accuracy by epoch: the E-I SNN and its rivals."""
    found, rows = of_kinds(runs, NAMES, stored.metrics), []
    figure, [[left, right]] = panels(2.5, 1, 2)
    for (kind, epochs), style in zip(found.items(), STYLES, strict=False):
        by = [row["epoch"] for row in epochs]
        left.plot(by, [row["train_loss"] for row in epochs], label=NAMES[kind], **style)
        right.plot(by, [100 * row["test_accuracy"] for row in epochs], label=NAMES[kind], **style)
        rows += [dict(kind=kind, **row) for row in epochs]
    left.set_ylabel("training loss")
    right.set(ylabel="test accuracy (%)", ylim=(0, 102))
    by_epoch(left)
    by_epoch(right)
    save(figure, "curves", rows, args.out, legend=left)


def draw_epsilon(args, runs):
    """The talk's table: what becomes of the training with a fixed epsilon, and with the adaptive one."""
    names = "1e-8 1e-7 1e-6 1e-5 1e-4 adaptive"
    found = {eps: runs.pick(eps=recipes.epsilon(eps)) for eps in names.split()}
    plots.table("epsilon", "epsilon", side_by_side(found, stored.result_of), args.out)


def draw_ablation(args, runs):
    """What becomes of the training when one part of the method is left out."""
    found = {"all of it": runs.pick(eps="adaptive"), "no STE": runs.pick(ste=False)}
    found["no gradient scaling"] = runs.pick(grad_scaling=False)
    found["|Kaiming| for E-I Init"] = runs.pick(init="kaiming")
    plots.table("ablation", "method", side_by_side(found, stored.result_of), args.out)


def draw_representation(args, runs):
    """Distributions of I_int and u before and after the training, and the last layer's firing rates in the plane."""
    run, dataset, networks = networks_of(runs, kinds=KINDS)
    x, y = data.sample(dataset, run.config["T"])
    y = y.cpu().numpy()
    n = len(layers(networks[AFTER]))
    shown = plots.shown_layers(n)
    figure = matplotlib.figure.Figure(figsize=(plots.PAGE, 5.6))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = plots.distribution_axes(upper, shown, run.config["threshold"])
    rows, points, last = [], [], {}
    looks = zip(networks.items(), (GREY, "black"), lower.subplots(1, 2), strict=True)
    for (when, network), color, plane in looks:
        densities = plots.density(measure.histograms(network, x).double().numpy())  # (layers, 2, bins)
        places = dict(when=[when], layer=range(1, n + 1), quantity=plots.QUANTITIES, bin_centre=plots.CENTRES)
        rows += long_rows("density", densities, **places)
        for (row, column), axis in np.ndenumerate(axes):
            axis.stairs(densities[shown[column], row], plots.EDGES, color=color, label=when, lw=1)
        measure.observe(network, x, lambda i, current, u, spikes: last.update(spikes=spikes))
        rates = last["spikes"].mean(0).flatten(1).cpu().numpy()  # (B, neurons)
        projected = plots.plane(plane, rates, y, dataset.n_classes, when)
        points += [dict(when=when, label=int(label), pc1=a, pc2=b) for label, (a, b) in zip(y, projected, strict=True)]
    save(figure, "representation", rows, args.out, legend=axes[0, 0])
    plots.write_csv(args.out / "representation-pca.csv", points)


def draw_evolution(args, runs):
    """The same distributions through the training: a picture with the epochs along x, and an animated GIF."""
    run = runs.pick()
    threshold = run.config["threshold"]
    densities = plots.density(stored.histograms(run))  # (epochs + 1, layers, 2, bins)
    n_epochs, n = densities.shape[:2]
    places = dict(epoch=range(n_epochs), layer=range(1, n + 1), quantity=plots.QUANTITIES, bin_centre=plots.CENTRES)
    save(plots.by_epoch_maps(densities, threshold), "evolution", long_rows("density", densities, **places), args.out)
    plots.save_gif(densities, threshold, args.out / "evolution.gif")


@torch.no_grad()
def moved_by_a_step(network, x, y):
    """How far a step of plain SGD moves each layer's current, over its standard deviation and the learning rate:
    {"w_ei": [layer 1, ...], ...}. Weights from excitatory neurons are in two parts, "w_ee, common", what the step does
    to all weights of a neuron alike, and "w_ee, rest". The network is in float64 afterwards."""
    inputs, found, rate = {}, {}, 1e-5
    hooks = [c.register_forward_pre_hook(lambda c, args: inputs.update({c: args[0]})) for c in circuits(network)[:-1]]
    with measure.hooked(network.double(), hooks, training=True), torch.enable_grad():
        F.cross_entropy(network(x.double()), y).backward()
    for circuit, seen in inputs.items():
        before = circuit(seen)
        for name, p in circuit.named_parameters():
            parts, usual = {name: p.grad}, p.clone()
            if name in circuit.from_excitatory:
                common = p.grad.mean(tuple(range(1, p.dim())), keepdim=True)
                parts = {f"{name}, common": common, f"{name}, rest": p.grad - common}
            for part, step in parts.items():
                p.copy_(usual - rate * step)
                distance = (circuit(seen) - before).square().mean().sqrt() / (rate * before.std())
                found.setdefault(part, []).append(distance.item())
            p.copy_(usual)
    return found


def draw_learning(args, runs):
    """What a step moves in the currents at initialisation (the CSV has all), and maps that hardly or mostly fire."""
    kinds = list(of_kinds(runs, ("ei", "homeostasis", "bn"), lambda run: run.load(stored.BEST)["epoch"]))
    divided = [kind for kind in kinds if kind != "bn"] or ["ei"]
    figure, [[*left, right]] = panels(2.8, 1, len(divided) + 1)
    rows = []
    for kind, axis, style in zip(dict.fromkeys([*divided, *kinds]), [*left, right], STYLES, strict=False):
        run, dataset, networks = networks_of(runs, kinds=kinds, kind=kind)
        before, spikes = next(iter(networks.values())), []
        x, _ = data.sample(dataset, run.config["T"])
        measure.observe(networks[AFTER], x, lambda *values, seen=spikes: seen.append(values[3]))
        rates = [s.float().transpose(0, 2).flatten(1).mean(1) for s in spikes]  # of each map, (n_E,)
        found = dict(hardly=[100 * (rate < 0.01).float().mean().item() for rate in rates])
        found["mostly"] = [100 * (rate > 0.5).float().mean().item() for rate in rates]
        by = range(1, len(rates) + 1)
        right.plot(by, np.sum([*found.values()], 0), label=NAMES[kind], **style)
        if circuits(before):
            found |= moved_by_a_step(before, *data.first_batch(run.config, dataset))
            for (part, distances), look in zip([*found.items()][2:], STYLES, strict=False):
                name, _, of = part.partition(", ")
                axis.plot(by, distances, label=f"{symbol(name)} {of}", **look)
            axis.set(title=NAMES[kind], yscale="log", ylabel="moved by a step", ylim=(1e-5, None))
        rows += long_rows("value", list(found.values()), kind=[kind], quantity=found, layer=by)
        by_layer(axis, len(rates))
    by_layer(right, len(rates))
    right.set(title="fire < 1 % or > 50 %", ylabel="maps (%)", ylim=(-3, 103))
    right.legend()
    save(figure, "learning", rows, args.out, legend=left[0])


def middle(values):
    """Maps, (T, B, n, H, W) -> their position in the middle, (T, B, n), one neuron a map. Dense: as it is."""
    return values if values.dim() == 3 else values[..., values.shape[-2] // 2, values.shape[-1] // 2]


def draw_balance(args, runs):
    """Excitation against subtractive inhibition of single neurons, and their currents and spikes through time."""
    run, dataset, networks = networks_of(runs)
    x, _ = data.sample(dataset, run.config["T"], 16)
    layer, found = len(layers(networks[AFTER])) // 2, {}
    for when, network in networks.items():
        if x.dim() == 4:
            network.T = 24  # longer than in the training, to see the traces
        currents, seen = currents_of(network, x, layer), []
        measure.observe(network, x, lambda i, current, u, spikes, seen=seen: seen.append((u, spikes)))
        found[when] = [middle(v).cpu().numpy() for v in (currents["i_ee"], currents["i_sub"], *seen[layer])]
    rates = (found[AFTER][3] > 0).mean(0)  # (images, maps)
    neurons = np.abs(rates.mean(0) - 0.3).argsort(kind="stable")[:3].tolist()  # neither silent nor always firing
    image = np.abs(rates[:, neurons[0]] - 0.3).argmin()
    time = np.arange(1, network.T + 1)
    figure, axes = panels(4, 2, 3, width_ratios=(1, 1.2, 1.2), sharex="col")
    rows = []
    for (when, (i_ee, i_sub, u, s)), (scatter, currents, membrane) in zip(found.items(), axes, strict=True):
        for neuron, style in zip(neurons, STYLES, strict=False):
            marker = dict(marker=style["marker"], color=style["color"], s=4, lw=0, alpha=0.5)
            scatter.scatter(i_ee[..., neuron], i_sub[..., neuron], label=f"neuron {neuron}", **marker)
            for k, step in np.ndindex(len(x), len(time)):
                place = step, k, neuron
                row = dict(when=when, layer=layer + 1, neuron=neuron, image=k, step=step + 1)
                rows.append(row | dict(i_ee=i_ee[place], i_sub=i_sub[place], u=u[place], spike=int(s[place] > 0)))
        scatter.axline((0, 0), slope=1, color=GREY, lw=0.6)
        scatter.set_ylabel(f"{when}\n$I_{{sub}}$")
        currents.plot(time, i_ee[:, image, neurons[0]], color=EXC, label="$I_{EE}$")
        currents.plot(time, i_sub[:, image, neurons[0]], color=INH, ls="--", label="$I_{sub}$")
        currents.set_ylabel("current")
        currents.margins(y=0.2)  # room for the legend
        trace = u[:, image, neurons[0]]
        membrane.plot(time, trace, color="black")
        membrane.axhline(run.config["threshold"], color=GREY, ls="--", lw=0.8)
        fired = time[s[:, image, neurons[0]] > 0]
        membrane.plot(fired, np.full(len(fired), trace.max() * 1.15 + 0.2), "|", color=EXC, ms=7)
        membrane.set_ylabel("$u$")
    titles = f"three neurons of layer {layer + 1}", f"neuron {neurons[0]}, one image", "its membrane and spikes"
    for column, title, label in zip(axes.T, titles, ("$I_{EE}$", "time step", "time step"), strict=True):
        column[0].set_title(title)
        column[1].set_xlabel(label)
    axes[0, 0].legend(markerscale=2, handletextpad=0, borderpad=0)
    axes[0, 1].legend(ncols=2, loc="upper center")
    save(figure, "balance", rows, args.out)


@torch.no_grad()
def currents_of(model, x, index):
    """The currents of one circuit, each (T, B, ...), for an input x of the network."""
    found = {}

    def record(circuit, args):
        for name, values in circuit.currents(args[0]).items():
            values = values.unflatten(0, (-1, len(x)))  # (T, B, ...); a still image may pass the first circuit once
            found[name] = values.expand(model.T, *values.shape[1:])

    with measure.hooked(model, [circuits(model)[index].register_forward_pre_hook(record)]):
        model(x)
    return found


@torch.no_grad()
def contrast_response(model, x, contrasts):
    """Firing rates (2, contrasts, layers): with divisive inhibition, and with I_div held at its mean. The mean is that
    of each map, over images, time and positions of x at full contrast in the intact network."""
    divided, means = circuits(model)[:-1], {}
    for i, circuit in enumerate(divided):
        i_div = currents_of(model, x, i)["i_div"].flatten(0, 1)
        means[circuit] = i_div.mean((0, *range(2, i_div.dim())), keepdim=True)

    def undivided(circuit, args, _):
        found = circuit.currents(args[0])
        g_e, b_e = (p.view(-1, *[1] * (found["i_ee"].dim() - 2)) for p in (circuit.g_e, circuit.b_e))
        return g_e * (found["i_ee"] - found["i_sub"]) / means[circuit] + b_e

    rates = []  # one after another: with and without the division, of each contrast, of each layer
    for changed in ([], divided):
        with measure.hooked(model, [circuit.register_forward_hook(undivided) for circuit in changed]):
            for contrast in contrasts:
                measure.observe(model, contrast * x, lambda i, current, u, spikes: rates.append(spikes.mean().item()))
    return torch.tensor(rates).view(2, len(contrasts), -1)


def draw_gain(args, runs):
    """Contrast response of each layer of the trained network: what PV+ divisive inhibition is for."""
    run, dataset, networks = networks_of(runs, kinds=("ei", "dann"))
    contrasts = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    x, _ = data.sample(dataset, run.config["T"], 64)
    responses = contrast_response(networks[AFTER], x, contrasts)  # (2, contrasts, layers)
    conditions = ("divisive inhibition", "its mean instead")
    n = responses.shape[2]
    shown = plots.shown_layers(n)
    figure, axes = panels(1.9, 1, len(shown), sharey=True)
    for i, axis in zip(shown, axes[0], strict=True):
        for name, values, style in zip(conditions, responses, STYLES, strict=False):
            axis.plot(contrasts, values[:, i], label=name, **style)
        axis.set(title=f"layer {i + 1}", xlabel="contrast", xticks=(0, 1))
    axes[0, 0].set(ylabel="firing rate\n(spikes/neuron/step)", ylim=(0, None))
    rows = long_rows("firing_rate", responses, condition=conditions, contrast=contrasts, layer=range(1, n + 1))
    save(figure, "gain", rows, args.out, legend=axes[0, 0])


def draw_weights(args, runs):
    """Distributions of weights and gains before and after the training, each in units of its layer's initial mean."""
    _, _, networks = networks_of(runs)
    first = circuits(networks[AFTER])[0]
    parameters = [name for name, _ in first.named_parameters() if name not in first.free]  # those of one sign
    figure, axes = panels(1.9, 1, len(parameters), sharey=True)
    units, rows = {}, []
    edges = np.arange(0, 5.1, 0.08)  # 1 is in the middle of a bin; the last bin holds all from 5 on
    for (when, network), style in zip(networks.items(), (dict(fill=True, alpha=0.35, lw=0), dict(lw=1)), strict=True):
        for parameter, axis in zip(parameters, axes[0], strict=True):
            values = []
            for i, circuit in enumerate(circuits(network)):
                if hasattr(circuit, parameter):  # a readout has no gains
                    p = getattr(circuit, parameter).detach().flatten().cpu()
                    values.append(p / units.setdefault((i, parameter), p.mean().item() or 1.0))
            values = torch.cat(values).numpy()
            fractions = np.histogram(values.clip(edges[0], edges[-1]), edges)[0] / len(values)
            sign = -1 if parameter in (*first.from_inhibitory, "g_i") else 1  # what it does to the membrane
            axis.stairs(fractions[::sign], (sign * edges)[::sign], color=INH if sign < 0 else EXC, label=when, **style)
            whole = dict(when=[when], parameter=[parameter], smallest=[values.min()], zeros=[(values == 0).mean()])
            rows += long_rows("fraction", fractions, **whole, sign=[sign], bin_low=edges[:-1])
            axis.set(xlabel=("$-$" if sign < 0 else "") + symbol(parameter), yscale="log", ylim=(1e-5, 2))
    axes[0, 0].set_ylabel("fraction")
    figure.supxlabel("in units of the layer's mean at initialisation", fontsize=8)
    save(figure, "weights", rows, args.out, legend=axes[0, 0])


FIGURES = {name.removeprefix("draw_"): draw for name, draw in globals().items() if name.startswith("draw_")}


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return recipes.status(lambda: command(argv))


def command(argv):
    p = recipes.Parser(description=__doc__.partition("\n")[0])
    p.add_argument("figure", choices=[*FIGURES, "all"], help="; ".join(f"{k}: {f.__doc__}" for k, f in FIGURES.items()))
    p.add_argument("runs", nargs="?", default="runs", help="a folder of runs, or one run (runs)")
    p.add_argument("--out", type=recipes.folder, help="where they go (figures; of other runs, into their folder)")
    p.add_argument("--batches", type=recipes.count, default=4, help="that the figure stabilizer looks at (4)")
    recipes.add_settings(p.add_argument_group("which of several runs"))
    args = p.parse_args(argv)
    if args.runs != "runs" and not Path(args.runs).is_dir():
        raise ValueError(f"there is no folder {args.runs}")
    args.out = args.out or Path("." if args.runs == "runs" else args.runs, "figures")
    runs, status = stored.Runs(args), 2
    for name in FIGURES if args.figure == "all" else [args.figure]:
        try:
            with matplotlib.rc_context(plots.STYLE), torch.random.fork_rng():
                torch.manual_seed(0)
                FIGURES[name](args, runs)
            print(f"{name}: {args.out / name}.png, .pdf, .csv")
            status = 0
        except (ValueError, OSError) as error:
            if args.figure != "all":
                raise
            print(f"{name}: not drawn. {' '.join(str(error).split())}")
    return status


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
