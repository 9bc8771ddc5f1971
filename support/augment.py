"""Augmentation of a training batch: it and a generator of random numbers on its device -> a batch of the same shape.
Every sample is treated on its own."""

import math
from functools import partial

import torch
import torch.nn.functional as F


def _uniform(x, generator, low, high):
    """A random number for each sample of x: (B, 1)."""
    return torch.rand(len(x), 1, device=x.device, generator=generator) * (high - low) + low


def _select(x, rows, columns):
    """x[b, ..., rows[b, i, j], columns[b, i, j]], each of the shape (B, S, S) or expanded to it: of the shape of x."""
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    return x[samples, ..., rows, columns].movedim((1, 2), (-2, -1))


def augment_cifar(x, generator):
    """CIFAR augmentation (paper, training details) of images (B, C, S, S) in [0, 1]: crop with padding 4, flip, cutout.

    Cutout: with probability 1/2 a rectangle of 2 to 40 % of the area, aspect ratio 0.4 to 2.5 (log-uniform), is filled
    with random values in [0, 1], one for each pixel and channel. In the authors' program the aspect ratio is uniform,
    and the rectangle has one random shade of red: what that changes is in results/cifar10.md.
    """
    B, C, _, S = x.shape
    uniform = partial(_uniform, x, generator)
    pixels = torch.arange(S, device=x.device)
    rows = pixels + uniform(0, 9).long()
    columns = torch.where(uniform(0, 1) < 0.5, pixels, pixels.flip(0)) + uniform(0, 9).long()
    x = _select(F.pad(x, [4] * 4), rows[:, :, None], columns[:, None, :])

    area, aspect = uniform(0.02, 0.4) * S * S, uniform(-1, 1).mul(math.log(2.5)).exp()
    height = (area * aspect).sqrt().round().clamp(max=S)
    width = (area / aspect).sqrt().round().clamp(max=S)
    top, left = (uniform(0, 1) * (S - height + 1)).floor(), (uniform(0, 1) * (S - width + 1)).floor()
    inside_rows = (pixels >= top) & (pixels < top + height) & (uniform(0, 1) < 0.5)
    inside_columns = (pixels >= left) & (pixels < left + width)
    cut = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(cut, torch.rand(B, C, S, S, device=x.device, generator=generator), x)


def augment_gesture(x, generator):
    """DVS-Gesture, event counts (B, T, C, S, S): random resized crop of 50 to 100 % of the area and horizontal flip,
    the same for all frames of a sample. The paper's recipe has the flip, though it makes a left hand of a right one."""
    rows, columns = _crop_and_flip(x, generator, 0.5)
    return _select(x, rows[:, :, None], columns[:, None, :])


def augment_cifar10_dvs(x, generator):
    """CIFAR10-DVS: random resized crop of 70 to 100 % of the area, horizontal flip, and one of roll, rotation, cutout.

    Roll: by up to 5 pixels along each side, what leaves at one edge comes back at the other. Rotation: by up to 30
    degrees, no events where it looks past the edges. Cutout: no events in a square of 16 pixels around any pixel.
    """
    S = x.shape[-1]
    rows, columns = _crop_and_flip(x, generator, 0.7)

    def uniform(low, high):
        return _uniform(x, generator, low, high)[:, :, None]

    pixels = torch.arange(S, device=x.device)
    which, middle = uniform(0, 3).floor(), (S - 1) / 2
    angle = uniform(-30, 30).deg2rad() * (which == 1)
    down, right = (uniform(-5, 6).floor() * (which == 0) for _ in range(2))
    # Where in the cropped frame each pixel (i, j) of the result looks: no interpolation, so one choice of pixels.
    i, j = pixels[:, None] - middle, pixels - middle
    row = (angle.cos() * i - angle.sin() * j + middle).round()
    column = (angle.sin() * i + angle.cos() * j + middle).round()
    seen = (row >= 0) & (row < S) & (column >= 0) & (column < S)
    top, left = ((uniform(0, S).floor() - 8) for _ in range(2))
    i, j = pixels[:, None] - top, pixels - left
    seen &= ~((which == 2) & (i >= 0) & (i < 16) & (j >= 0) & (j < 16))
    row, column = ((row - down) % S).long(), ((column - right) % S).long()
    row, column = (of.gather(1, at.flatten(1)).view_as(at) for of, at in ((rows, row), (columns, column)))
    return _select(x, row, column) * seen[:, None, None]


def _crop_and_flip(x, generator, smallest):
    """Random resized crop (nearest pixel) and flip: which rows and which columns of x each sample shows, (B, S) each.

    The crop has `smallest` to 1 of the area and an aspect ratio of 3/4 to 4/3 (log-uniform), or nearer to 1 where a
    crop of this area would not fit.
    """
    S = x.shape[-1]
    area = _uniform(x, generator, smallest, 1)
    aspect = (_uniform(x, generator, -1, 1) * (-area.log()).clamp(max=math.log(4 / 3))).exp()
    chosen = []
    for share in ((area * aspect).sqrt(), (area / aspect).sqrt()):
        side = (share * S).round().clamp(1, S)
        first = (_uniform(x, generator, 0, 1) * (S - side + 1)).floor()
        chosen.append((first + (torch.arange(S, device=x.device) + 0.5) * side / S).long())
    rows, columns = chosen
    return rows, torch.where(_uniform(x, generator, 0, 1) < 0.5, columns, columns.flip(1))


AUGMENTATIONS = {"none": None, "cifar": augment_cifar, "gesture": augment_gesture, "cifar10-dvs": augment_cifar10_dvs}
IN_WORDS = {None: "none", augment_cifar: "cifar: crop, flip, cutout", augment_gesture: "gesture: resized crop, flip"}
IN_WORDS[augment_cifar10_dvs] = "cifar10-dvs: resized crop, flip, and roll, rotation or cutout"
