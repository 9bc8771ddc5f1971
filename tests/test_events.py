"""Event cameras: recordings -> frames -> a network. DVS-Gesture's files are `.npy`, CIFAR10-DVS's are AEDAT4, written
by dv-processing. What needs that or tonic is skipped where it is not installed."""

import sys

import numpy as np
import pytest
import torch

import train
from model import build
from support import augment, data


def random_events(rng, n=1000):
    """(n, 4): column, row, polarity, time in ms (0 to 500)."""
    x, y, p = rng.integers(0, 128, n), rng.integers(0, 128, n), rng.integers(0, 2, n)
    return np.stack([x, y, p, np.sort(rng.integers(0, 500, n))], axis=1)


def save_gesture(root, split, user, label, events):
    folder = root / "DVSGesture" / f"ibmGesture{split}" / f"user{user:02d}_fluorescent_led"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{label}.npy", events)
    return folder / f"{label}.npy"


def save_cifar10_dvs(root, name, i, events):
    """An AEDAT4 file, with the times of a camera: microseconds since 1970."""
    dv = pytest.importorskip("dv_processing")
    folder = root / "CIFAR10DVS" / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"cifar10_{name}_{i}.aedat4"
    writer = dv.io.MonoCameraWriter(str(file), dv.io.MonoCameraWriter.EventOnlyConfig("DVS128", (128, 128)))
    store = dv.EventStore()
    for x, y, p, t in events.tolist():
        store.push_back(1_600_000_000_000_000 + 1000 * t, x, y, bool(p))
    writer.writeEvents(store)
    return file


@pytest.fixture
def gestures(tmp_path):
    """Four recordings for training and two for testing, of classes 0 and 10."""
    pytest.importorskip("tonic")
    rng = np.random.default_rng(0)
    for split, user in (("Train", 0), ("Train", 1), ("Test", 0)):
        for label in (0, 10):
            save_gesture(tmp_path, split, user, label, random_events(rng))
    return tmp_path


def by_hand(events, T, size):
    """Frames (T, 2, size, size) counted event by event, each shared out by the area of its pixel in each cell."""
    frames, n, edges = np.zeros((T, 2, size, size)), len(events) // T, np.arange(size + 1) * 128 / size
    for i, (x, y, p, _) in enumerate(events[: n * T]):
        height, width = (np.clip(edges[1:], v, v + 1) - np.clip(edges[:-1], v, v + 1) for v in (y, x))
        frames[i // n, p] += np.outer(height, width)
    return torch.from_numpy(frames).float()


@pytest.mark.parametrize("size", [48, 64, 20])
def test_frames_of_equal_event_count(gestures, size):
    d = data.load("dvs-gesture", gestures, size, T=3)
    assert d.train_x.shape == (4, 3, 2, size, size) and d.test_x.shape == (2, 3, 2, size, size)
    assert d.train_y.tolist() == [0, 10, 0, 10] and d.n_classes == 11 and d.in_channels == 2
    assert d.train_x.dtype == torch.uint8 and d.augment_name == "augment_gesture"
    frames = data.to_input(d.train_x)
    assert frames.sum((2, 3, 4)).flatten().tolist() == pytest.approx([333] * 12)  # 1000 // 3: none is lost
    file = gestures / "DVSGesture" / "ibmGestureTrain" / "user01_fluorescent_led" / "10.npy"
    torch.testing.assert_close(frames[3], by_hand(np.load(file), 3, size))
    with pytest.raises(ValueError, match="network takes images"):
        build("vgg8", 2, 11, T=4, image_size=size, plan=["P", 8])(frames)


@pytest.mark.parametrize("n, kind", [(50_000, torch.int32), (500, torch.int16)])
def test_a_busy_pixel_is_counted_in_a_wider_type(gestures, n, kind):
    save_gesture(gestures, "Test", 0, 0, np.tile(np.array([[127, 0, 1, 5]]), (2 * n, 1)))
    d = data.load("dvs-gesture", gestures, 64, T=2)
    assert d.test_x.dtype == kind and data.to_input(d.test_x)[0, :, 1, 0, 63].tolist() == [n, n]


def refused(root, *words, name="dvs-gesture"):
    with pytest.raises(ValueError) as found:
        data.load(name, root, 32, T=3)
    said = str(found.value)
    assert all(str(word) in said for word in words) and "\n" not in said, said


def test_signed_polarities_and_shuffled_events_are_put_right_and_bad_ones_refused(gestures):
    good = random_events(np.random.default_rng(2), 300).astype(float)
    good[:, 3] = np.arange(300)
    file = save_gesture(gestures, "Train", 0, 0, good)
    expected = data.load("dvs-gesture", gestures, 32, T=3).train_x
    signed = np.random.default_rng(0).permutation(good)
    signed[:, 2] = 2 * signed[:, 2] - 1
    np.save(file, signed)
    assert torch.equal(data.load("dvs-gesture", gestures, 32, T=3).train_x, expected)
    for column, values, words in (
        (0, [-1.0], "the x of an event is -1.0; it is from 0 to 127"),
        (1, [65539.0], "the y of an event is 65539.0"),
        (0, [3.7], "the x of an event is 3.7"),
        (2, [2.0, 3.0], "the polarity of an event is 2.0"),
    ):
        bad = good.copy()
        bad[: len(values), column] = values
        np.save(file, bad)
        refused(gestures, f"{file} cannot be read: {words}")


def test_files_that_are_no_recordings(gestures):
    file = gestures / "DVSGesture" / "ibmGestureTrain" / "user00_fluorescent_led" / "0.npy"
    intact = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for foreign in (b"", intact[:200], intact[: len(intact) // 2], b"not an array", pointer):
        file.write_bytes(foreign)
        refused(gestures, file, "is a Git LFS pointer" if foreign == pointer else "cannot be read")
    for array, words in ((np.array([{}]), ""), (np.zeros((9, 3)), "expected 4"), (np.zeros((2, 4)), "2 events cannot")):
        np.save(file, array)
        refused(gestures, f"{file} cannot be read", words)
    file.write_bytes(intact)
    file.rename(file.with_name("11.npy"))
    refused(gestures, "has something in it that is not of DVSGesture (")


def test_cifar10_dvs_is_read_and_split_by_class(tmp_path):
    pytest.importorskip("tonic")
    rng, written = np.random.default_rng(1), {"cat": [], "truck": []}
    for name in ("cat", "truck"):
        for i in range(10):
            written[name].append(random_events(rng, 100))
            file = save_cifar10_dvs(tmp_path, name, i, written[name][-1])
    d = data.load("cifar10-dvs", tmp_path, 48, T=5)
    assert d.train_x.shape == (18, 5, 2, 48, 48) and d.n_classes == 10 and d.augment is augment.augment_cifar10_dvs
    assert sorted(d.test_y.tolist()) == [3, 9] and sorted(d.train_y.tolist()) == [3] * 9 + [9] * 9
    found = data.to_input(torch.cat([d.train_x[d.train_y == 3], d.test_x[d.test_y == 3]]))
    for frames in (by_hand(events, 5, 48) for events in written["cat"]):  # each recording is in one set, once
        assert sum(torch.allclose(frames, other, atol=1e-5) for other in found) == 1
    intact = file.read_bytes()
    # The last one makes the decoder panic, which it says itself on stderr.
    for foreign in (b"", intact[:100], intact[: len(intact) // 2], bytes(5000), b"#!AER-DAT4.0\r\n" + bytes(200)):
        file.write_bytes(foreign)
        refused(tmp_path, f"{file} cannot be read", name="cifar10-dvs")
    file.parent.rename(file.parent.with_name("bike"))
    refused(tmp_path, "is not of CIFAR10DVS (KeyError: 'bike')", name="cifar10-dvs")


@pytest.mark.parametrize("name, kind", [("dvs-gesture", "DVSGesture"), ("cifar10-dvs", "CIFAR10DVS")])
def test_missing_recordings_are_not_downloaded_but_asked_for(name, kind, tmp_path, monkeypatch):
    tonic = pytest.importorskip("tonic")
    monkeypatch.setattr(tonic.dataset, "download_and_extract_archive", lambda *_, **__: 1 / 0)
    refused(tmp_path, f"no recordings of {name} in {tmp_path / kind}", f"{kind}({str(tmp_path)!r})", name=name)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "tonic", None)
    refused(tmp_path, "needs tonic", "pip install -r requirements-events.txt", name=name)


def test_the_command_trains_on_recordings(gestures, tmp_path, capsys):
    options = ["--data", "dvs-gesture", "--data-root", gestures, "--T", 3, "--batch-size", 2, "--width", 0.1]
    assert train.main([str(o) for o in (*options, "--epochs", 1, "--out", tmp_path / "r")]) == 0
    assert "test samples of 3x2x48x48" in capsys.readouterr().out
    assert train.main(["--eval", str(tmp_path / "r")]) == 0


def augmented(function, B, T=2, seed=0):
    """(B, 2, 48, 48): each pixel holds the row and the column, counted from 1, that it came from; 0: from nowhere."""
    place = torch.arange(1, 49.0)
    x = torch.stack([place[:, None].expand(48, 48), place.expand(48, 48)]).expand(B, T, 2, 48, 48)
    out = function(x, torch.Generator().manual_seed(seed))
    assert out.shape == x.shape and (out == out[:, :1]).all()  # the same for all frames
    return out[:, 0]


@pytest.mark.parametrize("function", [augment.augment_gesture, augment.augment_cifar10_dvs])
def test_event_augmentation_is_another_for_each_sample(function):
    out = augmented(function, 40)
    assert torch.equal(out, augmented(function, 40)) and not torch.equal(out, augmented(function, 40, seed=1))
    assert len({tuple(sample.flatten().tolist()) for sample in out}) == 40


def test_gesture_crops():
    rows, columns = augmented(augment.augment_gesture, 2000, T=1).unbind(1)
    assert (rows == rows[:, :, :1]).all() and (columns == columns[:, :1]).all()
    rows, columns = rows[:, :, 0], columns[:, 0]
    flipped = columns[:, 0] > columns[:, -1]
    assert 0.45 < flipped.float().mean() < 0.55
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    for places in (rows, columns):
        steps = places.diff()
        assert places.min() == 1 and places.max() == 48 and steps.min() == 0 and steps.max() == 1
        assert abs((places[:, 0] - 1 - (48 - places[:, -1])).mean()) < 1  # crops lie anywhere
    height, width = (places[:, -1] - places[:, 0] + 1 for places in (rows, columns))
    area, aspect = height * width / 48**2, height / width
    assert 0.48 < area.min() < 0.52 and area.max() > 0.98 and 0.72 < area.mean() < 0.78
    assert 0.71 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4 and abs(aspect.log().mean()) < 0.02


def test_one_of_roll_rotation_and_cutout(monkeypatch):
    # no crop, no flip, so that the other is seen alone
    monkeypatch.setattr(augment, "augment_gesture", lambda x, generator, smallest: x.clone())
    place = torch.stack(torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij"))
    rolls, angles, holes = [], [], []
    for sample in augmented(augment.augment_cifar10_dvs, 300) - 1:
        lost = (sample < 0).all(0)
        if lost.any() and ((sample == place).all(0) | lost).all():
            top, left, bottom, right = *lost.nonzero().amin(0).tolist(), *lost.nonzero().amax(0).tolist()
            assert lost[top : bottom + 1, left : right + 1].all()  # one rectangle, of 16 x 16 but for the edges
            assert (bottom - top == 15 or top == 0 or bottom == 47) and (right - left == 15 or left == 0 or right == 47)
            holes.append(lost.sum().item())
        elif not lost.any() and (sample[0] == sample[0, :, :1]).all():
            down, right = ((5 - int(channel[0, 0])) % 48 - 5 for channel in sample)
            assert torch.equal(place.roll((down, right), (1, 2)), sample)
            rolls.append((down, right))
        else:  # a rotation about the middle
            seen, came_from = place[:, ~lost] - 23.5, sample[:, ~lost] - 23.5
            cross, dot = (seen[0] * came_from[1] - seen[1] * came_from[0]).sum(), (seen * came_from).sum()
            angle = torch.atan2(cross, dot)
            angles.append(angle.rad2deg().item())
    assert all(0.25 < len(kind) / 300 < 0.42 for kind in (rolls, angles, holes))
    assert {d for d, _ in rolls} == {r for _, r in rolls} == set(range(-5, 6))
    assert -30.2 < min(angles) < -25 and 25 < max(angles) < 30.2 and abs(np.mean(angles)) < 6
    assert max(holes) == 256 and 64 <= min(holes) < 200
