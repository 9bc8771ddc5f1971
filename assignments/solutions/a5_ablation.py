"""Assignment 5 (15 points): an ablation experiment, with seeds.

The network below consists of your own functions of A1 to A4: finish these first. You train it on handwritten digits,
under four conditions: as in the paper, with a fixed epsilon, without STE, and without E-I Init. For each condition
there are five seeds. Write `run` (one training), `experiment` (all of them) and `plot`. Then

    python a5_ablation.py

writes results.csv and a5.png (five epochs each, one to two minutes), and `python check.py a5` looks at both. Then write
your five sentences below.
"""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from a1_lif import simulate
from a2_circuit import clamp_dale, currents
from a3_init import fan_in, initialize
from a4_prop import lateral_weights, stabilize

HERE = Path(__file__).resolve().parent
CONDITIONS = {"full": {}, "eps=1e-8": dict(eps=1e-8), "no STE": dict(ste=False), "no E-I Init": {}}
SEEDS = [0, 1, 2, 3, 4]
EPOCHS, BATCH, LR, MOMENTUM, T = 5, 32, 0.003, 0.9, 2

ANSWERS = {
    # Question 5 (2 points), with your own number of classes of `python check.py setup --id YOUR_ID`: the cross-entropy
    # loss of a network that is silent, so that all its logits are 0. A number.
    "silent_loss": None,
    # Five sentences (3 points), each on what your results show, with numbers from results.csv:
    "sentences": [
        "",  # 1. How much worse is eps=1e-8 than the full method? Mean and standard deviation over the seeds.
        "",  # 2. What would you have written if you had trained with one seed only? Name a seed that misleads.
        "",  # 3. Why does leaving out STE change (nearly) nothing here? Look at I_EE - I_sub where I_div is 0.
        "",  # 4. first_loss is near ln 10 under every condition. Why is it no sign of a good start?
        "",  # 5. What would you measure next to find out whether the gradient scaling of A4 matters?
    ],
}


def digits():
    """(train_x, train_y, test_x, test_y): 1437 and 360 images, (N, 1, 8, 8), intensities in [0, 1], labels 0 to 9."""
    with np.load(HERE / "digits.npz") as arrays:
        x = torch.from_numpy(arrays["x"]).float()[:, None] / 16
        y = torch.from_numpy(arrays["y"]).long()
    return x[:1437], y[:1437], x[1437:], y[1437:]


def batches(seed, epoch):
    """The batches of an epoch, as a list of index tensors. The order depends on seed and epoch only."""
    order = np.random.RandomState(1000 * seed + epoch).permutation(1437)
    return list(torch.from_numpy(order).split(BATCH))[: 1437 // BATCH]


class Network:
    """Two layers of 3x3 circuits (16 and 32 maps) with LIF neurons and 2x2 pooling, and a readout.

    Images (B, 1, 8, 8) -> logits (B, 10). `layers` is a list of dicts of parameters.
    """

    def __init__(self, condition):
        self.options = CONDITIONS[condition]
        self.layers = [self.parameters_of((1, 3, 3), 16), self.parameters_of((16, 3, 3), 32)]
        self.layers.append(self.parameters_of((128,), 10))
        for name in ("g_i", "g_e", "b_e"):  # a readout has none
            del self.layers[-1][name]

    def parameters_of(self, inputs, n_e):
        """The parameters of a layer before E-I Init: |Kaiming| weights, gains of 1."""
        n_i = max(1, n_e // 4)
        weights = dict(w_ee=torch.empty(n_e, *inputs), w_ie=torch.empty(n_i, *inputs), w_ei=torch.empty(n_e, n_i))
        for w in weights.values():
            torch.nn.init.kaiming_normal_(w).abs_()
        p = weights | dict(g_i=torch.ones(n_i), g_e=torch.ones(n_e), b_e=torch.zeros(n_e))
        return {name: tensor.requires_grad_() for name, tensor in p.items()}

    def parameters(self):
        return [tensor for p in self.layers for tensor in p.values()]

    def forward(self, p, x):
        """One layer: (T B, C, H, W) -> (T B, n_E, H / 2, W / 2), or the readout: -> (T B, 10)."""
        w = {name: tensor.flatten(1) if tensor.dim() > 1 else tensor for name, tensor in p.items()}  # (n, d)
        w["w_ei"] = lateral_weights(p["w_ei"], fan_in(p["w_ee"]))
        if "g_i" not in p:  # the readout: I_EE - I_sub
            x = x.flatten(1)
            return x @ w["w_ee"].T - x @ w["w_ie"].T @ w["w_ei"].T
        patches = F.unfold(x, 3, padding=1)  # the receptive field of each position: (T B, d, H W)
        i_int = currents(patches, w, lambda i_div: stabilize(i_div, **self.options))["i_int"]  # (T B, n_E, H W)
        _, s = simulate(i_int.unflatten(0, (T, -1)))  # (T, B, n_E, H W)
        return F.avg_pool2d(s.flatten(0, 1).unflatten(2, x.shape[2:]), 2)

    def __call__(self, images):
        x = images.repeat(T, 1, 1, 1)  # a still image is the same at each time step: (T B, 1, 8, 8)
        for p in self.layers:
            x = self.forward(p, x)
        return x.unflatten(0, (T, -1)).mean(0)

    def initialize(self, images):
        """E-I Init, by your `initialize`."""
        initialize([(p, self.forward) for p in self.layers], images.repeat(T, 1, 1, 1))

    def lowest(self):
        """The lowest value of all weights and gains that Dale's law is about."""
        return min(tensor.min().item() for p in self.layers for name, tensor in p.items() if name != "b_e")


@torch.no_grad()
def accuracy(network, x, y):
    """The share of images that the network classifies correctly, from 0 to 1."""
    return (network(x).argmax(1) == y).sum().item() / len(y)


def run(condition, seed, epochs=EPOCHS):
    """Trains one network and tests it after each epoch. (10 points, with `experiment`: 5 for what they do with a small
    network that `check.py` puts in the place of yours, 5 for results.csv)

    Everything random depends on the seed: call torch.manual_seed(seed), then make a new Network(condition). E-I Init
    (except under "no E-I Init") with the images of the first training batch, batches(seed, 0)[0]. Then for each epoch
    and each of its batches(seed, epoch): the cross-entropy loss, a step of torch.optim.SGD(lr=LR, momentum=MOMENTUM),
    clamp_dale for each layer.

    Returns:
        A dict, which is a line of results.csv:
        condition, seed: as given.
        steps: how many optimiser steps were made.
        g_i, first_weight: the first value of g_i and that of w_ee in the first layer, after E-I Init, before the first
            step.
        first_loss: the loss of the first batch, before the first step.
        lowest: the smallest value that network.lowest() has after any of the steps and its clamp_dale.
        by_epoch: a list of the accuracies on the test images after each epoch.
        test_accuracy: the number that you report: after the last epoch.
    """
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


def experiment(conditions=tuple(CONDITIONS), seeds=tuple(SEEDS), epochs=EPOCHS):
    """The list of the dicts of `run` for each condition and each seed, with the same number of epochs."""
    return [run(condition, seed, epochs) for condition in conditions for seed in seeds]


def plot(rows, path):
    """Draws the test accuracy by condition, every seed as a point, into the PNG file `path` (2 points).

    Use matplotlib. Import it in here.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    ax = figure.subplots()
    ax.scatter([row["condition"] for row in rows], [row["test_accuracy"] for row in rows], alpha=0.5)
    ax.set(ylabel="test accuracy", ylim=(0, 1))
    figure.savefig(path)


def write_csv(rows, path):
    """results.csv: a line for each dict; the accuracies by epoch with spaces between them."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(row | dict(by_epoch=" ".join(str(a) for a in row["by_epoch"])))


if __name__ == "__main__":
    torch.set_num_threads(1)  # for a network as small as this, more threads are slower
    rows = experiment()
    write_csv(rows, HERE / "results.csv")
    plot(rows, HERE / "a5.png")
