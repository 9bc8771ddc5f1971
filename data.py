"""Datasets, held decoded as integer tensors on the training device, and augmentation of a batch there.

E-I circuits need non-negative input, so nothing is standardized: images go into the network as pixel intensities in
[0, 1], and what an event camera saw as T frames of event counts, one frame a time step, one channel a polarity.
"""

import hashlib
import math
import os
import socket
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100

DATASETS = ["digits", "cifar10", "cifar100", "tinyimagenet", "folder", "cifar10-dvs", "dvs-gesture"]
SENSOR = 128  # both event cameras are 128 x 128 pixels


@dataclass
class Dataset:
    """Images (N, C, S, S) or frames (N, T, C, S, S) and labels (N,) int64 of a training and a test set, on one device.

    Images are uint8. Frames are whole numbers of fractions of an event (see `to_input`): uint8 if all of them fit, else
    int16 or int32 (uint16 has few operations in torch). So one tensor holds CIFAR10-DVS in 0.9 GB, half of float32.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    n_classes: int
    augment: Callable | None  # of a batch in training: (float batch, generator) -> batch

    @property
    def in_channels(self):
        return self.train_x.shape[-3]


def load(name, root="./data", image_size=32, device="cpu", T=16):
    """A dataset by name, decoded and on the device.

    Args:
        name: "digits" (scikit-learn's 1,797 handwritten digits, offline), "cifar10", "cifar100" (torchvision;
            downloaded to `root` on first use), "tinyimagenet" (as distributed, `root` or `root`/tiny-imagenet-200),
            "folder" (`root`/train/<class>/*, `root`/test/<class>/* or val/...), "cifar10-dvs" and "dvs-gesture" (event
            cameras, read through tonic from `root`/CIFAR10DVS and `root`/DVSGesture).
        root: where the data are.
        image_size: side in pixels to which images or frames are brought.
        device: where the tensors go.
        T: frames of an event recording; for images without meaning.

    Raises:
        ValueError, OSError: the data are missing, or not what they should be; names the folder or the file.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data {name!r}: choose from {', '.join(DATASETS)}")
    if name == "digits":
        splits, n_classes = _digits(image_size), 10
    elif name in ("folder", "tinyimagenet"):
        train, train_y, test, test_y, n_classes = (_folder if name == "folder" else _tinyimagenet)(Path(root))
        x = _cached(Path(root), train + test, (3, image_size, image_size), partial(_decode, size=image_size))
        splits = x[: len(train)], train_y, x[len(train) :], test_y
    elif name in ("cifar10-dvs", "dvs-gesture"):
        splits, n_classes = _events(name, Path(root), image_size, T)
    else:
        splits, n_classes = _cifar(name, root, image_size), 10 if name == "cifar10" else 100
    special = {"digits": None, "cifar10-dvs": augment_cifar10_dvs, "dvs-gesture": augment_gesture}
    return Dataset(*(tensor.to(device) for tensor in splits), n_classes, special.get(name, augment))


def describe(dataset):
    """How many samples of which shape there are, in words."""
    size = "x".join(map(str, dataset.train_x.shape[1:]))
    return f"{len(dataset.train_y):,} training, {len(dataset.test_y):,} test samples of {size}"


def to_input(x):
    """What a dataset holds -> float32 that a network receives, of the same shape.

    Images (N, C, S, S): intensities in [0, 1]. Frames (N, T, C, S, S): numbers of events, >= 0, fractions among them
    (see `_area_weights`).
    """
    return x.float().div_(255 if x.dim() < 5 else _parts(x.shape[-1]) ** 2)


def _resized(x, size):
    """Float images (N, C, H, W) -> (N, C, size, size)."""
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True) if x.shape[-2:] != (size, size) else x


def _digits(size):
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16  # 17 grey levels
    x = _resized(x, size).mul(255).round().clamp(0, 255).byte()
    y = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(y)), test_size=0.2, stratify=digits.target, random_state=0)
    return x[train], y[train], x[test], y[test]


def _cifar(name, root, size):
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    socket.setdefaulttimeout(10)  # or a dead connection would keep the reader waiting
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        sets = [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError) as error:
        raise OSError(
            f"{name} is not in {root} and cannot be downloaded ({error}): put the official {kind.filename} there, "
            "or use --data folder --data-root DIR with train/<class>/ and test/<class>/ images (or --data digits)"
        ) from None
    finally:
        socket.setdefaulttimeout(None)
    splits = []
    for part in sets:
        x = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        if size != 32:
            x = torch.cat([_resized(chunk.float(), size).round().clamp(0, 255).byte() for chunk in x.split(1000)])
        splits += [x, torch.tensor(part.targets)]
    return splits


def _folder(root):
    """Files and labels for training, the same for testing, number of classes."""
    test = root / ("test" if (root / "test").is_dir() or not (root / "val").is_dir() else "val")
    (train_files, train_y, classes), (test_files, test_y, test_classes) = _listing(root / "train"), _listing(test)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[0]
        raise ValueError(f"{root}: the class {odd!r} is not in both train and {test.name}")
    return train_files, train_y, test_files, test_y, len(classes)


def _tinyimagenet(root):
    """train/<wnid>/images/*, val/images/* and val/val_annotations.txt -> the same; classes are the sorted wnids."""
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise ValueError(
            f"no TinyImageNet in {root} (there is no {annotations}): unpack tiny-imagenet-200.zip, from "
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip, there"
        )
    train_files, train_y, classes = _listing(root / "train", "images")
    test_files, test_y = [], []
    for line in annotations.read_text().splitlines():  # val_0.JPEG, wnid, and a bounding box, between tabs
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in classes or not (annotations.parent / "images" / name).is_file():
            raise ValueError(f"{annotations} says {line!r}, but there is no val/images/{name} or no class {wnid!r}")
        test_files.append(annotations.parent / "images" / name)
        test_y.append(classes.index(wnid))
    if not test_y:
        raise ValueError(f"{annotations} names no image")
    return train_files, train_y, test_files, torch.tensor(test_y), len(classes)


def _events(name, root, size, T):
    """Recordings of an event camera -> T frames each of the same number of events, (N, T, 2, S, S).

    A recording of n events gives n // T to each frame, in order of time, and the last n % T are left out (tonic's
    ToFrame with n_event_bins). DVS-Gesture has its official split; of CIFAR10-DVS a tenth of each class, drawn once and
    for all, is the test set.
    """
    try:
        import aedat  # noqa: F401  tonic reads CIFAR10-DVS through it
        import tonic
    except ImportError as error:
        raise ValueError(f"--data {name} needs tonic ({error}): pip install -r requirements-events.txt") from None
    kind = tonic.datasets.DVSGesture if name == "dvs-gesture" else tonic.datasets.CIFAR10DVS
    splits = [dict(train=True), dict(train=False)] if name == "dvs-gesture" else [{}]
    folder = root / kind.__name__
    to_frames = tonic.transforms.ToFrame((SENSOR, SENSOR, 2), n_event_bins=T)
    # Unless its archives lie beside what was unpacked from them, tonic starts a long download: read what is there.
    local = type(kind.__name__, (kind,), {"_check_exists": lambda self: True})
    try:
        parts = [local(str(root), **split) for split in splits]
    except (ValueError, KeyError) as error:  # folders and files are named by user, light and class
        raise ValueError(f"{folder} has something in it that is not of {kind.__name__}: {error}") from None
    if not all(map(len, parts)):
        calls = "; ".join(f"{kind.__name__}({str(root)!r}{', train=False' * i})" for i in range(len(parts)))
        raise ValueError(
            f"no recordings of {name} in {folder}: let tonic download and unpack them, with "
            f'python -c "from tonic.datasets import {kind.__name__}; {calls}"'
        )
    found = {part.data[i]: (part, i) for part in parts for i in sorted(range(len(part)), key=part.data.__getitem__)}
    files, y = list(found), torch.tensor([part.targets[i] for part, i in found.values()])
    if y.max() >= len(kind.classes):
        raise ValueError(f"{files[y.argmax()]} is of class {y.max()}, but {name} has {len(kind.classes)}, from 0")
    weights = _area_weights(size)

    def decode(file):
        part, i = found[file]
        try:
            events = part[i][0]
            if len(events) < T:
                raise ValueError(f"{len(events)} events cannot make T={T} frames")
            frames = to_frames(events).view(np.uint16).astype(float)  # counted as int16, a very busy pixel wraps round
        except BaseException as error:  # a foreign file fails in many ways, one of them a panic of the AEDAT4 decoder
            raise ValueError(f"{file} cannot be read as a recording of {name}: {error}") from None
        return _narrow(torch.from_numpy(weights @ frames @ weights.T))

    x = _cached(folder, files, (T, 2, size, size), decode)
    train, test = list(range(len(parts[0]))), list(range(len(parts[0]), len(y)))
    if not test:
        train, test = train_test_split(train, test_size=0.1, stratify=y, random_state=0)
    return (x[train], y[train], x[test], y[test]), len(kind.classes)


def _parts(size):
    """In how many parts a sensor's pixel is cut along a side, so that each of `size` cells is made of whole parts."""
    return size // math.gcd(size, SENSOR)


def _area_weights(size):
    """(size, SENSOR): how many parts of each row of pixels lie in each row of cells, `weights @ frame @ weights.T`.

    An event is shared out among the cells that its pixel overlaps, by area, so nothing is lost and no cell is favoured:
    at 48 x 48 a cell is 2 2/3 pixels wide. What is stored are whole numbers, of events cut in `_parts(size)`^2: ninths
    at 48, sums of 2 x 2 pixels at 64.
    """
    parts = _parts(size)
    pixel_of_part = np.arange(SENSOR * parts) // parts
    cell_of_part = np.arange(SENSOR * parts) // (SENSOR * parts // size)
    weights = np.zeros((size, SENSOR))
    np.add.at(weights, (cell_of_part, pixel_of_part), 1)
    return weights


def _narrow(x):
    """Whole numbers >= 0 in the smallest type of uint8, int16 and int32 that holds them."""
    return x.to(next(t for t in (torch.uint8, torch.int16, torch.int32) if x.max() <= torch.iinfo(t).max))


def _cached(root, files, shape, decode):
    """decode(file) -> (*shape) of each file, stacked, in the widest type among them.

    Decoding many files takes minutes, so it is done once: kept in `root`, under a key that changes with any file and
    the shape.
    """
    stamp = [(str(f), s.st_size, s.st_mtime_ns) for f in files for s in [os.stat(f)]]
    key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]
    cache = root / f".decoded-{'x'.join(map(str, shape))}-{key}.pt"
    x = _read_cache(cache, (len(files), *shape))
    if x is not None:
        return x
    print(f"decoding {len(files):,} files of {root} ...", flush=True)
    x = torch.empty(len(files), *shape, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, sample in enumerate(pool.map(decode, files)):
            x = x.to(torch.promote_types(x.dtype, sample.dtype))
            x[i] = sample
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        torch.save(x, temporary)
        temporary.replace(cache)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        print(f"what was decoded cannot be cached in {root} ({str(error).splitlines()[0]}): going on without")
    return x


def _listing(folder, inner=""):
    """Image files, labels and class names of a folder of class folders, in alphabetical order.

    The images of a class are in its folder, or in the folder `inner` of that.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: images are read from train/<class>/ and test/<class>/ or val/<class>/")
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no class folders in it")
    files, labels = [], []
    for label, name in enumerate(classes):
        of_class = sorted(f for f in (folder / name / inner).rglob("*") if f.is_file() and not f.name.startswith("."))
        if not of_class:
            raise ValueError(f"the class folder {folder / name / inner} has no image in it")
        files += of_class
        labels += [label] * len(of_class)
    return files, torch.tensor(labels), classes


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs (EPS)
warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is an error, below


def _decode(file, size):
    """An image file, of an animated one the first image, -> (3, size, size) uint8."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"it says that it has {image.width} x {image.height} pixels, which is too large")
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits a channel")
            if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # a decoder fails on a foreign file in many ways; all of them mean the same
        raise ValueError(f"{file} cannot be read as an image: {error}") from None
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def _read_cache(cache, shape):
    try:
        with zipfile.ZipFile(cache) as archive:
            intact = archive.testzip() is None
        x = torch.load(cache, weights_only=True) if intact else None
    except Exception:  # absent or damaged: decode again
        return None
    return x if isinstance(x, torch.Tensor) and x.shape == shape and not x.is_floating_point() else None


def _uniform(x, generator, low, high):
    """A random number for each sample of x: (B, 1)."""
    return torch.rand(len(x), 1, device=x.device, generator=generator) * (high - low) + low


def _select(x, rows, columns):
    """x[b, ..., rows[b, i, j], columns[b, i, j]], each of the shape (B, S, S) or expanded to it: of the shape of x."""
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    return x[samples, ..., rows, columns].movedim((1, 2), (-2, -1))


def augment(x, generator):
    """CIFAR augmentation (paper, training details): random crop with padding 4, horizontal flip, cutout.

    Cutout: with probability 1/2 a rectangle of 2 to 40 % of the area, aspect ratio 0.4 to 2.5 (log-uniform), is filled
    with random values in [0, 1].

    Args:
        x: (B, C, S, S) float in [0, 1].
        generator: of random numbers, on the device of x.

    Returns:
        (B, C, S, S) in [0, 1]; every image is treated on its own.
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
    """DVS-Gesture: random resized crop of 50 to 100 % of the area and horizontal flip, the same for all frames.

    The flip is in the paper's recipe, although it makes a left-hand gesture of a right-hand one.

    Args:
        x: (B, T, C, S, S) event counts, float.
        generator: of random numbers, on the device of x.

    Returns:
        (B, T, C, S, S) event counts; every sample is treated on its own.
    """
    rows, columns = _crop_and_flip(x, generator, 0.5)
    return _select(x, rows[:, :, None], columns[:, None, :])


def augment_cifar10_dvs(x, generator):
    """CIFAR10-DVS: random resized crop of 70 to 100 % of the area, horizontal flip, and one of roll, rotation, cutout.

    Roll: by up to 5 pixels along each side, what leaves at one edge comes back at the other. Rotation: by up to 30
    degrees, no events where it looks past the edges. Cutout: no events in a square of 16 pixels around any pixel.
    Arguments and result as for `augment_gesture`.
    """
    S = x.shape[-1]
    rows, columns = _crop_and_flip(x, generator, 0.7)

    def uniform(low, high):
        return _uniform(x, generator, low, high)[:, :, None]

    pixels = torch.arange(S, device=x.device)
    which, middle = uniform(0, 3).floor(), (S - 1) / 2
    angle = uniform(-30, 30).deg2rad() * (which == 1)
    down, right = (uniform(-5, 6).floor() * (which == 0) for _ in range(2))
    # Where in the cropped frame each pixel (i, j) of the result looks: no interpolation, hence one choice of pixels.
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
    uniform = partial(_uniform, x, generator)
    area = uniform(smallest, 1)
    aspect = (uniform(-1, 1) * (-area.log()).clamp(max=math.log(4 / 3))).exp()
    chosen = []
    for share in ((area * aspect).sqrt(), (area / aspect).sqrt()):
        side = (share * S).round().clamp(1, S)
        first = (uniform(0, 1) * (S - side + 1)).floor()
        chosen.append((first + (torch.arange(S, device=x.device) + 0.5) * side / S).long())
    rows, columns = chosen
    return rows, torch.where(uniform(0, 1) < 0.5, columns, columns.flip(1))


def fingerprint(dataset):
    """A checksum of the training images and labels, also of their order."""
    y, parts = dataset.train_y, dataset.train_x.split(1000)  # at 8 bytes a pixel, all at once would take much memory
    sums = torch.cat([x.flatten(1).sum(1, dtype=torch.int64) for x in parts])
    return ((sums + y) * torch.arange(1, len(y) + 1, device=y.device)).sum().item()


def epoch_order(config, dataset, epoch):
    """The batches of an epoch, indices of samples, the incomplete last one left out: (batches, batch size)."""
    n, size = len(dataset.train_y), config["batch_size"]
    generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)[: n // size * size]
    return order.view(-1, size).to(dataset.train_y.device)


def training_batch(config, dataset, indices, step):
    """Input and labels of a step. The augmentation depends on seed and step alone, so a resumed run repeats it."""
    x = to_input(dataset.train_x[indices])
    if dataset.augment:
        x = dataset.augment(x, torch.Generator(x.device).manual_seed((config["seed"] * 1_000_003 + step) % 2**32))
    return x, dataset.train_y[indices]


def sample(dataset, T, n=256):
    """Some test samples (at most n, fewer if T is large), evenly spaced over the set, as input, and their labels."""
    step = -(-len(dataset.test_x) // max(1, min(n, 1000 // T)))
    return to_input(dataset.test_x[::step]), dataset.test_y[::step]
