"""The assignments, solved as a good student would, for `mistakes.py` and the tests; not part of the handout.

`lecturer.py` puts a section below the stub of the same name, where it takes the place of what is not done.
"""
# ruff: noqa: F821 (each section uses the names of its own stub)

import torch
import torch.nn.functional as F

# ---- a1_lif.py


def spike(u, threshold=1.0):
    return (u >= threshold).to(u.dtype)


def surrogate(u, threshold=1.0, alpha=4.0):
    sigma = torch.sigmoid(alpha * (u - threshold))
    return alpha * sigma * (1 - sigma)


def simulate(current, tau=2.0, threshold=1.0, alpha=4.0):
    u = s = torch.zeros_like(current[0])
    potentials, spikes = [], []
    for i in current:
        u = (1 - 1 / tau) * (u - threshold * s.detach()) + i
        s = Spike.apply(u, threshold, alpha)
        potentials.append(u)
        spikes.append(s)
    return torch.stack(potentials), torch.stack(spikes)


def f_i_curve(currents, tau=2.0, threshold=1.0, steps=100):
    _, s = simulate(currents.expand(steps, -1), tau, threshold)
    return s.mean(0)


# ---- a2_circuit.py


def currents(x, p, stabilize):
    i_ee = p["w_ee"] @ x
    i_ie = p["w_ie"] @ x
    s_i = i_ie
    i_sub = p["w_ei"] @ s_i
    i_div = p["w_ei"] @ (p["g_i"][:, None] * s_i)
    i_int = p["g_e"][:, None] * (i_ee - i_sub) / stabilize(i_div) + p["b_e"][:, None]
    return dict(i_ee=i_ee, i_ie=i_ie, i_sub=i_sub, i_div=i_div, i_int=i_int)


def clamp_dale(p):
    with torch.no_grad():
        for name in p:
            if name != "b_e":
                p[name].clamp_(min=0)


def pv_som_currents(x, p, stabilize):
    i_ee = p["w_ee"] @ x
    i_sub = p["w_es"] @ (p["w_se"] @ x)
    i_div = p["w_ep"] @ (p["g_p"][:, None] * (p["w_pe"] @ x))
    i_int = p["g_e"][:, None] * (i_ee - i_sub) / stabilize(i_div) + p["b_e"][:, None]
    return dict(i_ee=i_ee, i_sub=i_sub, i_div=i_div, i_int=i_int)


# ---- a3_init.py


def fan_in(w):
    return w[0].numel()


def weight_mean(x, d):
    square, var = x.square().mean(), x.var(0).mean()
    return (var / (d * (square + var))) ** 0.5


def gain(x, d):
    mean, square, var = x.mean(), x.square().mean(), x.var(0).mean()
    return (square + var) ** 0.5 / (d**0.5 * mean)


def poisson_gain(rate, d):
    return ((2 + rate) / (d * rate)) ** 0.5


def ei_init(p, x):
    d = fan_in(p["w_ee"])
    m = weight_mean(x, d)
    with torch.no_grad():
        for name in ("w_ee", "w_ie"):
            p[name].exponential_().mul_(m)
        p["w_ei"].fill_(1 / p["w_ei"].shape[1])
        if "g_i" in p:
            p["g_i"].fill_(gain(x, d))
            p["g_e"].fill_(1)
            p["b_e"].fill_(0)


def initialize(layers, batch, init=ei_init):
    x = batch
    for p, forward in layers:
        init(p, x)
        with torch.no_grad():
            x = forward(p, x)


# ---- a4_prop.py


def stabilize(i_div, eps="adaptive", ste=True):
    if eps != "adaptive":
        return i_div + eps
    axes = tuple(range(1, i_div.dim()))
    smallest = i_div.masked_fill(i_div == 0, torch.inf).amin(axes, keepdim=True)
    smallest = smallest.masked_fill(smallest.isinf(), 1)
    out = torch.where(i_div > 0, i_div, smallest)
    if ste:
        out = i_div + (out - i_div).detach()
    return out


def scale_gradient(w, factor):
    return w.detach() + factor * (w - w.detach())


def lateral_weights(w_ei, fan_in):
    return scale_gradient(w_ei, 1 / fan_in)


# ---- a5_ablation.py


def run(condition, seed, epochs=5):
    torch.manual_seed(seed)
    network = Network(condition)
    train_x, train_y, test_x, test_y = digits()
    if condition != "no E-I Init":
        network.initialize(train_x[batches(seed, 0)[0]])
    first = network.layers[0]
    row = dict(condition=condition, seed=seed, steps=0)
    row |= dict(g_i=first["g_i"][0].item(), first_weight=first["w_ee"].flatten()[0].item())
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)
    lowest, accuracies = [], []
    for epoch in range(epochs):
        for batch in batches(seed, epoch):
            loss = F.cross_entropy(network(train_x[batch]), train_y[batch])
            row.setdefault("first_loss", loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for p in network.layers:
                clamp_dale(p)
            row["steps"] += 1
            lowest.append(network.lowest())
        accuracies.append(accuracy(network, test_x, test_y))
    return row | dict(lowest=min(lowest), by_epoch=accuracies, test_accuracy=accuracies[-1])


def experiment(conditions=("full", "eps=1e-8", "no STE", "no E-I Init"), seeds=(0, 1, 2, 3, 4), epochs=5):
    rows = []
    for condition in conditions:
        for seed in seeds:
            rows.append(run(condition, seed, epochs))
    return rows


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    fig, ax = plt.subplots(figsize=(6, 4))
    ax.scatter([conditions.index(row["condition"]) for row in rows], [row["test_accuracy"] for row in rows], alpha=0.5)
    ax.set_xticks(range(len(conditions)), conditions)
    ax.set(ylabel="test accuracy", ylim=(0, 1))
    fig.savefig(path)
