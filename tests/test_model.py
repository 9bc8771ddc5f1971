import pytest
import torch
import torch.nn.functional as F

from ei_init import initialize
from inhibition import EICircuit, EICircuit2d, clamp_dale
from model import ARCHS, KINDS, AvgPool, build, circuits, cost_table, costs, first_nonfinite, layers, population
from train import train_step

NARROW = [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"]


@pytest.mark.parametrize("in_channels", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_builds_initialises_and_takes_a_step(arch, kind, in_channels):
    model = build(arch, in_channels=in_channels, T=2, kind=kind)
    x = torch.rand(2, in_channels, 32, 32)
    initialize(model, x)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    logits = model(x)
    assert logits.shape == (2, 10)
    loss = F.cross_entropy(logits, torch.tensor([1, 2]))
    loss.backward()
    optimizer.step()
    clamp_dale(model)
    assert loss.isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("size", [32, 48, 64])
def test_larger_images(size):
    for arch in ("vgg8", "resnet18"):
        assert build(arch, image_size=size, T=1)(torch.rand(1, 3, size, size)).shape == (1, 10)


def test_circuits_run_in_the_order_in_which_they_are_listed():
    for arch, n in (("vgg8", 6), ("vgg11", 9), ("vgg16", 14), ("vgg19", 17), ("resnet18", 1 + 16 + 3 + 1)):
        model = build(arch, T=1)
        listed, ran = circuits(model), []
        for c in listed:
            c.register_forward_pre_hook(lambda c, _, ran=ran: ran.append(c))
        model(torch.rand(1, 3, 32, 32))
        assert len(listed) == n and ran == listed
        assert [c.readout for c in listed] == [False] * (n - 1) + [True]
        assert all(isinstance(c, EICircuit2d) for c in listed[:-1]) and type(listed[-1]) is EICircuit
        assert len(layers(model)) == n - 1


def test_resnet_adds_the_spikes_of_a_block_to_its_identity():
    model = build("resnet18", T=2)
    x = torch.rand(4, 3, 32, 32)
    initialize(model, x)
    seen = {}
    block = model.encoder.blocks[2]  # the first with a shortcut layer: 1x1, stride 2
    assert block.shortcut.circuit.w_ee.shape == (128, 64, 1, 1) and block.shortcut.circuit.stride == 2
    block.conv2.register_forward_hook(lambda _, __, s: seen.update(spikes=s))
    block.shortcut.register_forward_hook(lambda _, __, s: seen.update(shortcut=s))
    block.register_forward_hook(lambda _, __, s: seen.update(out=s))
    model(x)
    assert torch.equal(seen["out"], seen["spikes"] + seen["shortcut"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_frame_at_each_step(kind):
    model = build("vgg8", plan=NARROW, kind=kind)
    x = torch.rand(4, 3, 32, 32)
    initialize(model, x)
    torch.testing.assert_close(model(x), model(x.unsqueeze(1).repeat(1, 4, 1, 1, 1)))


def test_dale_s_law_holds_after_any_number_of_steps():
    model = build("vgg8", plan=NARROW)
    x, y = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
    initialize(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)  # large, so that the clamp has work
    clamped = 0
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        clamped += sum((c.w_ee < 0).sum().item() for c in circuits(model))
        clamp_dale(model)
        for circuit in circuits(model):
            for name, p in circuit.named_parameters():
                assert name == "b_e" or (p >= 0).all(), name
    assert clamped > 0


def test_population_counts_neurons_by_hand():
    model = build("vgg8", plan=NARROW)
    sizes = [(16, 32), (16, 16), (32, 8), (32, 4), (32, 2)]
    assert population(model) == (
        sum(n * s * s for n, s in sizes) + 10,
        sum(n // 4 * s * s for n, s in sizes) + 2,
    )
    assert population(build("vgg8", plan=NARROW, kind="bn")) == (sum(n * s * s for n, s in sizes) + 10, 0)


def test_first_nonfinite_names_the_layer():
    model = build("vgg8", plan=NARROW)
    x = torch.rand(2, 3, 32, 32)
    initialize(model, x)
    assert first_nonfinite(model, x) == "loss"
    with torch.no_grad():
        model.encoder.stages[4].circuit.b_e[3] = float("nan")
    assert first_nonfinite(model, x) == "encoder.stages.4.circuit"


def test_a_step_from_a_loss_that_is_not_finite_is_left_out_so_that_the_layer_can_be_named():
    model = build("vgg8", plan=NARROW)
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    initialize(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    train_step(model, optimizer, x, y, 0.1)
    with torch.no_grad():
        model.readout.w_ee[0, 0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    assert not train_step(model, optimizer, x, y, 0.1)[0].isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert first_nonfinite(model, x) == "readout"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(arch="vgg9"), "unknown architecture"),
        (dict(arch="vgg8", kind="ln"), "unknown kind"),
        (dict(arch="vgg8", T=0), "at least 1"),
        (dict(arch="vgg8", image_size=31), "too small"),
        (dict(arch="vgg8", image_size=16, plan=NARROW), "too small"),
        (dict(arch="resnet18", plan=NARROW), "takes none"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 32, 32), (3, 32, 32), (2, 5, 3, 32, 32)])
def test_refuses_other_inputs(shape):
    with pytest.raises(ValueError, match=r"built for|frames"):
        build("vgg8", plan=NARROW)(torch.rand(shape))


def test_costs_are_those_counted_by_hand():
    net = build("vgg8", in_channels=1, plan=[4, "P", 8], T=2)
    x = torch.rand(3, 1, 32, 32)
    initialize(net, x)
    first, second, readout = costs(net, x)
    reached = 9 * 30 * 30 + 6 * 4 * 30 + 4 * 4  # taps of a 3x3 kernel that do not meet the border
    assert first["accumulates"] == 0
    assert first["multiplies"] == reached * (4 + 1) + 32 * 32 * (2 * 4 * 1 + 1 + 2 * 4)
    spikes = net.encoder.stages[0](x, 2, static=True)
    assert first["firing_rate"] == pytest.approx(spikes.mean().item())
    pooled = F.avg_pool2d(spikes, 2).sum(1)  # (T B, 16, 16); a spike at a border reaches fewer
    taps = torch.full((16,), 3.0)
    taps[0] = taps[-1] = 2
    expected = (pooled * taps[:, None] * taps).sum().item() / 3 * (8 + 2)
    assert second["accumulates"] == pytest.approx(expected, rel=1e-5)
    assert second["multiplies"] == 2 * 16 * 16 * (2 * 8 * 2 + 2 + 2 * 8)
    assert (second["parameters_e"], second["parameters_i"]) == (8 * 36 + 16, 2 * 36 + 16 + 2)
    assert (second["neurons_e"], second["neurons_i"]) == (8 * 256, 2 * 256)
    of_encoder = net.encoder(x, 2, static=True).sum().item() / 3
    assert readout["accumulates"] == pytest.approx(of_encoder * 12) and readout["multiplies"] == 2 * 10 * 2
    total = sum(row["parameters_e"] + row["parameters_i"] for row in (first, second, readout))
    assert total == sum(p.numel() for p in net.parameters())


def test_costs_of_the_rivals():
    x = torch.rand(2, 3, 32, 32)
    bn_snn = build("vgg8", plan=NARROW, kind="bn", T=2)
    bn, table = costs(bn_snn, x), cost_table(bn_snn, x)
    assert all(row["neurons_i"] == row["parameters_i"] == 0 for row in bn)
    assert bn[1]["multiplies"] == 2 * 16 * 16 * 16 and bn[1]["accumulates"] > 0
    dann = costs(build("vgg8", plan=NARROW, kind="dann", T=1), x)
    assert all(row["accumulates"] == 0 for row in dann)
    assert len(table) == 9 and table[-1].startswith("all")
    assert len(costs(build("resnet18", T=1), x)) == 21


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (6, 5), (3, 3)])
def test_pooling_equals_pytorch_s(size):
    x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = AvgPool()(x), torch.nn.functional.avg_pool2d(x, 2)
    grad = torch.randn_like(theirs)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, theirs)))
