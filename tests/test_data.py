import errno
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import train
from support import data, recipes


def make_folder(root, counts, test="test", size=(40, 36)):
    """A folder of colour images, one colour a class: {class: (training images, test images)}."""
    for i, (name, (n_train, n_test)) in enumerate(counts.items()):
        for split, n in (("train", n_train), (test, n_test)):
            (root / split / name).mkdir(parents=True)
            for j in range(n):
                colour = (40 * i, 10 * j, 200)
                Image.new("RGB", size, colour).save(root / split / name / f"{j:02d}.png")
    return root


def test_digits():
    d = data.load("digits")
    assert d.train_x.shape == (1437, 1, 32, 32) and d.test_x.shape == (360, 1, 32, 32)
    assert d.train_x.dtype == torch.uint8 and d.n_classes == 10 and d.in_channels == 1 and d.augment is None
    assert d.train_x.max() == 255 and d.train_x.min() == 0
    total = np.bincount(load_digits().target)
    share = torch.bincount(d.test_y).numpy() / total
    assert (abs(share - 0.2) < 0.01).all()  # stratified
    again = data.load("digits")
    assert torch.equal(d.train_x, again.train_x) and torch.equal(d.test_y, again.test_y)
    both = torch.cat([d.train_x, d.test_x]).flatten(1)
    original = torch.from_numpy(load_digits().images).sum((1, 2)).sort().values * 16
    assert ((both.float() / 255 * 16).sum(1).sort().values / original - 1).abs().max() < 0.02  # nothing left out


def test_to_input_is_intensity():
    assert data.to_input(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_is_read_in_alphabetical_order_and_cached(tmp_path, test, monkeypatch):
    root = make_folder(tmp_path, {"wolf": (2, 1), "ant": (3, 2)}, test)
    (root / "train" / "ant" / ".DS_Store").write_text("hidden files are no images")
    d = data.load("folder", root)
    assert d.train_y.tolist() == [0, 0, 0, 1, 1] and d.test_y.tolist() == [0, 0, 1] and d.n_classes == 2
    assert d.train_x.shape == (5, 3, 32, 32) and d.augment is data.augment
    assert d.train_x[2, :, 5, 5].tolist() == [40, 20, 200] and d.train_x[4, :, 5, 5].tolist() == [0, 10, 200]
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", lambda *_, **__: 1 / 0)  # the second time nothing is decoded
        again = data.load("folder", root)
    assert torch.equal(d.train_x, again.train_x) and torch.equal(d.test_x, again.test_x)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(root / "train" / "wolf" / "01.png")
    assert data.load("folder", root).train_x[4, :, 0, 0].tolist() == [1, 2, 3]  # a changed file is seen
    assert data.load("folder", root, image_size=48).train_x.shape == (5, 3, 48, 48)


def test_a_folder_in_which_nothing_can_be_written_is_read(tmp_path, monkeypatch, capsys):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    root = make_folder(tmp_path, {"a": (2, 1), "b": (2, 1)})
    monkeypatch.setattr(torch, "save", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    assert data.load("folder", root).train_x.shape == (4, 3, 32, 32)
    assert capsys.readouterr().out.count("cannot be cached") == 1


def test_a_damaged_cache_is_decoded_again(tmp_path):
    root = make_folder(tmp_path, {"a": (2, 1), "b": (2, 1)})
    d = data.load("folder", root)
    (cache,) = root.glob(".decoded*")
    raw = bytearray(cache.read_bytes())
    raw[len(raw) // 2] ^= 255
    cache.write_bytes(raw)
    assert torch.equal(data.load("folder", root).train_x, d.train_x)


def test_bad_folders(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no folder"):
        data.load("folder", tmp_path / "nowhere")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="no class folders"):
        data.load("folder", tmp_path / "empty")
    root = make_folder(tmp_path / "a", {"a": (2, 1), "b": (0, 1)})
    with pytest.raises(ValueError, match=r"class folder .*b has no image"):
        data.load("folder", root)
    root = make_folder(tmp_path / "b", {"a": (2, 1), "b": (2, 1)})
    (root / "train" / "b" / "notes.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.png cannot be read as an image .*: replace it or delete it$"):
        data.load("folder", root)

    def too_many(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(data.Image, "open", too_many)
    with pytest.raises(ValueError, match=r"cannot be read as an image \(.*Too many open files\)$"):  # a good image
        data.load("folder", root)
    monkeypatch.undo()
    root = make_folder(tmp_path / "c", {"a": (2, 1), "b": (2, 1)})
    (root / "test" / "c").mkdir()
    Image.new("RGB", (4, 4)).save(root / "test" / "c" / "x.png")
    with pytest.raises(ValueError, match="'c' is not in both"):
        data.load("folder", root)


def make_tinyimagenet(root):
    """As TinyImageNet is distributed, with a red and a green class of three images."""
    colours = {"n02": (200, 0, 0), "n01": (0, 200, 0)}
    for wnid, colour in colours.items():
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes are no images\n")
        for i in range(3):
            Image.new("RGB", (64, 64), colour).save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(["n02", "n01", "n01", "n02"]):
        Image.new("RGB", (64, 64), colours[wnid]).save(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return root


@pytest.mark.parametrize("folder", [".", "tiny-imagenet-200"])
def test_tinyimagenet_as_distributed(tmp_path, folder, monkeypatch):
    make_tinyimagenet(tmp_path / folder)
    d = data.load("tinyimagenet", tmp_path)
    assert d.train_x.shape == (6, 3, 32, 32) and d.n_classes == 2 and d.augment is data.augment
    assert d.train_y.tolist() == [0, 0, 0, 1, 1, 1] and d.test_y.tolist() == [1, 0, 0, 1]
    for x, y in ((d.train_x, d.train_y), (d.test_x, d.test_y)):
        assert torch.equal((x[:, 0] > x[:, 1]).flatten(1).all(1), y == 1)  # n02 is red
    monkeypatch.setattr(data, "_decode", lambda *_, **__: 1 / 0)  # the second time nothing is decoded
    assert torch.equal(data.load("tinyimagenet", tmp_path).test_x, d.test_x)


def test_bad_tinyimagenet(tmp_path):
    with pytest.raises(ValueError, match=r"no TinyImageNet in .*unpack tiny-imagenet-200\.zip"):
        data.load("tinyimagenet", tmp_path)
    root = make_tinyimagenet(tmp_path)
    annotations = root / "val" / "val_annotations.txt"
    intact = annotations.read_text()
    for line in ("val_9.JPEG\tn01\t0\n", "val_0.JPEG\tn03\t0\n", "val_0.JPEG\n", "\n"):
        annotations.write_text(intact + line)
        with pytest.raises(ValueError, match=r"val_annotations\.txt says '.*', but there is no"):
            data.load("tinyimagenet", root)
    annotations.write_text("")
    with pytest.raises(ValueError, match=r"val_annotations\.txt names no image"):
        data.load("tinyimagenet", root)


def test_recipes_of_tinyimagenet():
    def of(*arguments):
        config = recipes.settings(recipes.parse(["--data", "tinyimagenet", *arguments]))
        return [config[k] for k in ("lr", "warmup_epochs", "warmup_from", "epochs", "batch_size", "T", "image_size")]

    assert of("--arch", "resnet18") == [0.003, 10, 0.001, 300, 128, 4, 32]
    for arch in ("vgg8", "vgg16"):  # as for CIFAR-100
        cifar = recipes.settings(recipes.parse(["--data", "cifar100", "--arch", arch]))
        assert of("--arch", arch)[:3] == [cifar[k] for k in ("lr", "warmup_epochs", "warmup_from")]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_through_torchvision(tmp_path, monkeypatch, name):
    class Fake:
        def __init__(self, root, train, download):
            self.classes = list("abcdefghij")
            self.data = np.full((6 if train else 2, 32, 32, 3), 7, np.uint8)
            self.data[..., 2] = 9
            self.targets = [3] * len(self.data)

    monkeypatch.setattr(data, name.upper(), Fake)
    d = data.load(name, tmp_path)
    assert d.train_x.shape == (6, 3, 32, 32) and d.test_y.tolist() == [3, 3] and d.n_classes == 10
    assert d.augment is data.augment
    assert d.train_x[0, :, 4, 4].tolist() == [7, 7, 9]
    assert data.load(name, tmp_path, image_size=48).train_x.shape == (6, 3, 48, 48)


def write_mnist(folder, n_train=40, n_test=20):
    """The files of MNIST in torchvision's layout, as they are distributed, with random images."""
    folder.mkdir(parents=True)
    rng, found = np.random.default_rng(0), []
    for split, n in (("train", n_train), ("t10k", n_test)):
        x, y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(np.array([2051, n, 28, 28], ">i4").tobytes() + x.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(np.array([2049, n], ">i4").tobytes() + y.tobytes())
        found += [torch.from_numpy(x), torch.from_numpy(y)]
    return found


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_read_through_torchvision(tmp_path, name, folder, capsys):
    train_x, train_y, test_x, _ = write_mnist(tmp_path / folder / "raw")
    d = data.load(name, tmp_path, image_size=28)
    assert torch.equal(d.train_x[:, 0], train_x) and torch.equal(d.test_x[:, 0], test_x)
    assert d.train_y.tolist() == train_y.tolist() and d.n_classes == 10 and d.augment is None
    assert data.load(name, tmp_path, image_size=32).train_x.shape == (40, 1, 32, 32)
    options = ["--arch", "mlp", "--data", name, "--data-root", str(tmp_path), "--epochs", "1", "--batch-size", "20"]
    assert train.main([*options, "--out", str(tmp_path / "run")]) == 0
    assert "samples of 1x28x28" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["", "x" * 2000])
def test_damaged_files_of_mnist(tmp_path, broken, monkeypatch):
    write_mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_text(broken)
    with pytest.raises(OSError, match=r"mnist is not in .*, or damaged, and cannot be downloaded .* put the official"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_a_download_that_fails_names_the_other_ways(tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(OSError, match=r"cannot be downloaded .*--data folder .*--data digits"):
        data.load(name, tmp_path / "data")


def test_unknown_data():
    with pytest.raises(ValueError, match="unknown data 'mnisst'"):
        data.load("mnisst")


def augmented(x, seed=0):
    return data.augment(x, torch.Generator().manual_seed(seed))


def test_augmentation_crops_and_flips_each_image_on_its_own():
    x = torch.rand(400, 3, 32, 32)
    out = augmented(x)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out, augmented(x)) and not torch.equal(out, augmented(x, 1))
    padded = torch.nn.functional.pad(x, [4] * 4)
    shifts, flips, cut = set(), 0, 0
    for image, source in zip(out, padded, strict=True):
        best = (-1, None)
        for flipped in (False, True):
            for dy in range(9):
                for dx in range(9):
                    crop = source[:, dy : dy + 32, dx : dx + 32]
                    same = (image == (crop.flip(2) if flipped else crop)).all(0)
                    best = max(best, (same.sum().item(), dy, dx, flipped), key=lambda b: b[0])
        assert best[0] >= 0.55 * 1024  # the rest is the cutout, at most 40 % of the area but for rounding
        shifts.add(best[1:3])
        flips += best[3]
        cut += best[0] < 1024
    assert 0.4 < flips / 400 < 0.6 and 0.4 < cut / 400 < 0.6
    assert len({dy for dy, _ in shifts}) == 9 and len({dx for _, dx in shifts}) == 9


def test_cutout_areas_and_aspects():
    out = augmented(torch.full((2000, 1, 64, 64), -1.0))  # what is left of it is -1, or 0 from the padding
    cut = (out > 0).flatten(1)
    area = cut.float().mean(1)
    area = area[area > 0]
    assert 0.45 < len(area) / 2000 < 0.55
    assert area.min() > 0.015 and area.max() < 0.42 and 0.18 < area.mean() < 0.24
    boxes = (out > 0)[:, 0]
    height, width = boxes.any(2).sum(1).float(), boxes.any(1).sum(1).float()
    aspect = (height / width)[height > 0]
    assert aspect.min() > 0.35 and aspect.max() < 2.9 and 0.45 < (aspect > 1).float().mean() < 0.55
