"""Each figure from tiny runs: the picture is there, and the numbers beside it are those of the networks."""

import csv
import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

import model
import reproduce
import train
import visualize
from ei_init import initialize
from model import circuits
from support import data
from support.history import Trained
from support.measure import VARIANTS, histograms
from support.runs import CHECKPOINT, PREVIOUS, Run, _sealed, load_data_and_model, prepare

NARROW = [8, "P", 8, "P", 16, "P", 16, "P", 16, "P"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A folder with all runs that the figures need, of a narrow network on a few digits. Figures go there too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for networks as small as this one, more of them only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PLANS, "vgg8", NARROW)
        patch.setitem(model.PLANS, "vgg19", NARROW)
        whole = data.load("digits")
        few = data.Dataset(
            whole.train_x[:64], whole.train_y[:64], whole.test_x[:40], whole.test_y[:40], 10, augment=None
        )
        patch.setattr(data, "load", lambda *_, **__: few)
        folder = tmp_path_factory.mktemp("suite")
        arguments = ["--epochs", "2", "--T", "2", "--lr", "0.01", "--no-figures", "--out", str(folder / "runs")]
        assert reproduce.main(arguments) == 0
        yield folder
    torch.set_num_threads(threads)


def draw(name, suite):
    """The rows of the CSV of a figure."""
    assert visualize.main([name, str(suite / "runs"), "--out", str(suite / "figures")]) == 0
    for suffix in ("png", "pdf"):
        assert (suite / "figures" / f"{name}.{suffix}").stat().st_size > 5000
    picture = np.asarray(Image.open(suite / "figures" / f"{name}.png").convert("L"), dtype=float)
    assert picture.shape[1] >= 900 and picture.std() > 10 and (picture < 100).mean() > 0.002
    return numbers(suite / "figures" / f"{name}.csv")


def run_of(suite, name):
    return Trained(suite / "runs" / f"digits-vgg8-{name}-seed0")


def networks_of(suite, name):
    return visualize.networks_of(run_of(suite, name))[1]


def numbers(path):
    """The rows of a CSV file."""
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
    spikes = net.encoder.stages[0](batch.expand(2, *batch.shape))
    assert float(row["firing_rate"]) == pytest.approx(spikes.mean().item(), rel=1e-4)


def test_curves(suite):
    rows = draw("curves", suite)
    assert [row["model"] for row in rows] == ["ei"] * 2 + ["bn"] * 2 + ["plain"] * 2 + ["dann"] * 2
    metrics = numbers(run_of(suite, "bn").folder / "metrics.csv")
    assert [float(r["train_loss"]) for r in rows[2:4]] == [float(m["train_loss"]) for m in metrics]


@pytest.mark.parametrize("name, labels", [
    ("epsilon", ["1e-8", "1e-7", "1e-6", "1e-5", "1e-4", "adaptive"]),
    ("ablation", ["all of it", "no STE", "no gradient scaling", "|Kaiming| for E-I Init"]),
])  # fmt: skip
def test_tables(name, labels, suite, capsys):
    rows = draw(name, suite)
    assert list(dict.fromkeys(row["run"] for row in rows)) == labels
    markdown = (suite / "figures" / f"{name}.md").read_text(encoding="utf-8")
    assert markdown in capsys.readouterr().out and markdown.count("\n") == len(labels) + 2
    run = run_of(suite, "ei-eps1e-08" if name == "epsilon" else "ei-noste")
    result = json.loads((run.folder / "result.json").read_text())
    line = next(line for line in markdown.splitlines() if labels[0 if name == "epsilon" else 1] in line)
    assert result["outcome"] in line and f"{result['best_test_accuracy']:.2%}" in line


def test_representation(suite):
    rows = draw("representation", suite)
    x = data.to_input(data.load("digits").test_x)
    net = networks_of(suite, "ei")["after training"]
    values = net.encoder.stages[0].circuit(x)
    of = [r for r in rows if (r["when"], r["layer"], r["quantity"]) == ("after training", "1", "i_int")]
    expected = np.histogram(values.detach().clamp(-6, 6).numpy(), 120, (-6, 6), density=True)[0]
    assert [float(r["density"]) for r in of] == pytest.approx(list(expected), abs=1e-3)
    points = numbers(suite / "figures" / "representation-pca.csv")
    spikes = net.encoder.stages[:-1](x.expand(2, *x.shape))  # without the last pooling
    rates = spikes.mean(0).flatten(1).detach().double()
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
    _, after = load_data_and_model(run.config, torch.device("cpu"))
    after.load_state_dict(run.run.load()["model"])
    counts = np.array(histograms(after, data.to_input(data.load("digits").test_x))[4]["u"])
    assert last == pytest.approx(list(counts / counts.sum() / 0.1))


def test_balance(suite):
    rows = draw("balance", suite)
    assert len(rows) == 2 * 3 * 24 * 14
    row = next(r for r in rows if r["when"] == "after training" and r["step"] == "1")
    net = networks_of(suite, "ei")["after training"]
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
    x = data.to_input(data.load("digits").test_x)
    rate = networks_of(suite, "ei")["after training"].encoder.stages[0](x.expand(2, *x.shape)).mean().item()
    assert response("divisive inhibition", 1)[-1] == pytest.approx(rate, rel=1e-3)
    # both currents are linear in the image, hence their quotient is the same at any contrast
    assert response("divisive inhibition", 1) == pytest.approx([rate] * 11, rel=0.02)
    without = response("its mean instead", 1)
    assert without[-1] > 2 * without[0]


def test_gradients(suite, capsys):
    rows = draw("gradients", suite)
    assert len(rows) == 5 * (3 * 6 + 3 * 5)  # the readout has no g_I, g_E, b_E
    config = run_of(suite, "ei").config
    dataset, net = load_data_and_model(config, torch.device("cpu"))
    prepare(config, dataset, net)
    x, y = data.training_batch(config, dataset, data.epoch_order(config, dataset, 0)[0], 0)
    torch.nn.functional.cross_entropy(net(x), y).backward()
    row = next(r for r in rows if (r["variant"], r["parameter"], r["layer"]) == ("E-I Prop", "w_ei", "3"))
    assert float(row["gradient_norm"]) == pytest.approx(circuits(net)[2].w_ei.grad.norm().item(), rel=1e-4)
    alone = run_of(suite, "ei-kaiming").folder
    assert visualize.main(["gradients", str(alone), "--out", str(suite / "alone")]) == 0
    # the paper's method, whatever the run that it is drawn for
    assert numbers(suite / "alone" / "gradients.csv") == rows
    alone = ["gradients", str(run_of(suite, "dann").folder), "--out", str(suite / "alone")]
    assert visualize.main(alone) == 0 and "T=4" in capsys.readouterr().out  # not the one of DANN
    unscaled = next(r for r in rows if (r["variant"], r["parameter"], r["layer"]) == ("no scaling", "w_ei", "6"))
    scaled = next(r for r in rows if (r["variant"], r["parameter"], r["layer"]) == ("E-I Prop", "w_ei", "6"))
    assert float(unscaled["gradient_norm"]) == pytest.approx(16 * float(scaled["gradient_norm"]), rel=1e-3)


def test_stabilizer(suite, tmp_path):
    rows = draw("stabilizer", suite)
    assert len(rows) == 2 * 5 * len(VARIANTS)
    dataset, networks = visualize.networks_of(run_of(suite, "ei"), fast=False, end=True)
    config = run_of(suite, "ei").config
    order = data.epoch_order(config, dataset, 0)
    assert len(order) == 2
    (x, y), (other, _) = (data.training_batch(config, dataset, order[i], i) for i in range(2))
    for when, net in networks.items():
        of = [row for row in rows if row["when"] == when]
        zeros = np.mean([(circuits(net)[0].currents(z)["i_div"] == 0).float().mean().item() for z in (x, other)])
        (found,) = {float(row["zeros"]) for row in of if row["layer"] == "1"}
        assert found == pytest.approx(zeros)
        assert zeros > 0.05 and all(0 <= float(row["unbalanced"]) <= 1 for row in of)
        norms = {(row["layer"], row["variant"]): float(row["gradient_norm"]) for row in of}
        assert norms["1", "\u03b5=1e-8"] > 100 * norms["1", "adaptive"] > 0
        assert norms["1", "\u03b5=1e-6"] == pytest.approx(norms["1", "\u03b5=1e-8"] / 100, rel=0.1)
    net, norms, seen = networks["at initialisation"], [], []
    circuits(net)[1].register_forward_hook(lambda circuit, args, i_int: seen.extend((args[0].detach(), i_int)))
    for step in range(2):
        x, y = data.training_batch(config, dataset, order[step], step)
        seen.clear()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        (grad_int,) = torch.autograd.grad(loss, seen[1])
        leaf = seen[0].requires_grad_()
        (grad,) = torch.autograd.grad(circuits(net)[1].currents(leaf)["i_int"], leaf, grad_int)
        norms.append(grad.norm().item())
    row = next(r for r in rows if (r["when"], r["layer"], r["variant"]) == ("at initialisation", "2", "adaptive"))
    assert float(row["gradient_norm"]) == pytest.approx(max(norms), rel=1e-4)

    # a training that collapses after its best epoch is shown as it ended
    run = shutil.copytree(run_of(suite, "ei").folder, tmp_path / "run")
    state = Run(run).load()
    state["model"] = {k: torch.zeros_like(p) if k.endswith("w_ei") else p for k, p in state["model"].items()}
    (run / CHECKPOINT).write_bytes(_sealed(state))
    shares = []
    for _ in range(2):
        assert visualize.main(["stabilizer", str(run), "--out", str(tmp_path)]) == 0
        ended = [row for row in numbers(tmp_path / "stabilizer.csv") if row["when"] == "after training"]
        shares.append({float(row["zeros"]) for row in ended if row["layer"] == "2"}.pop())
        (run / CHECKPOINT).unlink(missing_ok=True)
        (run / PREVIOUS).unlink(missing_ok=True)  # then the parameters of the best epoch are all that there is
    assert shares[0] == 1 > shares[1]

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", run_of(suite, "bn").folder):  # without a run; a run without circuits
        assert visualize.main(["stabilizer", str(folder), "--out", str(tmp_path)]) == 0
        assert {row["when"] for row in numbers(tmp_path / "stabilizer.csv")} == {"at initialisation"}


def test_circuit_needs_neither_data_nor_runs(suite, tmp_path, monkeypatch):
    rows = draw("circuit", suite)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", None)
    assert visualize.main(["circuit"]) == 0
    assert numbers(tmp_path / "figures" / "circuit.csv") == rows
    symbols = {row["symbol"]: row for row in rows}
    for symbol in "x W_EE W_IE W_EI g_I I_EE I_sub I_div g_E b_E I_int s".split():
        assert symbols[symbol]["equation"] and symbols[symbol]["shape"]
    circuit = circuits(model.build("vgg11"))[1]
    sizes = dict(n_E=128, n_I=32, C=64, k=3)
    for name, p in circuit.named_parameters():
        place = name[:1].upper() + name[1:].upper() if name[0] == "w" else name[:2] + name[2:].upper()
        shape = symbols[place]["shape"].strip("(),").split(", ")
        assert [sizes[s] for s in shape] == list(p.shape)


def test_the_importing_program_keeps_its_plots(tmp_path):
    code = """
        import sys, matplotlib
        matplotlib.use("svg")
        matplotlib.rcParams["font.size"] = 17
        before = dict(matplotlib.rcParams)
        import visualize
        assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == "svg"
        assert visualize.main(["circuit", "--out", sys.argv[1]]) == 0
        assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == "svg"
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True, cwd=train.__file__[:-8])


def test_dense_circuits_can_be_drawn():
    assert visualize.middle(torch.rand(4, 2, 7)).shape == (4, 2, 7)
    maps = torch.rand(4, 2, 7, 5, 5)
    assert torch.equal(visualize.middle(maps), maps[..., 2, 2])


def test_weights(suite):
    rows = draw("weights", suite)
    assert {row["parameter"] for row in rows} == {"w_ee", "w_ie", "w_ei", "g_i", "g_e"}
    for row in rows:
        assert float(row["smallest"]) >= 0  # on its own side of zero
    zeros = [(c.w_ee == 0).flatten() for c in circuits(networks_of(suite, "ei")["after training"])]
    row = next(r for r in rows if (r["when"], r["parameter"]) == ("after training", "w_ee"))
    assert visualize.main(["weights", str(run_of(suite, "dann").folder), "--out", str(suite / "alone")]) == 0
    assert "g_i" not in (suite / "alone" / "weights.csv").read_text()  # DANN has its logarithm
    assert Trained(run_of(suite, "ei").folder, "elsewhere").config["data_root"] == "elsewhere"
    assert float(row["zeros"]) == pytest.approx(torch.cat(zeros).float().mean().item(), abs=1e-6)


def test_all_says_what_is_missing(suite, tmp_path, capsys):
    alone = suite / "runs" / "digits-vgg8-ei-seed0"
    assert visualize.main(["all", str(alone), "--out", str(tmp_path / "f")]) == 0
    out = capsys.readouterr().out
    assert "curves: not drawn. no run with model=bn" in out and "init.png" in out and "python reproduce.py" in out
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
    assert f"has no such run in it: python reproduce.py --out {tmp_path}" in fails(capsys, "curves", tmp_path)
    assert "there is no folder" in fails(capsys, "all", tmp_path / "nowhere")
    assert "invalid choice" in fails(capsys, "portrait")
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    assert "config.json" in fails(capsys, "curves", folder, "--out", tmp_path)
    config = (suite / "runs" / "digits-vgg8-ei-seed0" / "config.json").read_text()
    (folder / "config.json").write_text(config)
    assert "has no histograms.json, nor a checkpoint" in fails(capsys, "evolution", folder, "--out", tmp_path)
    (folder / "checkpoint.pt").touch()
    assert "is not finished: python train.py --resume" in fails(capsys, "evolution", folder, "--out", tmp_path)
    (folder / "checkpoint.pt").unlink()
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
    assert "no run with model=bn and otherwise the paper's method" in err or "nor a checkpoint" in err
    assert "--seed 5" in fails(capsys, "curves", tmp_path, "--seed", "5")
    (tmp_path / "ei" / "config.json").unlink()  # the checkpoint has it too
    (deep / "config.json").write_text("{")
    capsys.readouterr()
    assert visualize.main(["curves", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    assert "left out: " in capsys.readouterr().out


def copy_with(config, folder, **changed):
    """A run folder with settings only, some of them changed."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changed}), encoding="utf-8")


def test_runs_of_several_widths_are_not_mixed(suite, tmp_path, capsys):
    config = json.loads((run_of(suite, "ei").folder / "config.json").read_text(encoding="utf-8"))
    copy_with(config, tmp_path / "a", width=0.5)
    err = fails(capsys, "evolution", tmp_path, "--out", tmp_path / "f")
    assert f"{tmp_path / 'a'} has no histograms.json" in err  # the only one
    copy_with(config, tmp_path / "b", width=0.25)
    assert "width: 0.25, 0.5. Choose one with --width" in fails(capsys, "evolution", tmp_path)
    assert f"{tmp_path / 'b'} has no histograms.json" in fails(capsys, "evolution", tmp_path, "--width", "0.25")
    shutil.copytree(run_of(suite, "ei").folder, tmp_path / "c")
    assert visualize.main(["evolution", str(tmp_path), "--out", str(tmp_path / "f")]) == 0  # the paper's, c
    err = fails(capsys, "ablation", tmp_path, "--width", "0.5", "--out", tmp_path / "f")
    for part in ("no run with ste=False", "python reproduce.py", "--width 0.5", "--epochs 2", "--T 2", "--lr 0.01"):
        assert part in err
    copy_with(config, tmp_path / "d", tau=3.0)
    copy_with(config, tmp_path / "e", model="dann")  # has no tau
    assert f"{tmp_path / 'd'} has no histograms.json" in fails(capsys, "evolution", tmp_path, "--tau", "3")
    assert f"{tmp_path / 'd'} has no metrics.csv" in fails(capsys, "curves", tmp_path, "--tau", "3")
    copy_with(config, tmp_path / "b2", width=0.25, epochs=4)
    assert "has no histograms.json" in fails(capsys, "evolution", tmp_path, "--width", "0.25")


def test_a_second_run_with_the_same_settings_is_named(suite, tmp_path, capsys):
    for name in ("first", "second"):
        shutil.copytree(run_of(suite, "ei").folder, tmp_path / name)
    assert visualize.main(["evolution", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    assert f"{tmp_path / 'first'} is drawn, not {tmp_path / 'second'}" in capsys.readouterr().out


def test_a_result_of_another_kind(suite, tmp_path, capsys):
    shutil.copytree(suite / "runs", tmp_path, dirs_exist_ok=True)
    result = tmp_path / "digits-vgg8-ei-eps1e-08-seed0" / "result.json"
    for damaged in (dict(outcome=5), dict(outcome="converged", best_epoch=1, best_test_accuracy=[]), []):
        result.write_text(json.dumps(damaged))
        assert "result.json cannot be read" in fails(capsys, "epsilon", tmp_path, "--out", tmp_path)


def test_a_run_without_a_finite_epoch_is_in_the_table(suite, tmp_path):
    shutil.copytree(suite / "runs", tmp_path, dirs_exist_ok=True)
    broken = tmp_path / "digits-vgg8-ei-eps1e-08-seed0"
    (broken / "metrics.csv").write_text("")
    (broken / "result.json").write_text(json.dumps(dict(outcome="failed to converge")))
    assert visualize.main(["epsilon", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    assert "| 1e-8     | failed to converge | -" in (tmp_path / "f" / "epsilon.md").read_text()
