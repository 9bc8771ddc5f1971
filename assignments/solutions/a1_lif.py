"""Assignment 1 (20 points): the spiking neuron (paper, LIF neuron and surrogate gradient).

    u[t] = (1 - 1/tau) (u[t-1] - theta s[t-1]) + I[t]        u[0-] = 0, s[0-] = 0
    s[t] = 1 if u[t] >= theta else 0

    backward: ds/du = alpha sigma(alpha (u - theta)) (1 - sigma(alpha (u - theta))), no gradient through the reset

u is the membrane potential, I the input current, s the spike; tau is the time constant in time steps, theta the
threshold, alpha the steepness of the surrogate gradient, sigma the logistic function. `python check.py a1` checks it.
"""

import torch

ANSWERS = {
    # Question 1 (2 points), with your own tau, theta and T of `python check.py setup --id YOUR_ID`: the smallest
    # constant current with which a neuron that starts at u = 0 fires at least once within T time steps. A number.
    "smallest_current": None,
}


def spike(u, threshold=1.0):
    """s for the membrane potential u, any shape: 1.0 or 0.0, the same shape and dtype. (3 points)"""
    return (u >= threshold).to(u.dtype)


def surrogate(u, threshold=1.0, alpha=4.0):
    """ds/du for the membrane potential u, any shape: the formula above, the same shape. (3 points)"""
    sigma = torch.sigmoid(alpha * (u - threshold))
    return alpha * sigma * (1 - sigma)


class Spike(torch.autograd.Function):
    """Given. Forward: your `spike`. Backward: your `surrogate`. Use it as `Spike.apply(u, threshold, alpha)`."""

    @staticmethod
    def forward(ctx, u, threshold, alpha):
        ctx.save_for_backward(u)
        ctx.threshold, ctx.alpha = threshold, alpha
        return spike(u, threshold)

    @staticmethod
    def backward(ctx, grad_s):
        (u,) = ctx.saved_tensors
        return grad_s * surrogate(u, ctx.threshold, ctx.alpha), None, None


def simulate(current, tau=2.0, threshold=1.0, alpha=4.0):
    """Runs LIF neurons over time. (10 points)

    Args:
        current: I, (T, ...). The first axis is time. The neurons do not depend on each other.

    Returns:
        (u, s): the membrane potentials before the reset and the spikes, both (T, ...). Gradients pass from s to the
        current by `Spike.apply`, through time, but not through the reset.
    """
    u = s = torch.zeros_like(current[0])
    potentials, spikes = [], []
    for i in current:
        u = (1 - 1 / tau) * (u - threshold * s.detach()) + i
        s = Spike.apply(u, threshold, alpha)
        potentials.append(u)
        spikes.append(s)
    return torch.stack(potentials), torch.stack(spikes)


def f_i_curve(currents, tau=2.0, threshold=1.0, steps=100):
    """The f-I curve: firing rate against input current. (4 points)

    Args:
        currents: (n,): one constant current for each of n neurons.
        steps: how many time steps each neuron is simulated, from u = 0.

    Returns:
        Firing rates in spikes per time step, (n,), from 0 to 1.
    """
    _, s = simulate(currents.expand(steps, -1), tau, threshold)
    return s.mean(0)
