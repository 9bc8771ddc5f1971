"""The paper's figures: `python visualize.py all`, after `python reproduce.py`.

Each subcommand draws one figure from a folder of runs, or from one run. It writes a PNG, a PDF, and the numbers of the
figure as a CSV file. Orange is excitation and blue is inhibition. `python visualize.py circuit` needs no run.
"""

import contextlib
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from ei_init import ei_init, initialize
from model import ARCHS, build, circuits, layers
from support import console, data, plots, recipes
from support.diagram import SYMBOLS, circuit_diagram
from support.fast import keep_memory
from support.history import AFTER, BEFORE, Missing, networks_of, pick, trained_runs, usual_settings, with_circuits
from support.measure import VARIANTS, contrast_response, currents_of, histogram, observe, stabilization
from support.parallel import pick_device
from support.plots import EXC, GREY, INH, STYLES, by_epoch, by_layer, legend_outside, long_rows, panels, save
from support.runs import holds_run, load_data_and_model, prepare

NAMES = dict(ei="E-I SNN", bn="BN-SNN", plain="plain SNN", dann="DANN")
PARAMETERS = dict(w_ee="$W_{EE}$", w_ie="$W_{IE}$", w_ei="$W_{EI}$", g_i="$g_I$", g_e="$g_E$", b_e="$b_E$")


def draw_circuit(args):
    """The E-I circuit of one layer as a diagram, with its symbols as a table."""
    save(circuit_diagram(), "circuit", SYMBOLS, args.out)


# ---- at initialisation -----------------------------------------------------------------------------------------------


@torch.no_grad()
def without_gain(circuit, x):
    """E-I Init, but with g_I = 1."""
    ei_init(circuit, x)
    if not circuit.readout:
        circuit.g_i.fill_(1)


INITS = {"E-I Init": ei_init, "without its gain": without_gain, "|Kaiming|": None}  # None: what `build` leaves


def draw_init(args):
    """Mean and standard deviation of I_int, and firing rate, by layer, for three initialisations."""
    config = usual_settings(args, shown="vgg8 and vgg19")
    config["image_size"] = max(32, config["image_size"])  # an MLP may have smaller images than these networks take
    dataset, _ = load_data_and_model(config, torch.device("cpu"))
    torch.manual_seed(0)
    batch = data.to_input(dataset.train_x[torch.randperm(len(dataset.train_x))[:32]])
    figure, axes = panels(4.8, 3, 2, sharex="col", sharey="row")
    rows = []
    for arch, of_arch in zip(("vgg8", "vgg19"), axes.T, strict=True):
        for (how, init), style in zip(INITS.items(), STYLES, strict=False):
            torch.manual_seed(0)
            options = {key: config[key] for key in ("T", "image_size", *recipes.NEURONS)}
            model = build(arch, dataset.in_channels, dataset.n_classes, **options)
            with contextlib.suppress(ValueError):  # E-I Init stops after a silent layer. We draw this silence.
                if init:
                    initialize(model, batch, init)
            found = []

            def see(i, current, u, spikes, found=found):
                found.append((current.mean().item(), current.std().item(), spikes.mean().item()))

            observe(model, batch, see)
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
    legend_outside(figure, axes[0, 0])
    save(figure, "init", rows, args.out)


def draw_gradients(args):
    """Norm of each parameter's gradient by layer in the first step: STE, gradient scaling, adaptive and fixed eps."""
    variants = {"E-I Prop": {}, "no STE": dict(ste=False), "no scaling": dict(grad_scaling=False)}
    variants.update({"\u03b5=1e-6": dict(eps=1e-6), "\u03b5=1e-8": dict(eps=1e-8)})
    config = usual_settings(args)
    figure, axes = panels(3.6, 2, 3, sharex=True)
    rows = []
    for (name, options), style in zip(variants.items(), STYLES, strict=False):
        dataset, model = load_data_and_model({**config, **options}, torch.device("cpu"))
        prepare(config, dataset, model)
        x, y = data.first_batch(config, dataset)
        F.cross_entropy(model(x), y).backward()
        for parameter, axis in zip(PARAMETERS, axes.flat, strict=True):
            found = {i: getattr(c, parameter, None) for i, c in enumerate(circuits(model), 1)}  # not all in the readout
            by = [i for i, p in found.items() if p is not None and p.grad is not None]
            norms = [found[i].grad.norm().item() for i in by]
            rows += long_rows("gradient_norm", norms, variant=[name], parameter=[parameter], layer=by)
            axis.plot(by, norms, label=name, **style)
    for parameter, axis in zip(PARAMETERS, axes.flat, strict=True):
        axis.set_title(f"gradient of {PARAMETERS[parameter]}")
        plots.by_decades(axis)
    for axis in axes[1]:
        by_layer(axis, len(circuits(model)))
    for axis in axes[:, 0]:
        axis.set_ylabel("norm")
    legend_outside(figure, axes[0, 0])
    save(figure, "gradients", rows, args.out)


def draw_stabilizer(args):
    """Where I_div is 0, and what each stabilization does to the gradient, before the training and at its end."""
    try:
        run = pick(trained_runs(args))
        dataset, networks = networks_of(run, fast=False, end=True)
        config = run.config
        with_circuits(networks[AFTER])
    except Missing:
        config = usual_settings(args)
        dataset, network = load_data_and_model(config, pick_device())
        prepare(config, dataset, network)
        networks = {BEFORE: network}
    order = data.epoch_order(config, dataset, 0)[: args.batches]
    batches = [data.training_batch(config, dataset, chosen, step) for step, chosen in enumerate(order)]
    width = plots.PAGE if len(networks) == 2 else 5.4
    figure, axes = panels(4.4, 2, len(networks), width, sharex=True, sharey="row")
    rows = []
    for (when, network), (top, bottom) in zip(networks.items(), axes.T, strict=True):
        found = stabilization(network, batches)
        by = [row["layer"] for row in found]
        top.plot(by, [100 * row["zeros"] for row in found], color=INH, marker="o", label="$I_{div} = 0$")
        unbalanced = [100 * row["unbalanced"] if row["zeros"] else np.nan for row in found]  # no zeros: no share
        top.plot(by, unbalanced, color=EXC, marker="s", ls="--", label="of these, $I_{EE} \\neq I_{sub}$")
        top.set_title(when)
        for variant, style in zip(VARIANTS, STYLES, strict=False):
            bottom.plot(by, [row[variant] for row in found], label=variant, **style)
            counted = [dict(when=when) | {key: row[key] for key in ("layer", "zeros", "unbalanced")} for row in found]
            rows += [c | dict(variant=variant, gradient_norm=r[variant]) for c, r in zip(counted, found, strict=True)]
        by_layer(bottom, len(found))
    axes[0, 0].set(ylabel="share (%)", ylim=(-3, 103))
    axes[0, 0].legend()
    axes[1, 0].set(ylabel="largest norm of the gradient to $x$", yscale="log")
    legend_outside(figure, axes[1, 0], "lower center")
    save(figure, "stabilizer", rows, args.out)


# ---- the course of the training --------------------------------------------------------------------------------------


def draw_curves(args):
    """Training loss and test accuracy by epoch: the E-I SNN and its rivals."""
    runs = trained_runs(args)
    figure, [[left, right]] = panels(2.5, 1, 2)
    rows = []
    for (model, name), style in zip(NAMES.items(), STYLES, strict=False):
        metrics = pick(runs, model=model).metrics()
        epochs = [m["epoch"] for m in metrics]
        left.plot(epochs, [m["train_loss"] for m in metrics], label=name, **style)
        right.plot(epochs, [100 * m["test_accuracy"] for m in metrics], label=name, **style)
        rows += [dict(model=model, **m) for m in metrics]
    left.set_ylabel("training loss")
    right.set(ylabel="test accuracy (%)", ylim=(0, 102))
    by_epoch(left)
    by_epoch(right)
    legend_outside(figure, left)
    save(figure, "curves", rows, args.out)


def draw_epsilon(args):
    """The talk's table: what becomes of the training with a fixed epsilon, and with the adaptive one."""
    runs = trained_runs(args)
    found = {eps: pick(runs, eps=float(eps)) for eps in ("1e-8", "1e-7", "1e-6", "1e-5", "1e-4")}
    found["adaptive"] = pick(runs, eps="adaptive")
    plots.table("epsilon", "epsilon", found, args.out)


def draw_ablation(args):
    """What becomes of the training when one part of the method is left out."""
    runs = trained_runs(args)
    without = {
        "all of it": dict(eps="adaptive"),
        "no STE": dict(ste=False),
        "no gradient scaling": dict(grad_scaling=False),
        "|Kaiming| for E-I Init": dict(init="kaiming"),
    }
    plots.table("ablation", "method", {name: pick(runs, **wanted) for name, wanted in without.items()}, args.out)


# ---- what the circuit represents -------------------------------------------------------------------------------------


def look(network, x):
    """Histograms of I_int and u by layer, (layers, 2, bins), and the firing rates of the last layer, (B, neurons)."""
    counts, rates = [], []

    def see(i, current, u, spikes):
        counts.append((histogram(current), histogram(u)))
        rates[:] = [spikes.mean(0).flatten(1)]  # those of the last layer stay

    observe(network, x, see)
    return np.array(counts, dtype=float), rates[0].cpu().numpy()


def draw_representation(args):
    """Distributions of I_int and u before and after the training, and the last layer's firing rates in the plane."""
    run = pick(trained_runs(args))
    dataset, networks = networks_of(run)
    x, y = data.sample(dataset, run.config["T"])
    y = y.cpu().numpy()
    n = len(layers(networks[AFTER]))
    shown = plots.shown_layers(n)
    figure = Figure(figsize=(plots.PAGE, 5.6))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = plots.distribution_axes(upper, shown, run.config["threshold"])
    planes = lower.subplots(1, 2)
    rows, points = [], []
    for (when, network), color, plane in zip(networks.items(), (GREY, "black"), planes, strict=True):
        counts, rates = look(network, x)
        densities = plots.density(counts)  # (layers, 2, bins)
        places = dict(when=[when], layer=range(1, n + 1), quantity=plots.QUANTITIES, bin_centre=plots.CENTRES)
        rows += long_rows("density", densities, **places)
        for column, i in enumerate(shown):
            for row in range(2):
                axes[row, column].stairs(densities[i, row], plots.EDGES, color=color, label=when, lw=1)
        projected = plots.plane(plane, rates, y, dataset.n_classes, when)
        points += [dict(when=when, label=int(label), pc1=a, pc2=b) for label, (a, b) in zip(y, projected, strict=True)]
    legend_outside(upper, axes[0, 0])
    save(figure, "representation", rows, args.out)
    plots.write_csv(args.out / "representation-pca.csv", points)


def draw_evolution(args):
    """The same distributions through the training: a picture with the epochs along x, and an animated GIF."""
    run = pick(trained_runs(args))
    densities = plots.density(run.histograms())  # (epochs + 1, layers, 2, bins)
    n_epochs, n = densities.shape[:2]
    places = dict(epoch=range(n_epochs), layer=range(1, n + 1), quantity=plots.QUANTITIES, bin_centre=plots.CENTRES)
    threshold = run.config["threshold"]
    save(plots.by_epoch_maps(densities, threshold), "evolution", long_rows("density", densities, **places), args.out)
    plots.save_gif(densities, threshold, args.out / "evolution.gif")


def middle(values):
    """Maps, (T, B, n, H, W) -> their position in the middle, (T, B, n), one neuron a map. Dense: as it is."""
    return values if values.dim() == 3 else values[..., values.shape[-2] // 2, values.shape[-1] // 2]


def draw_balance(args):
    """Excitation against subtractive inhibition of single neurons, and their currents and spikes through time."""
    run = pick(trained_runs(args))
    dataset, networks = networks_of(run)
    x, _ = data.sample(dataset, run.config["T"], 16)
    trained = with_circuits(networks[AFTER])
    layer, found = len(layers(trained)) // 2, {}
    for when, network in networks.items():
        if x.dim() == 4:
            network.T = 24  # longer than in the training, to see the traces
        currents, seen = currents_of(network, x, layer), {}

        def see(i, current, u, spikes, seen=seen):
            if i == layer:
                seen.update(u=u, s=spikes)

        observe(network, x, see)
        four = (currents["i_ee"], currents["i_sub"], seen["u"], seen["s"])
        found[when] = [middle(values).cpu().numpy() for values in four]  # each (T, images, maps)
    rates = (found[AFTER][3] > 0).mean(0)  # (images, maps)
    neurons = np.abs(rates.mean(0) - 0.3).argsort(kind="stable")[:3].tolist()  # neither silent nor always firing
    image = np.abs(rates[:, neurons[0]] - 0.3).argmin()
    time = np.arange(1, trained.T + 1)

    figure, axes = panels(4, 2, 3, width_ratios=(1, 1.2, 1.2), sharex="col")
    rows = []
    for (when, (i_ee, i_sub, u, s)), (scatter, currents, membrane) in zip(found.items(), axes, strict=True):
        for neuron, style in zip(neurons, STYLES, strict=False):
            marker = dict(marker=style["marker"], color=style["color"], s=4, lw=0, alpha=0.5)
            scatter.scatter(i_ee[..., neuron], i_sub[..., neuron], label=f"neuron {neuron}", **marker)
            for k, step in np.ndindex(len(x), len(time)):
                row = dict(when=when, layer=layer + 1, neuron=neuron, image=k, step=step + 1)
                row.update(i_ee=i_ee[step, k, neuron], i_sub=i_sub[step, k, neuron], u=u[step, k, neuron])
                rows.append({**row, "spike": int(s[step, k, neuron] > 0)})
        limit = max(scatter.get_xlim()[1], scatter.get_ylim()[1])
        scatter.plot([0, limit], [0, limit], color=GREY, lw=0.6)
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
    axes[1, 0].set_xlabel("$I_{EE}$")
    for axis in axes[1, 1:]:
        axis.set_xlabel("time step")
    axes[0, 0].legend(markerscale=2, handletextpad=0, borderpad=0)
    axes[0, 1].legend(ncols=2, loc="upper center")
    axes[0, 0].set_title(f"three neurons of layer {layer + 1}")
    axes[0, 1].set_title(f"neuron {neurons[0]}, one image")
    axes[0, 2].set_title("its membrane and spikes")
    save(figure, "balance", rows, args.out)


def draw_gain(args):
    """Contrast response of each layer of the trained network: what PV+ divisive inhibition is for."""
    run = pick(trained_runs(args))
    dataset, networks = networks_of(run)
    contrasts = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    x, _ = data.sample(dataset, run.config["T"], 64)
    responses = contrast_response(with_circuits(networks[AFTER]), x, contrasts)  # (2, contrasts, layers)
    conditions = {"divisive inhibition": dict(color="black", marker="o", ls="-")}
    conditions["its mean instead"] = dict(color=GREY, marker="s", ls="--")
    n = responses.shape[2]
    shown = plots.shown_layers(n)
    figure, axes = panels(1.9, 1, len(shown), sharey=True)
    for i, axis in zip(shown, axes[0], strict=True):
        for (name, style), values in zip(conditions.items(), responses, strict=True):
            axis.plot(contrasts, values[:, i], label=name, **style)
        top = 1.1 * responses.max().item() + 1e-3
        axis.set(title=f"layer {i + 1}", xlabel="contrast", xticks=(0, 1), ylim=(0, top))
    axes[0, 0].set_ylabel("firing rate\n(spikes/neuron/step)")
    legend_outside(figure, axes[0, 0])
    rows = long_rows("firing_rate", responses, condition=conditions, contrast=contrasts, layer=range(1, n + 1))
    save(figure, "gain", rows, args.out)


def draw_weights(args):
    """Distributions of weights and gains before and after the training, each in units of its layer's initial mean."""
    run = pick(trained_runs(args))
    _, networks = networks_of(run)
    with_circuits(networks[AFTER])
    figure, axes = panels(1.9, 1, 5, sharey=True)
    units, rows = {}, []
    edges = np.arange(0, 5.1, 0.08)  # 1 is in the middle of a bin; the last bin holds all from 5 on
    looks = (dict(fill=True, alpha=0.35, lw=0), dict(lw=1))
    for (when, network), style in zip(networks.items(), looks, strict=True):
        for parameter, axis in zip(list(PARAMETERS)[:5], axes[0], strict=True):  # without b_E, which has no sign
            values = []
            for i, circuit in enumerate(circuits(network)):
                if hasattr(circuit, parameter):
                    p = getattr(circuit, parameter).detach().flatten().cpu()
                    values.append(p / units.setdefault((i, parameter), p.mean().item()))
            if not values:  # DANN has another g_I
                continue
            values = torch.cat(values).numpy()
            fractions = np.histogram(values.clip(edges[0], edges[-1]), edges)[0] / len(values)
            sign = -1 if parameter in ("w_ei", "g_i") else 1  # what it does to the membrane
            axis.stairs(fractions[::sign], (sign * edges)[::sign], color=INH if sign < 0 else EXC, label=when, **style)
            about = dict(when=when, parameter=parameter, sign=sign)
            whole = dict(smallest=values.min(), zeros=(values == 0).mean())
            for low, high, fraction in zip(edges, edges[1:], fractions, strict=False):
                rows.append(dict(**about, bin_low=low, bin_high=high, fraction=fraction, **whole))
            axis.set(xlabel=("$-$" if sign < 0 else "") + PARAMETERS[parameter], yscale="log", ylim=(1e-5, 2))
            axis.axvline(0, color="black", lw=0.6)
    axes[0, 0].set_ylabel("fraction")
    figure.supxlabel("in units of the layer's mean at initialisation", fontsize=8)
    legend_outside(figure, axes[0, 0])
    save(figure, "weights", rows, args.out)


# ---- the command line ------------------------------------------------------------------------------------------------

DRAW = [draw_circuit, draw_init, draw_curves, draw_epsilon, draw_ablation, draw_representation, draw_evolution]
DRAW += [draw_balance, draw_gain, draw_gradients, draw_stabilizer, draw_weights]
FIGURES = {draw.__name__.removeprefix("draw_"): draw for draw in DRAW}


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return console.status(lambda: command(argv))


def command(argv):
    p = recipes.Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    p.add_argument("figure", choices=[*FIGURES, "all"], help="; ".join(f"{k}: {f.__doc__}" for k, f in FIGURES.items()))
    p.add_argument("runs", nargs="?", default="runs", help="a folder of runs, or one run (runs)")
    p.add_argument("--out", type=recipes.folder, help="where the figures go (figures; of one run, its own folder)")
    where = "where there are runs of several"
    p.add_argument("--arch", choices=ARCHS, help=f"network, {where} (vgg8)")
    p.add_argument("--data", choices=data.LOADERS, help=f"dataset, {where} (digits)")
    kinds = dict(seed=recipes.whole, width=recipes.times, ei_ratio=recipes.count, tau=recipes.at_least_1)
    kinds.update(threshold=recipes.positive, alpha=recipes.positive)
    for key, kind in kinds.items():
        p.add_argument(f"--{key.replace('_', '-')}", type=kind, help=f"{where} ({recipes.WHAT[key]:g})")
    p.add_argument("--plan", type=recipes.layer_sizes, help=f"list of layers, {where} (the network's own)")
    p.add_argument("--batches", type=recipes.count, default=4, help="that the figure stabilizer looks at (4)")
    p.add_argument("--data-root", help="where the data are now (where the run had them; without one, ./data)")
    args = p.parse_args(argv)
    if args.runs != "runs" and not Path(args.runs).is_dir():
        raise ValueError(f"there is no folder {args.runs}")
    if args.out is None:
        args.out = Path(args.runs, "figures") if holds_run(args.runs) else Path("figures")
    drawn = 0
    for name in FIGURES if args.figure == "all" else [args.figure]:
        try:
            with matplotlib.rc_context(plots.STYLE), torch.random.fork_rng():
                torch.manual_seed(0)
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
    keep_memory()
    console.leave(main())
