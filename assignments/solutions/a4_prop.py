"""Assignment 4 (20 points): E-I Prop (paper, E-I Prop).

1. Adaptive stabilization: where I_div is exactly 0, the forward pass uses the smallest positive value of I_div in the
   same sample. A sample is one time step of one image, with all its neurons and positions. Nothing else is changed.
2. Straight-through estimator (STE): in the backward pass the replacement is the identity. The gradient reaches I_div
   itself, and not the element whose value was used.
3. Gradient scaling: the gradient of W_EI is multiplied by 1/d, d being the fan-in.

`python check.py a4` checks it.
"""

import torch

ANSWERS = {
    # Question 4 (2 points), with your own numbers of `python check.py setup --id YOUR_ID`: one sample of I_div, of two
    # neurons (rows) at three positions, and c = dL/d(I_div after stabilization), the same at each element. Without STE,
    # autograd goes through the replacement. What is then dL/dI_div of the smallest positive element? A number.
    "gradient_without_ste": None,
}


def stabilize(i_div, eps="adaptive", ste=True):
    """I_div, made safe to divide by. (10 points)

    Args:
        i_div: I_div, (N, ...), not negative. A sample is one index of the first axis.
        eps: "adaptive", or a positive number: the alternative that the paper argues against, I_div + eps.
        ste: with the straight-through estimator. False: autograd goes through the replacement, so that a replaced zero
            itself gets no gradient.

    Returns:
        The same shape, positive and finite. In a sample that has no positive value at all, zeros become 1.
    """
    if eps != "adaptive":
        return i_div + eps
    axes = tuple(range(1, i_div.dim()))
    smallest = i_div.masked_fill(i_div == 0, torch.inf).amin(axes, keepdim=True)
    smallest = smallest.masked_fill(smallest.isinf(), 1)
    out = torch.where(i_div > 0, i_div, smallest)
    if ste:
        out = i_div + (out - i_div).detach()
    return out


def scale_gradient(w, factor):
    """w in the forward pass; in the backward pass its gradient is multiplied by `factor`. (5 points)

    Args:
        w: a tensor of any shape.
        factor: a number.
    """
    return w.detach() + factor * (w - w.detach())


def lateral_weights(w_ei, fan_in):
    """W_EI as the circuit uses it: the same values; the gradient as E-I Prop says. (5 points)

    Args:
        w_ei: (n_E, n_I).
        fan_in: d, the number of inputs of one excitatory neuron.
    """
    return scale_gradient(w_ei, 1 / fan_in)
