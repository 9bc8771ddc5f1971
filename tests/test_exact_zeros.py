"""I_div is exactly 0 where the receptive field is silent, whatever algorithm convolves.

Winograd's convolution leaves rounding noise of both signs at silent positions. PyTorch takes it where it is built
without oneDNN, as its macOS wheels are; here oneDNN is switched off, or the noise is planted.
"""

import pytest
import torch
import torch.nn.functional as F

from ei_init import ei_init, initialize
from inhibition import EICircuit, EICircuit2d, clamp_dale
from model import build, circuits
from support.fast import FORMS, accelerate


def silent(x, w, stride, padding):
    """Positions whose receptive field holds nothing but zeros, counted with a kernel of ones: (N, 1, H', W')."""
    ones = x.new_ones(1, 1, *w.shape[2:], dtype=torch.double)
    return COUNT(x.sum(1, keepdim=True).double(), ones, None, stride, padding) == 0


COUNT, LINEAR = F.conv2d, F.linear


def noisy_conv2d(x, w, bias=None, stride=1, padding=0, *rest):
    out = COUNT(x, w, bias, stride, padding, *rest)
    noise = 1e-6 * torch.randn(out.shape).to(out)
    return out + noise * silent(x.detach(), w, stride, padding)


def noisy_linear(x, w, bias=None):
    out = LINEAR(x, w, bias)
    return out + 1e-6 * torch.randn(out.shape).to(out) * (x.detach().amax(1, keepdim=True) == 0)


def outputs_and_gradients(circuit, x, form):
    x = x.clone().requires_grad_()
    out = circuit.currents(x)["i_int"] if form == "currents" else circuit(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad(out, [x, *circuit.parameters()], grad)


CIRCUITS = [
    lambda: EICircuit(20, 8),
    lambda: EICircuit2d(6, 8, 3, padding=1),
    lambda: EICircuit2d(6, 8, 3, stride=2, padding=1),
    lambda: EICircuit2d(6, 8, 1, stride=2),
    lambda: EICircuit2d(6, 8, 3, padding=2),  # more than max_pool2d's own padding allows
    lambda: EICircuit(20, 8, readout=True),
]


@pytest.mark.parametrize("form", ["forward", "currents", "fused"])
@pytest.mark.parametrize("make", CIRCUITS)
def test_noise_at_silent_positions_changes_nothing(make, form, monkeypatch):
    circuit = make().double()
    shape = (6, 20) if type(circuit) is EICircuit else (6, 6, 9, 9)
    x = torch.rand(shape).double()
    ei_init(circuit, x)
    x[0] = 0  # a silent sample
    x[1:4, ..., :5] = 0  # silent positions, in a dense circuit silent neurons
    x[4] *= torch.rand(shape[1:]) < 0.05
    if form == "fused":
        circuit.__class__ = FORMS[type(circuit)]
    calm = outputs_and_gradients(circuit, x, form)
    monkeypatch.setattr(F, "conv2d", noisy_conv2d)
    monkeypatch.setattr(F, "linear", noisy_linear)
    for a, b in zip(outputs_and_gradients(circuit, x, form), calm, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_without_onednn_a_network_trains(form):
    """Two classes of sparse images. With the noise taken for I_div currents reach 1e12, and the loss stays at ln 2."""
    y = torch.arange(32) % 2
    x = torch.zeros(32, 1, 24, 24)
    for i in range(32):
        x[i, 0, 4:8, 4:8] = torch.rand(4, 4)
        x[i, 0, 16 * (i % 2) : 16 * (i % 2) + 6, 16:22] = torch.rand(6, 6)
    losses, largest = {}, []
    for onednn in (True, False):
        torch.manual_seed(0)
        with torch.backends.mkldnn.flags(enabled=onednn):
            model = build("vgg8", in_channels=1, n_classes=2, T=2, image_size=24, plan=[16, "P", 32, "P", 32, "P"])
            initialize(model, x)
            if form == "fused":
                assert accelerate(model) == set()
            for circuit in circuits(model)[:-1]:
                circuit.register_forward_hook(lambda _, __, i_int: largest.append(i_int.abs().max().item()))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            for _ in range(8):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                clamp_dale(model)
        losses[onednn] = loss.item()
    assert max(largest) < 1000
    assert losses[False] < 0.5 and losses[False] == pytest.approx(losses[True], abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_on_a_gpu_silent_positions_are_exactly_zero(tf32, search):
    """Whatever algorithm cuDNN chooses, and in TF32, whose products have 10 bits of mantissa."""
    sizes = [(3, 64, 32), (64, 128, 16), (128, 256, 8), (256, 512, 4), (512, 512, 2)]  # those of VGG-8's layers
    with torch.backends.cudnn.flags(enabled=True, benchmark=search, allow_tf32=tf32):
        for in_channels, n_e, side in sizes:
            for kernel, padding in ((3, 1), (1, 0)):
                circuit = EICircuit2d(in_channels, n_e, kernel, padding=padding).cuda()
                x = (torch.rand(256, in_channels, side, side, device="cuda") < 0.5 / in_channels).float()
                x[::2] = x[:, :, : side // 2] = 0
                ei_init(circuit, x)
                quiet = silent(x, circuit.w_ee, 1, padding)
                found = circuit.currents(x)
                assert 0.4 < quiet.float().mean() < 0.95
                for name in ("i_ee", "i_ie", "i_sub", "i_div"):
                    assert not found[name][quiet.expand_as(found[name])].any()
                assert (found["i_div"] >= 0).all()
