"""E-I Prop: what keeps the forward and the backward pass of the circuit stable.

1. Adaptive stabilization (`stabilize`, forward). Divisive inhibition divides by I_div, and where all presynaptic
   neurons are silent I_div is exactly 0. A fixed epsilon would make the quotient, and its gradient, as large as
   1 / epsilon. Instead a zero borrows the smallest positive I_div of its own sample, a value of the scale at hand.
2. Straight-through estimator (`stabilize`, backward). Were the loan differentiated, the one element that lent its
   value would collect the gradients of all that borrowed: a gradient sink. The gradient is passed to I_div itself.
3. Gradient scaling (`scale_gradient`). W_EI reaches every position through sums over the whole fan-in d, so its
   gradient is d times too large beside the others; it is multiplied by 1 / d.
"""

import torch
import torch.nn.functional as F


def smallest_positive(i_div):
    """The smallest positive value of each sample, (N, ...) -> (N, 1, ...); infinite where a sample has none."""
    return F.threshold(i_div, 0, torch.inf).amin(tuple(range(1, i_div.dim())), keepdim=True)


def stabilize(i_div, eps="adaptive", ste=True, silent=1.0):
    """I_div made safe to divide by (paper, E-I Prop: adaptive stabilization and straight-through estimator).

    Args:
        i_div: (N, ...), divisive inhibition, non-negative; a sample, along N, is one time step of one image.
        eps: "adaptive": each 0 becomes the smallest positive value of its sample, all else stays as it is. A number:
            the alternative that the paper argues against, i_div + eps.
        ste: backward, the replacement is the identity. False: it is differentiated (the paper's ablation).
        silent: what a sample without any positive value, which has none to lend, becomes with "adaptive".

    Returns:
        (N, ...), positive and, but for an infinite `silent`, finite.
    """
    if eps != "adaptive":
        return i_div + eps
    lent = smallest_positive(i_div.detach() if ste else i_div)
    lent = torch.where(lent.isinf(), silent, lent)
    divisor = torch.maximum(i_div, lent)  # nothing that is positive is smaller than what is lent
    return i_div + (divisor - i_div).detach() if ste else divisor


def divide(current, i_div, eps="adaptive", ste=True):
    """Gain control: current / stabilize(i_div), and 0 for a sample in which nothing inhibits.

    Args:
        current: (N, ...), the balanced current I_EE - I_sub.
        i_div, eps, ste: as for `stabilize`.

    Returns:
        (N, ...), finite. In a sample in which nothing inhibits the divisor is infinite, so that the quotient and both
        gradients are 0.
    """
    return current / stabilize(i_div, eps, ste, silent=torch.inf)


class _GainControl(torch.autograd.Function):
    """With q = balanced / I_div, g = dL/dI_int and, straight through, the stabilized divisor in place of I_div:

        dL/dbalanced = g / I_div      dL/dI_div = -q g / I_div      dL/ds_I = W^T dL/dI_div      dL/dW = dL/dI_div s_I^T

    Every position is a row of a matrix. Of the forward pass the input and the divisor are kept.
    """

    @staticmethod
    def forward(ctx, currents, w, b_e, eps):
        balanced, s_i = currents.flatten(0, -2).split([w.shape[0], w.shape[1]], 1)
        i_div = s_i @ w.t()
        if eps == "adaptive":
            sample = i_div.view(len(currents), -1)
            torch.maximum(sample, smallest_positive(sample), out=sample)  # stabilize(i_div), in its place
        else:
            i_div += eps
        ctx.save_for_backward(balanced, s_i, i_div, w)
        return torch.addcdiv(b_e, balanced, i_div).view(*currents.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        balanced, s_i, i_div, w = ctx.saved_tensors
        grad_currents = grad.new_empty(*grad.shape[:-1], sum(w.shape))
        grad_balanced, grad_s_i = grad_currents.view(-1, sum(w.shape)).split([w.shape[0], w.shape[1]], 1)
        grad = grad.reshape(-1, w.shape[0])
        torch.div(grad, i_div, out=grad_balanced)  # both gradients go where one convolution's gradient is needed
        minus_grad_div = torch.mul(grad_balanced, balanced).div_(i_div)
        torch.mm(minus_grad_div, -w, out=grad_s_i)
        return grad_currents, minus_grad_div.t() @ -s_i, grad.sum(0), None


def gain_control(currents, w, b_e, eps="adaptive"):
    """divide(balanced, w s_I, eps) + b_E in few passes over memory, which is what it costs: I_int.

    Args:
        currents: (N, ..., n_E + n_I): the balanced current g_E (I_EE - I_sub) and s_I of each position, side by side.
        w: (n_E, n_I), the synapses of divisive inhibition, W_EI with g_I in it.
        b_e: (n_E,).
        eps: as for `stabilize`; the estimator is straight-through.

    Returns:
        (N, ..., n_E).
    """
    return _GainControl.apply(currents, w, b_e, eps)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, factor):
        ctx.factor = factor
        return w.view_as(w)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def scale_gradient(w, factor):
    """w itself; backward, its gradient times `factor` (paper, E-I Prop: gradient scaling, 1/d for W_EI).

    Args:
        w: any shape.
        factor: a number.
    """
    return _ScaleGradient.apply(w, factor)
