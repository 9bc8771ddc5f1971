"""Draws the E-I circuit as a diagram, for `visualize.py circuit`. A reader of the paper may skip this file."""

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from support.plots import EXC, INH

SYMBOLS = [  # N: time steps and samples
    dict(symbol=symbol, meaning=meaning, equation=equation, shape=shape)
    for symbol, meaning, equation, shape in (
        ("x", "presynaptic activity", "x >= 0", "(N, C, H, W)"),
        ("W_EE", "synapses onto the excitatory neurons", "W_EE >= 0", "(n_E, C, k, k)"),
        ("W_IE", "synapses onto the PV+ interneurons", "W_IE >= 0", "(n_I, C, k, k)"),
        ("W_EI", "synapses of the interneurons, at each position alone", "W_EI >= 0", "(n_E, n_I)"),
        ("g_I", "gain of divisive inhibition", "g_I >= 0", "(n_I,)"),
        ("g_E", "gain of the excitatory neurons", "g_E >= 0", "(n_E,)"),
        ("b_E", "bias of the excitatory neurons", "free", "(n_E,)"),
        ("I_EE", "excitation of the dendrites", "I_EE = W_EE * x", "(N, n_E, H', W')"),
        ("I_IE", "drive of the interneurons", "I_IE = W_IE * x", "(N, n_I, H', W')"),
        ("s_I", "activity of the interneurons", "s_I = max(0, I_IE) = I_IE", "(N, n_I, H', W')"),
        ("I_sub", "subtractive inhibition, at the dendrites: E-I balance", "I_sub = W_EI s_I", "(N, n_E, H', W')"),
        ("I_div", "divisive inhibition, at the soma: gain control", "I_div = W_EI (g_I . s_I)", "(N, n_E, H', W')"),
        ("I_int", "current of the LIF neurons", "I_int = g_E . (I_EE - I_sub) / I_div + b_E", "(N, n_E, H', W')"),
        ("u", "membrane potential", "u[t] = (1 - 1/tau) (u[t-1] - theta s[t-1]) + I_int[t]", "(T, B, n_E, H', W')"),
        ("s", "spikes", "s[t] = 1 if u[t] >= theta else 0", "(T, B, n_E, H', W')"),
    )
]


def circuit_diagram():
    """The circuit of one layer, from presynaptic activity on the left to spikes on the right: a figure."""
    figure = Figure(figsize=(7, 3.7), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 7), ylim=(0.05, 3.65))  # about inches
    axis.axis("off")

    def write(x, y, text, color="black", size=10, **options):
        options = {"ha": "center", "va": "center", "zorder": 4, **options}
        axis.text(x, y, text, color=color, size=size, **options)

    def box(x, y, width, height, text, color, fill="white", lw=1.3, zorder=3, size=10):
        corner = (x - width / 2, y - height / 2)
        style = dict(boxstyle="round,pad=0,rounding_size=0.08", ec=color, fc=fill, lw=lw, zorder=zorder)
        axis.add_patch(FancyBboxPatch(corner, width, height, **style))
        write(x, y, text, color, size)

    def line(color, *points, arrow=False):
        axis.plot(*zip(*points, strict=True), color=color, lw=1.8, solid_joinstyle="round", zorder=1)
        if arrow:
            head = dict(arrowstyle="-|>,head_width=0.2,head_length=0.4", color=color, lw=1.8, shrinkA=0, shrinkB=0)
            axis.annotate("", points[-1], points[-2], arrowprops=head, zorder=1)

    def ends(x, y, sign, color):  # what a line does where it ends
        axis.plot(x, y, "o", color=color, ms=12, mec="white", zorder=5)
        write(x, y, sign, "white", 11, weight="bold", va="center_baseline", zorder=6)

    e, i = 2.6, 0.75  # heights of the excitatory and of the inhibitory neurons
    fork, dendrites, soma, neuron = 0.62, 2.9, 4.6, 6.07  # from left to right

    # the populations
    box(4.3, e + 0.09, 4.36, 1.26, "", EXC, "#FDF1E9", lw=0, zorder=0)
    write(4.3, 3.5, "$n_E$ excitatory neurons", EXC)
    box(2.65, i - 0.18, 1.66, 1.02, "", INH, "#E8F2F9", lw=0, zorder=0)
    write(2.65, 0.33, "PV$^{+}$ interneurons\n$n_I = n_E\\,/\\,4$", INH)

    # excitation
    write(0.25, 1.7, "$x$", EXC, 15)
    write(0.25, 1.42, "$x \\geq 0$", EXC, 9)
    line(EXC, (0.4, 1.7), (fork, 1.7), (fork, e), (2.3, e))
    line(EXC, (fork, 1.7), (fork, i), (2.3, i))
    box(1.1, e, 0.56, 0.34, "$W_{EE}$", EXC)
    box(1.1, i, 0.56, 0.34, "$W_{IE}$", EXC)
    write(1.72, e + 0.17, "$I_{EE}$", EXC, 11)
    write(1.6, i + 0.17, "$I_{IE}$", EXC, 11)

    # inhibition
    box(2.65, i, 1.36, 0.38, "$s_I = \\max(0, I_{IE})$", INH)
    line(INH, (dendrites, i), (dendrites, e))
    line(INH, (dendrites, i), (soma, i), (soma, e))
    box(3.95, i, 0.42, 0.34, "$g_I$", INH)
    for x, name, kind, aim in (
        (dendrites, "$I_{sub}$", "subtractive", "E-I balance"),
        (soma, "$I_{div}$", "divisive", "gain control"),
    ):
        box(x, 1.42, 0.56, 0.34, "$W_{EI}$", INH)
        write(x + 0.1, 1.86, name, INH, 11, ha="left")
        write(x + 0.38, 1.42, f"{kind}:\n{aim}", INH, 9, ha="left")

    # the excitatory neuron
    line("black", (dendrites, e), (soma - 0.83, e), arrow=True)
    line("black", (soma, e), (neuron - 0.25, e), arrow=True)
    line("black", (neuron, e), (6.62, e), arrow=True)
    box(dendrites, e, 1.1, 0.5, "$I_{EE} - I_{sub}$", "black")
    box(soma, e, 1.64, 0.62, "$g_E \\odot \\dfrac{I_{EE} - I_{sub}}{I_{div}} + b_E$", "black")
    box(neuron, e, 0.48, 0.5, "LIF", "black")
    for x, name in ((dendrites, "dendrites"), (soma, "soma")):
        write(x, e + 0.5, name, "#555555", 9)
    write(5.62, e + 0.17, "$I_{int}$", size=11)
    write(6.8, e + 0.3, "$s$", EXC, 13)
    for x in (6.68, 6.76, 6.9):
        line(EXC, (x, e - 0.11), (x, e + 0.11))
    ends(dendrites - 0.55, e, "+", EXC)
    ends(1.97, i, "+", EXC)
    ends(dendrites, e - 0.25, "\u2212", INH)
    ends(soma, e - 0.31, "\u00f7", INH)

    # the legend
    for y, color, name in ((0.75, EXC, "excitation"), (0.5, INH, "inhibition")):
        line(color, (5.5, y), (5.85, y))
        write(5.95, y, name, color, ha="left")
    return figure
