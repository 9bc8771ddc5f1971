"""Fused forms of the plain equations: the same results with fewer operations. A reader of the paper may skip this file.

`accelerate(model, batch)` puts the fused forms in place of the plain ones, after it has compared the two: every output
and every gradient, module by module. The plain form is the truth. Whoever edits `lif.py` or `inhibition.py` trains what
they wrote: where the fused form computes something else, one line says so and the plain form stays.

What is fused:
- LIF: one loop over time, its backward pass written out; only u is kept for it.
- circuit: I_EE - I_sub = (W_EE - W_EI W_IE) * x, for s_I is linear in x: one kernel with a sign in place of two
  products. One convolution serves both populations. The division and b_E are one function with its gradients written
  out.
- a 3x3 convolution of 2x2 maps, with which a VGG ends, as one matrix product.
- a still image passes the first circuit once, not T times.
- average pooling that does not keep its input, the spikes of a layer, for the backward pass.
- channels last in memory, which is fastest for convolutions on CPUs and GPUs.
"""

import copy
import ctypes
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import ei_prop
from baselines import DANN, DANNCircuit, DANNCircuit2d
from inhibition import EICircuit, EICircuit2d
from lif import LIF
from model import MLP, AvgPool, Layer, Network
from support.measure import hooked

# ---- the LIF neuron --------------------------------------------------------------------------------------------------


class _LIF(torch.autograd.Function):
    """dL/du[t] = dL/ds[t] ds/du[t] + (1 - 1/tau) dL/du[t+1],  dL/dI[t] = dL/du[t]."""

    @staticmethod
    def forward(ctx, current, tau, threshold, alpha):
        leak = 1 - 1 / tau
        step = torch.empty_like(current[0])  # its layout in memory is kept, also where `current` is expanded over time
        u = current.new_empty_strided(current.shape, (step.numel(), *step.stride()))
        spikes = torch.empty_like(u)
        for t in range(current.shape[0]):
            if t == 0:
                u[0].copy_(current[0])
            else:
                torch.sub(u[t - 1], spikes[t - 1], alpha=threshold, out=u[t])
                torch.add(current[t], u[t], alpha=leak, out=u[t])
            torch.ge(u[t], threshold, out=spikes[t])
        ctx.save_for_backward(u)
        ctx.leak, ctx.threshold, ctx.alpha = leak, threshold, alpha
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes):
        (u,) = ctx.saved_tensors
        grad = torch.sub(u, ctx.threshold).mul_(ctx.alpha).sigmoid_()  # sigma; then dL/ds ds/du in its place
        torch.ops.aten.sigmoid_backward.grad_input(grad_spikes, grad, grad_input=grad)
        grad.mul_(ctx.alpha)
        for t in reversed(range(len(u) - 1)):
            grad[t].add_(grad[t + 1], alpha=ctx.leak)
        return grad, None, None, None


class FastLIF(LIF):
    def forward(self, current):
        return _LIF.apply(current, self.tau, self.threshold, self.alpha)


# ---- the circuit -----------------------------------------------------------------------------------------------------


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, factor):
        ctx.factor = factor
        return w.view_as(w)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.factor, None


class _GainControl(torch.autograd.Function):
    """With q = balanced / I_div, g = dL/dI_int and, straight through, the divisor in place of I_div:

        dL/dbalanced = g / I_div      dL/dI_div = -q g / I_div      dL/ds_I = W^T dL/dI_div      dL/dW = dL/dI_div s_I^T

    Every position is a row of a matrix. Of the forward pass the input and the divisor are kept.
    """

    @staticmethod
    def forward(ctx, currents, w, b_e, eps):
        balanced, s_i = currents.flatten(0, -2).split([w.shape[0], w.shape[1]], 1)
        i_div = s_i @ w.t()
        if eps in ei_prop.STABILIZERS:
            maps = i_div.view(*currents.shape[:-1], -1).movedim(-1, 1)  # (N, n_E, ...), as in the plain form
            borrowed = ei_prop.STABILIZERS[eps](maps)
            if eps == "adaptive":  # nothing that is positive is smaller than the smallest positive value
                torch.maximum(maps, borrowed, out=maps)
            else:
                torch.where(maps > 0, maps, borrowed, out=maps)
        else:
            i_div += eps
        ctx.save_for_backward(balanced, s_i, i_div, w)
        return torch.addcdiv(b_e, balanced, i_div).view(*currents.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        balanced, s_i, i_div, w = ctx.saved_tensors
        grad_currents = grad.new_empty(*grad.shape[:-1], sum(w.shape))
        grad_balanced, grad_s_i = grad_currents.view(-1, sum(w.shape)).split([w.shape[0], w.shape[1]], 1)
        grad = grad.reshape(-1, w.shape[0])
        torch.div(grad, i_div, out=grad_balanced)  # both gradients go where one convolution's gradient is needed
        minus_grad_div = torch.mul(grad_balanced, balanced).div_(i_div)
        torch.mm(minus_grad_div, -w, out=grad_s_i)
        return grad_currents, -(minus_grad_div.t() @ s_i), grad.sum(0), None


def gain_control(currents, w, b_e, eps="adaptive"):
    """divide(balanced, w s_I, eps) + b_E in few passes over memory, straight through: I_int.

    Args:
        currents: (N, ..., n_E + n_I): the balanced current g_E (I_EE - I_sub) and s_I of each position, side by side.
        w: (n_E, n_I), the synapses of divisive inhibition, W_EI with g_I in it.
        b_e: (n_E,).
        eps: as for `ei_prop.stabilize`.

    Returns:
        (N, ..., n_E).
    """
    return _GainControl.apply(currents, w, b_e, eps)


class FastCircuit(EICircuit):
    def fused_inhibition(self):
        w_ei = _ScaleGradient.apply(self.w_ei, 1 / self.fan_in) if self.grad_scaling else self.w_ei
        return self.w_ie, w_ei, None if self.readout else self.g_i

    def fused_synapses(self, x, w):
        currents = self.product(x, w).to(w.dtype)
        with torch.no_grad():  # the mask of `EICircuit.synapses`, in place
            currents.mul_(self.is_reached(x).to(currents.dtype))
        return currents

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            w_ie, w_ei, g_i = self.fused_inhibition()
            w = self.w_ee - (w_ei @ w_ie.flatten(1)).view_as(self.w_ee)
            if not self.readout:
                w = self.g_e.view(-1, *[1] * (x.dim() - 1)) * w  # g_E scales what the division scales
                w = torch.cat([w, w_ie])
        currents = self.fused_synapses(x, w)  # with torch.autocast in 16 bits, and nothing else
        if self.readout:
            return currents
        with torch.autocast(x.device.type, enabled=False):
            w_div = w_ei * g_i  # g_I goes with the synapse in place of the activity
            if self.ste or self.eps not in ei_prop.STABILIZERS:
                return gain_control(currents.movedim(1, -1), w_div, self.b_e, self.eps).movedim(-1, 1)
            balanced, s_i = currents.split([self.n_e, self.n_i], 1)
            b_e = self.b_e.view(-1, *[1] * (x.dim() - 2))
            return ei_prop.divide(balanced, self.lateral(w_div, s_i), self.eps, self.ste) + b_e


class FastCircuit2d(FastCircuit, EICircuit2d):
    def product(self, x, w):
        small = x.shape[2:] == (2, 2) and (*w.shape[2:], self.stride, self.padding) == (3, 3, 1, 1)
        return _conv_2x2(x, w) if small and x.is_cpu else super().product(x, w)


def _conv_2x2(x, w):
    """A 3x3 convolution with padding on 2x2 maps as one matrix product: each position q is reached from each position p
    by one of the kernel's weights; the other 20 of its 36 products meet the padding."""
    place = torch.tensor([0, 1, 3, 4])  # of the four positions in a 3x3 grid whose middle is number 4
    tap = 4 + place[:, None] - place  # p, q
    w_pq = w.permute(2, 3, 1, 0).flatten(0, 1).index_select(0, tap.flatten()).unflatten(0, (4, 4))  # p, q, in, out
    rows = x.permute(0, 2, 3, 1).flatten(1) @ w_pq.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return rows.view(-1, 2, 2, w.shape[0]).permute(0, 3, 1, 2)


class FastDANNCircuit(DANNCircuit, FastCircuit):
    def fused_inhibition(self):
        return self.inhibition()


class FastDANNCircuit2d(DANNCircuit2d, FastCircuit2d):
    def fused_inhibition(self):
        return self.inhibition()


# ---- layers and networks ---------------------------------------------------------------------------------------------


class FastLayer(Layer):
    def forward(self, x):
        T = len(x)
        if T == 1 or x.stride(0) != 0:
            return super().forward(x)
        if isinstance(self.circuit, nn.Sequential):  # BN-SNN counts every time step in its variance
            return super().forward(torch.cat([x[0]] * T).unflatten(0, x.shape[:2]))  # which keeps the channels last
        # The same input at each step: one step is computed, and then expanded over time. The sum over time, which is
        # the gradient of that, runs fast where the channels are last in memory.
        current = self.circuit(x[0]).movedim(1, -1)
        current = current.expand(T, *current.shape).movedim(-1, 2)
        return self.neuron(current)


class _AvgPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.odd = x.shape[2] % 2, x.shape[3] % 2
        return F.avg_pool2d(x, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = F.interpolate(grad / 4, scale_factor=2, mode="nearest")
        return F.pad(grad, (0, ctx.odd[1], 0, ctx.odd[0])) if any(ctx.odd) else grad  # the last row met no window


class FastAvgPool(AvgPool):
    def forward(self, x):
        return _AvgPool.apply(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FastNetwork(Network):
    def forward(self, x):
        if isinstance(self.encoder, MLP):
            return super().forward(x)
        if x.dim() == 4:  # channels last
            x = x.contiguous(memory_format=torch.channels_last)
        elif x.dim() == 5:  # the T B frames one after another
            frames = x.transpose(0, 1)
            merged = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            x = merged.unflatten(0, frames.shape[:2]).transpose(0, 1)
        return super().forward(x)


FORMS = {
    LIF: FastLIF,
    EICircuit: FastCircuit,
    EICircuit2d: FastCircuit2d,
    DANNCircuit: FastDANNCircuit,
    DANNCircuit2d: FastDANNCircuit2d,
    AvgPool: FastAvgPool,
    Layer: FastLayer,
    Network: FastNetwork,
}

# ---- the proof -------------------------------------------------------------------------------------------------------


def accelerate(model, batch):
    """Puts the fused forms in the place of the plain ones, where both compute the same.

    To be called after `initialize`, with the network on its device. Parameters, names and the state_dict stay as they
    are, and no random number of torch's global generator is drawn.

    Args:
        model: a network of `model.build`, changed in place.
        batch: the first training batch, images (B, C, S, S) or frames (B, T, C, S, S); a few samples of it are used.

    Returns:
        The names of the files that compute something else than this file does: a set, usually empty. Each is printed in
        one line, and what it computes is left in its plain form.
    """
    device = next(model.parameters()).device
    if device.type not in ("cpu", "cuda"):  # on others (Apple's MPS) the fused forms were never run
        return set()
    with torch.autocast(device.type, enabled=False):
        differing = compare(model, batch)
    for file in sorted(differing):
        print(f"{file} computes something else than support/fast.py: its plain form is used, which is slower")
    for module in model.modules():
        if type(module) in FORMS and not differing.intersection(files_of(module)):
            module.__class__ = FORMS[type(module)]
    return differing


def files_of(module):
    """The concept files that say what a module computes, the one that says most first."""
    if isinstance(module, EICircuit):
        return ("baselines.py" if isinstance(module, DANN) else "inhibition.py"), "ei_prop.py"
    return ("lif.py",) if isinstance(module, LIF) else ("model.py",)


@torch.no_grad()
def inputs_of(model, batch):
    """The input of the first module of each kind when the network runs on a batch: {module: input}.

    Modules of one class are of the same kind if they have the same options; the number of maps is no matter. Maps of
    2x2 positions have a fused form of their own.
    """
    found, seen = {}, set()

    def note(module, args):
        sizes = ("n_e", "n_i", "fan_in", "training")
        options = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in sizes}
        kind = (type(module), str(options), args[0].shape[-2:] == (2, 2))
        if kind not in seen:
            seen.add(kind)
            found[module] = args[0]

    with hooked(model, [m.register_forward_pre_hook(note) for m in model.modules() if type(m) in FORMS]):
        model(batch)
    return found


def compare(model, batch):
    """The files that compute something else than the fused forms, see `accelerate`.

    Each pair gets the same input and the same incoming gradient, so that a spike that rounding flips does not spread
    from layer to layer. They are compared in float64. The weights are varied, for E-I Init makes many of them equal,
    which would hide differences; some inputs and weights are set to 0, so that zeros of I_div occur.
    """
    device, dtype = next(model.parameters()).device, torch.float64
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=dtype).to(device)

    differing = set()
    circuits = [m for m in model.modules() if isinstance(m, EICircuit)]
    if circuits and not ei_prop_is_same(circuits[0], rand):
        differing.add("ei_prop.py")
    for module, x in inputs_of(model, batch[:2]).items():
        if differing.intersection(files_of(module)) or isinstance(
            module, Network
        ):  # whose fused form computes the same
            continue
        plain = vary(copy.deepcopy(module).to(dtype), rand)
        fast = copy.deepcopy(plain)
        fast.__class__ = FORMS[type(module)]
        x = x.to(dtype)
        if isinstance(module, EICircuit):
            x = x[[0, len(x) // 2, -1]]  # time steps and samples: one as it is, one half silent, one silent
            x[1, ..., x.shape[-1] // 2 :] = 0
            x[2] = 0
            probes = [x]
        elif isinstance(module, LIF):  # potentials around the threshold, also exactly on it
            threshold = getattr(module, "threshold", 1.0)
            at_threshold = torch.linspace(-2, 2, 257, dtype=dtype, device=device)[None] * threshold
            probes = [x[:, :1], (4 * rand(len(x), 500) - 1) * threshold, at_threshold]
        elif isinstance(module, Layer):  # a still image, without a time axis
            probes = [x[0]]
        else:
            probes = [x[:2]]
        still = isinstance(module, Layer)
        if not all(same(plain, fast, probe, rand, still) for probe in probes):
            differing.add(files_of(module)[0])
    return differing


@torch.no_grad()
def vary(module, rand):
    """The same module with other parameters."""
    for p in module.parameters():
        p.mul_(0.5 + rand(*p.shape))
        if not p.any():  # b_E
            p.add_(rand(*p.shape) - 0.5)
    for circuit in module.modules():
        # Synapses that Dale's law has set to 0: I_div = 0 although I_EE differs from I_sub. A fixed eps, 1e-8, would
        # divide by almost nothing there, and beside such a current a difference elsewhere would look like rounding.
        if isinstance(circuit, EICircuit) and circuit.eps in ei_prop.STABILIZERS:
            circuit.w_ei[0] = 0
    return module


def same(plain, fast, x, rand, still=False):
    """Whether two forms of a function have the same output and the same gradients, to x and to their parameters.

    still: x has no time axis, and is the same in two time steps.
    """
    results, grad = [], None
    for form in (plain, fast):
        parameters = list(form.parameters()) if isinstance(form, nn.Module) else []
        leaf = x.detach().clone().requires_grad_()
        try:
            with torch.enable_grad():
                out = form(leaf.expand(2, *x.shape) if still else leaf)
                grad = rand(*out.shape) - 0.5 if grad is None else grad
                gradients = torch.autograd.grad(out, [leaf, *parameters], grad, materialize_grads=True)
        except Exception:  # the fused form lacks something, or the plain one takes no such probe: they differ
            return False
        results.append([out.detach(), *gradients])
    for a, b in zip(*results, strict=True):
        if a.shape != b.shape:
            return False
        if not ((a - b).abs() <= 1e-6 * a.abs() + 1e-9 * a.square().mean().sqrt()).all():
            return False
    return True


def ei_prop_is_same(circuit, rand):
    """The functions of `ei_prop.py` beside those that stand in their place here."""
    n, n_e = 4, 6
    x = rand(n, 2 * n_e, 5)  # I_EE - I_sub and I_div
    x[:, n_e:] *= 10 ** (-9 * rand(n, n_e, 5))  # of all sizes
    x[:, n_e:] *= rand(n, 1, 5) < 0.7
    x[0, n_e:] = 0  # a silent sample
    identity, zero = torch.eye(n_e).to(x), torch.zeros(n_e).to(x)

    def plain(x):
        return ei_prop.divide(x[:, :n_e], x[:, n_e:], circuit.eps, circuit.ste)

    def fast(x):
        if not circuit.ste and circuit.eps in ei_prop.STABILIZERS:
            return plain(x)  # there is no fused form of that
        return gain_control(x.movedim(1, -1), identity, zero, circuit.eps).movedim(-1, 1)

    def plain_scale(x):
        return ei_prop.scale_gradient(x, 0.25)

    def fast_scale(x):
        return _ScaleGradient.apply(x, 0.25)

    return same(plain, fast, x, rand) and same(plain_scale, fast_scale, x, rand)


# ---- memory ----------------------------------------------------------------------------------------------------------


def keep_memory(keep=True):
    """On Linux, has the C library keep the memory that tensors give back, for the next step needs the same again.

    By default blocks above 32 MB go back to the system, which clears every page before it gives them out again: a
    quarter and more of a training step on a CPU. Changes no result; `keep=False` is the default's behaviour again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_MMAP_MAX, 0 if keep else 65536)
        mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 << 20)
