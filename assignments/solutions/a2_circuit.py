"""Assignment 2 (15 points): the E-I circuit and Dale's law (paper, E-I circuit).

    I_EE  = W_EE x                                    excitation, n_E neurons
    I_IE  = W_IE x                                    drive of the PV+ interneurons, n_I neurons
    s_I   = I_IE                                      their activity
    I_sub = W_EI s_I                                  subtractive inhibition
    I_div = W_EI (g_I . s_I)                          divisive inhibition
    I_int = g_E . (I_EE - I_sub) / I_div + b_E        what the LIF neurons receive

"." multiplies each neuron by its own gain. Everything acts at each position alone: x is (N, in, P), for N samples, `in`
presynaptic neurons and P positions. `python check.py a2` checks it.
"""

import torch

ANSWERS = {
    # Question 2 (2 points), with your own numbers of `python check.py setup --id YOUR_ID`: for some x, a neuron has
    # I_int - b_E = v. What is its I_int - b_E for c x, all inputs multiplied by c? A number.
    "scaled_input": None,
}


def currents(x, p, stabilize):
    """Every current of the circuit. (8 points)

    Args:
        x: presynaptic activity, (N, in, P), not negative. It is 0 at some positions.
        p: a dict of parameters: w_ee (n_E, in), w_ie (n_I, in), w_ei (n_E, n_I), g_i (n_I,), g_e (n_E,), b_e (n_E,).
        stabilize: a function. Divide by stabilize(I_div), which is nowhere 0, not by I_div. (You write it in A4.)

    Returns:
        A dict of i_ee, i_ie, i_sub, i_div and i_int: i_ie is (N, n_I, P), the others are (N, n_E, P). i_div is the
        value before `stabilize`.
    """
    i_ee = p["w_ee"] @ x
    i_ie = p["w_ie"] @ x
    s_i = i_ie
    i_sub = p["w_ei"] @ s_i
    i_div = p["w_ei"] @ (p["g_i"][:, None] * s_i)
    i_int = p["g_e"][:, None] * (i_ee - i_sub) / stabilize(i_div) + p["b_e"][:, None]
    return dict(i_ee=i_ee, i_ie=i_ie, i_sub=i_sub, i_div=i_div, i_int=i_int)


def clamp_dale(p):
    """Dale's law: sets what is negative in w_ee, w_ie, w_ei, g_i and g_e to 0. b_e may have any sign. (3 points)

    Args:
        p: a dict of parameters as above, which require gradients; those of a readout are w_ee, w_ie, w_ei alone. The
            tensors themselves are changed (in place), because the optimiser holds them too. Nothing is returned.
    """
    with torch.no_grad():
        for name in p:
            if name != "b_e":
                p[name].clamp_(min=0)


def pv_som_currents(x, p, stabilize):
    """A variant with two cell types: SOM+ cells subtract, PV+ cells divide. (4 points)

        I_sub = W_ES (W_SE x)                  I_div = W_EP (g_P . (W_PE x))

    I_EE and I_int are as before.

    Args:
        x, stabilize: as above.
        p: w_ee (n_E, in), w_se (n_S, in), w_es (n_E, n_S), w_pe (n_P, in), w_ep (n_E, n_P), g_p (n_P,), g_e (n_E,),
            b_e (n_E,). A name says where a weight leads and where it comes from: w_se leads to SOM+ cells, from
            excitatory ones.

    Returns:
        A dict of i_ee, i_sub, i_div and i_int, each (N, n_E, P).
    """
    i_ee = p["w_ee"] @ x
    i_sub = p["w_es"] @ (p["w_se"] @ x)
    i_div = p["w_ep"] @ (p["g_p"][:, None] * (p["w_pe"] @ x))
    i_int = p["g_e"][:, None] * (i_ee - i_sub) / stabilize(i_div) + p["b_e"][:, None]
    return dict(i_ee=i_ee, i_sub=i_sub, i_div=i_div, i_int=i_int)
