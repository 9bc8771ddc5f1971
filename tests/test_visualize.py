"""Each figure from a suite of tiny runs: the picture is there, and the numbers beside it are those of the networks."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import train
import visualize
from ei_init import initialize
from model import circuits, histograms, layers, observe

NARROW = [8, "P", 8, "P", 16, "P", 16, "P", 16, "P"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A folder with the runs of the paper's suite, of a narrow network on a few digits, and where figures go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PLANS, "vgg8", NARROW)
        patch.setitem(model.PLANS, "vgg19", NARROW)
        whole = data.load("digits")
        few = data.Dataset(
            whole.train_x[:64], whole.train_y[:64], whole.test_x[:40], whole.test_y[:40], 10, augment=None
        )
        patch.setattr(data, "load", lambda *_, **__: few)
        folder = tmp_path_factory.mktemp("suite")
        arguments = ["--suite", "paper", "--epochs", "2", "--T", "2", "--lr", "0.01", "--out", str(folder / "runs")]
        assert train.main(arguments) == 0
        yield folder


def draw(name, suite):
    """The rows of the CSV of a figure."""
    assert visualize.main([name, str(suite / "runs"), "--out", str(suite / "figures")]) == 0
    for suffix in ("png", "pdf"):
        assert (suite / "figures" / f"{name}.{suffix}").stat().st_size > 5000
    picture = np.asarray(Image.open(suite / "figures" / f"{name}.png").convert("L"), dtype=float)
    assert picture.shape[1] >= 900 and picture.std() > 10 and (picture < 100).mean() > 0.002
    with open(suite / "figures" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def run_of(suite, name):
    return visualize.Trained(suite / "runs" / f"digits-vgg8-{name}-seed0")


def test_init(suite):
    rows = draw("init", suite)
    assert {row["init"] for row in rows} == {"E-I Init", "without its gain", "|Kaiming|"}
    assert len(rows) == 2 * 3 * 5
    torch.manual_seed(0)  # the same draw as the figure's
    batch = data.to_input(data.load("digits").train_x[torch.randperm(64)[:32]])
    torch.manual_seed(0)
    net = model.build("vgg8", in_channels=1, T=2)
    initialize(net, batch)
    i_int = net.encoder.stages[0].circuit(batch)
    row = next(row for row in rows if (row["arch"], row["init"], row["layer"]) == ("vgg8", "E-I Init", "1"))
    assert float(row["mean"]) == pytest.approx(i_int.mean().item(), abs=1e-4)
    assert float(row["std"]) == pytest.approx(i_int.std().item(), rel=1e-3)
    spikes = net.encoder.stages[0](batch, 2, static=True)
    assert float(row["firing_rate"]) == pytest.approx(spikes.mean().item(), rel=1e-4)


def test_curves(suite):
    rows = draw("curves", suite)
    assert [row["model"] for row in rows] == ["ei"] * 2 + ["bn"] * 2 + ["plain"] * 2 + ["dann"] * 2
    with open(run_of(suite, "bn").folder / "metrics.csv") as file:
        metrics = list(csv.DictReader(file))
    assert [float(r["train_loss"]) for r in rows[2:4]] == [float(m["train_loss"]) for m in metrics]


@pytest.mark.parametrize("name, labels", [
    ("epsilon", ["1e-8", "1e-7", "1e-6", "1e-5", "1e-4", "adaptive"]),
    ("ablation", ["all of it", "no STE", "no gradient scaling", "|Kaiming| for E-I Init"]),
])  # fmt: skip
def test_tables(name, labels, suite, capsys):
    rows = draw(name, suite)
    assert list(dict.fromkeys(row["run"] for row in rows)) == labels
    markdown = (suite / "figures" / f"{name}.md").read_text()
    assert markdown in capsys.readouterr().out and markdown.count("\n") == len(labels) + 2
    run = run_of(suite, "ei-eps1e-08" if name == "epsilon" else "ei-noste")
    result = json.loads((run.folder / "result.json").read_text())
    line = next(line for line in markdown.splitlines() if labels[0 if name == "epsilon" else 1] in line)
    assert result["outcome"] in line and f"{result['best_test_accuracy']:.2%}" in line


def test_representation(suite):
    rows = draw("representation", suite)
    run = run_of(suite, "ei")
    _, networks = run.networks()
    x = data.to_input(data.load("digits").test_x)
    net = networks["after training"]
    values = net.encoder.stages[0].circuit(x)
    of = [r for r in rows if (r["when"], r["layer"], r["quantity"]) == ("after training", "1", "i_int")]
    expected = np.histogram(values.detach().clamp(-6, 6).numpy(), 120, (-6, 6), density=True)[0]
    assert [float(r["density"]) for r in of] == pytest.approx(list(expected), abs=1e-3)
    with open(suite / "figures" / "representation-pca.csv") as file:
        points = list(csv.DictReader(file))
    spikes, static = x, True
    for stage in net.encoder.stages[:-1]:  # without the last pooling
        spikes, static = (
            (stage(spikes, 2, static), False) if isinstance(stage, model.Layer) else (stage(spikes), static)
        )
    rates = spikes.unflatten(0, (2, -1)).mean(0).flatten(1).detach().double()
    centred = rates - rates.mean(0)
    expected = (torch.linalg.svd(centred, full_matrices=False).S[:2] ** 2).tolist()
    found = np.array([[float(p["pc1"]), float(p["pc2"])] for p in points if p["when"] == "after training"])
    assert (found**2).sum(0) == pytest.approx(expected, rel=1e-3)
    assert [int(p["label"]) for p in points[:40]] == data.load("digits").test_y.tolist()


def test_evolution(suite):
    rows = draw("evolution", suite)
    with Image.open(suite / "figures" / "evolution.gif") as gif:
        assert gif.n_frames == 3  # before, and after each of two epochs
    assert len(rows) == 3 * 5 * 2 * 120
    run = run_of(suite, "ei")
    last = [float(r["density"]) for r in rows if (r["epoch"], r["layer"], r["quantity"]) == ("2", "5", "u")]
    _, after = train.make(run.config, torch.device("cpu"))
    after.load_state_dict(run.run.load()["model"])
    counts = np.array(histograms(after, data.to_input(data.load("digits").test_x))[4]["u"])
    assert last == pytest.approx(list(counts / counts.sum() / 0.1))


def test_balance(suite):
    rows = draw("balance", suite)
    assert len(rows) == 2 * 3 * 24 * 14
    _, networks = run_of(suite, "ei").networks()
    row = next(r for r in rows if r["when"] == "after training" and r["step"] == "1")
    net = networks["after training"]
    x = data.to_input(data.load("digits").test_x[3 * int(row["image"])])[None]  # 14 of 40 are looked at
    circuit = circuits(net)[2]
    seen = []
    circuit.register_forward_pre_hook(lambda c, a: seen.append(a[0][:1]))
    net(x)
    i_ee = torch.nn.functional.conv2d(seen[0], circuit.w_ee, padding=1)[0, int(row["neuron"]), 4, 4]
    assert float(row["i_ee"]) == pytest.approx(i_ee.item(), rel=1e-4)
    for r in rows:
        assert int(r["spike"]) == (float(r["u"]) >= 1)


def test_gain_is_flat_with_division_and_rises_without(suite):
    rows = draw("gain", suite)

    def response(condition, layer):
        return [float(r["firing_rate"]) for r in rows if r["condition"] == condition and r["layer"] == str(layer)]

    assert len(rows) == 2 * 11 * 5
    _, networks = run_of(suite, "ei").networks()
    x = data.to_input(data.load("digits").test_x)
    rate = networks["after training"].encoder.stages[0](x, 2, static=True).mean().item()
    assert response("divisive inhibition", 1)[-1] == pytest.approx(rate, rel=1e-3)
    # both currents are linear in the image, hence their quotient is the same at any contrast
    assert response("divisive inhibition", 1) == pytest.approx([rate] * 11, rel=0.02)
    without = response("its mean instead", 1)
    assert without[-1] > 2 * without[0]


def test_gradients(suite, capsys):
    rows = draw("gradients", suite)
    assert len(rows) == 5 * (3 * 6 + 3 * 5)  # the readout has no g_I, g_E, b_E
    config = run_of(suite, "ei").config
    dataset, net = train.make(config, torch.device("cpu"))
    train.prepare(config, dataset, net)
    x, y = train.training_batch(config, dataset, train.epoch_order(config, dataset, 0)[0], 0)
    torch.nn.functional.cross_entropy(net(x), y).backward()
    row = next(r for r in rows if (r["variant"], r["parameter"], r["layer"]) == ("E-I Prop", "w_ei", "3"))
    assert float(row["gradient_norm"]) == pytest.approx(circuits(net)[2].w_ei.grad.norm().item(), rel=1e-4)
    alone = run_of(suite, "ei-kaiming").folder
    assert visualize.main(["gradients", str(alone), "--out", str(suite / "alone")]) == 0
    with open(suite / "alone" / "gradients.csv") as file:
        assert list(csv.DictReader(file)) == rows  # the paper's method, whatever the run that it is drawn for
    alone = ["gradients", str(run_of(suite, "dann").folder), "--out", str(suite / "alone")]
    assert visualize.main(alone) == 0 and "T=4" in capsys.readouterr().out  # not the one of DANN
    unscaled = next(r for r in rows if (r["variant"], r["parameter"], r["layer"]) == ("no scaling", "w_ei", "6"))
    scaled = next(r for r in rows if (r["variant"], r["parameter"], r["layer"]) == ("E-I Prop", "w_ei", "6"))
    assert float(unscaled["gradient_norm"]) == pytest.approx(16 * float(scaled["gradient_norm"]), rel=1e-3)


def test_weights(suite):
    rows = draw("weights", suite)
    assert {row["parameter"] for row in rows} == {"w_ee", "w_ie", "w_ei", "g_i", "g_e"}
    for row in rows:
        assert float(row["smallest"]) >= 0  # on its own side of zero
    _, networks = run_of(suite, "ei").networks()
    zeros = [(c.w_ee == 0).flatten() for c in circuits(networks["after training"])]
    row = next(r for r in rows if (r["when"], r["parameter"]) == ("after training", "w_ee"))
    assert visualize.main(["weights", str(run_of(suite, "dann").folder), "--out", str(suite / "alone")]) == 0
    assert "g_i" not in (suite / "alone" / "weights.csv").read_text()  # DANN has its logarithm
    assert visualize.Trained(run_of(suite, "ei").folder, "elsewhere").config["data_root"] == "elsewhere"
    assert float(row["zeros"]) == pytest.approx(torch.cat(zeros).float().mean().item(), abs=1e-6)


def test_all_says_what_is_missing(suite, tmp_path, capsys):
    alone = suite / "runs" / "digits-vgg8-ei-seed0"
    assert visualize.main(["all", str(alone), "--out", str(tmp_path / "f")]) == 0
    out = capsys.readouterr().out
    assert (
        "curves: not drawn. no run with model=bn" in out
        and "init.png" in out
        and "python train.py --suite paper" in out
    )
    assert (tmp_path / "f" / "gain.png").exists() and not (tmp_path / "f" / "curves.png").exists()


def fails(capsys, *arguments):
    try:
        status = visualize.main([str(a) for a in arguments])
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_bad_input_ends_in_one_line(suite, tmp_path, capsys):
    assert "has no such run in it" in fails(capsys, "curves", tmp_path)
    assert "there is no folder" in fails(capsys, "all", tmp_path / "nowhere")
    assert "invalid choice" in fails(capsys, "portrait")
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    assert "config.json" in fails(capsys, "curves", folder, "--out", tmp_path)
    config = (suite / "runs" / "digits-vgg8-ei-seed0" / "config.json").read_text()
    (folder / "config.json").write_text(config)
    assert "is not finished" in fails(capsys, "evolution", folder, "--out", tmp_path)
    (folder / "histograms.json").write_text('[[{"i_int": [1]')
    assert "cannot be read" in fails(capsys, "evolution", folder, "--out", tmp_path)
    assert "has no best.pt" in fails(capsys, "weights", folder, "--out", tmp_path)
    for metrics in ("epoch,train_loss\n1,2.3", "x" * 200_000, "epoch,train_loss,test_loss,test_accuracy\ninf,1,1,1"):
        (folder / "metrics.csv").write_text(metrics)
        assert "cannot be read" in fails(capsys, "curves", folder, "--out", tmp_path)


def test_runs_of_several_networks_in_one_folder(suite, tmp_path, capsys):
    for name in ("ei", "bn", "plain", "dann"):
        shutil.copytree(run_of(suite, name).folder, tmp_path / name)
    deep = tmp_path / "a-resnet18"  # the first in the alphabet
    deep.mkdir()
    config = json.loads((tmp_path / "ei" / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps(config | dict(arch="resnet18")))
    assert visualize.main(["curves", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    err = fails(capsys, "curves", tmp_path, "--arch", "resnet18", "--out", tmp_path / "f")
    assert "no run with model=bn" in err or "not finished" in err
    assert "--seed 5" in fails(capsys, "curves", tmp_path, "--seed", "5")
    (tmp_path / "ei" / "config.json").unlink()  # the checkpoint has it too
    (deep / "config.json").write_text("{")
    capsys.readouterr()
    assert visualize.main(["curves", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    assert "left out: " in capsys.readouterr().out


def test_a_result_of_another_kind(suite, tmp_path, capsys):
    shutil.copytree(suite / "runs", tmp_path, dirs_exist_ok=True)
    result = tmp_path / "digits-vgg8-ei-eps1e-08-seed0" / "result.json"
    for damaged in (dict(outcome=5), dict(outcome="converged", best_epoch=1, best_test_accuracy=[]), []):
        result.write_text(json.dumps(damaged))
        assert "result.json cannot be read" in fails(capsys, "epsilon", tmp_path, "--out", tmp_path)


def test_a_run_without_a_finite_epoch_is_in_the_table(suite, tmp_path):
    for path in (suite / "runs").iterdir():
        shutil.copytree(path, tmp_path / path.name)
    broken = tmp_path / "digits-vgg8-ei-eps1e-08-seed0"
    (broken / "metrics.csv").write_text("")
    (broken / "result.json").write_text(json.dumps(dict(outcome="failed to converge")))
    assert visualize.main(["epsilon", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    assert "| 1e-8     | failed to converge | -" in (tmp_path / "f" / "epsilon.md").read_text()


@torch.no_grad()
def test_observing_changes_nothing():
    net = model.build("vgg8", plan=NARROW, kind="bn", T=3)
    x = torch.rand(4, 3, 32, 32)
    before, found = {k: v.clone() for k, v in net.state_dict().items()}, []
    net.eval()
    logits = net(x)
    net.train()
    observe(net, x, lambda i, current, u, spikes: found.append((i, current, u, spikes)))
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    assert torch.equal(net(x), logits)
    assert [f[0] for f in found] == list(range(5))
    for (_, _, u, spikes), layer in zip(found, layers(net), strict=True):
        assert torch.equal(spikes, (u >= layer.neuron.threshold).float())
