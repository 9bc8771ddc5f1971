"""The authors' checkpoints, read and written, and training beside their program."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import fails

import train
from ei_init import initialize
from model import build, circuits
from support import bench, official
from support.runs import Run

safetensors = pytest.importorskip("safetensors.torch")
GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "official-vgg8-narrow.safetensors"
TENSORS = safetensors.load_file(CHECKPOINT)
PLAN = [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"]  # of this checkpoint


def write(folder, tensors, **config):
    """A folder as the authors publish it."""
    folder.mkdir(exist_ok=True, parents=True)
    safetensors.save_file(tensors, folder / "model.safetensors")
    usual = dict(dataset="CIFAR10", arch="VGG", num_layers=8, T=4, ei_ratio=4)
    (folder / "config.json").write_text(json.dumps(usual | config), encoding="utf-8")
    return folder


@pytest.fixture
def mlp(tmp_path):
    """Such a folder, of an MLP for the digits, with 5 excitatory neurons for each inhibitory one and other neurons."""
    model = build("mlp", in_channels=1, image_size=8, ei_ratio=5, plan=[20, 10])
    initialize(model, torch.rand(20, 1, 8, 8))
    said = dict(dataset="digits", arch="MLP", num_layers=3, T=3, ei_ratio=5, neuron=dict(tau=3, v_threshold=0.5))
    return write(tmp_path / "CIFAR10-VGG8", {k: v.clone() for k, v in official.state_of(model).items()}, **said)


def test_logits_of_a_checkpoint_and_the_way_back(tmp_path):
    model = official.load(CHECKPOINT, "vgg8", plan=PLAN)
    with np.load(GOLDEN / "official-vgg8-narrow.npz") as golden, torch.no_grad():
        assert np.abs(model(torch.tensor(golden["x"])).numpy() - golden["logits"]).max() < 1e-4
    official.save(model, tmp_path / "a")
    written = safetensors.load_file(tmp_path / "a")
    assert written.keys() == TENSORS.keys() and all(torch.equal(written[k], TENSORS[k]) for k in TENSORS)
    official.save(official.load(tmp_path / "a", "vgg8", plan=PLAN), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_names_and_shapes():
    with torch.device("meta"):
        found = official.state_of(build("resnet18"))
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in found.items()]
    assert sorted(lines) == sorted((GOLDEN / "official-resnet18-names.txt").read_text(encoding="utf-8").splitlines())
    for arch, frames, numbers in ("vgg11", True, (1, 8, 15, 21, 28, 34, 41, 47, 55)), ("mlp", False, (2, 7, 12, 17)):
        pairs = official.modules_of(build(arch, width=0.1).encoder, frames)
        assert pairs == [(f"layers.{n}", f"layers.{n + 1}") for n in numbers]


NETWORKS = {
    "vgg8, poolings elsewhere": dict(arch="vgg8", plan=[8, "P", 8, "P", 16, "P", 16, 16, "P", "P"]),
    "vgg11, frames": dict(arch="vgg11", width=0.125, in_channels=2, image_size=48, T=3),
    "resnet18": dict(arch="resnet18", width=0.1, n_classes=200, ei_ratio=2),
    "mlp": dict(arch="mlp", in_channels=1, image_size=28),
    "mlp, 15 // 4 interneurons": dict(arch="mlp", plan=[15, 8, 8], in_channels=1, image_size=8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_to_the_bit(name, tmp_path):
    options, frames, path = NETWORKS[name], "frames" in name, tmp_path / "a.safetensors"
    model = build(**options)
    x = torch.rand(2, *[model.T] * frames, model.in_channels, model.image_size, model.image_size)
    initialize(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5 + torch.rand_like(p)).add_(1e-3)
    official.save(model, path, frames)
    again, written = official.load(path, **options), path.read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(model(x), again(x))
    official.save(again, path)
    assert path.read_bytes() == written


def test_what_has_no_place_in_the_authors_program(tmp_path):
    model = build("vgg8", width=0.1)
    circuits(model)[0].w_se = torch.nn.Parameter(torch.ones(2))
    for other, message in (
        (build("vgg8", kind="bn", width=0.1), "only networks with E-I circuits"),
        (build("vgg8", kind="dann", width=0.1), "no circuit with a parameter alpha"),
        (model, "no circuit with a parameter w_se"),
    ):
        with pytest.raises(ValueError, match=message):
            official.save(other, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


BROKEN = {  # what is said of a tensor, its name, and what stands in its place
    "'layers.10.gain_i' is missing, not of shape (4, 1, 1)": ("layers.10.gain_i", None),
    "'layers.10.more' has no place in this network": ("layers.10.more", torch.zeros(2)),
    "'layers.10.gain_e' is of shape (16,), not of shape (16, 1, 1)": ("layers.10.gain_e", torch.zeros(16)),
    "of shape (5, 16, 3, 3), not of shape (4, 16, 3, 3)": ("layers.9.conv_ie.weight", torch.zeros(5, 16, 3, 3)),
    "'layers.3.bias' has values that are not finite": ("layers.3.bias", torch.full((16, 1, 1), float("nan"))),
    "'layers.3.gain_i' has values that are not finite, or below 0": ("layers.3.gain_i", -torch.ones(4, 1, 1)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_tensor_that_is_not_right(message, tmp_path):
    name, value = BROKEN[message]
    tensors = {k: v for k, v in (TENSORS | {name: value}).items() if v is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        official.load(write(tmp_path, tensors), "vgg8", plan=PLAN)


def test_names_of_dataparallel(tmp_path):
    write(tmp_path, {f"module.{name}": tensor for name, tensor in TENSORS.items()})
    state = official.state_of(official.load(tmp_path, "vgg8", plan=PLAN))
    assert all(torch.equal(TENSORS[name], tensor) for name, tensor in state.items())


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save(dict(a=1), path)
    for content in (path.read_bytes(), b"", b"x" * 100, CHECKPOINT.read_bytes()[:-5]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged or no safetensors file, a pickle is not read"):
            official.load(path, "vgg8", plan=PLAN)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the file itself"):
        official.load(tmp_path, "vgg8", plan=PLAN)


def test_a_run_folder_of_a_checkpoint(mlp, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, run = ["--official", str(mlp), "--plan", "20 10"], Path("runs/official-CIFAR10-VGG8")
    assert train.main(argv) == 0
    out, config = capsys.readouterr().out, Run(run).config
    assert "; the authors report 87.03% on CIFAR10\n" in out and f"run folder: {run}\n" in out
    assert [config[k] for k in ("arch", "plan", "ei_ratio", "T", "tau", "threshold")] == ["mlp", "20-10", 5, 3, 3, 0.5]
    assert {path.name for path in run.iterdir()} - {".lock"} == {"best.pt", "config.json"}
    loaded = official.load(mlp, "mlp", in_channels=1, image_size=8, ei_ratio=5, plan=[20, 10]).state_dict()
    assert all(torch.equal(Run(run).load("best.pt")["model"][name], p) for name, p in loaded.items())
    assert train.main(["--eval", str(run)]) == 0
    assert re.search(r"test accuracy \d+\.\d\d%", out)[0] in capsys.readouterr().out


def test_what_config_json_says_beside_the_tensors_counts_or_is_refused(tmp_path, capsys):
    argv = ["--official", tmp_path / "x", "--out", tmp_path / "run"]
    for config, message in (
        (dict(dataset="digits", T=0), "T and image_size are at least 1"),
        (dict(dataset="digits", neuron=dict(tau=0.5)), "tau must be at least 1"),
        (dict(dataset="ImageNet"), "unknown data 'imagenet'"),
        (dict(neuron=dict(v_reset=0.0)), "config.json cannot be used (ValueError: a neuron of {"),
    ):
        write(tmp_path / "x", TENSORS, **config)
        assert message in fails(capsys, *argv)
    first = {"layers.2.conv_ee.weight": torch.rand(16, 1, 3, 3)}  # digits have one channel
    write(tmp_path / "x", TENSORS | first, arch="ResNet", ei_ratio=8)  # the tensors say what network it is
    message = "x is not of the network that its config.json, the options and the data make (ValueError: the tensor "
    message += "'layers.2.conv_ie.weight' is of shape (4, 3, 3, 3), not of shape (4, 1, 3, 3))"
    assert message in fails(capsys, *argv, "--data", "digits")
    (tmp_path / "x" / "config.json").unlink()
    assert "config.json cannot be used" in fails(capsys, *argv)
    assert not (tmp_path / "run").exists()


STAND_IN = {  # a program with the interface of the authors'; its circuit and optimiser are written anew
    "spikingjelly/__init__.py": "",
    "spikingjelly/activation_based/functional.py": "def reset_net(network): network.clean = True",
    "modules/optimizers.py": """
import torch
class EiSGD(torch.optim.SGD):
    def step(self):
        pairs = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p in pairs:  # so the first step is 1.9 times the gradient
            self.state[p].setdefault("momentum_buffer", (p.grad + group["weight_decay"] * p).detach())
        super().step()
        for group, p in pairs:
            p.data.clamp_(min=0 if group["clamped"] else -torch.inf)
""",
    "models/vgg.py": """
import torch
from torch import nn
from lif import LIF
layer_config = {}
class Of(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if torch.is_tensor(part) else part)
class Synapses(Of):
    def forward(self, x):
        return (self.conv_ee(x), self.conv_ie(x)) if x.dim() > 2 else (x @ self.weight_ee.T, x @ self.weight_ie.T)
class Norm(Of):
    def forward(self, currents):
        assert self._inited
        (e, i), w = currents, self.weight_ei
        if i.dim() == 2: return e - i @ w.T
        sub, div = (torch.einsum("ei,nihw->nehw", w, i) for i in (i, self.gain_i * i))
        least = torch.where(div > 0, div, torch.inf).amin((1, 2, 3), keepdim=True)
        div = div + (torch.where(div > 0, div, least) - div).detach()
        return self.gain_e * (e - sub) / div + self.bias
def norm(n, d, *shape):
    gains = dict(gain_i=torch.ones(n // 4).view(shape), gain_e=torch.ones(n).view(shape))
    made = Norm(weight_ei=torch.ones(n, n // 4), **gains, bias=torch.zeros(n).view(shape))
    made.weight_ei.register_hook(lambda grad: grad / d)
    return made
def vgg(T, plan, n_in, n_out, neuron, ei):
    merge, split, layers = Of(forward=lambda x: x.flatten(0, 1)), Of(forward=lambda x: x.unflatten(0, (T, -1))), []
    for n in plan:
        if n == "P":
            layers.append(nn.AvgPool2d(2)); continue
        conv = [nn.Conv2d(n_in, m, 3, padding=1, bias=False) for m in (n, n // 4)]
        layers += [Synapses(conv_ee=conv[0], conv_ie=conv[1]), norm(n, 9 * n_in, -1, 1, 1)] if ei else conv[:1]
        layers += [split, LIF(**neuron), *[nn.Dropout(0)] * ei, merge]
        n_in = n
    dense = Synapses(weight_ee=torch.ones(n_out, n_in), weight_ie=torch.ones(n_out // 4, n_in))
    last = [dense, norm(n_out, n_in, 1, -1)] if ei else [nn.Linear(n_in, n_out)]
    return nn.Sequential(Of(forward=lambda x: x.expand(T, *x.shape)), merge, *layers, nn.Flatten(), *last, split)
class SpikingVGG(nn.Module):
    def __init__(self, T, num_layers, in_channels, n_outputs, neuron_config, light_classifier, dropout, seq_input, BN=0,
                 ei_ratio=4, device=None, rng=None):
        super().__init__()
        self.layers = vgg(T, layer_config[num_layers], in_channels, n_outputs, neuron_config, not BN)
    def forward(self, x):
        del self.clean  # as the membranes' state
        return self.layers(x).mean(0)
SpikingEiVGG = SpikingVGG
""",
}


@pytest.fixture  # writes that program, one place of it changed; its modules are forgotten afterwards
def stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(old="\0", new=""):
        for name, text in STAND_IN.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
        return tmp_path

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] in ("models", "modules", "spikingjelly")]:
        del sys.modules[name]


def test_side_by_side(stand_in, capsys):
    assert official.compare(stand_in(), steps=10, width=0.1, batch_size=8) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "10"] and rows[0][1] != rows[1][1]  # they do train
    assert all(row[1] == row[2] and float(row[3]) < 1e-12 for row in rows)


@pytest.mark.parametrize("old, new", [("grad / d", "grad"), ("**neuron)", "2.1)"), ("min=0 if", "min=1e-3 if")])
def test_side_by_side_sees_a_difference(stand_in, capsys, old, new):
    official.compare(stand_in(old, new), steps=1, width=0.1, batch_size=8)
    assert float(capsys.readouterr().out.split()[-1]) > 1e-9


def test_another_program_is_one_line(stand_in, capsys):
    other = str(stand_in("return self.layers(x)", "raise KeyError('a') #"))
    err = fails(capsys, "--compare", other, command=lambda *argv: official.main(argv))
    assert "KeyError: 'a'" in err and "is no checkout of" in err


def test_the_benchmark_measures_the_authors_networks(stand_in, monkeypatch):
    monkeypatch.setattr(bench, "build", lambda arch, **options: build(arch, width=0.1, **options))
    forms = bench.networks(torch.rand(4, 3, 32, 32), "vgg8", T=2, authors=stand_in())
    for name, n_circuits in ("authors", 6), ("authors bn", 0):
        assert sum("weight_ei" in parameter for parameter in forms[name].state_dict()) == n_circuits
        contender = bench.Contender(forms[name], torch.rand(4, 3, 32, 32))
        contender.train()
        assert contender.optimizer is forms[name].sgd
