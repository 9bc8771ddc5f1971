"""Each figure from tiny runs: the picture is there, and the numbers beside it are those of the networks."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from test_measure import use_som

import ei_prop
import reproduce
import train
import visualize
from ei_init import initialize
from model import build, circuits
from support import data, measure, plots
from support import runs as stored
from support.runs import CHECKPOINT, PREVIOUS, Run, load_data_and_model, prepare, restore

TINY = ["--plan", "8 P 8 P", "--T", "2", "--epochs", "1", "--batch-size", "32"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A folder of all runs that the figures need, of a small network on a few digits. Figures go there too."""
    digits = data.load("digits")
    few = data.Dataset(digits.train_x[:64], digits.train_y[:64], digits.test_x[:40], digits.test_y[:40], 10)
    folder = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: few)
        assert reproduce.main([*TINY, *"--suite paper homeostasis --no-figures --out".split(), str(folder)]) == 0
        yield folder


def run_of(suite, kind="ei", what=""):
    return suite / f"digits-vgg8-{kind}-plan8-P-8-P{what}-seed0"


def trained(suite):
    """The data and the trained network of the run that the figures are drawn from."""
    run = Run(run_of(suite))
    dataset, net = load_data_and_model(run.config, torch.device("cpu"))
    restore(net, run.load()["model"], run.folder)
    return dataset, net.eval()


def first_step(suite):
    """That network at initialisation, with the gradients of its first step, and the input of it."""
    config = Run(run_of(suite)).config
    dataset, net = load_data_and_model(config, torch.device("cpu"))
    prepare(config, dataset, net)
    x, y = data.first_batch(config, dataset)
    F.cross_entropy(net(x), y).backward()
    return net, x


def numbers(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def rows_of(name, folder, *options):
    """The rows of the CSV of a figure."""
    assert visualize.main([name, str(folder), "--out", str(folder / "figures"), *options]) == 0
    return numbers(folder / "figures" / f"{name}.csv")


def draw(name, folder, *options):
    """The same, and the picture is looked at."""
    rows = rows_of(name, folder, *options)
    assert (folder / "figures" / f"{name}.pdf").stat().st_size > 5000
    picture = np.asarray(Image.open(folder / "figures" / f"{name}.png").convert("L"), dtype=float)
    assert picture.shape[1] >= 900 and picture.std() > 10 and (picture < 100).mean() > 0.002
    return rows


@pytest.fixture
def no_pictures(monkeypatch):
    """Numbers only: pictures take most of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(plots, "save_gif", lambda *_: None)


def found_in(rows, name, **places):
    """The numbers in a column of a CSV file, of the rows with these values in other columns."""
    return [float(row[name]) for row in rows if all(row[key] == value for key, value in places.items())]


def fails(capsys, *arguments):
    assert visualize.main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_init_needs_no_run(suite, tmp_path):
    rows = draw("init", tmp_path, "--width", "0.1", "--T", "2", "--ei-ratio", "2")
    assert len(rows) == (5 + 16) * 3 and {row["init"] for row in rows} == {"E-I Init", "without its gain", "|Kaiming|"}
    torch.manual_seed(0)  # the same draw as the figure's
    batch = data.to_input(data.load("digits").train_x[torch.randperm(64)[:32]])
    torch.manual_seed(0)
    net = build("vgg8", in_channels=1, T=2, width=0.1, ei_ratio=2)
    initialize(net, batch)
    i_int, spikes = net.encoder.stages[0].circuit(batch), net.encoder.stages[0](batch.expand(2, *batch.shape))
    (row,) = (row for row in rows if (row["arch"], row["init"], row["layer"]) == ("vgg8", "E-I Init", "1"))
    found = [float(row[name]) for name in ("mean", "std", "firing_rate")]
    assert found == pytest.approx([i_int.mean().item(), i_int.std().item(), spikes.mean().item()], rel=1e-3, abs=1e-4)


def test_curves(suite):
    rows = draw("curves", suite)
    assert [row["kind"] for row in rows] == ["ei", "bn", "plain", "dann", "homeostasis"]
    (metrics,) = numbers(run_of(suite, "bn") / "metrics.csv")
    assert all(rows[1][name] == metrics[name] for name in ("epoch", "train_loss", "test_loss", "test_accuracy"))


@pytest.mark.parametrize("name, labels, what", [
    ("epsilon", ["1e-8", "1e-7", "1e-6", "1e-5", "1e-4", "adaptive"], "-eps1e-08"),
    ("ablation", ["no STE", "all of it", "no gradient scaling", "|Kaiming| for E-I Init"], "-noste"),
])  # fmt: skip
def test_tables(name, labels, what, suite, capsys):
    assert {row["run"] for row in draw(name, suite)} == set(labels)
    markdown = (suite / "figures" / f"{name}.md").read_text(encoding="utf-8")
    assert markdown in capsys.readouterr().out and "best on the test set" in markdown
    result = json.loads((run_of(suite, what=what) / "result.json").read_text(encoding="utf-8"))
    cells = [cell.strip() for cell in next(line for line in markdown.splitlines() if labels[0] in line).split("|")]
    assert cells[1:-1] == [labels[0], result["outcome"], "1", f"{result['best_test_accuracy']:.2%}"]


def test_representation(suite):
    rows = draw("representation", suite)
    dataset, net = trained(suite)
    x = data.to_input(dataset.test_x)
    values = net.encoder.stages[0].circuit(x).detach().clamp(-6, 6).numpy()
    expected = np.histogram(values, 120, (-6, 6), density=True)[0]
    found = found_in(rows, "density", when="after training", layer="1", quantity="i_int")
    assert found == pytest.approx(list(expected), abs=1e-3)
    points = numbers(suite / "figures" / "representation-pca.csv")
    rates = net.encoder.stages[:-1](x.expand(2, *x.shape)).mean(0).flatten(1).detach()  # of the last layer
    expected = (torch.linalg.svd(rates - rates.mean(0), full_matrices=False).S[0] ** 2).item()
    assert sum(pc**2 for pc in found_in(points, "pc1", when="after training")) == pytest.approx(expected, rel=1e-3)
    assert [int(p["label"]) for p in points[:40]] == dataset.test_y.tolist()
    assert len(rows_of("representation", run_of(suite, "plain"))) == len(rows)  # it needs no circuits


def test_evolution(suite):
    rows = draw("evolution", suite)
    with Image.open(suite / "figures" / "evolution.gif") as gif:
        assert gif.n_frames == 2  # before and after the epoch
    dataset, net = trained(suite)
    counts = measure.histograms(net, data.to_input(dataset.test_x))[1, 1].numpy()  # layer 2, u
    found = found_in(rows, "density", epoch="1", layer="2", quantity="u")
    assert found == pytest.approx(list(counts / counts.sum() / 0.1)) and len(rows) == 2 * 2 * 2 * 120


def test_balance(suite):
    rows = draw("balance", suite)
    assert len(rows) == 2 * 3 * 24 * 14 and all(int(row["spike"]) == (float(row["u"]) >= 1) for row in rows)
    row = next(row for row in rows if row["when"] == "after training" and row["step"] == "1")
    dataset, net = trained(suite)
    image = data.to_input(dataset.test_x[3 * int(row["image"])])[None]  # 14 of 40 are looked at
    found = visualize.currents_of(net, image, 1)["i_ee"][0, 0, int(row["neuron"]), 8, 8]
    assert float(row["i_ee"]) == pytest.approx(found.item(), rel=1e-4)
    assert visualize.middle(dense := torch.rand(4, 2, 7)) is dense


def test_gain_is_flat_with_division_and_rises_without(suite):
    rows = draw("gain", suite)
    dataset, net = trained(suite)
    x = data.to_input(dataset.test_x)
    rate = net.encoder.stages[0](x.expand(2, *x.shape)).mean().item()
    divided = found_in(rows, "firing_rate", condition="divisive inhibition", layer="1")
    assert divided == pytest.approx([rate] * 11, rel=0.02)
    without = found_in(rows, "firing_rate", condition="its mean instead", layer="1")
    assert len(without) == 11 and without[-1] > 2 * without[0]


def test_gradients(suite, capsys):
    rows = draw("gradients", suite)
    assert len(rows) == 5 * (3 * 3 + 3 * 2)  # the readout has no g_I, g_E, b_E
    net, names = first_step(suite)[0], ("E-I Prop", "no scaling")
    norms = {name: found_in(rows, "gradient_norm", variant=name, parameter="w_ei") for name in names}
    assert norms["E-I Prop"] == pytest.approx([c.w_ei.grad.norm().item() for c in circuits(net)], rel=1e-4)
    scaled = [norm / c.fan_in for norm, c in zip(norms["no scaling"], circuits(net), strict=True)]
    assert norms["E-I Prop"] == pytest.approx(scaled, rel=1e-3)
    assert "is of kind dann" in fails(capsys, "gradients", run_of(suite, "dann"))


def test_learning(suite):
    rows, (net, x) = draw("learning", suite), first_step(suite)
    assert {row["kind"] for row in rows} == {"ei", "homeostasis", "bn"}
    circuit = net.encoder.stages[0].circuit
    before, step = circuit(x), circuit.w_ie.grad.mean((1, 2, 3), keepdim=True)
    circuit.w_ie.data -= 0.001 * step
    moved = 1000 * (circuit(x) - before).square().mean().sqrt() / before.std()
    assert found_in(rows, "value", kind="ei", quantity="w_ie, common")[0] == pytest.approx(moved.item(), rel=0.02)
    dataset, net = trained(suite)
    rates = net.encoder.stages[0](data.to_input(dataset.test_x).expand(2, 40, 1, 32, 32)).mean((0, 1, 3, 4))
    for name, share in dict(hardly=rates < 0.01, mostly=rates > 0.5).items():
        assert found_in(rows, "value", kind="ei", quantity=name)[0] == 100 * share.float().mean()


def test_stabilizer(suite, capsys):
    rows = draw("stabilizer", suite)
    dataset, net = trained(suite)
    config = Run(run_of(suite)).config
    order = data.epoch_order(config, dataset, 0)
    batches = [data.training_batch(config, dataset, chosen, i) for i, chosen in enumerate(order)]
    expected = visualize.stabilization(net, batches, {"adaptive": ("adaptive", True)})[1]
    for name, value in dict(zeros=expected["zeros"], gradient_norm=expected["adaptive"]).items():
        found = found_in(rows, name, when="after training", layer="2", variant="adaptive")
        assert found == pytest.approx([value], rel=1e-4) and value > 0
    small = found_in(rows, "gradient_norm", when="at initialisation", layer="1", variant="\u03b5=1e-8")
    assert small[0] > 100 * found_in(rows, "gradient_norm", when="at initialisation", layer="1", variant="adaptive")[0]
    for kind in ("bn", "homeostasis"):
        assert f"is of kind {kind}" in fails(capsys, "stabilizer", run_of(suite, kind))


def test_a_training_that_collapses_after_its_best_epoch_is_shown_as_it_ended(suite, tmp_path, no_pictures):
    run = shutil.copytree(run_of(suite), tmp_path / "run")
    state = Run(run).load()
    state["model"] = {k: torch.zeros_like(p) if k.endswith("w_ei") else p for k, p in state["model"].items()}
    torch.save(state, run / CHECKPOINT)
    assert set(found_in(rows_of("stabilizer", run), "zeros", when="after training", layer="2")) == {1}
    for name in (CHECKPOINT, PREVIOUS):  # then the parameters of the best epoch are all that there is
        (run / name).unlink(missing_ok=True)
    assert max(found_in(rows_of("stabilizer", run), "zeros", when="after training", layer="2")) < 1


def test_weights(suite):
    rows = draw("weights", suite)
    assert min(found_in(rows, "smallest")) >= 0  # on its own side of zero
    zeros = [(c.w_ee == 0).flatten() for c in circuits(trained(suite)[1])]
    found = found_in(rows, "zeros", when="after training", parameter="w_ee")
    assert found[0] == pytest.approx(torch.cat(zeros).float().mean().item(), abs=1e-6)
    for kind, names in dict(dann="w_ee w_ie w_ei g_e", homeostasis="w_ee w_ie w_ei g_i g_e").items():
        assert {row["parameter"] for row in rows_of("weights", run_of(suite, kind))} == set(names.split())


@pytest.mark.parametrize("eps", ["3e-5", "twice"])
def test_an_edited_circuit_is_drawn_with_its_own_cells_and_eps(eps, suite, tmp_path, no_pictures, monkeypatch):
    use_som(monkeypatch)
    monkeypatch.setitem(ei_prop.STABILIZERS, "twice", lambda i_div: 2 * ei_prop.smallest_positive(i_div))
    assert train.main([*TINY, "--eps", eps, "--out", str(tmp_path)]) == 0
    assert len({row["variant"] for row in rows_of("stabilizer", tmp_path)}) == 6
    gradients = found_in(rows_of("gradients", tmp_path), "gradient_norm", variant=f"\u03b5={eps}", parameter="w_se")
    assert len(gradients) == 3
    signs = {row["parameter"]: int(row["sign"]) for row in rows_of("weights", tmp_path)}
    assert signs == dict(w_ee=1, w_ie=1, w_ei=-1, g_i=-1, g_e=1, w_se=1, w_es=-1)


def copy(run, folder, **config):
    """A copy of a run without its networks, with some other settings."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.pt", "figures"))
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return folder


def test_only_what_was_made_alike_stands_side_by_side(suite, tmp_path, capsys, no_pictures):
    copy(run_of(suite), tmp_path / "ei")
    copy(run_of(suite, "bn"), tmp_path / "bn", epochs=2, batch_size=16)
    result = copy(run_of(suite, "plain"), tmp_path / "plain") / "result.json"
    result.write_text(result.read_text(encoding="utf-8").replace("40 samples", "41 samples"), encoding="utf-8")
    metrics = copy(run_of(suite, "dann"), tmp_path / "dann") / "metrics.csv"
    assert [row["kind"] for row in rows_of("curves", tmp_path)] == ["ei", "dann"]  # DANN has no time, so another T
    said = f" was made with other {{}} than {tmp_path / 'ei'}\n"
    out = capsys.readouterr().out
    assert f"{tmp_path / 'bn'}{said.format('epochs, batch_size')}" in out and f"plain{said.format('images')}" in out
    for text in ("epoch,train_loss,test_loss,test_accuracy\n1,2.3,nan,0.1\n", "epoch\n1\n", "x" * 200_000, "text"):
        metrics.write_text(text, encoding="utf-8")
        assert [row["kind"] for row in rows_of("curves", tmp_path)] == ["ei"]
        assert f"left out: {metrics} is missing or damaged" in capsys.readouterr().out
    for name in ("ei", "bn", "plain"):
        shutil.copy(metrics, tmp_path / name)
    assert "none of the runs can be drawn" in fails(capsys, "curves", tmp_path)
    run, other = Run(run_of(suite)), Run(run_of(suite, what="-noste"))
    other.config["lr"] = 1.0  # of the same kind of network, so it is no recipe of its own
    assert stored.differing(run, other) == ["lr"] and stored.differing(run, Run(run_of(suite, "bn"))) == []


def test_the_run_is_chosen_by_its_settings(suite, tmp_path, capsys, no_pictures, monkeypatch):
    for name, config in (("a", dict(seed=1)), ("b", {}), ("c", {}), ("d", dict(width=0.5, tau=3.0))):
        copy(run_of(suite), tmp_path / name, **config)
    copy(run_of(suite, "dann"), tmp_path / "e")
    monkeypatch.setattr(stored, "histograms", lambda run: np.ones((2, 3, 2, 120)))
    rows_of("evolution", tmp_path)
    assert f"of 4 such runs {tmp_path / 'b'} is drawn" in capsys.readouterr().out
    rows_of("evolution", tmp_path, "--seed", "1")
    assert "such runs" not in capsys.readouterr().out
    rows_of("evolution", tmp_path, "--tau", "3", "--kind", "dann")  # which has no tau
    assert "has no run with kind=ei eps=adaptive ste=False" in fails(capsys, "ablation", tmp_path)


def test_all_says_what_is_missing(suite, tmp_path, capsys, no_pictures, monkeypatch):
    monkeypatch.setattr(visualize, "FIGURES", {name: visualize.FIGURES[name] for name in ("ablation", "evolution")})
    monkeypatch.setattr(stored, "histograms", lambda run: np.ones((2, 3, 2, 120)))
    alone = copy(run_of(suite), tmp_path / "my runs" / "ei")
    assert visualize.main(["all", str(alone)]) == 0
    out = capsys.readouterr().out
    assert f"ablation: not drawn. {alone} has no run with kind=ei eps=adaptive ste=False" in out
    assert f"evolution: {alone / 'figures'}" in out


def test_bad_input_ends_in_one_line(suite, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for figure in ("curves", "stabilizer", "gradients", "representation"):
        assert "empty has no run with kind=ei" in fails(capsys, figure, tmp_path / "empty")
    assert "there is no folder" in fails(capsys, "all", tmp_path / "nowhere")
    assert "invalid choice" in fails(capsys, "portrait")
    run = copy(run_of(suite), tmp_path / "run")
    assert "best.pt" in fails(capsys, "weights", run)
    assert "checkpoint.pt" in fails(capsys, "evolution", run)
    for text in ("[]", "{"):
        (run / "result.json").write_text(text)
        with pytest.raises(ValueError, match=r"result\.json is missing or damaged"):
            stored.result_of(Run(run))
    (run / "config.json").write_text("{")
    assert "config.json" in fails(capsys, "curves", run)
