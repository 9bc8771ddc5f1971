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


def _replaced(i_div):
    """i_div with each 0 replaced by the smallest positive value of its sample; inf where a sample has none."""
    positive = i_div > 0
    lent = torch.where(positive, i_div, torch.inf).amin(tuple(range(1, i_div.dim())), keepdim=True)
    return torch.where(positive, i_div, lent)


def stabilize(i_div, eps="adaptive", ste=True):
    """I_div made safe to divide by (paper, E-I Prop: adaptive stabilization and straight-through estimator).

    Args:
        i_div: (N, ...), divisive inhibition, non-negative; a sample, along N, is one time step of one image.
        eps: "adaptive": each 0 becomes the smallest positive value of its sample, all else stays as it is. A number:
            the alternative that the paper argues against, i_div + eps.
        ste: backward, the replacement is the identity. False: it is differentiated (the paper's ablation).

    Returns:
        (N, ...), positive and finite. A sample without any positive value has none to lend and becomes 1; the circuit
        gives such a sample I_int = b_E (`divide`).
    """
    if eps != "adaptive":
        return i_div + eps
    if not ste:
        divisor = _replaced(i_div)
        return torch.where(divisor.isinf(), 1.0, divisor)
    divisor = _replaced(i_div.detach())
    return i_div + (torch.where(divisor.isinf(), 1.0, divisor) - i_div).detach()


class _DivideSTE(torch.autograd.Function):
    """q = current / divisor, where the divisor stands for I_div also backward: dL/dcurrent = g / divisor and
    dL/dI_div = -q g / divisor, written out for their memory traffic."""

    @staticmethod
    def forward(ctx, current, i_div, eps):
        divisor = _replaced(i_div) if eps == "adaptive" else i_div + eps
        quotient = current / divisor
        ctx.save_for_backward(divisor, quotient)
        return quotient

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        divisor, quotient = ctx.saved_tensors
        grad = grad / divisor
        return grad, torch.mul(grad, quotient).neg_(), None


def divide(current, i_div, eps="adaptive", ste=True):
    """Gain control: current / stabilize(i_div), and 0 for a sample in which nothing inhibits.

    Args:
        current: (N, ...), the balanced current I_EE - I_sub.
        i_div, eps, ste: as for `stabilize`.

    Returns:
        (N, ...), finite. In a sample in which nothing inhibits the divisor is infinite, so that the quotient and both
        gradients are 0.
    """
    if ste or eps != "adaptive":
        return _DivideSTE.apply(current, i_div, eps)
    return current / _replaced(i_div)


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
