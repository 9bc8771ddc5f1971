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


def _smallest_positive(i_div):
    """For each sample the smallest positive value of i_div, (N, 1, ...); inf for a sample that has none."""
    return torch.where(i_div > 0, i_div, torch.inf).amin(tuple(range(1, i_div.dim())), keepdim=True)


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
    lent = _smallest_positive(i_div.detach() if ste else i_div)
    lent = torch.where(lent.isinf(), 1.0, lent)
    if ste:
        return i_div + torch.where(i_div > 0, 0.0, lent - i_div).detach()
    return torch.where(i_div > 0, i_div, lent)


def divide(current, i_div, eps="adaptive", ste=True):
    """Gain control: current / stabilize(i_div), and 0 for a sample in which nothing inhibits.

    Args:
        current: (N, ...), the balanced current I_EE - I_sub.
        i_div, eps, ste: as for `stabilize`.

    Returns:
        (N, ...), finite.
    """
    quotient = current / stabilize(i_div, eps, ste)
    if eps != "adaptive":
        return quotient
    silent = (i_div <= 0).flatten(1).all(1).view(-1, *[1] * (i_div.dim() - 1))
    return torch.where(silent, 0.0, quotient)


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
