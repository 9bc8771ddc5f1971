"""The authors' checkpoints, read and written, and training beside their program."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reproduce
import train
import visualize
from ei_init import initialize
from model import build, circuits
from support import official
from support.runs import Run

safetensors = pytest.importorskip("safetensors.torch")

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "official-vgg8-narrow.safetensors"
PLAN = [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"]


@pytest.fixture
def tensors():
    return safetensors.load_file(CHECKPOINT)


def write(folder, tensors, **config):
    """A folder as the authors publish it."""
    folder.mkdir(exist_ok=True)
    safetensors.save_file(tensors, folder / "model.safetensors")
    config = dict(dataset="CIFAR10", arch="VGG", num_layers=8, T=4, ei_ratio=4) | config
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def fails(capsys, *arguments, program=train):
    assert program.main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", 4), ("test", 2)):
        for name in "abcdefghij":
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


# ---- files -----------------------------------------------------------------------------------------------------------


def test_logits_of_a_checkpoint():
    model = official.load(CHECKPOINT, T=4)
    with np.load(GOLDEN / "official-vgg8-narrow.npz") as golden, torch.no_grad():
        assert np.abs(model(torch.tensor(golden["x"])).numpy() - golden["logits"]).max() < 1e-4
    assert [c.n_e for c in circuits(model)] == [16, 16, 32, 32, 32, 10] and model.T == 4


def test_resnet18_by_its_names():
    shapes = [line.split(" ", 1) for line in (GOLDEN / "official-resnet18-names.txt").read_text().splitlines()]
    given = {name: torch.rand(ast.literal_eval(shape)) for name, shape in shapes}
    found = official.describe(given, 32)
    assert (found["arch"], found["in_channels"], found["n_classes"], found["ei_ratio"]) == ("resnet18", 3, 10, 4)
    model = official.fill(build(**found), given)
    block = model.encoder.blocks[2]
    assert torch.equal(model.encoder.stem.circuit.w_ee, given["conv1.conv_ee.weight"])
    assert torch.equal(block.conv2.circuit.w_ie, given["layer2.0.conv2.conv_ie.weight"])
    assert torch.equal(block.shortcut.circuit.g_i, given["layer2.0.downsample.1.gain_i"].flatten())
    assert torch.equal(model.readout.w_ei, given["final_ei_norm.weight_ei"])
    state = official.state_of(model)
    assert state.keys() == given.keys() and all(torch.equal(state[name], given[name]) for name in given)
    del model.official
    assert official.state_of(model).keys() == given.keys()


NETWORKS = {
    "vgg8": dict(arch="vgg8", width=0.125),
    "vgg11, frames": dict(arch="vgg11", width=0.125, in_channels=2, image_size=48, T=3),
    "vgg16": dict(arch="vgg16", width=0.125, n_classes=100, ei_ratio=2),
    "vgg19": dict(arch="vgg19", plan=[4, 4, "P", 8, 8, "P", *[8] * 4, "P", *[4] * 4, "P", *[6] * 4, "P"]),
    "resnet18": dict(arch="resnet18", width=0.125, n_classes=200),
    "mlp": dict(arch="mlp", in_channels=1, image_size=28),
    "mlp of two layers": dict(arch="mlp", in_channels=3, image_size=8, plan=[30]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_to_the_bit(name, tmp_path):
    options = dict(T=2, image_size=32) | NETWORKS[name]
    frames = "frames" in name
    model = build(**options)
    shape = (2, options["T"]) if frames else (2,)
    x = torch.rand(*shape, model.in_channels, model.image_size, model.image_size)
    initialize(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5 + torch.rand_like(p)).add_(1e-3)
    official.save(model, tmp_path / "a.safetensors", frames)
    again = official.load(tmp_path / "a.safetensors", options["T"], options["image_size"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(model(x), again(x))
    official.save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("width", [0.01, 0.0333, 0.05, 0.1, 0.2, 0.3, 0.35, 1.7])
def test_a_resnet18_of_any_width(width):
    with torch.device("meta"):
        model = build("resnet18", width=width)
        pairs = zip(circuits(model), official.RESNET, strict=True)
        shapes = {name: shape for pair in pairs for name, (_, shape) in official.names(*pair).items()}
        again = build(**official.describe({name: torch.empty(shape) for name, shape in shapes.items()}, 32))
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_what_has_no_place_in_the_authors_program(tmp_path):
    path = tmp_path / "a.safetensors"
    for plan in ([16, "P", 16, "P", 32, "P", 32, 32, "P", "P"], [8, "P", 8, "P"], [8, 8, 8, "P", 8, "P", 8, "P"]):
        with pytest.raises(ValueError, match="the authors' program has no such network"):
            official.save(build("vgg8", plan=plan), path)
    model = build("vgg8", width=0.1)
    circuits(model)[0].w_se = torch.nn.Parameter(torch.ones(2))
    for convert in (lambda: official.save(model, path), lambda: official.fill(model, official.read(CHECKPOINT))):
        with pytest.raises(ValueError, match="a parameter w_se, which has no place"):
            convert()
    assert not path.exists()


def test_the_way_back_keeps_all_that_was_in_the_file(tensors, tmp_path):
    model = official.load(CHECKPOINT)
    official.save(model, tmp_path / "a.safetensors")
    written = safetensors.load_file(tmp_path / "a.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[k], tensors[k]) for k in tensors)
    del model.official  # as of a network that was trained here
    assert official.state_of(model).keys() == tensors.keys()
    assert {k: v.shape for k, v in official.state_of(model).items()} == {k: v.shape for k, v in tensors.items()}


def test_numbers_of_layers():
    """Conv, norm, split, LIF, dropout, merge; P; flatten: those of the golden VGG-8, and by the same rule others."""
    first = [pair[0] for pair in official.numbered(build("vgg8", width=0.1).encoder, frames=False)]
    assert first == [f"layers.{n}" for n in (2, 9, 16, 23, 30, 38)]
    first = [pair[0] for pair in official.numbered(build("vgg11", width=0.1).encoder, frames=True)]
    assert first == [f"layers.{n}" for n in (1, 8, 15, 21, 28, 34, 41, 47, 55)]
    pairs = official.numbered(build("mlp").encoder, frames=False)
    assert pairs == [(f"layers.{n}", f"layers.{n + 1}") for n in (2, 7, 12, 17)]


def change(tensors, name, value):
    return {k: v for k, v in (tensors | {name: value}).items() if v is not None}


BROKEN = [
    (lambda t: change(t, "layers.9.conv_ie.weight", None), "a tensor is missing: the weights ie of layers.9"),
    (lambda t: change(t, "layers.10.gain_i", None), "the tensor 'layers.10.gain_i' is missing"),
    (lambda t: change(t, "layers.39.bias", None), "the tensor 'layers.39.bias' is missing"),
    (lambda t: {k: v for k, v in t.items() if not k.startswith("layers.10.")}, "6 layers and of 5 norms"),
    (lambda t: change(t, "layers.10.more", torch.zeros(2)), "the tensor 'layers.10.more' is no part"),
    (lambda t: change(t, "layers.9.weight_ee", torch.zeros(2, 2)), "the tensor 'layers.9.weight_ee' has no place"),
    (
        lambda t: change(t, "layers.10.gain_e", torch.zeros(16)),
        "'layers.10.gain_e' has the shape (16,), not (16, 1, 1)",
    ),
    (
        lambda t: change(t, "layers.9.conv_ee.weight", torch.zeros(16, 8, 3, 3)),
        "has the shape (16, 8, 3, 3), not (16, 16",
    ),
    (lambda t: change(t, "layers.9.conv_ie.weight", torch.zeros(5, 16, 3, 3)), "follow no one E:I ratio"),
    (lambda t: change(t, "layers.2.conv_ee.weight", t["layers.2.conv_ee.weight"] * float("nan")), "no finite float32"),
    (lambda t: change(t, "layers.3.bias", torch.zeros(16, 1, 1, dtype=torch.int64)), "is of torch.int64"),
    (lambda t: change(t, "layers.3.bias", torch.zeros(16, 1, 1).to(torch.float8_e4m3fn)), "is of torch.float8"),
    (lambda t: change(t, "layers.3.gain_i", -t["layers.3.gain_i"]), "Dale's law forbids"),
    (lambda t: change(t, "layers.2.conv_ee.weight", torch.tensor(1.0)), "the shape (), which no layer has"),
    (lambda t: change(t, "layers.9.conv_ie.weight", torch.zeros(4)), "the shape (4,), which no layer has"),
    (lambda t: change(t, "layers.3.bias", torch.full((16, 1, 1), 1e300, dtype=torch.float64)), "no finite float32"),
    (
        lambda t: {k: v for k, v in t.items() if int(k.split(".")[1]) > 3},
        "4 convolutions and 1 dense layers are no network",
    ),
    (lambda t: {}, "there are no tensors in it"),
]


@pytest.mark.parametrize("make, message", BROKEN, ids=range(len(BROKEN)))
def test_a_file_that_is_not_right(make, message, tensors, images, tmp_path, capsys):
    folder = write(tmp_path / "x", make(tensors))
    with pytest.raises(ValueError, match=r"model\.safetensors|x") as raised:
        official.load(folder)
    assert message in str(raised.value)
    assert message in fails(
        capsys, "--official", folder, "--data", "folder", "--data-root", images, "--out", tmp_path / "r"
    )
    assert not (tmp_path / "r").exists()


def test_a_file_of_another_kind(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('it was executed')",)

    path = tmp_path / "model.safetensors"
    for content in (b"", b"x" * 100, CHECKPOINT.read_bytes()[:-5]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            official.load(path)
    torch.save(Evil(), path)
    with pytest.raises(ValueError, match="a pickle is not read"):
        official.load(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        official.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="only an E-I network"):
        official.save(build("vgg8", kind="bn", width=0.1), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="only an E-I network"):
        official.save(build("vgg8", kind="dann", width=0.1), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"has the shape .*, not"):
        official.load(CHECKPOINT, image_size=64)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_a_run_folder_of_a_checkpoint(tensors, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "CIFAR10-VGG8", tensors)
    assert train.main(["--official", str(folder), "--data", "folder", "--data-root", str(images)]) == 0
    out = capsys.readouterr().out
    run = Path("runs/official-CIFAR10-VGG8")
    assert "; the authors report 87.03%" in out and f"run folder: {run}" in out and "accumulates" in out
    assert {path.name for path in run.iterdir()} - {".lock"} == {"best.pt", "config.json"}
    best = Run(run).load("best.pt")["model"]
    assert all(torch.equal(best[name], p) for name, p in official.load(folder).state_dict().items())
    said = out.partition("test accuracy ")[2].partition("%")[0]
    assert train.main(["--eval", str(run)]) == 0
    assert f"test accuracy {said}%" in capsys.readouterr().out
    for figure in ("representation", "balance", "gain", "weights", "stabilizer"):
        assert visualize.main([figure, str(run)]) == 0
        out = capsys.readouterr().out
        assert "trained elsewhere, so 'E-I Init with these data' is not what it started from" in out
        assert (run / "figures" / f"{figure}.png").exists()
        text = (run / "figures" / f"{figure}.csv").read_text(encoding="utf-8")
        assert "at initialisation" not in text
    assert "E-I Init with these data" in text
    assert "has no history: its network was trained elsewhere" in fails(capsys, "evolution", run, program=visualize)
    assert "or the network was trained elsewhere" in fails(capsys, "--resume", run)
    assert train.main(["--official", str(folder), "--data", "folder", "--data-root", str(images)]) == 0  # once more
    assert Path("runs/official-CIFAR10-VGG8-2/best.pt").exists()


def test_what_contradicts_the_file(tensors, images, tmp_path, capsys):
    folder = write(tmp_path / "x", tensors)
    common = ("--official", folder, "--data", "folder", "--data-root", images)
    assert "--arch=vgg11 is given, but the tensors say vgg8" in fails(capsys, *common, "--arch", "vgg11")
    assert "--model bn is given" in fails(capsys, *common, "--model", "bn")
    assert "--width=0.5 is given" in fails(capsys, *common, "--width", 0.5)
    assert "--plan=8-P is given" in fails(capsys, *common, "--plan", "8 P")
    assert "for 3 channels and 10 classes, but these data have 1 and 10" in fails(
        capsys, *common[:2], "--data", "digits"
    )
    assert "give one of them" in fails(capsys, *common, "--resume", "x")
    for config, message in (
        (dict(T=0), "T is to be a whole number"),
        (dict(T=True), "T is to be a whole number"),
        (dict(neuron=dict(tau="2")), "tau is to be a number of at least 1, not '2'"),
        (dict(ei_ratio=8), "says ei_ratio 8, but the tensors are of 4"),
        (dict(ei_ratio=[4]), "says ei_ratio [4], but the tensors are of 4"),
        (dict(num_layers=11), "says num_layers 11, but the tensors are of vgg8"),
    ):
        assert message in fails(capsys, *("--official", write(tmp_path / "y", tensors, **config)), *common[2:])
    for dataset in ("ImageNet", ["CIFAR10"]):
        odd = write(tmp_path / "y", tensors, dataset=dataset)
        assert f"says dataset {dataset!r}: give --data" in fails(capsys, "--official", odd)
    for option in (("--epochs", 3), ("--init", "kaiming"), ("--other-data",), ("--give-up",)):
        assert f"--official trains nothing: leave {option[0]} out" in fails(capsys, *common, *option)
    (tmp_path / "y" / "config.json").write_text("[]")
    assert "config.json cannot be read: it holds no settings" in fails(capsys, "--official", tmp_path / "y")
    (tmp_path / "y" / "config.json").unlink()
    assert "config.json cannot be read" in fails(capsys, "--official", tmp_path / "y")


def test_no_network_and_unknown_names(capsys, monkeypatch):
    assert "'CIFAR10-VGG9' is no folder and none of the published networks: CIFAR10-VGG8, " in fails(
        capsys, "--official", "CIFAR10-VGG9"
    )
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    monkeypatch.setattr(hub.utils.logging, "set_verbosity_error", lambda: None)  # what other tests hear stays
    err = fails(capsys, "--official", "CIFAR10-VGG8")
    assert "cannot be downloaded (no route to host)" in err and "give --official DIR" in err


def test_a_download(tensors, images, tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository, file, subfolder):
        asked.append((repository, subfolder, file))
        return str(write(tmp_path / "cache" / "snapshot", tensors) / file)

    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.utils.logging, "set_verbosity_error", lambda: None)
    assert train.main(["--official", "CIFAR10-VGG8", "--data", "folder", "--data-root", str(images)]) == 0
    assert asked == [("vwOvOwv/DeepEISNN", "CIFAR10-VGG8", name) for name in ("config.json", "model.safetensors")]
    assert "; the authors report 87.03% on CIFAR10\n" in capsys.readouterr().out
    assert Path("runs/official-CIFAR10-VGG8/best.pt").exists()


def test_an_mlp_of_other_time_steps_and_ratio(tmp_path, capsys):
    torch.manual_seed(0)
    model = build("mlp", in_channels=1, T=2, image_size=8, ei_ratio=5, plan=[20, 10])
    initialize(model, torch.rand(20, 1, 8, 8))
    official.save(model, tmp_path / "model.safetensors")
    write(
        tmp_path / "x",
        official.read(tmp_path),
        dataset="digits",
        arch="MLP",
        num_layers=3,
        T=2,
        ei_ratio=5,
        neuron=dict(tau=3),
    )
    path = tmp_path / "x" / "model.safetensors"  # the file stands for the folder that it is in
    assert train.main(["--official", str(path), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "mlp ei: 40 excitatory and 8 inhibitory" in out and "authors report" not in out
    config = Run(tmp_path / "run").config
    assert [config[k] for k in ("arch", "plan", "T", "ei_ratio", "tau")] == ["mlp", "20-10", 2, 5, 3]
    assert "(with --image-size 4, which decides about an MLP's channels)" in fails(
        capsys, "--official", path, "--image-size", 4
    )


def test_without_the_packages(tensors, tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "x", tensors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -r requirements-official.txt" in fails(capsys, "--official", "CIFAR10-VGG8")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install -r requirements-official.txt" in fails(capsys, "--official", folder)


def test_every_published_network_has_its_data():
    assert len(official.PUBLISHED) == 11
    for name in official.PUBLISHED:
        assert official.DATA[name.split("-")[0].lower()] in train.data.LOADERS
    for (arch, kind), accuracy in reproduce.AUTHORS.items():
        if kind == "ei":
            name = arch.upper() if arch != "resnet18" else "ResNet18"
            assert official.PUBLISHED[f"CIFAR10-{name}"] == accuracy


# ---- side by side ----------------------------------------------------------------------------------------------------

STAND_IN = {
    "models/__init__.py": "",
    "modules/__init__.py": "",
    "spikingjelly/__init__.py": "",
    "spikingjelly/activation_based/__init__.py": "",
    "spikingjelly/activation_based/functional.py": """
def reset_net(net):
    for module in net.modules():
        if hasattr(module, "v"):
            module.v = 0
""",
    "modules/optimizers.py": """
import torch

class EiSGD(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, weight_decay, clamped):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, clamped=clamped))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad + group["weight_decay"] * p
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = g.clone()
                state["momentum_buffer"].mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * state["momentum_buffer"])
                if group["clamped"]:
                    p.clamp_(min=0)
""",
    "models/vgg.py": """
import torch
from torch import nn
import torch.nn.functional as F

layer_config = {8: [64, "P", 128, "P", 256, "P", 512, "P", 512, "P"]}

class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v >= 0).to(v)

    @staticmethod
    def backward(ctx, g):
        s = torch.sigmoid(4 * ctx.saved_tensors[0])
        return g * 4 * s * (1 - s)

class LIFNode(nn.Module):
    def __init__(self, tau):
        super().__init__()
        self.v, self.tau = 0, tau

    def forward(self, x):
        out = []
        for i in x:
            self.v = self.v * (1 - 1 / self.tau) + i DECAY
            s = Step.apply(self.v - 1)
            self.v = self.v - s.detach()
            out.append(s)
        return torch.stack(out)

class Pair(nn.Module):
    pass

class EiConv(nn.Module):
    def __init__(self, n_in, n, k, n_i):
        super().__init__()
        self.conv_ee = nn.Conv2d(n_in, n, k, padding=1, bias=False)
        self.conv_ie = nn.Conv2d(n_in, n_i, k, padding=1, bias=False)

    def forward(self, x):
        return self.conv_ee(x), self.conv_ie(x)

class EiLinear(nn.Module):
    def __init__(self, n_in, n, n_i):
        super().__init__()
        self.weight_ee = nn.Parameter(torch.rand(n, n_in))
        self.weight_ie = nn.Parameter(torch.rand(n_i, n_in))

    def forward(self, x):
        return x @ self.weight_ee.T, x @ self.weight_ie.T

class Norm(nn.Module):
    def __init__(self, n, n_i, d, last=False):
        super().__init__()
        shape = (1, -1) if last else (-1, 1, 1)
        self.weight_ei = nn.Parameter(torch.rand(n, n_i))
        self.gain_i = nn.Parameter(torch.ones(n_i).view(shape))
        self.gain_e = nn.Parameter(torch.ones(n).view(shape))
        self.bias = nn.Parameter(torch.zeros(n).view(shape))
        self.d, self.last, self._inited = d, last, False

    def forward(self, currents):
        assert self._inited
        e, i = currents
        w = self.weight_ei
        w = w / self.d + (w - w / self.d).detach()
        if self.last:
            return e - i @ w.T
        sub = torch.einsum("ei,nihw->nehw", w, i)
        div = torch.einsum("ei,nihw->nehw", w, self.gain_i * i)
        least = torch.where(div > 0, div, torch.inf).amin((1, 2, 3), keepdim=True)
        div = div + (torch.where(div > 0, div, least) - div).detach()
        return self.gain_e * (e - sub) / div + self.bias

class Do(nn.Module):
    def __init__(self, do):
        super().__init__()
        self.do = do

    def forward(self, x):
        return self.do(x)

class SpikingEiVGG(nn.Module):
    def __init__(self, T, num_layers, in_channels, n_outputs, neuron_config, light_classifier, dropout, seq_input,
                 ei_ratio, device, rng):
        super().__init__()
        assert light_classifier and not dropout and not seq_input and ei_ratio == 4
        merge, split = (lambda x: x.flatten(0, 1)), (lambda x: x.unflatten(0, (T, -1)))
        layers = [Do(lambda x: x.expand(T, *x.shape)), Do(merge)]
        for n in layer_config[num_layers]:
            if n == "P":
                layers.append(nn.AvgPool2d(2))
                continue
            layers += [EiConv(in_channels, n, 3, max(1, n // 4)), Norm(n, max(1, n // 4), 9 * in_channels)]
            layers += [Do(split), LIFNode(**neuron_config), nn.Dropout(dropout), Do(merge)]
            in_channels = n
        layers += [nn.Flatten(), EiLinear(in_channels, n_outputs, max(1, n_outputs // 4))]
        layers += [Norm(n_outputs, max(1, n_outputs // 4), in_channels, True), Do(split)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)MEAN
""",
}


def stand_in(folder, decay="", mean=".mean(0)"):
    """A program with the interface of the authors', written for this test; `decay` makes another neuron of it."""
    for name, text in STAND_IN.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("DECAY", decay).replace("MEAN", mean), encoding="utf-8")
    return folder


@pytest.fixture
def fresh_modules(monkeypatch):
    """Other programs' modules are forgotten afterwards."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("models", "modules", "spikingjelly"):
            del sys.modules[name]


@pytest.mark.parametrize("mean", [".mean(0)", ""])  # (B, classes), or (T, B, classes)
def test_side_by_side(tmp_path, capsys, fresh_modules, mean):
    folder = stand_in(tmp_path / "theirs", mean=mean)
    assert official.main(["--compare", str(folder), "--steps", "6", "--width", "0.1", "--batch-size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3", "5", "6"]
    step, ours, theirs, largest, relative, differing, _, spikes = lines[-1].split()
    assert step == "6" and ours == theirs and float(largest) < 1e-12 and float(relative) < 1e-12
    assert differing == "0" and int(spikes.replace(",", "")) > 100_000
    assert float(lines[2].split()[1]) != float(ours)  # they do train


def test_side_by_side_sees_a_difference(tmp_path, capsys, fresh_modules):
    folder = stand_in(tmp_path / "theirs", decay="/ 1.01")
    assert official.main(["--compare", str(folder), "--steps", "3", "--width", "0.1", "--batch-size", "8"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert float(last[3]) > 1e-6 and last[5] != "0"


def test_side_by_side_without_their_program(tmp_path, capsys):
    assert "there is no folder" in fails(capsys, "--compare", tmp_path / "none", program=official)
    assert "(ModuleNotFoundError: No module named 'models')" in fails(capsys, "--compare", tmp_path, program=official)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("class SpikingEiVGG", "class Other", "AttributeError"),
        ("light_classifier, dropout,", "light, dropout,", "TypeError"),
        ("layer_config", "cfg", "AttributeError"),
        ("class EiSGD", "class Other", "AttributeError"),
        ("self.gain_i", "self.gain", "RuntimeError: Error(s) in loading state_dict"),
        ("LIFNode", "Neuron", "it has 0 modules with LIF in their name, not 5"),
        ("return self.layers(x)", "raise KeyError('a') #", "KeyError: 'a'"),
        ("p.clamp_(min=0)", "p.clamp_to(0)", "AttributeError"),
        ("return self.layers(x).mean(0)", "return self.layers(x).mean(0)[:, :3]", "IndexError"),
        ("class Step(", "raise SystemExit(3)\n\nclass Step(", "SystemExit: 3"),
        ("import torch", "import nothing_like_it", "No module named 'nothing_like_it'"),
    ],
)
def test_side_by_side_with_another_program(tmp_path, capsys, fresh_modules, old, new, message):
    folder = stand_in(tmp_path / "theirs")
    for path in (folder / "models" / "vgg.py", folder / "modules" / "optimizers.py"):
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    arguments = ("--compare", folder, "--steps", 1, "--width", 0.05, "--batch-size", 4)
    err = fails(capsys, *arguments, program=official)
    assert message in err and "is not the authors' program, or another version of it" in err
