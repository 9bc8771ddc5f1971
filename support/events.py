"""Recordings of event cameras (CIFAR10-DVS, DVS-Gesture) as T frames of event counts: one frame a time step, one
channel a polarity. Tonic finds the files; events are counted here, since in its int16 the counts of a pixel wrap."""

import math
from threading import Lock

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from support import explained

SENSOR = 128  # both event cameras are 128 x 128 pixels
PARSER = Lock()  # of the header of an .npy file: Python's was seen to fail in several threads at once


def recordings(name, root, size, T):
    """What there is of a dataset of recordings, and how each becomes T frames of the same number of events. Returns
    their folder, pairs (file, class) for training and for testing, the names of the classes, and a function that
    decodes a file to frames of whole numbers (T, 2, S, S). Without tonic or recordings there is a ValueError."""
    with explained(f"--data {name} needs tonic: pip install -r requirements-events.txt"):
        import aedat  # noqa: F401  tonic reads CIFAR10-DVS through it
        import tonic
    gesture = name == "dvs-gesture"
    kind = tonic.datasets.DVSGesture if gesture else tonic.datasets.CIFAR10DVS
    splits = [dict(train=True), dict(train=False)] if gesture else [{}]
    folder = root / kind.__name__
    # Unless its archives lie beside what was unpacked from them, tonic starts a long download: read what is there.
    local = type(kind.__name__, (kind,), {"_check_exists": lambda self: True})
    names = dict(enumerate(kind.classes))
    with explained(f"{folder} has something in it that is not of {kind.__name__}"):  # a user, light, class
        sets = [local(str(root), **split) for split in splits]
        found = [[(file, names[i]) for file, i in sorted(zip(part.data, part.targets, strict=True))] for part in sets]
    if not all(map(len, sets)):
        calls = "; ".join(f"{kind.__name__}({str(root)!r}{', train=False' * i})" for i in range(len(sets)))
        how = f'python -c "from tonic.datasets import {kind.__name__}; {calls}"'
        raise ValueError(f"no recordings of {name} in {folder}: give --data-root, or let tonic download them: {how}")
    if not gesture:  # no official split: a tenth of each class is the test set, drawn once for all
        found = train_test_split(found[0], test_size=0.1, stratify=[name for _, name in found[0]], random_state=0)
    weights = area_weights(size)

    def decode(file):
        if gesture:  # tonic would cast whatever is in the file to events
            with PARSER:
                x, y, p, t = np.load(file).T
        else:
            events = tonic.io.read_aedat4(file)
            t, x, y, p = (events[field] for field in events.dtype.names)
        frames = torch.from_numpy(weights @ count(x, y, p, t, T).astype(float) @ weights.T)
        smallest = next(t for t in (torch.uint8, torch.int16, torch.int32) if frames.max() <= torch.iinfo(t).max)
        return frames.to(smallest)

    return folder, *found, list(kind.classes), decode


def count(x, y, p, t, T):
    """Events -> how many there are at each pixel in each frame, (T, 2, SENSOR, SENSOR), int64.
    Of n events, in order of time, each frame receives n // T, and the last n % T are left out, as in tonic's ToFrame.
    Polarities of -1 and 1 are taken as 0 and 1. Fewer than T events, another pixel, another polarity: a ValueError."""
    if len(t) < T:
        raise ValueError(f"{len(t)} events cannot make T={T} frames")
    for name, values, known in (("x", x, range(SENSOR)), ("y", y, range(SENSOR)), ("polarity", p, (-1, 0, 1))):
        if len(odd := np.setdiff1d(values, known)):
            raise ValueError(f"the {name} of an event is {odd[0]}; it is from {known[0]} to {known[-1]}")
    order = np.argsort(t, kind="stable")[: len(t) // T * T]
    frame = np.arange(len(order)) // (len(t) // T)
    pixel = y.astype(np.int64) * SENSOR + x.astype(np.int64)
    index = (frame * 2 + (p[order] > 0)) * SENSOR**2 + pixel[order]
    return np.bincount(index, minlength=T * 2 * SENSOR**2).reshape(T, 2, SENSOR, SENSOR)


def parts(size):
    """In how many parts a sensor's pixel is cut along a side, so that each of `size` cells is made of whole parts."""
    return size // math.gcd(size, SENSOR)


def area_weights(size):
    """(size, SENSOR): how many parts of each row of pixels lie in each row of cells, `weights @ frame @ weights.T`.
    An event is shared out among the cells that its pixel overlaps, by area, so that no cell is favoured: at 48 x 48 a
    cell is 2 2/3 pixels wide. What is stored are whole numbers of parts of an event, `parts(size)`^2: ninths at 48."""
    cell = np.arange(SENSOR * parts(size)) // (SENSOR * parts(size) // size)  # of each part of a row of pixels
    return (cell.reshape(SENSOR, -1) == np.arange(size)[:, None, None]).sum(2).astype(float)
