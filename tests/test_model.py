import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize, prune

from baselines import DANNCircuit2d
from ei_init import initialize
from inhibition import EICircuit, EICircuit2d, clamp_dale
from model import ARCHS, KINDS, PLANS, AvgPool, build, circuits, layers
from support.fast import accelerate

NARROW = [16, "P", 16, "P", 32, "P", 32, "P", 32, "P"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_builds_initialises_and_takes_a_step(arch, kind):
    model = build(arch, in_channels=2, T=2, kind=kind, width=0.25)
    x = torch.rand(2, 2, 32, 32)
    initialize(model, x)
    logits = model(x)
    assert logits.shape == (2, 10) and logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    clamp_dale(model)
    assert all(p.grad is not None for p in model.parameters())
    for circuit in circuits(model):
        assert all((p >= 0).all() for name, p in circuit.named_parameters() if name not in ("b_e", "alpha"))


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
    sizes = zip(layers(model), (98, 500, 500), strict=True)
    assert [layer.circuit(torch.rand(6, n)).shape[1] for layer, n in sizes] == [500, 500, 300]
    assert model(x).shape == (6, 5) and len(circuits(model)) == (0 if kind in ("bn", "plain") else 4)
    torch.testing.assert_close(model.eval()(x), model(x.unsqueeze(1).repeat(1, 4, 1, 1, 1)))
    assert [n for n in circuits(build("mlp", plan=[20, 12], width=0.5)) if not n.readout][1].w_ee.shape == (6, 10)


def test_resnet_adds_the_spikes_of_a_block_to_its_identity():
    model, x, seen = build("resnet18", T=2, width=0.5), torch.rand(4, 3, 32, 32), {}
    initialize(model, x)
    block = model.encoder.blocks[2]  # the first with a shortcut layer: 1x1, stride 2
    assert block.shortcut.circuit.w_ee.shape == (64, 32, 1, 1) and block.shortcut.circuit.stride == 2
    block.conv2.register_forward_hook(lambda _, __, s: seen.update(spikes=s))
    block.shortcut.register_forward_hook(lambda _, __, s: seen.update(shortcut=s))
    block.register_forward_hook(lambda _, __, s: seen.update(out=s))
    block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    same = model.encoder.blocks[3]  # no change of shape: the identity itself
    same.conv2.register_forward_hook(lambda _, __, s: seen.update(second=s))
    same.register_forward_hook(lambda _, __, s: seen.update(after=s))
    model.encoder.blocks.register_forward_hook(lambda _, __, s: seen.update(last=s))
    model.readout.register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))
    model(x)
    assert torch.equal(seen["out"], seen["spikes"] + seen["shortcut"]) and seen["spikes"].any()
    assert seen["x"].shape == (2, 4, 32, 32, 32) and seen["out"].shape == (2, 4, 64, 16, 16)
    assert same.shortcut is None and torch.equal(seen["after"], seen["second"] + seen["out"])
    assert (torch.autograd.grad((seen["after"] - seen["second"]).sum(), seen["out"])[0] - 1).abs().max() < 1e-3
    assert seen["after"].max() > 1 and torch.equal(seen["after"], seen["after"].round())  # a whole number
    assert torch.equal(seen["shortcut"], block.shortcut(seen["x"])) and seen["last"].shape == (2, 4, 256, 4, 4)
    torch.testing.assert_close(seen["features"], seen["last"].flatten(0, 1).flatten(2).mean(2))  # over positions


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_frame_at_each_step(kind):
    model = build("vgg8", plan=NARROW, kind=kind)
    x = torch.rand(4, 3, 32, 32)
    initialize(model, x)
    model.train(kind != "homeostasis")  # whose slow averages move in a pass of training
    torch.testing.assert_close(model(x), model(x.unsqueeze(1).repeat(1, 4, 1, 1, 1)))


ARCH_OR_KIND = "^arch is one of .*vgg8, .* and kind one of ei, bn, plain, dann, homeostasis, not "
SIZES = "^in_channels, n_classes, T and image_size are at least 1, and width is positive"
PLAN = "^a plan is a list of layer sizes, of a VGG also of P, not "


@pytest.mark.parametrize("options, message", [
    (dict(arch="vgg9"), ARCH_OR_KIND + "'vgg9', 'ei'$"),
    (dict(kind="ln"), ARCH_OR_KIND + "'vgg8', 'ln'$"),
    (dict(image_size=31), "^images of 31x31 pixels are too small for this network's poolings$"),
    (dict(image_size=16, plan=[16, "P"] * 5), "^images of 16x16 pixels are too small for this network's poolings$"),
    *[(dict(arch="mlp", plan=plan), PLAN + re.escape(str(plan))) for plan in ([30, "P"], [0], [True], [], 5, [2.0])],
    *[(dict(plan=plan), PLAN + re.escape(str(plan))) for plan in (["P"], "64 P", [8, "p"], [8, -1])],
    (dict(arch="resnet18", plan=[8, "P", 8, 8]), PLAN),
    *[({name: value}, SIZES) for name in ("in_channels", "n_classes", "T", "image_size") for value in (0, -2)],
    *[(dict(width=width), SIZES) for width in (0, -1.0, float("nan"))],
    (dict(tau=0.5), "^lif: tau must be at least 1"),
    (dict(kind="bn", threshold=0), "^lif: .* threshold=0"),
    (dict(alpha=-1), "^lif: .* alpha=-1"),
    (dict(ei_ratio=0), "^a circuit needs sizes of at least 1"),
    (dict(kind="dann", ei_ratio=0), "^a circuit needs sizes of at least 1"),
    (dict(eps=-1), "^eps is a positive number"),
])  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        build(**dict(arch="vgg8") | options)


def test_refuses_an_option_that_it_does_not_know():
    with pytest.raises(TypeError, match=r"^build has no option 'treshold'$"):
        build("vgg8", kind="bn", treshold=1.0)


X = torch.rand(2, 3, 32, 32)
SHAPES = [torch.rand(2, 3, 64, 64), torch.rand(2, 1, 32, 32), X[0], X[..., 1:], X[:, :, 1:], X[None, None], X[:0]]
SHAPES += [torch.rand(2, 5, 3, 32, 32), torch.rand(0, 4, 3, 32, 32), torch.tensor(1.0)]
CASES = [(x, r"the network takes images \(B, .* or frames .* not " + re.escape(str(tuple(x.shape)))) for x in SHAPES]
CASES += [((255 * X).byte(), r"the images are torch.uint8: give intensities in \[0, 1\], e.g. images.float\(\) / 255")]
CASES += [
    (wrong, "the images have values that are negative.*, or not finite") for wrong in (X - 0.5, X / 0, torch.nan * X)
]


@pytest.mark.parametrize("wrong, message", CASES)
def test_what_is_no_input_is_named(wrong, message):
    model = build("vgg8", plan=NARROW)
    with pytest.raises(ValueError, match=f"^{message}"):
        model(wrong)
    if "finite" in message:
        build("vgg8", plan=NARROW, kind="bn")(wrong)  # weights of any sign: the images may be negative


def test_the_plans_are_those_of_the_paper():
    design = dict(
        mlp="500 500 300",
        vgg8="64 P 128 P 256 P 512 P 512 P",
        vgg11="64 P 128 P 256 256 P 512 512 P 512 512 P",
        vgg16="64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512 P",
        vgg19="64 64 P 128 128 P 256 256 256 256 P 512 512 512 512 P 512 512 512 512 P",
    )
    assert PLANS["resnet18"] == [64, 128, 256, 512]
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
    assert [c.n_e for c in circuits(model)] == [*[64] * 5, *[128] * 5, *[256] * 5, *[512] * 5, 10]
    assert [c.stride for c in circuits(model)[:-1]] == [1] * 5 + [2, 1, 2, 1, 1] * 3
    assert [c.w_ee.shape[-1] for c in circuits(model)[:-1]] == [3] * 5 + [3, 3, 1, 3, 3] * 3
    assert [c.padding for c in circuits(model)[:-1]] == [1] * 5 + [1, 1, 0, 1, 1] * 3
    assert [block.shortcut is None for block in model.encoder.blocks] == [True, True] + [False, True] * 3
    assert model.readout.w_ee.shape == (10, 512)


def test_width_multiplies_the_maps_and_leaves_at_least_4():
    with torch.device("meta"):
        for arch, width, maps in (
            ("vgg8", 0.5, [32, 64, 128, 256, 256]),
            ("vgg8", 0.01, [4, 4, 4, 5, 5]),
            ("vgg8", 2, [128, 256, 512, 1024, 1024]),
            ("vgg8", 0.12, [8, 15, 31, 61, 61]),
        ):
            model = build(arch, width=width)
            assert [c.n_e for c in circuits(model)] == [*maps, 10]
        assert [c.n_e for c in circuits(build("resnet18", plan=[8, 16], width=0.4))] == [*[4] * 5, *[6] * 5, 10]
        assert build("resnet18", width=0.5).readout.fan_in == 256
        assert [c.n_e for c in circuits(build("vgg8", plan=[8, "P", 20], width=0.5))] == [4, 10, 10]
        assert [c.n_e for c in circuits(build("vgg8", plan=[2, "P", 3]))] == [2, 3, 10]  # a plan is taken as it is


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
        model = build(arch, width=0.1, kind=kind, **options)
        assert not circuits(model)
        assert all((n.tau, n.threshold, n.alpha) == (3, 0.7, 2) for n in (layer.neuron for layer in layers(model)))
    dann = build(arch, width=0.25, kind="dann", **options)
    assert all((c.n_i, c.eps) == (max(1, c.n_e // 8), 1e-8) for c in circuits(dann))
    assert {type(c) for c in circuits(dann)[:-1]} == {DANNCircuit2d}
    assert all(isinstance(layer.neuron, torch.nn.ReLU) for layer in layers(dann))


def test_kinds_are_what_they_are_called():
    for kind, circuit in (("bn", torch.nn.Sequential), ("plain", torch.nn.Conv2d)):
        model = build("vgg8", plan=NARROW, kind=kind)
        assert all(type(layer.circuit) is circuit for layer in layers(model))
        assert type(model.readout) is torch.nn.Linear and model.readout.bias is not None


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


def test_the_hook_of_the_docstring():
    model, seen = build("vgg8", plan=NARROW, T=2), []
    layers(model)[2].register_forward_hook(lambda layer, inputs, spikes: seen.append((inputs[0].shape, spikes.shape)))
    model(torch.rand(3, 3, 32, 32))
    assert seen == [((2, 3, 16, 8, 8), (2, 3, 32, 8, 8))]


# ---- what PyTorch offers, on a plain network and an accelerated one --------------------------------------------------


def small(form, n=6):
    model, x = build("vgg8", in_channels=1, n_classes=2, T=2, image_size=8, plan=[8, "P", 16]), torch.rand(n, 1, 8, 8)
    initialize(model, x)
    assert form == "plain" or not accelerate(model)
    return model, x


FORMS = pytest.mark.parametrize("form", ["plain", "fast"])


@FORMS
def test_gradients_of_the_image_and_of_some_parameters_only(form):
    model, x = small(form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x.requires_grad_()).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert x.grad.any()
    for frozen in ("w_ee", "w_ie", "w_ei", "g_i", "g_e", "b_e"):
        model.zero_grad()
        getattr(layers(model)[1].circuit, frozen).requires_grad_(False)
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, wanted[name], atol=1e-6) if p.requires_grad else p.grad is None, name
        model.requires_grad_(True)


@FORMS
def test_pruned_and_parametrized_weights(form):
    model, x = small(form)
    first, second = (layer.circuit for layer in layers(model))
    prune.l1_unstructured(first, "w_ee", amount=0.5)
    parametrize.register_parametrization(second, "w_ee", torch.nn.ReLU())
    logits = model(x)
    accelerate(model)  # the pruned one; the other is of a class of its own
    assert type(first).__name__ == "FastCircuit2d"
    torch.testing.assert_close(model(x), logits)
    logits.sum().backward()
    assert (first.w_ee_orig.grad == 0).float().mean() >= 0.5 and first.w_ee_orig.grad.any()
    assert second.parametrizations.w_ee.original.grad.any()


@pytest.mark.slow
def test_torch_compile():
    model, x = small("plain")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)


def test_torch_func():
    model, x = small("plain")
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, sample[None]).square().sum()

    torch.testing.assert_close(torch.func.vmap(lambda sample: model(sample[None])[0])(x), model(x))
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad, rtol=1e-3, atol=1e-4)
