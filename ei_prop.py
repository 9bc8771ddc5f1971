"""E-I Prop: what keeps the forward and the backward pass of the circuit stable (paper, E-I Prop).

The circuit divides by I_div, and I_div is exactly 0 where no presynaptic neuron fires.

1. Adaptive stabilization (`stabilize`, forward). Where I_div is 0, the division uses the smallest positive value of
   I_div in the same sample. One sample is one time step of one image, with all its maps and positions. Nothing is
   added to the other values. The alternative is a small constant, I_div + eps. What goes wrong with it is a gradient:
   where the receptive field is silent, I_EE - I_sub is 0 as well, so the quotient is 0 with any eps, and so is the
   gradient to I_div. But the gradient to I_EE - I_sub is g / eps (g is the gradient of the quotient). The weights get
   nothing of it, because x = 0 there; it goes on to x, to the layers below. With eps = 1e-8 it is 1e8 g.
2. Straight-through estimator (`stabilize`, backward). The replacement counts as the identity: the gradient reaches
   I_div itself, and not the one element whose value was used. At silent receptive fields this changes nothing, because
   the gradient to I_div is 0 there (1.). It matters where I_div = 0 although I_EE differs from I_sub, which happens
   when weights or gains are clamped to 0. `visualize.py stabilizer` counts how often that is.
3. Gradient scaling (`scale_gradient`). The gradient of W_EI is multiplied by 1/d. Here d is the number of inputs x of
   an excitatory neuron (its fan-in), not the number of its interneurons. Without it W_EI learns much faster than the
   rest: in the first step of VGG-8 on the digits (40 draws of weights and batch), plain SGD on W_EI changes I_int 1.3
   to 17 times as much as plain SGD on W_EE does. With 1/d it changes I_int less than W_EE does, in all layers but the
   first by a factor of more than 60: W_EI is nearly frozen. Without it VGG-8 stays at chance on the digits; at a
   quarter of its width it learns. The idea comes from DANN.

`python ei_prop.py` shows all three on one row of numbers.
"""

import torch
import torch.nn.functional as F


def smallest_positive(i_div):
    """The smallest positive value of each sample: (N, ...) -> (N, 1, ...); infinity where a sample has none."""
    positive = F.threshold(i_div, 0, torch.inf)  # i_div where it is above 0, infinity elsewhere: (N, ...)
    return positive.amin(tuple(range(1, i_div.dim())), keepdim=True)


# What a zero of I_div is replaced by. To try another one, write a function like `smallest_positive`, add a line here,
# and train with `--eps NAME`. It may return any shape that broadcasts to (N, ...), positive, and infinity where a
# sample has no positive value.
STABILIZERS = {"adaptive": smallest_positive}


def straight_through(x, value):
    """`value` in the forward pass, x in the backward pass. Both (N, ...)."""
    return x + (value - x).detach()  # forward: x + value - x = value; backward: the bracket is a constant, d/dx = 1


def stabilize(i_div, eps="adaptive", ste=True, silent=1.0):
    """I_div, made safe to divide by (paper, E-I Prop: adaptive stabilization, straight-through estimator).

    Args:
        i_div: I_div, (N, ...), not negative. A sample along N is one time step of one image.
        eps: a name in `STABILIZERS`: only the zeros are replaced. A positive number: I_div + eps.
        ste: backward, the replacement is the identity. False (an ablation): autograd goes through the replacement.
        silent: what stands in a sample that has no positive value at all, if eps is a name.

    Returns:
        (N, ...), positive; finite if `silent` is.
    """
    if eps not in STABILIZERS:
        return i_div + eps
    borrowed = STABILIZERS[eps](i_div)  # (N, 1, ...), infinite in a silent sample
    borrowed = torch.where(borrowed.isinf(), silent, borrowed)
    divisor = torch.where(i_div > 0, i_div, borrowed)  # (N, ...)
    return straight_through(i_div, divisor) if ste else divisor


def divide(current, i_div, eps="adaptive", ste=True):
    """current / I_div, and 0 in a sample where nothing inhibits: (N, ...), (N, ...) -> (N, ...), finite.

    The divisor of a sample without any positive I_div is infinity. So the quotient is 0, and both gradients too.
    """
    return current / stabilize(i_div, eps, ste, silent=torch.inf)


def scale_gradient(w, factor):
    """w in the forward pass; in the backward pass its gradient is multiplied by `factor` (paper, E-I Prop: 1/d for
    W_EI).

    Args:
        w: finite, of any shape.
        factor: a number.
    """
    return w.detach() + factor * (w - w.detach())  # forward: w + factor 0 = w; backward: d/dw = factor


if __name__ == "__main__":
    print("One sample with four positions. The second is silent: I_EE = I_sub = I_div = 0. In the third I_div is 0,")
    print("but I_EE - I_sub is not (its inhibitory weights were clamped to 0). Loss: the sum of the quotients.\n")
    balanced = torch.tensor([[0.6, 0.0, -0.3, 0.4]], requires_grad=True)  # I_EE - I_sub, (N, 4)
    i_div = torch.tensor([[2.0, 0.0, 0.0, 0.5]], requires_grad=True)  # (N, 4)
    cases = {"adaptive, STE": ("adaptive", True), "adaptive, no STE": ("adaptive", False), "eps = 1e-8": (1e-8, True)}
    for name, (eps, ste) in cases.items():
        quotient = divide(balanced, i_div, eps, ste)  # (N, 4)
        gradients = torch.autograd.grad(quotient.sum(), (balanced, i_div))
        print(name)
        rows = {"I_EE - I_sub": balanced, "I_div": i_div, "divided by": stabilize(i_div, eps, ste)}
        rows |= {"quotient": quotient, "dL/d(I_EE - I_sub)": gradients[0], "dL/dI_div": gradients[1]}
        for label, row in rows.items():
            print(f"  {label:19}" + " ".join(f"{v:10.3g}" for v in row[0].tolist()))
    print("\nThe silent position: its gradient to I_EE - I_sub is 1e8 with eps = 1e-8, and 2 with the adaptive value.")
    print(
        "STE changes nothing there. In the third position it does: without STE the last one, whose value was borrowed,"
    )
    print("gets its gradient too.\n")
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    out = scale_gradient(w, 1 / 9)
    (scaled,) = torch.autograd.grad(out.sum(), w)
    print(f"scale_gradient(w, 1/9): forward {out.tolist()}, dL/dw {[round(v, 4) for v in scaled.tolist()]}, not [1, 1]")
