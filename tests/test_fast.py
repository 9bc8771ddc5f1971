"""The fused forms equal the plain ones, and stand only for the text that this was shown for."""

import ast
import contextlib
import copy
import functools
import importlib
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn
from torch._functorch import config as functorch

import baselines
import ei_prop
import inhibition
import lif
from ei_init import initialize
from inhibition import EICircuit, EICircuit2d
from lif import LIF
from model import ARCHS, KINDS, AvgPool, Layer, Network, build, circuits, layers
from support import fast
from support.fast import FINGERPRINTS, FORMS, FastLIF, Recorded, accelerate, use_bfloat16
from support.measure import evaluate
from train import train_step

ROOT = Path(__file__).parents[1]
GPU = pytest.param("cuda", id="gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])
OLD = not hasattr(functorch, "force_non_lazy_backward_lowering")
COMPILES = pytest.mark.skipif(OLD, reason="this PyTorch makes no kernels")


def fused(module):
    """A copy in which every module has its fused form, whatever its text is."""
    module = copy.deepcopy(module)
    for m in module.modules():
        m.__class__ = FORMS.get(type(m), type(m))
    return module


def results(form, x):
    """The output of a module, dL/dx and dL/d of each parameter with a random dL/d output, and the running statistics.
    What is the same at each step is x[0], without a copy; its gradient is summed over time."""
    still = x.stride(0) == 0 and len(x) > 1
    leaf = (x[0] if still else x).detach().clone().requires_grad_()
    out = form(leaf.expand(x.shape) if still else leaf)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
    gradients = torch.autograd.grad(out, [leaf, *form.parameters()], grad, materialize_grads=True)
    return [out, *gradients, *(buffer.double() for buffer in form.buffers())]


def assert_equal(module, x):
    """Both forms from the same input, in float64: so a spike that rounding flips does not spread to other layers."""
    found, wanted = results(fused(module), x), results(module, x)
    assert wanted[0].isfinite().all() and wanted[1].isfinite().all()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * b.square().mean().sqrt().item() + 1e-12)
    return wanted[0].any().item()


@torch.no_grad()
def varied(model):
    """Parameters of which no two are equal, for that would hide differences. Some neurons fire without input, and some
    synapses are 0, as after `clamp_dale`, so that I_div is 0 where I_EE differs from I_sub."""
    for p in model.parameters():
        p.mul_(0.5 + torch.rand_like(p)) if p.any() else p.uniform_(-0.5, 1.5)
    for circuit in circuits(model):
        circuit.w_ei.div_(circuit.w_ei.sum(1, keepdim=True))
        if circuit.eps != 1e-8:  # by which a current of that size would be divided, and hide all others
            circuit.w_ei[0] = 0
            circuit.w_ie[:, 0] = 0
    return model


@torch.no_grad()
def inputs_of(model, batch):
    """The input of each module that has a fused form: {module: x}."""
    found = {}
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, args: found.update({module: args[0]}))
    model(batch)
    hook.remove()
    return {module: x for module, x in found.items() if type(module) in (*FORMS, Network)}


def largest(i_div):
    found = i_div.amax(tuple(range(1, i_div.dim())), keepdim=True)
    return torch.where(found > 0, found, torch.inf)


# Pooling of odd sizes, 11 -> 5 -> 2; at the end maps of 2x2. A ResNet has strides of 2 and 1x1 kernels, also there.
SIZES = dict(mlp=dict(plan=[12, 8], image_size=5), vgg8=dict(plan=[5, "P", 8, "P", 9], image_size=11))
SIZES["resnet18"] = dict(width=0.08, image_size=5)
OPTIONS = [dict(frames=True), dict(T=1), dict(eps=1e-8), dict(eps=1e-3), dict(eps=1e-3, ste=False), dict(ste=False)]
OPTIONS += [dict(grad_scaling=False), dict(ei_ratio=8), dict(ei_ratio=1000), dict(tau=1.0), dict(eps="largest")]
OPTIONS += [dict(tau=5.0, threshold=0.3, alpha=1.0), dict(eps="largest", ste=False, frames=True)]
OPTIONS += [dict(kind="homeostasis", **eps) for eps in (dict(eps=1e-3), dict(eps="largest"), dict(ste=False))]
CASES = [(arch, dict(kind=kind)) for arch in ARCHS for kind in KINDS]
CASES += [(arch, options) for arch in SIZES for options in OPTIONS] + [("vgg8", dict(kind="bn", frames=True))]


NOT_COMPILED = {fast.spikes: fast.spikes, fast.halved: fast.halved}  # the text of the kernels runs as it is


@DEVICES
@pytest.mark.parametrize("kernels", [{}, NOT_COMPILED], ids=["by hand", "not compiled"])
@pytest.mark.parametrize("arch, options", CASES, ids=str)
def test_fused_equals_plain(arch, options, kernels, device, monkeypatch):
    if kernels and arch not in SIZES:
        pytest.skip("its layers are those of the others")
    monkeypatch.setattr(fast, "KERNELS", {device: kernels} if kernels else {})
    monkeypatch.setitem(ei_prop.STABILIZERS, "largest", largest)
    options = SIZES.get(arch, dict(width=0.02)) | dict(T=3, in_channels=2) | options
    frames = options.pop("frames", False)
    model = build(arch, **options).double().to(device)
    batch = torch.rand(4, *[model.T] * frames, 2, model.image_size, model.image_size).double().to(device)
    varied(model)
    batch[0] = 0  # a silent sample, and silent positions
    batch[1, ..., :4] = 0
    alive = []
    for module, x in inputs_of(model, batch).items():
        if isinstance(module, EICircuit):
            x = x * (0.5 + torch.rand_like(x))  # spikes give many positions the same I_div: without STE, they would tie
            x[0], x[1, ..., : x.shape[-1] // 2] = 0, 0
        if isinstance(module, EICircuit | LIF | AvgPool) or options.get("ste", True):
            alive.append(assert_equal(module, x))
    assert sum(alive) > 0.7 * len(alive)


@pytest.mark.slow
@COMPILES
@DEVICES
def test_what_is_compiled_equals_plain(device, monkeypatch, capsys):
    if device == "cpu" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(fast, "KERNELS", {})
    fast.compile_on(device)
    still, frames = dict(kind="ei", width=0.1), dict(kind="bn", plan=[5, "P", 8])
    for options, shape in ((still, (3, 3, 32, 32)), (frames, (3, 4, 3, 32, 32))):
        model = varied(build("vgg8", **options).double().to(device))
        batch = torch.rand(shape, device=device).double()
        batch[0], batch[1, ..., :9] = 0, 0  # a silent sample, and silent positions
        assert assert_equal(model, batch)
        with torch.inference_mode():
            torch.testing.assert_close(fused(model.eval())(batch), model(batch))
    layer, x = layers(varied(build("vgg8", plan=[5, "P", 8]).to(device)))[1], torch.rand(4, 3, 5, 16, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = results(fused(layer), x.round())
        assert fast.KERNELS.pop(device) and not capsys.readouterr().out
        for a, b in zip(found, results(fused(layer), x.round()), strict=True):
            assert relative_error(a.double(), b.double()) < 0.05 and b.any()


def broken(function, **options):
    raise RuntimeError("no Triton")


def other(function, **options):
    return lambda *args: 1.1 * function(*args)


def broken_later(function, **options):
    return lambda *args: broken(function)


class BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return broken(None)


def broken_backward(function, **options):
    return lambda *args: BrokenBackward.apply(function(*args))


COMPILERS = [(broken, "RuntimeError"), (broken_later, "RuntimeError"), (other, "they give other results")]
COMPILERS += [(broken_backward, "RuntimeError")]


@COMPILES
def test_the_backward_pass_is_compiled_with_the_forward_one(monkeypatch):
    def compiler(function, **options):
        return lambda: functorch.force_non_lazy_backward_lowering

    monkeypatch.setattr(torch, "compile", compiler)
    assert fast.kernel_of(len, "cpu")() and not functorch.force_non_lazy_backward_lowering


@pytest.mark.parametrize("compiler, why", COMPILERS)
def test_without_a_compiler_that_works_one_line_says_so(compiler, why, monkeypatch, capsys):
    monkeypatch.setattr(fast, "KERNELS", {})
    monkeypatch.setattr(torch, "compile", compiler)
    fast.compile_on("cpu")
    said = capsys.readouterr().out
    why = "AttributeError" if OLD else why
    assert f"makes no kernels here ({why}): gain control" in said and said.count("\n") == 1
    assert fast.KERNELS == {"cpu": {}}


@DEVICES
def test_bfloat16(device):
    """Spikes and zeros of I_div are exact. All else is that of 32 bits within what 16 bits round away."""
    model = build("vgg8", width=0.2).to(device)
    batch = torch.rand(4, 3, 32, 32, device=device)
    batch[0], batch[1, ..., :9] = 0, 0  # a silent sample, and silent positions
    initialize(model, batch)
    use_bfloat16(model)
    inputs = {module: x for module, x in inputs_of(model, batch).items() if isinstance(module, EICircuit | LIF)}
    accelerate(model)
    for module, x in inputs.items():
        high = results(module, x)
        with torch.autocast(device, torch.bfloat16):
            low = results(module, x)
        assert relative_error(low[0], high[0]) < 0.02
        for a, b in zip(low[1:], high[1:], strict=True):
            assert (a - b).norm() <= 0.1 * b.norm()
        if isinstance(module, LIF):  # the membrane has 32 bits
            assert low[0].dtype == torch.bfloat16 and torch.equal(low[0].float(), high[0]) and high[0].any()
        elif not module.readout:
            assert low[0].dtype == torch.float32
            silent = module.currents(x)["i_ee"] == 0
            assert silent.any() and torch.equal(low[0][silent], high[0][silent])  # b_E
    counted = []
    for layer in layers(model):
        layer.register_forward_hook(lambda _, x, spikes: counted.append(spikes.double().mean().item()))
    _, _, rates = evaluate(model, (batch * 255).byte(), torch.arange(4, device=device))
    assert rates == pytest.approx(counted, rel=1e-5) and min(rates) > 0
    assert {p.dtype for p in model.parameters()} == {model(batch).dtype} == {torch.float32}


@pytest.mark.parametrize("flags, lines", [("flags : avx512_bf16", 0), ("Features : i8mm bf16", 0), ("flags : avx2", 1)])
def test_a_processor_without_bfloat16_is_told(flags, lines, monkeypatch, capsys):
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: flags)
    use_bfloat16(build("mlp"))
    assert capsys.readouterr().out.count("\n") == lines


def trained(recorded, device="cpu", steps=8):
    """The parameters of a small network after some steps with a changing learning rate, and what each step gave."""
    torch.manual_seed(0)
    model = build("vgg8", width=0.1, T=2).to(device)
    x, y = torch.rand(steps, 8, 3, 32, 32).to(device), torch.randint(10, (steps, 8)).to(device)
    initialize(model, x[0])
    accelerate(model, compiled=True)
    optimizer = torch.optim.SGD([dict(params=[p], lr=0.1) for p in model.parameters()], momentum=0.9, fused=True)
    step, gave = recorded(train_step), []
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (i + 1)
        gave += [value.clone() for value in step(model, optimizer, x[i], y[i], 1.0)]
    assert {type(group["lr"]) for group in optimizer.param_groups} == {float}
    return [*model.parameters(), *gave]


class Emulated(Recorded):
    """Recording as on a GPU: what is recorded does not run, only what is replayed. `fault`: what goes wrong in it."""

    fault = ""

    def record(self, network, optimizer, x, y, *more):
        self.optimizer, self.run = optimizer, lambda: self.step(network, optimizer, self.x, self.y, *more)
        self.state = [*network.parameters(), *(value["momentum_buffer"] for value in optimizer.state.values())]
        return super().record(network, optimizer, x, y, *more)

    @contextlib.contextmanager
    def recording(self, graph):
        assert all(type(group["lr"]) is torch.Tensor for group in self.optimizer.param_groups)
        before = [value.clone() for value in self.state]
        yield
        torch._foreach_copy_(self.state, before)
        if self.fault == "error":
            raise RuntimeError("operation not permitted\nmore")

    def play(self):
        fast.set_rates(self.optimizer, [rate.item() * (1.5 if self.fault == "other" else 1) for rate in self.rates])
        with torch.enable_grad():
            torch._foreach_copy_(self.out, list(self.run()))


@pytest.mark.parametrize("fault, said", [("", ""), ("error", "(operation not"), ("other", "(it gives")])
def test_a_recorded_step_is_the_step(fault, said, monkeypatch, capsys):
    made = []

    def recorded(step):
        made.append(Emulated(step))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=made[0].play))
        monkeypatch.setattr(torch.cuda, "graph", made[0].recording)
        return made[0]

    monkeypatch.setattr(Emulated, "fault", fault)
    for found, wanted in zip(trained(recorded), trained(lambda step: step), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == bool(said) and (made[0].graph is None) == bool(said)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernels", [{}, {"cuda": {}}], ids=["compiled", "by hand"])
def test_a_recorded_step_on_a_gpu(kernels, monkeypatch, capsys):
    monkeypatch.setattr(fast, "KERNELS", kernels)
    for found, wanted in zip(trained(Recorded, "cuda"), trained(lambda step: step, "cuda"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert not capsys.readouterr().out


@DEVICES
@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("tau, threshold, alpha", [(1.0, 0.5, 4.0), (2.0, 1.0, 4.0), (5.0, 0.8, 1.5)])
def test_lif(tau, threshold, alpha, T, still, device):
    exact = torch.linspace(-2, 2, 257, device=device) * threshold  # also potentials exactly on the threshold
    for x in (exact, 3 * torch.randn(2, 4, 5, 3, device=device).transpose(1, 3)):
        x = x.double().expand(T, *x.shape) if still else torch.stack([x.double()] * T)
        assert_equal(LIF(tau, threshold, alpha), x)
        assert torch.equal(FastLIF(tau, threshold, alpha)(x), LIF(tau, threshold, alpha)(x))


@pytest.mark.parametrize("arch", SIZES)
def test_a_still_image_passes_the_first_circuit_once(arch):
    for kind in ("ei", "plain", "dann"):  # in BN-SNN the variance counts every time step
        model = fused(build(arch, kind=kind, T=3, **SIZES[arch]))
        first, sizes, x = layers(model)[0], [], torch.rand(5, 3, model.image_size, model.image_size)
        see = functools.partial(lambda c, s, m, args: s.append(len(args[0])) if m is c else None, first.circuit, sizes)
        with nn.modules.module.register_module_forward_pre_hook(see):
            model(x), model(x[:, None].repeat(1, 3, 1, 1, 1))
            first.neuron = nn.Hardtanh(inplace=True)  # it writes into its input, at each time step
            model(x)
        assert sizes == [5, 15, 15]


OWN = dict(  # what a student may change in a layer
    nothing=lambda layer: None,
    hook=lambda layer: layer.circuit.register_forward_hook(lambda *_: None),
    gradient=lambda layer: layer.circuit.register_full_backward_pre_hook(lambda *_: None),
    circuit=lambda layer: setattr(layer.circuit, "__class__", type("Noisy", (type(layer.circuit),), {})),
    function=lambda layer: setattr(layer.circuit, "noise", torch.randn),
    neuron=lambda layer: setattr(layer, "neuron", nn.ReLU(inplace=True)),
    stabilizer=lambda layer: setattr(layer.circuit, "eps", "largest"),
)


@pytest.mark.parametrize("own", OWN)
def test_a_layer_with_something_of_a_student_runs_plain(own, monkeypatch):
    monkeypatch.setitem(ei_prop.STABILIZERS, "largest", largest)
    model, seen = fused(build("vgg8", width=0.1, kind="bn")), []
    OWN[own](layer := layers(model)[0])
    assert fast.is_usual(layer) == (own == "nothing")
    use_bfloat16(model)
    layer.neuron.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    model(torch.rand(2, 3, 32, 32))
    assert seen == [torch.float32]  # the membrane, also then


def test_what_the_fused_forms_cannot_do_is_an_error():
    """Second derivatives and torch.func: the backward passes are written by hand."""
    cases = [(LIF(), torch.rand(3, 4)), (EICircuit(12, 8), torch.rand(4, 12))]
    for plain, x in [*cases, (EICircuit2d(3, 8, 3), torch.rand(4, 3, 6, 6))]:
        form = fused(plain)
        with pytest.raises(RuntimeError, match="first derivatives only; for second ones do not call accelerate"):
            torch.autograd.grad(form(x.requires_grad_()).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda x, form=form: form(x).square().sum())(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", SIZES)
def test_accelerate_changes_nothing_but_the_forms(arch, kind, capsys):
    model = build(arch, kind=kind, T=2, **SIZES[arch]).eval()
    for m in model.modules():
        m.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))  # so it needs no memory
    before, ids, random = copy.deepcopy(model), list(map(id, model.parameters())), torch.get_rng_state()
    assert accelerate(model) == set() and not capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), random) and not model.training
    assert list(map(id, model.parameters())) == ids
    for (name, value), (same_name, kept) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert name == same_name and torch.equal(value, kept)
    assert not any(type(m) in FORMS for m in copy.deepcopy(model).modules())


def test_prove_it_and_renew_the_fingerprint():
    found = {}
    for thing in (*FORMS, ei_prop.STABILIZERS["adaptive"]):
        found |= fast.functions_of(thing, "")
    now = {name: fast.fingerprint(function) for name, function in found.items()}
    changed = [name for name in sorted({*now, *FINGERPRINTS}) if now.get(name) != FINGERPRINTS.get(name)]
    lines = [f"    {name} {now[name]}" if name in now else f"    {name} is gone" for name in changed]
    assert not changed, (
        f"{', '.join(changed)} changed. Adapt the fused form in support/fast.py until the tests of this file that "
        "compare both forms pass (test_fused_equals_plain, test_lif, here and on a GPU). Then put into FINGERPRINTS:\n"
        + "\n".join(lines)
    )


CONV, DANN = {"EICircuit2d", "DANNCircuit2d", "HomeostaticCircuit2d"}, {"DANNCircuit", "DANNCircuit2d"}
EI = {"EICircuit", "EICircuit2d", "HomeostaticCircuit", "HomeostaticCircuit2d"}


def left_plain(fast, capsys, change=lambda modules: None):
    """What `accelerate` prints for one module of each class, and which of them stay plain."""
    make = {form.__name__: form for form in fast.FORMS}
    sizes = dict(LIF=(), AvgPool=(), Layer=(nn.Identity(), nn.Identity()), EICircuit=(3, 8), DANNCircuit=(3, 8))
    modules = nn.ModuleList([form(*sizes.get(name, (3, 8, 3))) for name, form in make.items()])
    change(modules)
    fast.accelerate(modules)
    plain = {type(m).__name__ for m in modules if not isinstance(m, tuple(fast.FORMS.values()))}
    return capsys.readouterr().out, plain


def says(file, function):
    return f"{file}.py: {function} is not the text that support/fast.py was written for, so the plain form runs\n"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A function: edits a copy of the concept files, and gives `support.fast` as it is loaded with them."""

    def load(edit):
        for name in fast.CONCEPTS:
            text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
            (tmp_path / f"{name}.py").write_text(edit(name, text), encoding="utf-8")
        for name in [*sys.modules]:
            if name.partition(".")[0] in {"support", *fast.CONCEPTS}:
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module("support.fast")

    return load


# file, function, text, its replacement, what stays plain
EDITS = [
    ("lif", "simulate", ") + i_t  #", ") + i_t; u = u.clamp(min=-5)  #", {"LIF"}),
    ("ei_prop", "<lambda>", '"adaptive": smallest_positive', '"adaptive": lambda i_div: i_div + 1', EI),
    ("inhibition", "EICircuit.currents", "i_int=i_int)", "i_int=i_int.clamp(-10, 10))", EI | DANN),
    ("inhibition", "EICircuit2d", "2d(EICircuit):", "2d(EICircuit, __import__('contextlib').ContextDecorator):", CONV),
    ("baselines", "DANN.__init__", "0.5 * math.log(", "math.log(", DANN),
    ("model", "Layer.forward", "return self.neuron(", "return 2 * self.neuron(", {"Layer"}),
    ("model", "AvgPool.forward", "F.avg_pool2d(", "F.max_pool2d(", {"AvgPool"}),
]


@pytest.mark.parametrize("file, function, old, new, plain", EDITS)
def test_an_edit_of_a_file_is_named_and_stays_plain(file, function, old, new, plain, copied, capsys, tmp_path):
    edited = copied(lambda name, text: text.replace(old, new) if name == file else text)
    assert (tmp_path / f"{file}.py").read_text(encoding="utf-8").count(new) == 1
    assert left_plain(edited, capsys) == (says(file, function), plain)
    shutil.copy(ROOT / f"{file}.py", tmp_path)  # changed back on disk, but what is loaded is the edited one
    assert left_plain(edited, capsys) == (says(file, function), plain)


def test_comments_docstrings_and_layout_change_nothing(copied, capsys):
    def edit(name, text):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body[: ast.get_docstring(node) is not None] = [ast.Expr(ast.Constant("other words"))]
        return ast.unparse(tree).replace("):\n", "):  # type: int\n\n")

    assert left_plain(copied(edit), capsys) == ("", set())


def wrapped(function):
    return functools.wraps(function)(lambda *args: function(*args))


def unreadable():
    space = {}
    exec("def function(x, *_):\n    return 0 * x", space)
    return space["function"]


# place, name, what stands there from now on (None: nothing), what is named, what stays plain
AT_RUN_TIME = [
    (inhibition, "divide", lambda current, *_: current, "inhibition.divide", EI | DANN),
    (inhibition, "divide", functools.partial(ei_prop.divide, ste=False), "inhibition.divide", EI | DANN),
    (baselines, "scale_gradient", lambda w, _: w, "baselines.scale_gradient", DANN),
    (EICircuit, "currents", lambda self, x: dict(i_int=x), "inhibition.EICircuit.currents", EI | DANN),
    (EICircuit2d, "lateral", functools.partialmethod(torch.mul), "inhibition.EICircuit2d.lateral", CONV),
    (EICircuit2d, "is_reached", None, "inhibition.EICircuit2d.is_reached", CONV),
    (lif, "simulate", wrapped(lif.simulate), "lif.simulate", {"LIF"}),
    (lif, "Spike", types.SimpleNamespace(apply=lambda u, *_: u.sigmoid()), "lif.Spike", {"LIF"}),
    (lif.Spike, "backward", staticmethod(wrapped(lif.Spike.backward)), "lif.Spike.backward", {"LIF"}),
    (LIF, "forward", lambda self, current: current, "lif.LIF.forward", {"LIF"}),
    (Layer, "forward", wrapped(Layer.forward), "model.Layer.forward", {"Layer"}),
]


@pytest.mark.parametrize("place, name, value, named, plain", AT_RUN_TIME)
def test_what_is_put_in_at_run_time_is_named_and_stays(place, name, value, named, plain, monkeypatch, capsys):
    if value is None:
        monkeypatch.delattr(place, name)
    else:
        monkeypatch.setattr(place, name, value, raising=False)
    assert left_plain(fast, capsys) == (says(*named.split(".", 1)), plain)


@pytest.mark.parametrize("value", [torch.relu, F.relu, functools.partial(torch.amax, dim=1), lambda i: i, unreadable()])
def test_another_adaptive_value_stays_plain(value, monkeypatch, capsys):
    monkeypatch.setitem(ei_prop.STABILIZERS, "adaptive", value)
    assert left_plain(fast, capsys) == (says("ei_prop", "STABILIZERS"), EI)


OF_ONE = [("EICircuit", "forward", lambda x: x), ("EICircuit", "is_reached", types.MethodType(len, 1))]
OF_ONE += [("EICircuit", "forward", functools.partial(torch.relu)), ("EICircuit2d", "lateral", unreadable())]
OF_ONE += [("LIF", "tau", nn.Parameter(torch.tensor(2.0))), ("LIF", "threshold", torch.rand(8))]
OF_ONE += [("LIF", "alpha", torch.rand(8)), ("EICircuit", "eps", torch.tensor(0.1))]


@pytest.mark.parametrize("kind, name, value", OF_ONE)
def test_a_module_with_a_function_or_a_tensor_of_its_own_stays_plain(kind, name, value, capsys):
    """E.g. a time constant that learns, or another threshold for each neuron."""

    def change(modules):
        (module,) = (m for m in modules if type(m).__name__ == kind)
        vars(module).pop(name, None)
        setattr(module, name, value)

    assert left_plain(fast, capsys, change) == (says(dict(LIF="lif").get(kind, "inhibition"), f"{kind}.{name}"), {kind})


def test_a_subclass_stays_plain(capsys):
    class Mine(EICircuit2d):
        pass

    text, plain = left_plain(fast, capsys, lambda modules: modules.append(Mine(3, 8, 3)))
    assert plain == {"Mine"} and text.count("\n") == 1 and text.startswith("inhibition.py: EICircuit2d ")
