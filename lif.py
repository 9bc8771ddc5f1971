"""The excitatory neuron: leaky integrate-and-fire (LIF), trained with a surrogate gradient.

    u[t] = (1 - 1/tau) (u[t-1] - theta s[t-1]) + I[t]        u[-1] = s[-1] = 0
    s[t] = 1  if u[t] >= theta  else 0

u is the membrane potential, I the input current (not scaled by the leak), theta the firing threshold, s the spikes.
The reset is soft: a spike takes theta off the membrane, so what exceeds the threshold is kept for the next step.

A step function has no useful derivative, so the backward pass puts a smooth one in its place: the slope of a logistic
function, alpha sigma(alpha (u - theta)) (1 - sigma(alpha (u - theta))) with alpha = 4. No gradient runs through the
reset. Errors then travel back through time along the leak alone:

    dL/du[t] = dL/ds[t] surrogate'(u[t]) + (1 - 1/tau) dL/du[t+1]        dL/dI[t] = dL/du[t]
"""

import torch
from torch import nn

ALPHA = 4.0  # sharpness of the surrogate gradient


class _LIF(torch.autograd.Function):
    """Both recursions above, written out. Of the forward pass only u is kept: s is u >= theta."""

    @staticmethod
    def forward(ctx, current, tau, threshold):
        leak = 1 - 1 / tau
        step = torch.empty_like(current[0])  # its layout is kept, also where `current` is expanded over time
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
        ctx.leak, ctx.threshold = leak, threshold
        return spikes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_spikes):
        (u,) = ctx.saved_tensors
        grad = torch.empty_like(u)
        for t in reversed(range(u.shape[0])):
            sigma = torch.sub(u[t], ctx.threshold).mul_(ALPHA).sigmoid_()
            torch.ops.aten.sigmoid_backward.grad_input(grad_spikes[t], sigma, grad_input=grad[t])
            grad[t].mul_(ALPHA)
            if t + 1 < u.shape[0]:
                grad[t].add_(grad[t + 1], alpha=ctx.leak)
        return grad, None, None


def lif(current, tau=2.0, threshold=1.0):
    """Spikes of a population of LIF neurons driven by a current (paper, Eq. of the LIF neuron; see above).

    Args:
        current: (T, ...), real, in the units of the threshold; time is the leading axis. May be an expanded view
            (the same current at every step) and is then not copied.
        tau: membrane time constant in steps, at least 1 (1: no memory).
        threshold: theta, positive.

    Returns:
        Spikes, (T, ...), each 0 or 1, in the type of `current`.

    Raises:
        ValueError: for a tau below 1, a threshold that is not positive, or a current without a time step.
    """
    if not tau >= 1 or not threshold > 0:
        raise ValueError(
            f"lif: tau must be at least 1 and the threshold positive, not tau={tau}, threshold={threshold}"
        )
    if current.dim() == 0 or current.shape[0] == 0:
        raise ValueError(f"lif: the current needs a leading axis of at least one time step, not {tuple(current.shape)}")
    return _LIF.apply(current, tau, threshold)


@torch.no_grad()
def membrane_potential(current, tau=2.0, threshold=1.0):
    """u of the neurons that `lif` simulates, before the reset, (T, ...): the recursion line by line, for looking at."""
    u = torch.empty(current.shape, dtype=current.dtype, device=current.device)
    before_reset = spike = torch.zeros_like(current[0])
    for t in range(current.shape[0]):
        u[t] = before_reset = (1 - 1 / tau) * (before_reset - threshold * spike) + current[t]
        spike = (before_reset >= threshold).to(u.dtype)
    return u


class LIF(nn.Module):
    """`lif` as a layer: (T, ...) -> (T, ...). It has no parameters and keeps no state between calls."""

    def __init__(self, tau=2.0, threshold=1.0):
        super().__init__()
        self.tau, self.threshold = tau, threshold

    def forward(self, current):
        return lif(current, self.tau, self.threshold)

    def extra_repr(self):
        return f"tau={self.tau}, threshold={self.threshold}"
