"""The excitatory neuron: leaky integrate-and-fire (LIF), trained with a surrogate gradient (paper, LIF neuron).

    u[t] = (1 - 1/tau) (u[t-1] - theta s[t-1]) + I[t]        u[0-] = 0, s[0-] = 0
    s[t] = 1 if u[t] >= theta else 0

u is the membrane potential, I the input current, theta the firing threshold, s the spike. The membrane forgets the
share 1/tau of its potential in each step (the leak). The current is added whole: the leak does not act on it. A spike
takes theta away from the potential (soft reset), so what lies above the threshold is kept.

The step from u to s has the derivative 0 almost everywhere, so nothing could be learned through it. In the backward
pass we use the derivative of a smooth step instead, the logistic function sigma(alpha (u - theta)). This is the
surrogate gradient:

    ds/du = alpha sigma(alpha (u - theta)) (1 - sigma(alpha (u - theta)))        alpha = 4

No gradient passes through the reset. All other gradients are autograd's. `python lif.py` runs one neuron.
"""

import torch
from torch import nn


class Spike(torch.autograd.Function):
    """s = 1 if u >= theta else 0, with the surrogate gradient (paper, surrogate gradient; the formulas are above)."""

    generate_vmap_rule = True  # with this, and with `setup_context` apart from `forward`, torch.func works too

    @staticmethod
    def forward(u, threshold, alpha):
        return (u >= threshold).to(u.dtype)  # s[t], the shape of u

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, ctx.threshold, ctx.alpha = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx, grad_s):
        (u,) = ctx.saved_tensors
        sigma = torch.sigmoid(ctx.alpha * (u - ctx.threshold))  # the smooth step, the shape of u
        return grad_s * ctx.alpha * sigma * (1 - sigma), None, None  # dL/du = dL/ds ds/du


def check_neuron(tau, threshold, alpha):
    if not (tau >= 1 and threshold > 0 and alpha > 0):
        raise ValueError(
            f"lif: tau must be at least 1, threshold and alpha must be positive, not tau={tau}, "
            f"threshold={threshold}, alpha={alpha}"
        )


def simulate(current, tau=2.0, threshold=1.0, alpha=4.0):
    """Runs LIF neurons over time: the two equations above, one time step after another.

    Args:
        current: I, (T, ...), any real numbers, in units of the threshold. The first axis is time.
        tau: membrane time constant in time steps, at least 1 (1: the neuron forgets everything in one step).
        threshold: theta, positive.
        alpha: steepness of the surrogate gradient, positive.

    Returns:
        Two lists of T tensors of shape (...): the membrane potentials before the reset, and the spikes (0 or 1).

    Raises:
        ValueError: tau below 1, threshold or alpha not positive, or a current without a time step.
    """
    check_neuron(tau, threshold, alpha)
    if current.dim() == 0 or len(current) == 0:
        raise ValueError(f"lif: the current needs a first axis of at least one time step, not {tuple(current.shape)}")
    u = s = torch.zeros_like(current[0])  # u[0-] = 0, s[0-] = 0, each (...)
    potentials, spikes = [], []
    for i_t in current:  # I[t], (...)
        u = (1 - 1 / tau) * (u - threshold * s.detach()) + i_t  # u[t], (...); `detach`: no gradient through the reset
        s = Spike.apply(u, threshold, alpha)  # s[t], (...)
        potentials.append(u)
        spikes.append(s)
    return potentials, spikes


def lif(current, tau=2.0, threshold=1.0, alpha=4.0):
    """Spikes of LIF neurons: I, (T, ...) -> s, (T, ...), each 0 or 1. Arguments and errors as for `simulate`.

    For examples and for trying things out; networks use the class `LIF` below.
    """
    _, spikes = simulate(current, tau, threshold, alpha)
    return torch.stack(spikes)


@torch.no_grad()
def membrane_potential(current, tau=2.0, threshold=1.0):
    """u of the same neurons, before the reset: I, (T, ...) -> u, (T, ...). It has no gradient: it is for looking at."""
    potentials, _ = simulate(current, tau, threshold)
    return torch.stack(potentials)


class LIF(nn.Module):
    """`lif` as a layer: I, (T, ...) -> s, (T, ...). No parameters. No state is kept between two calls.

    Change the neuron in `simulate`, or here: what looks at the membrane asks `membrane_potential` below.
    """

    def __init__(self, tau=2.0, threshold=1.0, alpha=4.0):
        super().__init__()
        check_neuron(tau, threshold, alpha)
        self.tau, self.threshold, self.alpha = tau, threshold, alpha

    def simulate(self, current):
        """I, (T, ...) -> lists of u[t] and of s[t], as the function `simulate`."""
        return simulate(current, self.tau, self.threshold, self.alpha)

    def forward(self, current):
        return torch.stack(self.simulate(current)[1])  # s, (T, ...)

    @torch.no_grad()
    def membrane_potential(self, current):
        """u before the reset, for looking at: I, (T, ...) -> u, (T, ...)."""
        return torch.stack(self.simulate(current)[0])

    def extra_repr(self):
        return f"tau={self.tau}, threshold={self.threshold}, alpha={self.alpha}"


if __name__ == "__main__":
    print("One neuron, tau = 2, theta = 1, eight time steps. u[t] = 0.5 (u[t-1] - s[t-1]) + I[t]")
    current = torch.tensor([0.5, 0.5, 0.5, 0.5, 2.5, 0.5, 0.25, 0.0], requires_grad=True)  # (T,)
    spikes = lif(current)  # (T,)
    spikes.sum().backward()  # L = number of spikes
    u = membrane_potential(current)  # (T,)
    slope = 4 * torch.sigmoid(4 * (u - 1)) * (1 - torch.sigmoid(4 * (u - 1)))  # (T,)
    print("  t     I[t]     u[t]   s[t]   ds/du   dL/dI[t]")
    for t in range(8):
        row = (current[t].item(), u[t].item(), spikes[t].item(), slope[t].item(), current.grad[t].item())
        print("{:3d} {:8.4f} {:8.4f} {:6.0f} {:7.4f} {:10.4f}".format(t + 1, *row))
    print(
        "At t = 5 the potential is far above 1: after the spike the rest is kept, and the neuron fires again at t = 6."
    )
    print("dL/dI[t] = ds/du[t] + 0.5 dL/dI[t+1]: the error travels back in time along the leak, not through the reset.")
