"""Event cameras: recordings in the files that tonic reads -> frames -> a network that learns motion from them.

DVS-Gesture's are `.npy` arrays, as its distribution has them; CIFAR10-DVS's are AEDAT4 files, written by the library of
the camera's maker (dv-processing, which .ci/run installs; without it the tests of those are skipped).
"""

import shutil
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from ei_init import initialize
from inhibition import clamp_dale
from model import PLANS, build
from support import augment, data, events, recipes
from support.measure import evaluate


def random_events(rng, n=1000):
    """(n, 4): column, row, polarity, time in ms (0 to 500)."""
    x, y, p = rng.integers(0, 128, n), rng.integers(0, 128, n), rng.integers(0, 2, n)
    return np.stack([x, y, p, np.sort(rng.integers(0, 500, n))], axis=1)


def moving_bar(rng, n=2400):
    """A horizontal line of events that moves down through all 128 rows, from any row on and round the edge."""
    events = random_events(rng, n)
    events[:, 1] = (rng.integers(128) + np.arange(n) * 128 // n) % 128
    return events


def backwards(events):
    """What happened, in reverse order at the same times."""
    return np.concatenate([events[::-1, :3], events[:, 3:]], axis=1)


def save_gesture(root, split, user, label, events):
    folder = root / "DVSGesture" / f"ibmGesture{split}" / f"user{user:02d}_fluorescent_led"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{label}.npy", events)


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
def tonic():
    return pytest.importorskip("tonic")


@pytest.fixture
def gestures(tmp_path, tonic):
    """Four recordings for training and two for testing, of classes 0 and 10."""
    rng = np.random.default_rng(0)
    for split, users in (("Train", 2), ("Test", 1)):
        for user in range(users):
            for label in (0, 10):
                save_gesture(tmp_path, split, user, label, random_events(rng))
    return tmp_path


def by_hand(events, T, size):
    """Frames (T, 2, size, size) counted event by event, each shared out by the area of its pixel in each cell."""
    frames, n = np.zeros((T, 2, size, size)), len(events) // T
    for i, (x, y, p, _) in enumerate(events[: n * T]):
        for row in range(size):
            height = min(y + 1, (row + 1) * 128 / size) - max(y, row * 128 / size)
            for column in range(size) if height > 0 else ():
                width = min(x + 1, (column + 1) * 128 / size) - max(x, column * 128 / size)
                frames[i // n, p, row, column] += max(width, 0) * height
    return frames


@pytest.mark.parametrize("size", [48, 64, 20])
def test_frames_of_equal_event_count(gestures, size):
    d = data.load("dvs-gesture", gestures, size, T=3)
    assert d.train_x.shape == (4, 3, 2, size, size) and d.test_x.shape == (2, 3, 2, size, size)
    assert d.train_y.tolist() == [0, 10, 0, 10] and d.n_classes == 11 and d.in_channels == 2
    assert not d.train_x.is_floating_point() and d.augment is data.augment_gesture
    frames = data.to_input(d.train_x)
    assert frames.dtype == torch.float32 and frames.min() >= 0
    assert frames.sum((2, 3, 4)).flatten().tolist() == pytest.approx([333] * 12)  # 1000 // 3: none is lost
    file = gestures / "DVSGesture" / "ibmGestureTrain" / "user01_fluorescent_led" / "10.npy"
    expected = torch.from_numpy(by_hand(np.load(file), 3, size)).float()
    torch.testing.assert_close(frames[3], expected)


def test_a_busy_pixel_is_counted_in_a_wider_type(gestures):
    events = np.tile(np.array([[127, 0, 1, 5]]), (100_000, 1))
    save_gesture(gestures, "Test", 0, 0, events)
    d = data.load("dvs-gesture", gestures, 64, T=2)  # 50,000 a frame: more than an int16 holds
    assert d.test_x.dtype == torch.int32 and data.to_input(d.test_x)[0, :, 1, 0, 63].tolist() == [50_000, 50_000]
    save_gesture(gestures, "Test", 0, 0, events[:1000])
    assert data.load("dvs-gesture", gestures, 64, T=2).test_x.dtype == torch.int16
    save_gesture(gestures, "Test", 0, 0, events[:200])
    assert data.load("dvs-gesture", gestures, 64, T=2).test_x.dtype == torch.uint8


def test_recordings_are_decoded_once_for_each_T_and_size(gestures, tonic, monkeypatch):
    first = data.load("dvs-gesture", gestures, 48, T=4)
    decoded = []
    original = events.count
    monkeypatch.setattr(events, "count", lambda found, T: decoded.append(T) or original(found, T))
    again = data.load("dvs-gesture", gestures, 48, T=4)
    assert not decoded and torch.equal(first.train_x, again.train_x) and torch.equal(first.test_x, again.test_x)
    assert data.load("dvs-gesture", gestures, 48, T=5).train_x.shape[1] == 5 and len(decoded) == 6
    assert data.load("dvs-gesture", gestures, 32, T=4).train_x.shape[3] == 32 and len(decoded) == 12
    save_gesture(gestures, "Train", 0, 0, random_events(np.random.default_rng(9), 500))
    changed = data.load("dvs-gesture", gestures, 48, T=4)
    assert len(decoded) == 18 and not torch.equal(first.train_x[0], changed.train_x[0])


@pytest.mark.parametrize(
    "column, values, message",
    [
        (3, [np.nan], "time"),
        (0, [-1.0], "x of an event"),
        (1, [65539.0], "y of an event"),
        (0, [3.7], "not a whole number"),
        (2, [2.0, 3.0], "polarities"),
    ],
)
def test_a_bad_event_in_a_file_is_refused_with_its_name(column, values, message, gestures, tmp_path):
    shutil.copytree(gestures, tmp_path / "g")
    file = sorted((tmp_path / "g").rglob("*.npy"))[0]
    found = np.load(file).astype(float)
    found[: len(values), column] = values
    np.save(file, found)
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read as a recording of dvs-gesture: .*{message}"):
        data.load("dvs-gesture", tmp_path / "g", 32, T=3)


def test_signed_polarities_and_shuffled_events_in_a_file_are_put_right(gestures, tmp_path):
    expected = data.load("dvs-gesture", gestures, 32, T=3)
    shutil.copytree(gestures, tmp_path / "g")
    for file in (tmp_path / "g").rglob("*.npy"):
        found = np.load(file).astype(float)
        found[:, 2] = 2 * found[:, 2] - 1
        order = np.argsort(found[:, 3], kind="stable")
        if len(set(found[:, 3])) == len(found):  # no two at the same time: their order is unambiguous
            found = found[np.concatenate([order[::2], order[1::2]])]
        np.save(file, found)
    got = data.load("dvs-gesture", tmp_path / "g", 32, T=3)
    assert torch.equal(expected.train_x, got.train_x) and torch.equal(expected.test_x, got.test_x)


@pytest.fixture(scope="module")
def cifar10_dvs(tmp_path_factory):
    """Ten recordings of two of the ten classes, and what was written: {class: [events]}."""
    pytest.importorskip("tonic")
    root, rng = tmp_path_factory.mktemp("cifar10-dvs"), np.random.default_rng(1)
    written = {"cat": [random_events(rng, 300) for _ in range(10)], "truck": [random_events(rng) for _ in range(10)]}
    for name, recordings in written.items():
        for i, found in enumerate(recordings):
            save_cifar10_dvs(root, name, i, found)
    return root, written


def test_cifar10_dvs_is_read_and_split_by_class(cifar10_dvs):
    root, written = cifar10_dvs
    d = data.load("cifar10-dvs", root, 48, T=5)
    assert d.train_x.shape == (18, 5, 2, 48, 48) and d.n_classes == 10 and d.augment is data.augment_cifar10_dvs
    assert sorted(d.test_y.tolist()) == [3, 9] and sorted(d.train_y.tolist()) == [3] * 9 + [9] * 9
    both, labels = torch.cat([d.train_x, d.test_x]), torch.cat([d.train_y, d.test_y])
    assert torch.equal(data.load("cifar10-dvs", root, 48, T=5).test_x, d.test_x)
    expected = [torch.from_numpy(by_hand(e, 5, 48)) for e in written["cat"]]
    found = list(data.to_input(both[labels == 3]).double())
    for frames in expected:  # each recording is in one of the two sets, once
        same = [i for i, other in enumerate(found) if torch.allclose(frames, other, atol=1e-5)]
        assert len(same) == 1
        found.pop(same[0])


@pytest.mark.parametrize("name", ["dvs-gesture", "cifar10-dvs"])
def test_the_command_trains_on_recordings(name, request, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PLANS, "vgg8", [8, "P", 8, "P", 16, "P", 16, "P", 16, "P"])  # its shape, in a second
    root = request.getfixturevalue("gestures") if name == "dvs-gesture" else request.getfixturevalue("cifar10_dvs")[0]
    options = ["--data", name, "--data-root", str(root), "--T", "3", "--batch-size", "2"]
    assert train.main([*options, "--epochs", "2", "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "test samples of 3x2x48x48" in out and "epoch   2" in out
    assert train.main(["--eval", str(tmp_path / "r")]) == 0


def test_frames_of_another_number_than_T_are_refused(gestures):
    frames = data.to_input(data.load("dvs-gesture", gestures, 32, T=3).train_x)
    with pytest.raises(ValueError, match="runs for T=4 time steps, but the data have 3 frames"):
        build("vgg8", 2, 11, T=4)(frames)


def run_and_fail(capsys, *arguments):
    start = time.perf_counter()
    assert train.main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and time.perf_counter() - start < 20
    return err


@pytest.mark.parametrize("name", ["dvs-gesture", "cifar10-dvs"])
def test_without_tonic_one_line_says_what_to_install(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tonic", None)
    err = run_and_fail(capsys, "--data", name, "--data-root", tmp_path)
    assert "tonic" in err and "pip install -r requirements-events.txt" in err


@pytest.mark.parametrize("name, kind", [("dvs-gesture", "DVSGesture"), ("cifar10-dvs", "CIFAR10DVS")])
def test_missing_recordings_are_not_downloaded_but_asked_for(name, kind, tmp_path, capsys, monkeypatch, tonic):
    monkeypatch.setattr(tonic.dataset, "download_and_extract_archive", lambda *_, **__: 1 / 0)
    err = run_and_fail(capsys, "--data", name, "--data-root", tmp_path)
    assert f"no recordings of {name} in {tmp_path / kind}" in err and f"{kind}('{tmp_path}')" in err
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_recordings(gestures, capsys):
    def fails():
        return run_and_fail(capsys, "--data", "dvs-gesture", "--data-root", gestures)

    train_folder = gestures / "DVSGesture" / "ibmGestureTrain"
    file = train_folder / "user00_fluorescent_led" / "0.npy"
    intact = file.read_bytes()
    for foreign in (b"", intact[:200], intact[: len(intact) // 2], b"not an array"):
        file.write_bytes(foreign)
        assert f"{file} cannot be read as a recording of dvs-gesture" in fails()
    np.save(file, np.array([{"an": "object"}], dtype=object))
    assert f"{file} cannot be read" in fails()
    save_gesture(gestures, "Train", 0, 0, random_events(np.random.default_rng(0), 15))
    assert "15 events cannot make T=16 frames" in fails()
    events = random_events(np.random.default_rng(0))
    events[7, 0] = 128
    save_gesture(gestures, "Train", 0, 0, events)
    assert f"{file} cannot be read" in fails()
    file.write_bytes(intact)
    (train_folder / "user00_fluorescent_led" / "11.npy").write_bytes(intact)
    assert "11.npy is of class 11, but dvs-gesture has 11" in fails()
    (train_folder / "user00_fluorescent_led" / "11.npy").rename(train_folder / "user00_fluorescent_led" / "copy.npy")
    assert "is not of DVSGesture" in fails()


def test_aedat4_files_that_are_damaged(tmp_path, capsys, tonic):
    file = save_cifar10_dvs(tmp_path, "bird", 0, random_events(np.random.default_rng(0)))
    intact = file.read_bytes()
    for foreign in (b"", intact[:100], intact[: len(intact) // 2], bytes(5000)):
        file.write_bytes(foreign)
        err = run_and_fail(capsys, "--data", "cifar10-dvs", "--data-root", tmp_path)
        assert f"{file} cannot be read as a recording of cifar10-dvs" in err
    file.write_bytes(b"#!AER-DAT4.0\r\n" + bytes(200))  # here the decoder panics, and says so itself on stderr
    with pytest.raises(ValueError, match="cannot be read as a recording"):
        data.load("cifar10-dvs", tmp_path, 48)
    file.parent.rename(file.parent.with_name("bike"))
    assert "is not of CIFAR10DVS: 'bike'" in run_and_fail(capsys, "--data", "cifar10-dvs", "--data-root", tmp_path)


def test_recipes_of_event_cameras():
    def of(*arguments):
        config = recipes.settings(recipes.parse(arguments))
        return [config[k] for k in ("lr", "warmup_epochs", "epochs", "batch_size", "T", "image_size")]

    for arch in ("vgg8", "vgg11"):
        assert of("--data", "cifar10-dvs", "--arch", arch) == [0.001, 10, 300, 32, 10, 48]
    assert of("--data", "dvs-gesture") == [0.001, 10, 300, 32, 16, 48]
    assert of("--data", "dvs-gesture", "--T", "4", "--image-size", "64")[-2:] == [4, 64]


# Augmentation. Each pixel of `coordinates` holds its row in one channel and its column in the other, counted from 1, so
# that the result shows where each of its pixels came from; 0 is a pixel from nowhere.


def coordinates(B, T=2, S=48):
    places = torch.arange(1, S + 1.0)
    return torch.stack([places[:, None].expand(S, S), places.expand(S, S)]).expand(B, T, 2, S, S)


def augmented(augment, x, seed=0):
    return augment(x, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("augment", [data.augment_gesture, data.augment_cifar10_dvs])
def test_event_augmentation_is_the_same_for_all_frames_and_another_for_each_sample(augment):
    x = coordinates(40, T=3)
    out = augmented(augment, x)
    assert out.shape == x.shape and out.dtype == x.dtype and (out == out[:, :1]).all()
    assert torch.equal(out, augmented(augment, x)) and not torch.equal(out, augmented(augment, x, 1))
    assert len({tuple(sample.flatten().tolist()) for sample in out[:, 0]}) == 40
    counts = torch.rand(8, 3, 2, 48, 48)
    out = augmented(augment, counts)
    assert out.min() >= 0 and all(torch.isin(b[b > 0], a).all() for a, b in zip(counts, out, strict=True))
    assert augmented(augment, torch.zeros(8, 3, 2, 48, 48)).sum() == 0


def test_gesture_crops():
    rows, columns = augmented(data.augment_gesture, coordinates(2000))[:, 0].unbind(1)
    assert (rows == rows[:, :, :1]).all() and (columns == columns[:, :1]).all()
    rows, columns = rows[:, :, 0], columns[:, 0]
    flipped = columns[:, 0] > columns[:, -1]
    assert 0.45 < flipped.float().mean() < 0.55
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    for places in (rows, columns):
        steps = places.diff()
        assert places.min() == 1 and places.max() == 48 and steps.min() == 0 and steps.max() == 1
        near, far = places[:, 0] - 1, 48 - places[:, -1]
        assert abs((near - far).mean()) < 1  # crops lie anywhere
    height, width = (places[:, -1] - places[:, 0] + 1 for places in (rows, columns))
    area, aspect = height * width / 48**2, height / width
    assert 0.48 < area.min() < 0.52 and area.max() > 0.98 and 0.72 < area.mean() < 0.78
    assert 0.71 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4 and abs(aspect.log().mean()) < 0.02


def test_one_of_roll_rotation_and_cutout(monkeypatch):
    def whole(x, generator, smallest):  # no crop, no flip, so that the other is seen alone
        assert smallest == 0.7
        pixels = torch.arange(x.shape[-1]).expand(len(x), -1)
        return pixels, pixels

    monkeypatch.setattr(augment, "_crop_and_flip", whole)
    S, source = 48, coordinates(1)[0, 0]
    out = augmented(data.augment_cifar10_dvs, coordinates(300))[:, 0]
    rolls, angles, holes = [], [], []
    for sample in out:
        unmoved = (sample == source).all(0)
        lost = (sample == 0).all(0)
        if (unmoved | lost).all() and lost.any():
            where = lost.nonzero()
            top, left, bottom, right = *where.amin(0).tolist(), *where.amax(0).tolist()
            assert lost[top : bottom + 1, left : right + 1].all()  # one rectangle
            assert (bottom - top + 1 == 16) or top == 0 or bottom == S - 1
            assert (right - left + 1 == 16) or left == 0 or right == S - 1
            holes.append(lost.sum().item())
        elif not lost.any() and (sample[0] == sample[0, :, :1]).all():
            down, right = (1 - sample[0, 0, 0]).item() % S, (1 - sample[1, 0, 0]).item() % S
            assert torch.equal(source.roll((int(down), int(right)), (1, 2)), sample)
            rolls.append([(d + 5) % S - 5 for d in (down, right)])
        else:  # a rotation: what is seen lies where the angle says, within half a pixel
            place = torch.stack(torch.meshgrid(*[torch.arange(S) - 23.5] * 2, indexing="ij"))
            seen, came_from = place[:, ~lost], (sample - 24.5)[:, ~lost]
            cross = (seen[0] * came_from[1] - seen[1] * came_from[0]).sum()
            angle = torch.atan2(cross, (seen * came_from).sum())  # but for rounding to whole pixels
            angle = angle + torch.linspace(-0.03, 0.03, 31)
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
            miss = (turn @ seen - came_from).abs().flatten(1).amax(1)
            assert miss.min() < 0.53
            turn, angle = turn[miss.argmin()], angle[miss.argmin()]
            assert ((turn @ place[:, lost]).abs().amax(0) > 23.5).all()  # dark only where it looks past the edge
            angles.append(angle.rad2deg().item())
    assert all(0.25 < len(kind) / 300 < 0.42 for kind in (rolls, angles, holes))
    assert {d for d, _ in rolls} == {r for _, r in rolls} == set(range(-5, 6))
    assert -30.2 < min(angles) < -25 and 25 < max(angles) < 30.2 and abs(np.mean(angles)) < 6
    assert max(holes) == 256 and 64 <= min(holes) < 200


def test_the_crop_of_everything_changes_nothing():
    x = torch.rand(20, 2, 2, 48, 48)
    rows, columns = augment._crop_and_flip(x, torch.Generator().manual_seed(0), 1)
    everything = torch.arange(48).expand(20, -1)
    assert torch.equal(rows, everything)
    assert torch.equal(columns.sort(1).values, everything)  # for it may be flipped
    assert torch.equal(augment._select(x, everything[:, :, None], everything[:, None, :]), x)


def test_a_network_learns_the_direction_of_motion(tmp_path, tonic):
    """Bars that move down (0) or up (1), on the disk as DVS-Gesture's recordings are, through `data.load`.

    Each recording that moves up is one that moves down, backwards in time. So the two classes consist of the very same
    frames, and whoever looks at one frame, or at the frames in any order, can do no better than chance.
    """
    rng, T = np.random.default_rng(0), 8
    for split, n in (("Train", 96), ("Test", 32)):
        for user in range(n):
            events = moving_bar(rng)
            save_gesture(tmp_path, split, user, 0, events)
            save_gesture(tmp_path, split, user, 1, backwards(events))
    d = data.load("dvs-gesture", tmp_path, 16, T=T)
    for x, y in ((d.train_x, d.train_y), (d.test_x, d.test_y)):
        assert torch.equal(x[y == 0], x[y == 1].flip(1))
    config = dict(seed=0, batch_size=16, epochs=8, lr=0.004, warmup_epochs=1, warmup_from=1e-7)
    model = build("vgg8", d.in_channels, 2, T=T, image_size=16, plan=["P", 32, 32, "P", 32, "P"])
    initialize(model, data.first_batch(config, d)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, weight_decay=5e-4, fused=True)
    step = 0
    for epoch in range(config["epochs"]):
        for indices in data.epoch_order(config, d, epoch):
            x, y = data.training_batch(config, d, indices, step)
            optimizer.param_groups[0]["lr"] = train.learning_rate(config, step, 12)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            clamp_dale(model)
            step += 1
    assert evaluate(model, d.test_x, d.test_y)[1] >= 0.85
    assert evaluate(model, d.test_x.flip(1), d.test_y)[1] <= 0.15  # backwards in time, down is up
