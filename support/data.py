"""Datasets, decoded once and held as integer tensors on the training device. Nothing is standardized, since the circuit
needs non-negative input: pixel intensities in [0, 1], or T frames of event counts (`events.py`). To add a dataset,
write a function like `digits` and give it a line in `LOADERS`."""

import hashlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.transforms.functional import pil_to_tensor, resize

from support import events, explained
from support.augment import AUGMENTATIONS

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs (EPS)
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
SOURCES = Path(__file__).read_bytes() + Path(events.__file__).read_bytes()  # of the decoders, as they were loaded


@dataclass
class Dataset:
    """Images (N, C, S, S) or frames (N, T, C, S, S) and labels (N,) of a training and a test set, on one device.
    Tensors or arrays of any integer type are taken; anything else raises a ValueError. Images are held as uint8, labels
    as int64, frames as whole numbers of fractions of an event (see `to_input`). chance: the accuracy of a network that
    always says the commonest class of the test set. augment_name: what is done to the training data, in words."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: list | int  # their names, in the order of the labels, or only how many there are
    augment: object = None  # of a batch in training: a name, or a function (float batch, generator) -> batch

    def __post_init__(self):
        names = range(self.classes) if isinstance(self.classes, (int, np.integer)) else self.classes
        self.classes = [str(name) for name in names]
        self.n_classes = len(self.classes)
        if self.n_classes < 2:
            raise ValueError("there is only one class: there is nothing to tell apart")
        self.train_x, self.train_y = self._checked("training", self.train_x, self.train_y)
        self.test_x, self.test_y = self._checked("test", self.test_x, self.test_y)
        shape, of_test = list(self.train_x.shape[1:]), list(self.test_x.shape[1:])
        if shape != of_test:
            raise ValueError(f"training samples have the shape {shape}, test samples {of_test}: make them alike")
        self.in_channels = shape[-3]
        self.chance = self.test_y.bincount().max().item() / len(self.test_y)
        if self.augment is not None and not callable(self.augment):
            names = ("none", "cifar") if self.train_x.dim() == 4 else ("none", "gesture", "cifar10-dvs")
            if not isinstance(self.augment, str) or self.augment not in names:
                raise ValueError(f"these data can be augmented by {', '.join(names)}, not by {self.augment}")
            self.augment = AUGMENTATIONS[self.augment]
        self.augment_name = getattr(self.augment, "__name__", str(self.augment or "none"))

    def _checked(self, split, x, y):
        """Samples and labels as they are held."""
        came = f"of type {type(x).__name__} with labels of type {type(y).__name__}"
        with explained(f"the {split} set is {came}, not tensors or arrays of numbers"):
            x, y = (torch.as_tensor(v.copy() if isinstance(v, np.ndarray) else v) for v in (x, y))  # not read-only
        came = f"{x.dtype} {tuple(x.shape)} with labels {y.dtype} {tuple(y.shape)}"
        right = x.dim() in (4, 5) and x.shape[-1] == x.shape[-2] and x.numel() > 0 and y.shape == x.shape[:1]
        if right and not (x.is_floating_point() or y.is_floating_point()):
            x, y = x if x.dtype in (torch.uint8, torch.int16, torch.int32) else x.long(), y.long()
            came += f", from {x.min()} to {x.max()} with labels from {y.min()} to {y.max()}"
            if 0 <= x.min() and (x.dim() == 5 or x.max() <= 255) and 0 <= y.min() and y.max() < self.n_classes:
                return x.byte() if x.dim() == 4 else x, y
        want = f"images (N, C, S, S) from 0 to 255, frames (N, T, C, S, S); labels (N,) from 0 to {self.n_classes - 1}"
        raise ValueError(f"the {split} set is {came}; expected whole numbers, not standardized: {want}")


def load(name, root="./data", image_size=32, device="cpu", T=16, augment=None):
    """A dataset by name (see `LOADERS`) from the folder `root`, on the device, of side `image_size`, recordings as T
    frames. augment: a name in `AUGMENTATIONS`; None or "auto": what is usual. A ValueError or OSError says where."""
    if name not in LOADERS:
        raise ValueError(f"unknown data {name!r}: choose from {', '.join(LOADERS)}")
    found = LOADERS[name](Path(root).expanduser().absolute(), image_size, T)
    try:
        *splits_and_classes, own = found
        dataset = Dataset(*splits_and_classes, augment=own if augment in (None, "auto") else augment)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the loader of {name} has to return six values, as `digits` does: {error}") from None
    for part in ("train_x", "train_y", "test_x", "test_y"):
        setattr(dataset, part, getattr(dataset, part).to(device))
    return dataset


def to_input(x):
    """Samples as they are held -> float32, of the same shape: intensities in [0, 1], or numbers of events, >= 0."""
    return x.float() / (255 if x.dim() < 5 else events.parts(x.shape[-1]) ** 2)


def digits(root, size, T):
    """Scikit-learn's digits, 8x8 pixels of 17 grey levels, enlarged; a fifth of each class is the test set. Each loader
    takes the folder of the data, the images' side in pixels and the number of time steps, and returns the arguments of
    `Dataset`: training images (N, C, size, size), labels (N,), test images, labels, classes, augment."""
    found = load_digits()
    x = resize(torch.from_numpy(found.images).float()[:, None] / 16, [size, size]).mul(255).round().byte()
    train, test = train_test_split(range(len(x)), test_size=0.2, stratify=found.target, random_state=0)
    return x[train], found.target[train], x[test], found.target[test], 10, None


def downloaded(kind, own, root, size, T):
    """What torchvision downloads on first use: `kind` is its class there, `own` the augmentation."""
    if not root.parent.is_dir():
        raise OSError(f"{kind.__name__} is not in {root}, and nothing is downloaded there: {root.parent} is no folder")
    if not root.is_dir():
        print(f"there is no {root}: {kind.__name__} is downloaded into it; --data-root says where else it is")
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10)  # or a dead connection would keep the reader waiting
        sets = [kind(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:  # of a damaged file: AssertionError, ValueError, ...
        for file in [*root.glob("*.gz"), *root.glob("cifar-*/*"), *root.glob("*/raw/*")]:
            content_of(file)  # refuses pointers
        for empty in (root / kind.__name__ / "raw", root / kind.__name__, root):
            with suppress(OSError):  # it is none, or it is not empty
                empty.rmdir()
        advice = f"put the official {getattr(kind, 'filename', 'files')} there, or use --data digits"
        why = f"{kind.__name__} is not in --data-root {root}, or damaged, and cannot be downloaded"
        raise OSError(f"{why}: {advice} ({' '.join(str(error).split())})") from None
    finally:
        socket.setdefaulttimeout(before)
    splits = []
    for part in sets:
        x = torch.as_tensor(part.data)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)  # (N, C, H, W)
        splits += [torch.cat([resize(x.float(), [size, size]).round().byte() for x in x.split(1000)]), part.targets]
    return *splits, sets[0].classes, own


def recordings(name, own, root, size, T):
    """Event cameras (see events.py); `own`: the augmentation."""
    *found, decode = events.recordings(name, root, size, T)
    return *_decoded(*found, (T, 2, size, size), decode), own


def images(own, root, size, T):
    """Images in train/<class>/ and test/<class>/, or val/<class>/ where test/ has no class folders, so no labels."""
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    train = _listing(root / "train")
    classes = sorted({name for _, name in train})
    test = root / "test"
    if (root / "val").is_dir() and not any(normalize("NFC", entry.name) in classes for entry in test.glob("*")):
        test = root / "val"
    return *_decoded(root, train, _listing(test), classes, (3, size, size), partial(_decode, size=size)), own


def _listing(folder):
    """Pairs (image file, name of its class) of a folder of class folders, in alphabetical order."""
    if (folder / "val_annotations.txt").is_file():  # of TinyImageNet: in each line an image, its class and a box
        lines = (folder / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
        return [(folder / "images" / line.split("\t")[0], "".join(line.split("\t")[1:2])) for line in lines]
    files = sorted(folder / name for name in glob("*/**/*", root_dir=folder, recursive=True))  # nothing that is hidden
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"no images in {folder}/<class>/: wanted are train/<class>/ and test/<class>/ or val/<class>/")
    if max(len(file.parts) for file in found) > len(folder.parts) + 30:
        raise ValueError(f"{folder}: a link leads back to a folder above it")
    others = [file for file in files if file.suffix.lower() not in SUFFIXES and file.is_file()]
    if others:
        print(f"{folder}: {len(others)} files that are no images by their names are left out, e.g. {others[0]}")
    return [(file, normalize("NFC", file.relative_to(folder).parts[0])) for file in found]


def _decode(file, size):
    """An image file, of an animated one the first image, -> (3, size, size) uint8. Transparency is left out."""
    with Image.open(file, formats=FORMATS) as image:
        is_tiff, image = image.format == "TIFF", ImageOps.exif_transpose(image)  # turned as the camera was held
        if image.mode[0] in "IF":  # more than 8 bits, which Pillow would cut off at 255
            low, high = image.convert("F").getextrema()
            if image.mode == "F" or low < 0 or high > 65535 or (is_tiff and high < 4096):
                raise ValueError(f"its pixels go from {low} to {high}: what is white is not clear, save it with 8 bits")
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        return pil_to_tensor(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def _decoded(root, train, test, classes, shape, decode):
    """Pairs (file, name of its class) for training and testing -> the first five values that a loader returns.
    decode(file) -> (*shape) takes minutes in all: its results are kept in `root`, by a checksum of files, decoder."""
    if odd := sorted({name for _, name in test} ^ {name for _, name in train}):
        raise ValueError(f"{root}: the class {odd[0]!r} has no training image or no test image")

    def decode_or_say_which(file):
        try:
            return decode(file)
        except BaseException as error:  # a foreign file makes a decoder fail in many ways, that of AEDAT4 panic
            raise ValueError(f"{file} cannot be read: {error or type(error).__name__}") from None

    files = [file for file, _ in train + test]
    names = [os.path.relpath(file, root) for file in files]
    cache = f".decoded-{'x'.join(map(str, shape))}"
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda file: hashlib.sha256(content_of(file)).digest(), files)
        key = hashlib.sha256(SOURCES + repr([names, *sums]).encode()).hexdigest()[:32]
        try:
            with np.load(root / f"{cache}-{key}.npz") as found:
                x = found["x"]  # out of a zip file, so that damage is noticed
        except Exception:  # there is none, or it is damaged
            print(f"decoding {len(files):,} files of {root} ...", flush=True)
            x = torch.stack(list(pool.map(decode_or_say_which, files))).numpy()
            part = root / f"{cache}-{os.getpid()}.npz"
            try:
                for old in root.glob(f"{cache}[-.]*"):
                    old.unlink()
                np.savez(part, x=x)
                os.replace(part, root / f"{cache}-{key}.npz")  # whole or not at all
            except OSError as error:
                print(f"what was decoded cannot be kept in {root} ({error}): going on without")
                with suppress(OSError):
                    part.unlink()
    x, y = torch.from_numpy(x), torch.tensor([classes.index(name) for _, name in train + test])
    return x[: len(train)], y[: len(train)], x[len(train) :], y[len(train) :], classes


def content_of(file):
    """The bytes of a file. A Git LFS pointer in its place is a ValueError."""
    content = Path(file).read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the file itself: run git lfs pull")
    return content


def identity(dataset):
    """What a run remembers of its data: classes, shape of a sample, checksums of both sets with labels and order."""
    found = dict(classes=dataset.classes, shape=list(dataset.train_x.shape[1:]))
    for name, x, y in (("train", dataset.train_x, dataset.train_y), ("test", dataset.test_x, dataset.test_y)):
        checksum = hashlib.blake2b(x.cpu().contiguous().numpy(), digest_size=16)
        checksum.update(y.cpu().contiguous().numpy())
        found[name] = f"{len(y)} samples, checksum {checksum.hexdigest()}"
    return found


def differences(before, now, but=()):
    """How two of `identity` differ, in words, "" if they do not; `but`: what may differ, "train", "test", "shape"."""
    words = dict(classes="the classes have other names or another order", shape="a sample has another shape")
    words |= dict(train="the training set has other contents", test="the test set has other contents")
    return "; ".join(words[key] for key in words if before[key] != now[key] and key not in but)


def epoch_order(config, dataset, epoch):
    """The batches of an epoch, indices of samples, the incomplete last one left out: (batches, batch size)."""
    n, size = len(dataset.train_y), config["batch_size"]
    if size > n:
        raise ValueError(f"a batch of {size} is larger than the training set of {n}: give --batch-size {n} or less")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch))
    return order[: n // size * size].view(-1, size).to(dataset.train_y.device)


def training_batch(config, dataset, indices, step):
    """Input and labels of a step. The augmentation depends on seed and step alone, so a resumed run repeats it."""
    x = to_input(dataset.train_x[indices])
    if dataset.augment:
        given = x
        x = dataset.augment(x, torch.Generator(x.device).manual_seed((config["seed"] * 1_000_003 + step) % 2**32))
        if not torch.is_tensor(x) or (x.shape, x.dtype) != (given.shape, given.dtype):
            came = f"{x.dtype} {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
            raise ValueError(f"augmentation made {came} of {given.dtype} {tuple(given.shape)}, which it has to return")
    return x, dataset.train_y[indices]


def first_batch(config, dataset):
    """Input, (B, C, H, W) or frames (B, T, C, H, W), and labels, (B,), of the first training step."""
    return training_batch(config, dataset, epoch_order(config, dataset, 0)[0], step=0)


def sample(dataset, T, n=256):
    """Some test samples (at most n, fewer if T is large), evenly spaced over the set, as input, and their labels."""
    step = -(-len(dataset.test_x) // max(1, min(n, 1000 // T)))
    return to_input(dataset.test_x[::step]), dataset.test_y[::step]


# `folder` has no augmentation of its own: a flip would make an arrow to the right of one to the left.
LOADERS = {"digits": digits, "tinyimagenet": partial(images, "cifar"), "folder": partial(images, None)}
LOADERS |= {"cifar10": partial(downloaded, CIFAR10, "cifar"), "cifar100": partial(downloaded, CIFAR100, "cifar")}
LOADERS |= {"mnist": partial(downloaded, MNIST, None), "fashion-mnist": partial(downloaded, FashionMNIST, None)}
LOADERS |= {"dvs-gesture": partial(recordings, "dvs-gesture", "gesture")}
LOADERS |= {"cifar10-dvs": partial(recordings, "cifar10-dvs", "cifar10-dvs")}
