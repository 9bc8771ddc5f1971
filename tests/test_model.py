import pytest
import torch
import torch.nn.functional as F

from baselines import DANNCircuit2d
from ei_init import initialize
from inhibition import EICircuit, EICircuit2d, clamp_dale
from lif import LIF
from model import ARCHS, KINDS, PLANS, AvgPool, Layer, ResNet18, build, circuits, layers
from support.fast import accelerate

NARROW = [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"]


@pytest.mark.parametrize("in_channels", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_builds_initialises_and_takes_a_step(arch, kind, in_channels):
    model = build(arch, in_channels=in_channels, T=2, kind=kind, width=0.25)
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
        assert build(arch, image_size=size, T=1, width=0.1)(torch.rand(1, 3, size, size)).shape == (1, 10)


def test_circuits_run_in_the_order_in_which_they_are_listed():
    for arch, n in (("vgg8", 6), ("vgg11", 9), ("vgg16", 14), ("vgg19", 17), ("resnet18", 1 + 16 + 3 + 1)):
        model = build(arch, T=1, width=0.1)
        listed, ran = circuits(model), []
        for c in listed:
            c.register_forward_pre_hook(lambda c, _, ran=ran: ran.append(c))
        model(torch.rand(1, 3, 32, 32))
        assert len(listed) == n and ran == listed
        assert [c.readout for c in listed] == [False] * (n - 1) + [True]
        assert all(isinstance(c, EICircuit2d) for c in listed[:-1]) and type(listed[-1]) is EICircuit
        assert len(layers(model)) == n - 1


@pytest.mark.parametrize("kind", KINDS)
def test_mlp(kind):
    model = build("mlp", in_channels=2, image_size=7, kind=kind, n_classes=5)
    x = torch.rand(6, 2, 7, 7)
    initialize(model, x)
    assert [
        layer.circuit(torch.rand(6, n)).shape[1] for layer, n in zip(layers(model), (98, 500, 500), strict=True)
    ] == [
        500,
        500,
        300,
    ]
    assert model(x).shape == (6, 5) and len(circuits(model)) == (4 if kind in ("ei", "dann") else 0)
    torch.testing.assert_close(model(x), model(x.unsqueeze(1).repeat(1, 4, 1, 1, 1)))
    assert [n for n in circuits(build("mlp", plan=[20, 12], width=0.5)) if not n.readout][1].w_ee.shape == (6, 10)


def test_resnet_adds_the_spikes_of_a_block_to_its_identity():
    model = build("resnet18", T=2, width=0.5)
    x = torch.rand(4, 3, 32, 32)
    initialize(model, x)
    seen = {}
    block = model.encoder.blocks[2]  # the first with a shortcut layer: 1x1, stride 2
    assert block.shortcut.circuit.w_ee.shape == (64, 32, 1, 1) and block.shortcut.circuit.stride == 2
    block.conv2.register_forward_hook(lambda _, __, s: seen.update(spikes=s))
    block.shortcut.register_forward_hook(lambda _, __, s: seen.update(shortcut=s))
    block.register_forward_hook(lambda _, __, s: seen.update(out=s))
    block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    same = model.encoder.blocks[3]  # no change of shape: the identity itself
    same.conv2.register_forward_hook(lambda _, __, s: seen.update(second=s))
    same.register_forward_hook(lambda _, __, s: seen.update(after=s))
    model(x)
    assert torch.equal(seen["out"], seen["spikes"] + seen["shortcut"]) and seen["spikes"].any()
    assert seen["x"].shape == (2, 4, 32, 32, 32) and seen["out"].shape == (2, 4, 64, 16, 16)
    assert same.shortcut is None and torch.equal(seen["after"], seen["second"] + seen["out"])
    assert torch.equal(seen["shortcut"], block.shortcut(seen["x"]))


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(arch="vgg9"), "unknown architecture"),
        (dict(arch="vgg8", kind="ln"), "unknown kind"),
        (dict(arch="vgg8", T=0), "at least 1"),
        (dict(arch="vgg8", image_size=31), "^images of 31x31 pixels are too small: vgg8 needs 32x32 or more$"),
        (dict(arch="resnet18", image_size=31), "^images of 31x31 pixels are too small: resnet18 needs 32x32 or more$"),
        (
            dict(arch="vgg8", image_size=16, plan=NARROW),
            "^images of 16x16 pixels are too small for this network's poolings$",
        ),
        (dict(arch="resnet18", plan=NARROW), "^a plan is a list of layers of a VGG or an MLP; resnet18 takes none$"),
        (dict(arch="mlp", plan=[30, "P"]), r"^a plan of mlp is a list of layer sizes, not \[30, 'P'\]$"),
        (
            dict(arch="vgg8", plan=["P"]),
            r"^a plan of vgg8 is a list of layer sizes and P, one of them a size, not \['P'\]$",
        ),
        (dict(arch="mlp", plan=[0], kind="bn"), r"^a plan of mlp is a list of layer sizes, not \[0\]$"),
        (dict(arch="mlp", plan=[True]), "^a plan of mlp is a list of layer sizes"),
        (dict(arch="mlp", plan=5), "^a plan of mlp is a list of layer sizes, not 5$"),
        (dict(arch="mlp", plan=[5], image_size=-2), "^sizes must .* image_size=-2, width=1.0$"),
        (dict(arch="mlp", plan=[]), r"^a plan of mlp is a list of layer sizes, not \[\]$"),
        (dict(arch="mlp", image_size=0), "^sizes must .* image_size=0, width=1.0$"),
        (dict(arch="vgg9"), "^unknown architecture 'vgg9': choose from mlp, vgg8, vgg11, vgg16, vgg19, resnet18"),
        (dict(arch="vgg8", kind="ln"), "^unknown kind 'ln': choose from ei, bn, plain, dann$"),
        (dict(arch="vgg8", in_channels=0), "^sizes must be at least 1 and the width positive, not in_channels=0, "),
        (
            dict(arch="vgg8", n_classes=0),
            "^sizes must .* not in_channels=3, n_classes=0, T=4, image_size=32, width=1.0$",
        ),
        (dict(arch="vgg8", T=0), "^sizes must .* not in_channels=3, n_classes=10, T=0, image_size=32, width=1.0$"),
        (dict(arch="vgg8", width=0), "^sizes must .* width=0$"),
        (dict(arch="vgg8", width=-1.0), "^sizes must .* width=-1.0$"),
        (dict(arch="vgg8", width=float("nan")), "^sizes must .* width=nan$"),
        (dict(arch="vgg8", tau=0.5), "^lif: tau must be at least 1"),
        (dict(arch="vgg8", kind="bn", threshold=0), "^lif: .* threshold=0"),
        (dict(arch="vgg8", alpha=-1), "^lif: .* alpha=-1"),
        (dict(arch="vgg8", ei_ratio=0), "^a circuit needs sizes of at least 1"),
        (dict(arch="vgg8", kind="dann", ei_ratio=0), "^a circuit needs sizes of at least 1"),
        (dict(arch="vgg8", eps=-1), "^eps is a positive number"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


NOT_AN_IMAGE = r"^the network was built for images of \(3, 32, 32\) \(channels, height, width\), not \({}\)"


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 64), (2, 1, 32, 32), (3, 32, 32), (2, 3, 32, 31), (2, 3, 31, 32), (1, 1, 4, 3, 32, 32)]
)
def test_refuses_other_inputs(shape):
    with pytest.raises(ValueError, match=NOT_AN_IMAGE.format(", ".join(map(str, shape)))):
        build("vgg8", plan=NARROW)(torch.rand(shape))


def test_refuses_another_number_of_frames():
    with pytest.raises(ValueError, match=r"^the network runs for T=4 time steps, but the data have 5 frames$"):
        build("vgg8", plan=NARROW)(torch.rand(2, 5, 3, 32, 32))


def test_the_plans_are_those_of_the_paper():
    design = dict(
        mlp="500 500 300",
        vgg8="64 P 128 P 256 P 512 P 512 P",
        vgg11="64 P 128 P 256 256 P 512 512 P 512 512 P",
        vgg16="64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512 P",
        vgg19="64 64 P 128 128 P 256 256 256 256 P 512 512 512 512 P 512 512 512 512 P",
    )
    assert {arch: " ".join(map(str, plan)) for arch, plan in PLANS.items()} == design
    for arch, plan in design.items():
        with torch.device("meta"):
            model = build(arch, T=1)
        assert [c.n_e for c in circuits(model)] == [int(n) for n in plan.split() if n != "P"] + [10]
        kinds = ["P" if isinstance(stage, AvgPool) else "L" for stage in model.encoder.stages]
        assert kinds == ["P" if n == "P" else "L" for n in plan.split()]
        convolutions = [] if arch == "mlp" else circuits(model)[:-1]
        assert all(c.w_ee.shape[2:] == (3, 3) and c.padding == c.stride == 1 for c in convolutions)
    with torch.device("meta"):
        model = build("resnet18", T=1)
    assert [c.n_e for c in circuits(model)] == [
        *[64] * 5, *[128, 128, 128, 128, 128], *[256] * 5, *[512] * 5, 10
    ]  # fmt: skip
    assert [c.stride for c in circuits(model)[:-1]] == [1] * 5 + [2, 1, 2, 1, 1] * 3
    assert [c.w_ee.shape[-1] for c in circuits(model)[:-1]] == [3] * 5 + [3, 3, 1, 3, 3] * 3
    assert [c.padding for c in circuits(model)[:-1]] == [1] * 5 + [1, 1, 0, 1, 1] * 3
    assert [block.shortcut is None for block in model.encoder.blocks] == [True, True] + [False, True] * 3
    assert model.readout.w_ee.shape == (10, 512)
    with torch.device("meta"):
        assert [c.n_e for c in circuits(build("resnet18"))] == [c.n_e for c in circuits(model)]
        assert ResNet18(3, lambda *a, **o: Layer(EICircuit2d(*a, **o), LIF())).n_features == 512


def test_width_multiplies_the_maps_and_leaves_at_least_4():
    with torch.device("meta"):
        for arch, width, maps in (
            ("vgg8", 0.5, [32, 64, 128, 256, 256]),
            ("vgg8", 0.01, [4, 4, 4, 5, 5]),
            ("vgg8", 2, [128, 256, 512, 1024, 1024]),
            ("vgg8", 0.11, [7, 14, 28, 56, 56]),
        ):
            model = build(arch, width=width)
            assert [c.n_e for c in circuits(model)] == [*maps, 10]
        widths = [m.stem.circuit.n_e for m in (build("resnet18", width=w).encoder for w in (0.01, 0.25, 1.5))]
        assert widths == [4, 16, 96]
        assert [c.n_e for c in circuits(build("resnet18", width=0.02))][-6:] == [10, 10, 10, 10, 10, 10]
        assert build("resnet18", width=0.5).readout.fan_in == 256
        assert [c.n_e for c in circuits(build("vgg8", plan=[8, "P", 20], width=0.5))] == [4, 10, 10]
        assert [c.n_e for c in circuits(build("vgg8", plan=[2, "P", 3]))] == [2, 3, 10]  # a plan is taken as it is
    assert build("vgg8", width=0.01, T=1)(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    assert build("resnet18", width=0.01, T=1)(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_the_defaults_are_those_of_the_paper():
    model = build("vgg8", plan=NARROW)
    assert (model.T, model.in_channels, model.image_size) == (4, 3, 32) and model.readout.n_e == 10
    for circuit in circuits(model):
        assert (circuit.eps, circuit.ste, circuit.grad_scaling) == ("adaptive", True, True)
        assert circuit.n_i == circuit.n_e // 4
    assert all((n.tau, n.threshold, n.alpha) == (2, 1, 4) for n in (layer.neuron for layer in layers(model)))


@pytest.mark.parametrize("arch", ["vgg8", "resnet18"])
def test_every_option_reaches_every_layer(arch):
    options = dict(tau=3.0, threshold=0.7, alpha=2.0, ei_ratio=8, eps=1e-3, ste=False, grad_scaling=False)
    model = build(arch, width=0.25, n_classes=17, T=2, in_channels=2, image_size=40, **options)
    assert (model.T, model.in_channels, model.image_size) == (2, 2, 40)
    assert model(torch.rand(1, 2, 40, 40)).shape == (1, 17)
    assert len(circuits(model)) == len(layers(model)) + 1 > 5
    for circuit in circuits(model):
        assert (circuit.eps, circuit.ste, circuit.grad_scaling) == (1e-3, False, False)
        assert circuit.n_i == circuit.n_e // 8
    for layer in layers(model):
        assert (layer.neuron.tau, layer.neuron.threshold, layer.neuron.alpha) == (3.0, 0.7, 2.0)
    for kind in ("bn", "plain"):
        model = build(arch, width=0.1, kind=kind, tau=3.0, threshold=0.7, alpha=2.0, ei_ratio=8, eps=1e-3, ste=False)
        assert not circuits(model)
        assert all((n.tau, n.threshold, n.alpha) == (3, 0.7, 2) for n in (layer.neuron for layer in layers(model)))
    dann = build(arch, width=0.25, kind="dann", ei_ratio=8, eps=1e-3, grad_scaling=False)
    assert all(c.n_i == c.n_e // 8 or c.n_i == 1 for c in circuits(dann))
    assert all(c.eps == 1e-8 for c in circuits(dann))
    assert {type(c) for c in circuits(dann)[:-1]} == {DANNCircuit2d}
    assert all(isinstance(layer.neuron, torch.nn.ReLU) for layer in layers(dann))


def test_kinds_are_what_they_are_called():
    readout = dict(bn=torch.nn.Linear, plain=torch.nn.Linear)
    for kind, circuit in (("bn", torch.nn.Sequential), ("plain", torch.nn.Conv2d)):
        model = build("vgg8", plan=NARROW, kind=kind)
        assert all(type(layer.circuit) is circuit for layer in layers(model)) and type(model.readout) is readout[kind]
        assert model.readout.bias is not None
    assert build("vgg8", plan=NARROW).readout.readout


def test_a_layer_merges_time_into_the_batch():
    layer = Layer(EICircuit2d(2, 8, 3, stride=2, padding=1), LIF(tau=3.0))
    x = torch.rand(3, 5, 2, 7, 7)
    out = layer(x)
    assert out.shape == (3, 5, 8, 4, 4)
    current = torch.stack([layer.circuit(step) for step in x])
    torch.testing.assert_close(out, layer.neuron(current))


def test_the_logits_are_the_readout_averaged_over_time():
    model = build("vgg8", plan=[4, "P", 8, "P"], in_channels=1, T=3, n_classes=5)
    x = torch.rand(4, 3, 1, 32, 32)
    initialize(model, x)
    seen = []
    model.readout.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = model(x)
    features = seen[0].view(3, 4, -1)
    assert features.shape == (3, 4, 8 * 64)
    torch.testing.assert_close(logits, sum(model.readout(f) for f in features) / 3)
    spikes = x.transpose(0, 1)  # the chain by hand
    for stage in model.encoder.stages:
        spikes = stage(spikes)
    assert torch.equal(spikes.flatten(2), features) and spikes.shape == (3, 4, 8, 8, 8)
    # the order of the frames matters
    assert not torch.equal(model(x.flip(1)), logits)


def test_the_features_of_a_resnet_are_averaged_over_positions():
    model = build("resnet18", width=0.1, T=2)
    x, seen = torch.rand(2, 3, 32, 32), {}
    initialize(model, x)
    model.encoder.blocks.register_forward_hook(lambda _, __, out: seen.update(maps=out))
    model.readout.register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))
    model(x)
    assert seen["maps"].shape == (2, 2, 51, 4, 4)
    torch.testing.assert_close(seen["features"], seen["maps"].flatten(0, 1).flatten(2).mean(2))


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (6, 5), (3, 3)])
def test_pooling_is_the_mean_of_four(size):
    x = torch.randn(2, 3, 4, *size)
    out = AvgPool()(x)
    assert out.shape == (2, 3, 4, size[0] // 2, size[1] // 2)
    a, b = 2 * (size[0] // 2), 2 * (size[1] // 2)
    quarters = [x[..., i:a:2, j:b:2] for i in (0, 1) for j in (0, 1)]
    torch.testing.assert_close(out, sum(quarters) / 4)


def test_the_hook_of_the_docstring():
    model, seen = build("vgg8", plan=NARROW, T=2), []
    layers(model)[2].register_forward_hook(lambda layer, inputs, spikes: seen.append((inputs[0].shape, spikes.shape)))
    model(torch.rand(3, 3, 32, 32))
    assert seen == [((2, 3, 16, 8, 8), (2, 3, 32, 8, 8))]


def test_what_is_no_input_is_named():
    model = build("vgg8", plan=NARROW, T=2)
    x = torch.rand(2, 3, 32, 32)
    cases = [
        (x[0], "batch axis"),
        (x[:0], "empty"),
        ((255 * x).byte(), r"uint8.*/ 255"),
        (x.double(), "float64, but the network is torch.float32"),
        (x - 0.5, "negative values"),
        (torch.full_like(x, float("nan")), "not finite"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            model(wrong)
    build("vgg8", plan=NARROW, T=2, kind="bn")(x - 0.5)  # weights of any sign: it may be negative
    kept = x.clone()
    model(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("form", ["plain", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(dtype, form):
    model = build("vgg8", in_channels=1, n_classes=2, T=2, plan=[8, "P", 16, "P"])
    y = torch.arange(16) % 2
    x = torch.rand(16, 1, 32, 32) * 0.2
    x[y == 1, :, :16] += 0.7
    initialize(model, x)
    if form == "fast":
        assert not accelerate(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clamp_dale(model)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and all(p.isfinite().all() for p in model.parameters())
