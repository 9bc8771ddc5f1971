"""Datasets: what is read from files, what is refused, batches in a fixed order, the augmentation of CIFAR."""

import os
import socket
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from support import augment, data

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.fixture
def images(tmp_path):
    """A folder of two classes, each with three images for training and two for testing."""
    for file in [
        f"{split}/{name}/{j}.png" for split in ("train", "test") for name in ("ant", "wolf") for j in range(3)
    ]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if file[:4] == "trai" or file[-5] != "2":
            Image.new("RGB", (20, 18), (40 * ("wolf" in file), 10 * int(file[-5]), 200)).save(tmp_path / file)
    return tmp_path


def refused(root, *words, name="folder"):
    with pytest.raises((ValueError, OSError)) as found:
        data.load(name, root)
    said = str(found.value)
    assert all(word in said for word in words) and "\n" not in said, said


def test_digits():
    d = data.load("digits")
    assert d.train_x.shape == (1437, 1, 32, 32) and d.test_x.shape == (360, 1, 32, 32) and d.train_x.max() == 255
    assert d.n_classes == 10 and d.in_channels == 1 and d.augment_name == "none"
    counts, whole = d.test_y.bincount().numpy(), load_digits()
    assert (abs(counts / np.bincount(whole.target) - 0.2) < 0.01).all() and d.chance == counts.max() / 360  # stratified
    both = torch.cat([d.train_x, d.test_x]).flatten(1).float().sum(1).sort().values / 255
    original = torch.from_numpy(whole.images).sum((1, 2)).sort().values
    assert (both / original - 1).abs().max() < 0.02  # nothing left out


def test_batches_and_augmentation_are_the_same_as_ever():
    d, config = data.load("digits", augment="cifar"), dict(seed=3, batch_size=4)
    order = data.epoch_order(config, d, 2)
    assert order.shape == (359, 4) and order[:2].tolist() == [[585, 245, 1359, 968], [736, 39, 444, 895]]
    x, y = data.training_batch(config, d, order[1], 7)
    assert x.mean().item() == pytest.approx(0.303436667) and torch.equal(y, d.train_y[order[1]])
    assert x[0, 0, 16, ::8].tolist() == pytest.approx([0, 0.509061098, 0.26103121, 0.212456882])
    with pytest.raises(ValueError, match="a batch of 2000 is larger than the training set of 1437"):
        data.epoch_order(dict(seed=0, batch_size=2000), d, 0)


def test_a_folder_is_read_in_alphabetical_order_and_cached(images, monkeypatch, capsys):
    for name in ("ant/.DS_Store", "ant/Thumbs.db", "wolf/notes.txt"):
        (images / "train" / name).write_text("no image")
    (images / "train" / ".ipynb_checkpoints").mkdir()
    d = data.load("folder", images)
    assert "2 files that are no images by their names are left out" in capsys.readouterr().out
    assert d.train_y.tolist() == [0, 0, 0, 1, 1, 1] and d.test_y.tolist() == [0, 0, 1, 1] and d.augment is None
    assert d.train_x[2, :, 5, 5].tolist() == [0, 20, 200] and d.train_x[4, :, 5, 5].tolist() == [40, 10, 200]
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", lambda *_, **__: 1 / 0)  # the second time nothing is decoded
        again = data.load("folder", images)
    assert torch.equal(d.train_x, again.train_x) and torch.equal(d.test_x, again.test_x)
    (images / ".decoded-3x32x32.pt").touch()  # of an earlier version
    file = images / "train" / "wolf" / "1.png"
    Image.new("RGB", (20, 18), (1, 2, 3)).save(file)  # a changed file is seen
    assert data.load("folder", images).train_x[4, :, 0, 0].tolist() == [1, 2, 3]
    assert data.load("folder", images, image_size=320).train_x.shape == (6, 3, 320, 320)
    assert sorted(f.name.rpartition("-")[0] for f in images.glob(".dec*")) == [".decoded-3x320x320", ".decoded-3x32x32"]


def test_a_cache_that_cannot_be_used(images, monkeypatch, capsys):
    expected = data.load("folder", images).train_x
    (cache,) = images.glob(".decoded*")
    damaged = bytearray(cache.read_bytes())
    damaged[len(damaged) // 2] ^= 255

    def decoded_again(words=""):
        capsys.readouterr()
        same, out = torch.equal(data.load("folder", images).train_x, expected), capsys.readouterr().out
        return same and "decoding 10 files" in out and words in out

    for content in (damaged, b"", POINTER):
        cache.write_bytes(content)
        assert decoded_again()
    monkeypatch.setattr(data, "SOURCES", b"the code that decodes, edited")
    assert decoded_again() and not decoded_again()
    monkeypatch.setattr(data, "SOURCES", b"once more")
    with monkeypatch.context() as patch:  # a folder in which nothing can be written, and a process that is killed
        patch.setattr(os, "replace", lambda *_: os.stat("/nowhere/at/all"))
        assert decoded_again("cannot be kept") and not list(images.glob(".decoded*"))
        patch.setattr(os, "replace", lambda *_: exit(1))
        with pytest.raises(SystemExit):
            data.load("folder", images)
    assert decoded_again() and len(list(images.glob(".decoded*"))) == 1


def test_folders_that_are_refused(images, monkeypatch):
    monkeypatch.chdir(images)
    refused("nowhere", f"no images in {images / 'nowhere' / 'train'}/<class>/")  # a relative path is told in full
    (images / "empty" / "train" / "a").mkdir(parents=True)
    refused("empty", "no images in")
    for split in ("train", "test"):
        (images / split / "cat").mkdir()  # an empty folder in both is no class
    assert data.load("folder", images).classes == ["ant", "wolf"]
    image = images / "train" / "cat" / "x.png"
    Image.new("RGB", (4, 4)).save(image)
    refused(images, "the class 'cat' has no training image or no test image")
    Image.new("RGB", (4, 4)).save(images / "test" / "cat" / "x.png")
    for content, words in ((b"text", "cannot be read: "), (b"", "cannot be read: "), (POINTER, "is a Git LFS pointer")):
        image.write_bytes(content)
        refused(images, str(image), words)
    for name in ("train/cat", "test/cat", "train/wolf", "test/wolf"):
        (images / name).rename(images / name.replace("/", "-"))
    refused(images, "only one class")


def test_links_names_and_a_test_set_without_labels(images):
    expected, cafe = data.load("folder", images), images / "train" / "Caf\u00e9"
    (images / "train" / "ant").rename(cafe)
    (images / "test" / "ant").rename(images / "test" / "Cafe\u0301")  # another Unicode form
    d = data.load("folder", images)
    assert d.classes == ["Caf\u00e9", "wolf"] and torch.equal(d.test_y, expected.test_y)
    (images / "test").rename(images / "val")
    (images / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(images / "test" / "images" / "1.png")
    assert torch.equal(data.load("folder", images).test_x, expected.test_x)
    cafe.rename(images / "elsewhere")
    try:
        cafe.symlink_to(images / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("no permission to make links")
    assert torch.equal(data.load("folder", images).train_x, expected.train_x)
    (cafe / "gone.png").symlink_to(images / "nothing.png")
    refused(images, "gone.png")
    (cafe / "gone.png").unlink()
    (cafe / "up").symlink_to(images / "elsewhere", target_is_directory=True)
    refused(images, "a link leads back")


def test_images_are_decoded_to_the_same_intensities(tmp_path):
    file, grey = tmp_path / "x", np.linspace(0, 255, 1024).reshape(32, 32).astype(np.uint8)
    wide, expected = grey.astype(np.int32) * 257, np.broadcast_to(grey, (3, 32, 32)).astype(int)

    def error(image, of="TIFF", **how):
        image.save(file, of, **how)
        return abs(data._decode(file, 32).numpy() - expected)

    for mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        assert error(Image.fromarray(grey).convert("RGB").convert(mode)).max() <= 1, mode
    for pixels, of in ((wide.astype(np.uint16), "PNG"), (wide.astype(np.uint16), "TIFF"), (wide, "TIFF")):
        assert error(Image.fromarray(pixels), of).max() <= 1, of  # Pillow alone cuts 16 bits off at 255
    for bad in (wide * 1000, -wide, wide // 17, (wide // 17).astype(np.uint16), grey.astype(np.float32)):
        with pytest.raises(ValueError, match=r"pixels go from .* what is white is not clear"):
            error(Image.fromarray(bad))
    animated = dict(save_all=True, append_images=[Image.new("L", (32, 32), 9)])
    assert error(Image.fromarray(grey), "GIF", **animated).max() <= 1  # the first of the two
    exif = Image.Exif()
    exif[274] = 3  # upside down
    assert error(Image.fromarray(grey[::-1, ::-1]), "JPEG", exif=exif, quality=95).mean() < 3
    Image.new("RGBA", (4, 4), (10, 200, 30, 0)).save(file, "PNG")
    assert data._decode(file, 32)[:, 5, 5].tolist() == [10, 200, 30]  # transparent, as torchvision has it


def test_tinyimagenet_as_distributed(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for wnid, colour in {"n02": (200, 0, 0), "n01": (0, 200, 0)}.items():
        for file in (f"train/{wnid}/images/{wnid}_0.JPEG", f"val/images/val_{wnid}.JPEG", f"test/images/{wnid}.JPEG"):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), colour).save(root / file)
    lines = "val_n02.JPEG\tn02\t0\t32\t44\t62\nval_n01.JPEG\tn01\t0\t32\t44\t62\nval_n01.JPEG\tn01\t0\t32\t44\t62\n"
    (root / "val" / "val_annotations.txt").write_text(lines)
    d = data.load("tinyimagenet", tmp_path)
    assert d.augment_name == "augment_cifar" and d.classes == ["n01", "n02"]
    assert d.train_y.tolist() == [0, 1] and d.test_y.tolist() == [1, 0, 0]
    for x, y in ((d.train_x, d.train_y), (d.test_x, d.test_y)):
        assert torch.equal((x[:, 0] > x[:, 1]).flatten(1).all(1), y == 1)  # n02 is red
    for line, words in (("val_n01.JPEG\tn03\t0\n", "the class 'n03'"), ("val_n01.JPEG\n", "the class ''")):
        (root / "val" / "val_annotations.txt").write_text(lines + line)
        refused(tmp_path, words, name="tinyimagenet")


def test_cifar_and_mnist_are_read_through_torchvision(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            self.classes, self.targets, self.data = list("abc"), [2] * 6, np.full((6, 32, 32, 3), 7, np.uint8)
            self.data[..., 2] = 9

    monkeypatch.setitem(data.LOADERS, "cifar10", partial(data.downloaded, Fake, "cifar"))
    d = data.load("cifar10", tmp_path, image_size=48)
    assert d.train_x.shape == (6, 3, 48, 48) and d.test_y.tolist() == [2] * 6 and d.n_classes == 3
    assert d.augment is augment.augment_cifar and d.train_x[0, :, 4, 4].tolist() == [7, 7, 9]

    folder, rng, found = tmp_path / "FashionMNIST" / "raw", np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for split, n in (("train", 40), ("t10k", 20)):
        x, y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(np.array([2051, n, 28, 28], ">i4").tobytes() + x.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(np.array([2049, n], ">i4").tobytes() + y.tobytes())
        found += [torch.from_numpy(x)[:, None], torch.from_numpy(y).long()]
    d = data.load("fashion-mnist", tmp_path, image_size=28)
    assert all(map(torch.equal, (d.train_x, d.train_y, d.test_x, d.test_y), found)) and d.augment_name == "none"
    for content, words in ((b"x" * 2000, "or damaged, and cannot be downloaded"), (POINTER, "is a Git LFS pointer")):
        (folder / "train-labels-idx1-ubyte").write_bytes(content)
        refused(tmp_path, words, name="fashion-mnist")


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_download_that_fails(tmp_path, monkeypatch, name):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: os.stat("/no/route/to/the/host"))
    monkeypatch.chdir(tmp_path)
    refused("data", f"{tmp_path / 'data'}, or", "cannot be downloaded", "--data digits", name=name)
    refused("dta/cifar", f"nothing is downloaded there: {tmp_path / 'dta'} is no folder", name=name)
    assert not list(tmp_path.iterdir())
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(POINTER)
    refused(".", "cifar-10-python.tar.gz is a Git LFS pointer", name=name)


X, Y = torch.zeros(4, 1, 2, 2).byte(), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint16])
def test_one_s_own_data_may_be_of_any_type_of_whole_numbers(kind):
    d = data.Dataset(X.numpy().astype(kind), Y.numpy().astype(kind), X.int(), [0, 0, 0, 1], np.int64(2))
    assert d.train_x.dtype == torch.uint8 and torch.equal(d.train_y, Y) and d.train_y.dtype == torch.int64
    assert d.chance == 0.75 and d.classes == ["0", "1"]


ODD = [  # what is not right in a dataset, and what is said of it
    (dict(train_x=torch.full((4, 1, 2, 2), torch.nan)), r"float32 .*; expected whole numbers.*standardized"),
    (dict(train_x=torch.full((4, 1, 2, 2), 65535)), "from 65535 to 65535 .*from 0 to 255"),
    (dict(test_x=-X.int() - 1), "test set is .* from -1 to -1"),
    (dict(train_x=X[:, 0]), r"\(4, 2, 2\) .*images \(N, C, S, S\)"),
    (dict(train_x=torch.zeros(4, 2, 2, 3).byte()), r"\(4, 2, 2, 3\)"),
    (dict(train_x=["a.png", "b.png"]), "is of type list .*, not tensors or arrays of numbers"),
    (dict(test_x=X[:0], test_y=Y[:0]), r"test set is torch.uint8 \(0, 1, 2, 2\)"),
    (dict(test_x=torch.zeros(4, 1, 3, 3).byte()), r"training samples have .*1, 2, 2.*, test samples .*1, 3, 3"),
    (dict(train_y=torch.tensor([0, 1, 2, 0])), "labels from 0 to 2; .*from 0 to 1"),
    (dict(train_y=Y[:, None]), r"labels torch.int64 \(4, 1\)"),
    (dict(train_y=Y.float()), "labels torch.float32"),
    (dict(classes=1), "only one class"),
    (dict(augment="gesture"), "augmented by none, cifar, not by gesture"),
    (dict(augment=5), "augmented by none, cifar, not by 5"),
]


@pytest.mark.parametrize("change, message", ODD)
def test_anything_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message) as found:
        data.Dataset(**dict(train_x=X, train_y=Y, test_x=X, test_y=Y, classes=2) | change)
    assert "\n" not in str(found.value)


def test_what_a_loader_returns_is_checked(monkeypatch):
    monkeypatch.setitem(data.LOADERS, "mine", lambda *_: (X, Y, X, Y, 2))
    refused(".", "has to return six values", name="mine")


def test_cifar_augmentation_crops_flips_and_cuts_each_image_on_its_own():
    """Each pixel holds its row in one channel and its column in the other, from 1, so it shows where it came from."""
    place = torch.arange(1.0, 33)
    x = torch.stack([place[:, None].expand(32, 32), place.expand(32, 32)]).expand(400, 2, 32, 32)
    shifts, flips, areas, aspects = set(), 0, [], []
    for rows, columns in augment.augment_cifar(x, torch.Generator().manual_seed(0)):
        seen, cut = rows >= 1, (rows > 0) & (rows < 1)  # 0: from beyond the edge
        down, right, mirrored = ((v[seen]).unique() for v in (rows - place[:, None], columns - place, columns + place))
        assert len(down) == 1 and 1 in (len(right), len(mirrored))
        flips += len(mirrored) == 1
        shifts.add((down.item(), right.item() if len(right) == 1 else 33 - mirrored.item()))
        if cut.any():
            height, width = cut.any(1).sum().item(), cut.any(0).sum().item()
            assert height * width == cut.sum()
            areas.append(height * width / 1024)
            aspects.append(height / width)
    assert {d for d, _ in shifts} == {r for _, r in shifts} == set(range(-4, 5))
    assert 0.4 < flips / 400 < 0.6 and 0.4 < len(areas) / 400 < 0.6
    assert 0.01 < min(areas) < 0.05 and 0.36 < max(areas) < 0.43 and 0.18 < np.mean(areas) < 0.24
    assert 0.33 < min(aspects) < 0.5 and 2 < max(aspects) < 3 and 0.4 < np.mean(np.array(aspects) > 1) < 0.6
