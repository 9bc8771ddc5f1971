"""Datasets, decoded once and held as integer tensors on the training device. A reader of the paper may skip this file.

The circuit needs non-negative input, so nothing is standardized: images go into the network as pixel intensities in
[0, 1], recordings of event cameras as T frames of event counts (`events.py`).

To add a dataset, write a function like `digits` and give it a line in `LOADERS`.
"""

import hashlib
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

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST

from support.augment import augment, augment_cifar10_dvs, augment_gesture
from support.console import replace
from support.events import EVENT_DATA, parts, recordings


@dataclass
class Dataset:
    """Images (N, C, S, S) or frames (N, T, C, S, S) and labels (N,) int64 of a training and a test set, on one device.

    Images are uint8. Frames are whole numbers of fractions of an event (see `to_input`): uint8 if all of them fit, else
    int16 or int32 (uint16 has few operations in torch). So one tensor holds CIFAR10-DVS in 0.9 GB, half of float32.

    Raises:
        ValueError: images or frames that are not whole numbers of at least 0, as standardized images are, or labels
            that are not those of the classes.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: list | int  # their names, in the order of the labels, or only how many there are
    augment: Callable | None = None  # of a batch in training: (float batch, generator) -> batch

    def __post_init__(self):
        if isinstance(self.classes, int):
            self.classes = [str(i) for i in range(self.classes)]
        if self.n_classes < 2:
            raise ValueError("there is only one class: there is nothing to tell apart")
        for split, x, y in (("training", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if len(x) == 0:
                raise ValueError(f"the {split} set is empty")
            if x.dim() == 4 and x.dtype != torch.uint8 and not x.is_floating_point() and x.max() > 255:
                raise ValueError(f"the {split} images have values up to {x.max()}: give them as 0 to 255 (uint8)")
            if x.is_floating_point() or x.dtype == torch.bool or (x.dtype != torch.uint8 and x.min() < 0):
                raise ValueError(
                    f"the {split} images are {x.dtype} from {x.min().item():.3g} to {x.max().item():.3g}; the circuit "
                    "needs non-negative input, so give them as whole numbers from 0 to 255 (uint8), not standardized"
                )
            if len(x) != len(y):
                raise ValueError(f"there are {len(x)} {split} images, but {len(y)} labels")
            if not (y.min() >= 0 and y.max() < self.n_classes):
                raise ValueError(
                    f"the {split} labels go from {y.min()} to {y.max()}, but there are {self.n_classes} classes, from 0"
                )

    @property
    def n_classes(self):
        return len(self.classes)

    @property
    def chance(self):
        """The accuracy of the best guess without looking: the share of the commonest class of the test set."""
        return self.test_y.bincount().max().item() / len(self.test_y)

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
    if name not in LOADERS:
        raise ValueError(f"unknown data {name!r}: choose from {', '.join(LOADERS)}")
    *splits, classes, of_batch = LOADERS[name](Path(root).expanduser(), image_size, T)
    return Dataset(*(tensor.to(device) for tensor in splits), classes, of_batch)


def describe(dataset):
    """How many samples of which shape there are, in words."""
    size = "x".join(map(str, dataset.train_x.shape[1:]))
    return f"{len(dataset.train_y):,} training, {len(dataset.test_y):,} test samples of {size}"


def to_input(x):
    """What a dataset holds -> float32 that a network receives, of the same shape.

    Images (N, C, S, S): intensities in [0, 1]. Frames (N, T, C, S, S): numbers of events, >= 0, fractions among them
    (see `events.area_weights`).
    """
    return x.float() / (255 if x.dim() < 5 else parts(x.shape[-1]) ** 2)


def _resized(x, size):
    """Float images (N, C, H, W) -> (N, C, size, size)."""
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True) if x.shape[-2:] != (size, size) else x


def digits(root, size, T):
    """Scikit-learn's digits, 8x8 pixels of 17 grey levels, enlarged; a fifth of each class is the test set.

    Each loader takes the folder of the data, the images' side in pixels and the number of time steps.

    Returns:
        Training images (N, C, size, size) uint8, their labels (N,) int64, test images, test labels, the names of the
        classes or their number, and the augmentation of a training batch (None: none).
    """
    found = load_digits()
    x = _resized(torch.from_numpy(found.images).float()[:, None] / 16, size).mul(255).round().clamp(0, 255).byte()
    y = torch.from_numpy(found.target).long()
    train, test = train_test_split(range(len(y)), test_size=0.2, stratify=found.target, random_state=0)
    return x[train], y[train], x[test], y[test], 10, None


def downloaded(name, root, size, T):
    """What torchvision downloads on first use."""
    kind, files, of_batch = {  # the class in torchvision, its files, the augmentation
        "cifar10": (CIFAR10, "cifar-10-python.tar.gz", augment),
        "cifar100": (CIFAR100, "cifar-100-python.tar.gz", augment),
        "mnist": (MNIST, "MNIST/raw/train-images-idx3-ubyte.gz and its three companions", None),
        "fashion-mnist": (FashionMNIST, "FashionMNIST/raw/train-images-idx3-ubyte.gz and its three companions", None),
    }[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # or a dead connection would keep the reader waiting
    try:
        root.mkdir(parents=True, exist_ok=True)
        sets = [kind(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:  # of a damaged file: AssertionError, ValueError, ...
        why = " ".join(str(error).split())
        raise OSError(
            f"{name} is not in {root}, or damaged, and cannot be downloaded ({why}): put the official {files} there, "
            "or use --data folder --data-root DIR with train/<class>/ and test/<class>/ images (or --data digits)"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    splits = []
    for part in sets:
        x = torch.as_tensor(part.data)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()  # (N, C, S, S)
        if size != x.shape[-1]:
            x = torch.cat([_resized(chunk.float(), size).round().clamp(0, 255).byte() for chunk in x.split(1000)])
        splits += [x, torch.as_tensor(part.targets)]
    return *splits, sets[0].classes, of_batch


def image_files(listing, root, size, T):
    """Images in files, of which `listing` tells the names and the labels."""
    train, train_y, test, test_y, classes = listing(root)
    x = _cached(root, train + test, (3, size, size), partial(_decode, size=size))
    return x[: len(train)], train_y, x[len(train) :], test_y, classes, augment


def events(name, root, size, T):
    """DVS-Gesture has an official split. Of CIFAR10-DVS a tenth of each class is the test set, drawn once for all."""
    folder, files, y, decode, n_train, classes = recordings(name, root, size, T)
    x = _cached(folder, files, (T, 2, size, size), decode)
    train, test = list(range(n_train)), list(range(n_train, len(y)))
    if not test:
        train, test = train_test_split(train, test_size=0.1, stratify=y, random_state=0)
    of_batch = augment_cifar10_dvs if name == "cifar10-dvs" else augment_gesture
    return x[train], y[train], x[test], y[test], classes, of_batch


def _folder(root):
    """Files and labels for training, the same for testing, names of the classes.

    The test set is in test/, or in val/ where there is no test/ or one without class folders (without labels, that is).
    """
    train_files, train_y, classes = _listing(root / "train")
    test = root / "test"
    if (root / "val").is_dir() and not any((test / name).is_dir() for name in classes):
        if test.is_dir():
            print(f"{test} has no class folders, so no labels: {root / 'val'} is the test set")
        test = root / "val"
    test_files, test_y, test_classes = _listing(test)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[0]
        raise ValueError(f"{root}: the class {odd!r} is not in both train and {test.name}")
    return train_files, train_y, test_files, test_y, classes


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
    for line in annotations.read_text(
        encoding="utf-8"
    ).splitlines():  # val_0.JPEG, wnid, and a bounding box, between tabs
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in classes or not (annotations.parent / "images" / name).is_file():
            raise ValueError(f"{annotations} says {line!r}, but there is no val/images/{name} or no class {wnid!r}")
        test_files.append(annotations.parent / "images" / name)
        test_y.append(classes.index(wnid))
    if not test_y:
        raise ValueError(f"{annotations} names no image")
    return train_files, train_y, test_files, torch.tensor(test_y), classes


def _cached(root, files, shape, decode):
    """decode(file) -> (*shape) of each file, stacked, in the widest type among them.

    Decoding many files takes minutes, so it is done once for each shape and kept in `root`, with a checksum of the
    names and contents of all files.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        names = [os.path.relpath(file, root) for file in files]
        key = hashlib.blake2b(repr(list(zip(names, pool.map(_digest, files), strict=True))).encode()).hexdigest()
        cache = root / f".decoded-{'x'.join(map(str, shape))}.pt"
        x = _read_cache(cache, key, (len(files), *shape))
        if x is not None:
            return x
        print(f"decoding {len(files):,} files of {root} ...", flush=True)
        x = torch.empty(len(files), *shape, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is an error
            for i, sample in enumerate(pool.map(decode, files)):
                x = x.to(torch.promote_types(x.dtype, sample.dtype))
                x[i] = sample
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        torch.save(dict(key=key, x=x), temporary)
        replace(temporary, cache)
        for old in [*root.glob(f"{cache.stem}-*.pt"), *root.glob(f"{cache.name}.*")]:  # of earlier versions, or killed
            old.unlink()
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        print(f"what was decoded cannot be cached in {root} ({str(error).splitlines()[0]}): going on without")
    return x


def _digest(file):
    """A checksum of a file's contents."""
    found = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            found.update(block)
    return found.digest()


SUFFIXES = {".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif"}
SUFFIXES |= {".tiff", ".webp", ""}  # a file without an ending may be an image


def _listing(folder, inner=""):
    """Image files, labels and class names of a folder of class folders, in alphabetical order.

    The images of a class are in its folder and in all folders below it, or in the folder `inner` of that. Links are
    followed. Hidden files and folders are left out, and files that by their names are no images, with a line that
    counts them.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: images are read from train/<class>/ and test/<class>/ or val/<class>/")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        _refuse_dangling(entry)
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise ValueError(f"{folder} has no class folders in it")
    if len(classes) == 1:
        raise ValueError(f"{folder} has only one class folder, {classes[0]!r}: there is nothing to tell apart")
    files, labels, others = [], [], []
    for label, name in enumerate(classes):
        found = _files(folder / name / inner)
        of_class = [file for file in found if file.suffix.lower() in SUFFIXES]
        skipped = [file for file in found if file.suffix.lower() not in SUFFIXES]
        if not of_class:
            why = f", only {len(skipped)} other files, e.g. {skipped[0].name}" if skipped else ""
            raise ValueError(f"the class folder {folder / name / inner} has no image in it{why}")
        files += of_class
        labels += [label] * len(of_class)
        others += skipped
    if others:
        print(f"{folder}: {len(others)} files that are no images by their names are left out, e.g. {others[0]}")
    return files, torch.tensor(labels), classes


def _refuse_dangling(path):
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to something that is not there: mend it or remove it")


def _files(folder, above=()):
    """All files below a folder but hidden ones, in alphabetical order. Links are followed, but not in circles."""
    here, found = folder.resolve(), []
    if here in above or not folder.is_dir():
        return []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        _refuse_dangling(entry)
        found += _files(entry, (*above, here)) if entry.is_dir() else [entry]
    return sorted(found)


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs (EPS)


def _decode(file, size):
    """An image file, of an animated one the first image, -> (3, size, size) uint8.

    It is turned as its EXIF orientation says. Of transparent pixels the colour counts and the transparency does not, as
    in torchvision.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"it says that it has {image.width} x {image.height} pixels, which is too large")
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits a channel")
            image_format = image.format
            bits = 16 if image.mode.startswith("I;16") or image.format == "PNG" else 32
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # `convert` would cut it off at 255
                image = image.convert("I")
                low, high = image.getextrema()
                if low < 0 or high > 65535:
                    raise ValueError(f"its pixels go from {low} to {high}; save it with 8 or 16 bits a channel")
                if image_format == "TIFF" and 255 < high < 4096:
                    raise ValueError(
                        f"its pixels go up to {high}, so it is not clear what is white; save it with 8 bits"
                    )
                if high > 255 or (bits == 16 and image_format != "TIFF"):  # a TIFF that holds at most 255 has 8 bits
                    image = image.point(lambda value: value * (1 / 257))
                image = image.convert("L")
            image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except Exception as error:  # a decoder fails on a foreign file in many ways; all of them mean the same
        advice = "" if getattr(error, "errno", None) else ": replace it or delete it"  # errno: the system's trouble
        raise ValueError(f"{file} cannot be read as an image ({error}){advice}") from None
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def _read_cache(cache, key, shape):
    try:
        with zipfile.ZipFile(cache) as archive:
            intact = archive.testzip() is None
        found = torch.load(cache, weights_only=True) if intact else {}
        x = found["x"] if found["key"] == key else None
    except Exception:  # absent or damaged: decode again
        return None
    return x if isinstance(x, torch.Tensor) and x.shape == shape and not x.is_floating_point() else None


def identity(dataset):
    """What a run remembers of its data: names of the classes, the shape of a sample, checksums of both sets with their
    labels and order."""
    found = dict(classes=list(map(str, dataset.classes)), shape=list(dataset.train_x.shape[1:]))
    for name, x, y in (("train", dataset.train_x, dataset.train_y), ("test", dataset.test_x, dataset.test_y)):
        checksum = hashlib.blake2b(digest_size=16)
        for tensor in (x, y):
            checksum.update(tensor.cpu().contiguous().numpy())
        found[name] = f"{len(y)} samples, checksum {checksum.hexdigest()}"
    return found


def differences(before, now, but=()):
    """How the data of a run differ from other data, in words; "" if they do not.

    Args:
        before, now: two of `identity`.
        but: what may differ: "train", "test", "shape".
    """
    found = []
    if len(before["classes"]) != len(now["classes"]):
        found.append(f"there were {len(before['classes'])} classes, and now there are {len(now['classes'])}")
    elif before["classes"] != now["classes"]:
        pairs = zip(before["classes"], now["classes"], strict=True)
        was, is_now = next(pair for pair in pairs if pair[0] != pair[1])
        found.append(f"the classes have other names or another order: {was!r} was where {is_now!r} is now")
    if before["shape"] != now["shape"] and "shape" not in but:
        found.append(f"a sample was of shape {before['shape']}, and now of {now['shape']}")
    for name, words in (("train", "training set"), ("test", "test set")):
        if before[name] != now[name] and name not in but:
            found.append(f"the {words} has other contents")
    return "; ".join(found)


def epoch_order(config, dataset, epoch):
    """The batches of an epoch, indices of samples, the incomplete last one left out: (batches, batch size).

    Raises:
        ValueError: there are fewer samples than a batch has.
    """
    n, size = len(dataset.train_y), config["batch_size"]
    if size > n:
        raise ValueError(
            f"a batch of {size} is larger than the training set of {n}: train with --batch-size {n} or less"
        )
    generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)[: n // size * size]
    return order.view(-1, size).to(dataset.train_y.device)


def training_batch(config, dataset, indices, step):
    """Input and labels of a step. The augmentation depends on seed and step alone, so a resumed run repeats it."""
    x = to_input(dataset.train_x[indices])
    if dataset.augment:
        x = dataset.augment(x, torch.Generator(x.device).manual_seed((config["seed"] * 1_000_003 + step) % 2**32))
    return x, dataset.train_y[indices]


def first_batch(config, dataset):
    """Input, (B, C, H, W) or frames (B, T, C, H, W), and labels, (B,), of the first training step."""
    return training_batch(config, dataset, epoch_order(config, dataset, 0)[0], step=0)


def sample(dataset, T, n=256):
    """Some test samples (at most n, fewer if T is large), evenly spaced over the set, as input, and their labels."""
    step = -(-len(dataset.test_x) // max(1, min(n, 1000 // T)))
    return to_input(dataset.test_x[::step]), dataset.test_y[::step]


LOADERS = {
    "digits": digits,
    **{name: partial(downloaded, name) for name in ("cifar10", "cifar100", "mnist", "fashion-mnist")},
    "tinyimagenet": partial(image_files, _tinyimagenet),
    "folder": partial(image_files, _folder),
    **{name: partial(events, name) for name in EVENT_DATA},
}
