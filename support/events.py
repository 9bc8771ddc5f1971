"""Recordings of event cameras (CIFAR10-DVS, DVS-Gesture) as frames. A reader of the paper may skip this file.

What an event camera saw becomes T frames of event counts: one frame a time step, one channel a polarity.
"""

import math

import numpy as np
import torch

EVENT_DATA = ["cifar10-dvs", "dvs-gesture"]
SENSOR = 128  # both event cameras are 128 x 128 pixels


def recordings(name, root, size, T):
    """What there is of a dataset of recordings, and how each becomes T frames of the same number of events.

    A recording of n events gives n // T to each frame, in order of time, and the last n % T are left out, as in tonic's
    ToFrame with n_event_bins.

    Returns:
        folder: where the recordings are.
        files: their paths.
        y: their labels, (N,).
        decode: a function, file -> frames (T, 2, S, S), whole numbers of fractions of an event (see `area_weights`).
        n_train: the first so many are the training set; if these are all, there is no official split.
        classes: their names.

    Raises:
        ValueError: tonic is not installed, there are no recordings, or a file is not one.
    """
    try:
        import aedat  # noqa: F401  tonic reads CIFAR10-DVS through it
        import tonic
    except ImportError as error:
        raise ValueError(f"--data {name} needs tonic ({error}): pip install -r requirements-events.txt") from None
    kind = tonic.datasets.DVSGesture if name == "dvs-gesture" else tonic.datasets.CIFAR10DVS
    splits = [dict(train=True), dict(train=False)] if name == "dvs-gesture" else [{}]
    folder = root / kind.__name__
    # Unless its archives lie beside what was unpacked from them, tonic starts a long download: read what is there.
    local = type(kind.__name__, (kind,), {"_check_exists": lambda self: True})
    try:
        sets = [local(str(root), **split) for split in splits]
    except (ValueError, KeyError) as error:  # folders and files are named by user, light and class
        raise ValueError(f"{folder} has something in it that is not of {kind.__name__}: {error}") from None
    if not all(map(len, sets)):
        calls = "; ".join(f"{kind.__name__}({str(root)!r}{', train=False' * i})" for i in range(len(sets)))
        raise ValueError(
            f"no recordings of {name} in {folder}: let tonic download and unpack them, with "
            f'python -c "from tonic.datasets import {kind.__name__}; {calls}"'
        )
    found = {part.data[i]: (part, i) for part in sets for i in sorted(range(len(part)), key=part.data.__getitem__)}
    files, y = list(found), torch.tensor([part.targets[i] for part, i in found.values()])
    if y.max() >= len(kind.classes):
        raise ValueError(f"{files[y.argmax()]} is of class {y.max()}, but {name} has {len(kind.classes)}, from 0")
    weights = area_weights(size)

    def decode(file):
        part, i = found[file]
        try:
            frames = count(load_gesture(file) if name == "dvs-gesture" else part[i][0], T).astype(float)
        except BaseException as error:  # a foreign file fails in many ways, one of them a panic of the AEDAT4 decoder
            raise ValueError(f"{file} cannot be read as a recording of {name}: {error}") from None
        return _narrow(torch.from_numpy(weights @ frames @ weights.T))

    return folder, files, y, decode, len(sets[0]), list(kind.classes)


def load_gesture(file):
    """The events of a DVS-Gesture recording as they are in the file; tonic would cast them, whatever they are."""
    columns = np.load(file)
    if columns.ndim != 2 or columns.shape[1] != 4:
        raise ValueError(f"it is an array of shape {columns.shape}, not (events, 4)")
    return dict(zip("xypt", columns.T, strict=True))


def count(events, T):
    """Events with fields x, y, p, t -> how many there are at each pixel, (T, 2, SENSOR, SENSOR), int64.

    What is unambiguous is put right: events that are not in order of time are sorted, polarities of -1 and 1 are taken
    as 0 and 1. Everything else is refused.

    Raises:
        ValueError: fewer than T events, times that are not numbers, a pixel beyond the sensor, another polarity.
    """
    t, p = np.asarray(events["t"]), np.asarray(events["p"])
    if len(t) < T:
        raise ValueError(f"{len(t)} events cannot make T={T} frames")
    if not np.isfinite(t.astype(float)).all():
        raise ValueError("the time of an event is not a number")
    position = {}
    for axis in "xy":
        position[axis] = np.asarray(events[axis])
        low, high = position[axis].min(), position[axis].max()
        if (position[axis] != np.floor(position[axis])).any():
            raise ValueError(f"{axis} of an event is not a whole number")
        if not (low >= 0 and high < SENSOR):  # also where it is not a number
            raise ValueError(
                f"{axis} of an event goes from {low} to {high}, but the sensor has pixels 0 to {SENSOR - 1}"
            )
    if not np.isin(p, (-1, 0, 1)).all() or ((p == 0).any() and (p == -1).any()):
        raise ValueError(f"polarities are 0 and 1, or -1 and 1, not {sorted(set(p.tolist()))[:5]}")
    order = np.argsort(t, kind="stable")[: len(t) // T * T]
    frame = np.arange(len(order)) // (len(t) // T)
    pixel = position["y"].astype(np.int64) * SENSOR + position["x"].astype(np.int64)
    index = (frame * 2 + (p[order] > 0)) * SENSOR**2 + pixel[order]
    return np.bincount(index, minlength=T * 2 * SENSOR**2).reshape(T, 2, SENSOR, SENSOR)


def parts(size):
    """In how many parts a sensor's pixel is cut along a side, so that each of `size` cells is made of whole parts."""
    return size // math.gcd(size, SENSOR)


def area_weights(size):
    """(size, SENSOR): how many parts of each row of pixels lie in each row of cells, `weights @ frame @ weights.T`.

    An event is shared out among the cells that its pixel overlaps, by area, so nothing is lost and no cell is favoured:
    at 48 x 48 a cell is 2 2/3 pixels wide. What is stored are whole numbers, of events cut in `parts(size)`^2: ninths
    at 48, sums of 2 x 2 pixels at 64.
    """
    n = parts(size)
    pixel_of_part = np.arange(SENSOR * n) // n
    cell_of_part = np.arange(SENSOR * n) // (SENSOR * n // size)
    weights = np.zeros((size, SENSOR))
    np.add.at(weights, (cell_of_part, pixel_of_part), 1)
    return weights


def _narrow(x):
    """Whole numbers >= 0 in the smallest type of uint8, int16 and int32 that holds them."""
    return x.to(next(t for t in (torch.uint8, torch.int16, torch.int32) if x.max() <= torch.iinfo(t).max))
