"""Augmentation of a training batch: it and a random generator -> a batch of the same shape, each sample alone."""

import math

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import InterpolationMode, resized_crop, rotate


def augment_cifar(x, generator):
    """CIFAR augmentation (paper, training details) of images (B, C, S, S) in [0, 1]: crop with padding 4, flip, cutout.
    Cutout: with probability 1/2 a rectangle of 2 to 40 % of the area, aspect ratio 0.4 to 2.5 (log-uniform), is filled
    with random values in [0, 1], one for each pixel and channel. In the authors' program the aspect ratio is uniform,
    and the rectangle has one random shade of red: what that changes is in results/cifar10.md."""
    B, C, _, S = x.shape
    samples, pixels = torch.arange(B, device=x.device)[:, None, None], torch.arange(S, device=x.device)

    def uniform(low, high):  # a random number for each image: (B, 1)
        return torch.rand(B, 1, device=x.device, generator=generator) * (high - low) + low

    rows = pixels + uniform(0, 9).long()
    columns = torch.where(uniform(0, 1) < 0.5, pixels, pixels.flip(0)) + uniform(0, 9).long()
    x = F.pad(x, [4] * 4)[samples, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)  # (B, C, S, S)

    area, aspect = uniform(0.02, 0.4) * S * S, uniform(-1, 1).mul(math.log(2.5)).exp()
    height = (area * aspect).sqrt().round().clamp(max=S)
    width = (area / aspect).sqrt().round().clamp(max=S)
    top, left = (uniform(0, 1) * (S - height + 1)).floor(), (uniform(0, 1) * (S - width + 1)).floor()
    inside_rows = (pixels >= top) & (pixels < top + height) & (uniform(0, 1) < 0.5)
    inside_columns = (pixels >= left) & (pixels < left + width)
    cut = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(cut, torch.rand(B, C, S, S, device=x.device, generator=generator), x)


def augment_gesture(x, generator, smallest=0.5):
    """DVS-Gesture, event counts (B, T, C, S, S): random resized crop of 50 to 100 % of the area and horizontal flip,
    the same for all frames of a sample. The paper's recipe has the flip, though it makes a left hand of a right one.
    The crop has `smallest` to 1 of the area and an aspect ratio of 3/4 to 4/3 (log-uniform), or nearer to 1 where a
    crop of this area would not fit. Its pixels are chosen, not mixed."""
    S = x.shape[-1]
    area, aspect, top, left, flip = torch.rand(5, len(x), device=x.device, generator=generator)  # (B,) each
    area = smallest + (1 - smallest) * area
    aspect = ((2 * aspect - 1) * (-area.log()).clamp(max=math.log(4 / 3))).exp()
    height, width = (S * (area * aspect).sqrt()).round(), (S * (area / aspect).sqrt()).round()
    boxes = torch.stack([top * (S - height + 1), left * (S - width + 1), height, width], 1).int().tolist()  # (B, 4)
    nearest = InterpolationMode.NEAREST_EXACT
    x = torch.stack([resized_crop(sample, *box, [S, S], nearest) for sample, box in zip(x, boxes, strict=True)])
    return torch.where(flip.view(-1, 1, 1, 1, 1) < 0.5, x, x.flip(-1))


def augment_cifar10_dvs(x, generator):
    """CIFAR10-DVS: random resized crop of 70 to 100 % of the area, horizontal flip, and one of roll, rotation, cutout.
    Roll: by up to 5 pixels along each side, what leaves at one edge comes back at the other. Rotation: by up to 30
    degrees, no events where it looks past the edges. Cutout: no events in a square of 16 pixels around any pixel."""
    x, S = augment_gesture(x, generator, smallest=0.7), x.shape[-1]
    changed, random = [], torch.rand(len(x), 3, device=x.device, generator=generator).tolist()
    for sample, (which, a, b) in zip(x, random, strict=True):
        if which < 1 / 3:
            sample = sample.roll((int(11 * a) - 5, int(11 * b) - 5), (-2, -1))
        elif which < 2 / 3:
            sample = rotate(sample, 60 * a - 30)
        else:
            top, left = int(S * a) - 8, int(S * b) - 8
            sample[..., max(0, top) : top + 16, max(0, left) : left + 16] = 0
        changed.append(sample)
    return torch.stack(changed)


AUGMENTATIONS = {"none": None, "cifar": augment_cifar, "gesture": augment_gesture, "cifar10-dvs": augment_cifar10_dvs}
