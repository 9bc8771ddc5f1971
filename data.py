"""Datasets, held decoded as one uint8 tensor on the training device, and augmentation of a batch there.

Images go into the network as pixel intensities in [0, 1]: E-I circuits need non-negative input, so nothing is
standardized.
"""

import hashlib
import math
import os
import socket
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100

DATASETS = ["digits", "cifar10", "cifar100", "folder"]


@dataclass
class Dataset:
    """Images (N, C, S, S) uint8 and labels (N,) int64 of a training and a test set, on one device."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    n_classes: int
    augmented: bool  # whether `augment` is applied in training

    @property
    def in_channels(self):
        return self.train_x.shape[1]


def load(name, root="./data", image_size=32, device="cpu"):
    """A dataset by name, decoded and on the device.

    Args:
        name: "digits" (scikit-learn's 1,797 handwritten digits, offline), "cifar10", "cifar100" (torchvision;
            downloaded to `root` on first use), "folder" (`root`/train/<class>/*, `root`/test/<class>/* or val/...).
        root: where the data are.
        image_size: side in pixels to which the images are brought.
        device: where the tensors go.

    Raises:
        ValueError, OSError: the data are missing, or not what they should be; names the folder or the file.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data {name!r}: choose from {', '.join(DATASETS)}")
    if name == "digits":
        splits, n_classes = _digits(image_size), 10
    elif name == "folder":
        splits, n_classes = _folder(Path(root), image_size)
    else:
        splits, n_classes = _cifar(name, root, image_size), 10 if name == "cifar10" else 100
    return Dataset(*(tensor.to(device) for tensor in splits), n_classes, augmented=name != "digits")


def to_input(x):
    """uint8 pixels -> float32 intensities in [0, 1], of the same shape."""
    return x.float().div_(255)


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


def _folder(root, size):
    test = root / ("test" if (root / "test").is_dir() or not (root / "val").is_dir() else "val")
    (train_files, train_y, classes), (test_files, test_y, test_classes) = _listing(root / "train"), _listing(test)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[0]
        raise ValueError(f"{root}: the class {odd!r} is not in both train and {test.name}")
    splits = train_y, test_y
    # Decoding 60,000 files takes a while, so it is done once. The key changes with any file of the folder.
    stamp = [(str(f), s.st_size, s.st_mtime_ns) for f in train_files + test_files for s in [f.stat()]]
    cache = root / f".decoded-{size}-{hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]}.pt"
    x = _read_cache(cache, (len(stamp), 3, size, size))
    if x is None:
        print(f"decoding {len(stamp):,} images of {root} ...", flush=True)
        x = torch.empty(len(stamp), 3, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, image in enumerate(pool.map(lambda f: _decode(f, size), train_files + test_files)):
                x[i] = image
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
        try:
            torch.save(x, temporary)
            temporary.replace(cache)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            print(f"the decoded images cannot be cached in {root} ({str(error).splitlines()[0]}): going on without")
    n = len(train_files)
    return (x[:n], splits[0], x[n:], splits[1]), len(classes)


def _listing(folder):
    """Image files, labels and class names of a folder of class folders, in alphabetical order."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: --data folder needs train/<class>/ and test/<class>/ (or val/<class>/)")
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no class folders in it")
    files, labels = [], []
    for label, name in enumerate(classes):
        of_class = sorted(f for f in (folder / name).rglob("*") if f.is_file() and not f.name.startswith("."))
        if not of_class:
            raise ValueError(f"the class folder {folder / name} has no image in it")
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
    return x if isinstance(x, torch.Tensor) and x.shape == shape and x.dtype == torch.uint8 else None


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

    def uniform(low, high):
        return torch.rand(B, 1, device=x.device, generator=generator) * (high - low) + low

    pixels = torch.arange(S, device=x.device)
    rows = pixels + uniform(0, 9).long()
    columns = torch.where(uniform(0, 1) < 0.5, pixels, pixels.flip(0)) + uniform(0, 9).long()
    samples = torch.arange(B, device=x.device)
    x = F.pad(x, [4] * 4)[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    area, aspect = uniform(0.02, 0.4) * S * S, uniform(-1, 1).mul(math.log(2.5)).exp()
    height = (area * aspect).sqrt().round().clamp(max=S)
    width = (area / aspect).sqrt().round().clamp(max=S)
    top, left = (uniform(0, 1) * (S - height + 1)).floor(), (uniform(0, 1) * (S - width + 1)).floor()
    inside_rows = (pixels >= top) & (pixels < top + height) & (uniform(0, 1) < 0.5)
    inside_columns = (pixels >= left) & (pixels < left + width)
    cut = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(cut, torch.rand(B, C, S, S, device=x.device, generator=generator), x)
