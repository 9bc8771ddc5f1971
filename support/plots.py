"""How figures look and how they are saved. There is no pyplot here, so that a notebook's own plots stay as they are."""

import csv
import itertools

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA

from support.measure import BINS

EXC, INH, GREY = "#D55E00", "#0072B2", "#777777"  # excitation, inhibition (palette of Okabe and Ito, also below)
_colors = ("#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
_dashes = ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 2)))  # told apart also without colours
STYLES = [dict(color=c, marker=m, ls=dash) for c, m, dash in zip(_colors, "os^Dvx", _dashes, strict=True)]
# Settings of matplotlib while a figure is drawn.
STYLE = {"font.size": 8, "lines.linewidth": 1.2, "lines.markersize": 3.5, "figure.constrained_layout.use": True}
STYLE |= {"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}
PAGE = 6.8  # inches, the width of a page
EDGES = np.linspace(BINS["low"], BINS["high"], BINS["n"] + 1)  # of the bins of I_int and u
CENTRES = np.linspace(BINS["low"], BINS["high"], 2 * BINS["n"] + 1)[1::2]
QUANTITIES = dict(i_int="$I_{int}$", u="$u$")


def write_csv(path, rows):
    """Writes dicts with the same keys as lines of a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([*map(list, rows[:1]), *(row.values() for row in rows)])


def save(figure, name, rows, out, legend=None, place="upper"):
    """Writes name.png, name.pdf, name.csv (the rows, dicts, behind them). legend: an axis whose legend is outside."""
    if legend:
        handles, labels = legend.get_legend_handles_labels()
        figure.legend(handles, labels, loc=f"outside {place} center", ncols=len(labels))
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=200)
    figure.savefig(out / f"{name}.pdf", metadata=dict(CreationDate=None))  # no date: the same picture is the same file
    write_csv(out / f"{name}.csv", rows)


def long_rows(name, values, **axes):
    """An array as rows of a CSV file: a dict for each element. axes: the name of each axis, and the labels along it."""
    places = itertools.product(*axes.values())
    elements = np.asarray(values).flatten().tolist()
    return [{**dict(zip(axes, place, strict=True)), name: v} for place, v in zip(places, elements, strict=True)]


def panels(height, rows=1, columns=1, width=PAGE, **options):
    """A figure and its axes, (rows, columns). Sizes are in inches."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def symbol(name):
    """A parameter's name as in the equations: w_ie -> W_IE."""
    kind, _, of = name.partition("_")
    return f"${kind.upper() if kind == 'w' else kind}_{{{of.upper()}}}$" if len(kind) == 1 and of.isalpha() else name


def by_layer(axis, n):
    axis.set_xlabel("layer")
    axis.set_xticks(range(1, n + 1) if n <= 8 else range(1, n + 1, 3))


def by_epoch(axis):
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def shown_layers(n):
    """Which of n layers, from 0, a figure has room for: at most five, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, 5))})


def density(counts):
    """Counts -> probability density, along the last axis."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1) / (EDGES[1] - EDGES[0])


def distribution_axes(figure, shown, threshold):
    """Axes for densities of I_int (above) and u (below) in the layers `shown`: (2, layers). Dashed: the threshold."""
    axes = figure.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
    for of_row, name, title in zip(axes, QUANTITIES.values(), ("layer {}", ""), strict=True):
        of_row[0].set_ylabel("density")
        for axis, i in zip(of_row, shown, strict=True):
            axis.axvline(threshold, color=GREY, ls="--", lw=0.8)
            axis.set(yscale="log", ylim=(1e-3, 10), xlabel=name, title=title.format(i + 1))
    return axes


def by_epoch_maps(densities, threshold):
    """Densities of I_int and u, (epochs, layers, 2, bins), as grey maps with the epochs along x: a figure."""
    shown = shown_layers(densities.shape[1])
    figure, axes = panels(3.2, 2, len(shown), sharey=True, sharex=True)
    looks = dict(origin="lower", aspect="auto", cmap="Greys", vmin=-3, vmax=0.5, interpolation="nearest")
    looks["extent"] = (-0.5, len(densities) - 0.5, EDGES[0], EDGES[-1])
    for row, (name, title) in enumerate(zip(QUANTITIES.values(), ("layer {}", ""), strict=True)):
        axes[row, 0].set_ylabel(name)
        for axis, i in zip(axes[row], shown, strict=True):
            axis.imshow(np.log10(densities[:, i, row].T + 1e-3), **looks)
            axis.axhline(threshold, color="black", ls="--", lw=0.8)
            axis.set_title(title.format(i + 1))
    for axis in axes[1]:
        by_epoch(axis)
    return figure


def save_gif(densities, threshold, path):
    """The same as an animation, a frame an epoch. Of a long training about 60 epochs are shown."""
    n, shown = len(densities), shown_layers(densities.shape[1])
    figure = Figure(figsize=(PAGE, 3))
    axes = distribution_axes(figure, shown, threshold)
    title = figure.suptitle("epoch 0")
    lines = {place: axis.plot(CENTRES, CENTRES, color="black")[0] for place, axis in np.ndenumerate(axes)}

    def draw(epoch):
        title.set_text(f"epoch {epoch}")
        for (row, column), line in lines.items():
            line.set_ydata(densities[epoch, shown[column], row])

    epochs = sorted({*range(0, n, max(1, n // 60)), n - 1})
    FuncAnimation(figure, draw, epochs).save(path, PillowWriter(fps=max(2, len(epochs) // 15)), dpi=100)


def plane(axis, rates, y, n_classes, title):
    """Draws rates, (B, neurons), by their first two principal components, with labels y, (B,). Returns them, (B, 2)."""
    with np.errstate(invalid="ignore"):  # a silent layer has no variance to explain
        pca = PCA(2, random_state=0).fit(rates)
    explained = np.nan_to_num(pca.explained_variance_ratio_.sum())
    projected = pca.transform(rates)
    axis.scatter(*projected.T, c=y, cmap="viridis", s=6, lw=0)
    if n_classes <= 10:
        for label in np.unique(y):
            box = dict(boxstyle="circle,pad=0.1", fc="white", lw=0, alpha=0.7)  # to be read on top of points
            axis.annotate(str(label), projected[y == label].mean(0), ha="center", va="center", bbox=box)
    axis.set(title=f"{title} ({explained:.0%} of the variance)", xlabel="PC 1", ylabel="PC 2", xticks=[], yticks=[])
    return projected


def table(name, first, runs, out):
    """The best epoch of each run, label -> (outcome, `runs.metrics`), as text, Markdown, picture. first: a heading."""
    cells, rows = [[first, "outcome", "best epoch", "best on the test set"]], []
    figure, axes = panels(3.3 + 0.2 * len(runs), 2, width=5, height_ratios=(1, 1.6))
    top, bottom = axes[:, 0]
    for (label, (outcome, epochs)), style in zip(runs.items(), STYLES, strict=False):
        best = max(epochs, key=lambda row: row["test_accuracy"], default=None)
        accuracy = best["test_accuracy"] if best else None
        cells.append([label, outcome, str(best["epoch"]), f"{accuracy:.2%}"] if best else [label, outcome, "-", "-"])
        for row in epochs:
            kept = {key: row[key] for key in ("epoch", "train_loss", "test_accuracy")}
            rows.append(dict(run=label, outcome=outcome, **kept, best_test_accuracy=accuracy))
        bottom.plot([row["epoch"] for row in epochs], [row["train_loss"] for row in epochs], label=label, **style)
    form = "| {:24} | {:20} | {:10} | {:20} |"
    lines = [form.format(label.replace("|", "\\|"), *others) for label, *others in cells]
    lines.insert(1, form.format("---", "---", "---", "---"))
    print("\n".join(lines))
    top.axis("off")
    drawn = top.table(cells[1:], colLabels=cells[0], bbox=(0, 0, 1, 1), cellLoc="center", edges="horizontal")
    drawn.auto_set_font_size(False)
    bottom.set_ylabel("training loss")
    by_epoch(bottom)
    bottom.legend(ncols=2)
    save(figure, name, rows, out)
    (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
