"""The usual mistakes of A1 to A5, as changes of `solutions.py`, with their names and what the paper does instead.

A mistake is (name, sentence, ways): each way in which students write it is a dict, text of the solution -> new text.
To add one, write it here and run `python lecturer.py freeze`. It is not part of the handout.
"""

LEAK = "(1 - 1 / tau) * (u - threshold * s.detach()) + i"
INTERNEURON = "    s_i = i_ie\n"
QUOTIENT = 'p["g_e"][:, None] * (i_ee - i_sub) / stabilize(i_div) + p["b_e"][:, None]'
SOM = 'p["w_es"] @ (p["w_se"] @ x)'
PV = 'p["w_ep"] @ (p["w_pe"] @ x)'
PV_GAIN = 'p["w_ep"] @ (p["g_p"][:, None] * (p["w_pe"] @ x))'
DIVISIVE = 'p["w_ei"] @ (p["g_i"][:, None] * s_i)'
SMALLEST = "smallest = i_div.masked_fill(i_div == 0, torch.inf).amin(axes, keepdim=True)"
WHERE = "torch.where(i_div > 0, i_div, smallest)"
DRAW = "p[name].exponential_().mul_(m)"
NETWORK = "    network = Network(condition)\n"

MISTAKES = {
    "a1": [
        (
            "> in place of >=",
            "In the paper a neuron whose potential is exactly at the threshold fires.",
            [{"u >= threshold": "u > threshold"}],
        ),
        (
            "threshold 1 whatever theta is",
            "The argument `threshold` is theta.",
            [{"u >= threshold": "u >= 1"}],
        ),
        (
            "surrogate without alpha in front",
            "The derivative of sigma(alpha (u - theta)) has the inner derivative alpha as a factor.",
            [{"return alpha * sigma": "return sigma"}],
        ),
        (
            "surrogate without alpha inside",
            "alpha also stands in the argument of sigma: it makes the step steep.",
            [{"torch.sigmoid(alpha * (u - threshold))": "torch.sigmoid(u - threshold)"}],
        ),
        (
            "surrogate centred at 0",
            "It is largest where the neuron just fires, at u = theta, not at u = 0.",
            [{"alpha * (u - threshold)": "alpha * u"}],
        ),
        (
            "the input decays too",
            "The leak (1 - 1/tau) acts on what is left of the potential; I[t] is added whole.",
            [{LEAK: "(1 - 1 / tau) * (u - threshold * s.detach() + i)"}],
        ),
        (
            "the input is divided by tau",
            "Some textbooks do that; in the paper I[t] is added whole.",
            [{LEAK: "(1 - 1 / tau) * (u - threshold * s.detach()) + i / tau"}],
        ),
        (
            "the leak does not act on the reset",
            "theta s[t-1] is taken away first, and the leak (1 - 1/tau) acts on the difference.",
            [{LEAK: "(1 - 1 / tau) * u - threshold * s.detach() + i"}],
        ),
        (
            "hard reset",
            "The reset takes theta away and keeps what was above it; it does not set the potential to 0.",
            [{LEAK: "(1 - 1 / tau) * u * (1 - s.detach()) + i"}],
        ),
        ("no reset", "After a spike, theta is taken away from the potential.", [{LEAK: "(1 - 1 / tau) * u + i"}]),
        (
            "the reset takes 1 away",
            "It takes theta away, which need not be 1.",
            [{LEAK: "(1 - 1 / tau) * (u - s.detach()) + i"}],
        ),
        (
            "leak 1/tau",
            "1/tau is the share that is forgotten in a step; 1 - 1/tau is kept.",
            [{LEAK: "1 / tau * (u - threshold * s.detach()) + i"}],
        ),
        (
            "gradient through the reset",
            "theta s[t-1] counts as a constant in the backward pass: detach it.",
            [{"s.detach()": "s"}],
        ),
        (
            "u after the reset",
            "u[t] is the potential before the reset, the one that is compared with theta.",
            [{"potentials.append(u)": "potentials.append(u - threshold * s)"}],
        ),
        (
            "number of spikes for the rate",
            "The firing rate is the number of spikes divided by the number of time steps.",
            [{"return s.mean(0)": "return s.sum(0)"}],
        ),
        (
            "one current after the other into the same neuron",
            "Each current has a neuron of its own, which starts at u = 0.",
            [
                {
                    "    _, s = simulate(currents.expand(steps, -1), tau, threshold)\n    return s.mean(0)": (
                        "    _, s = simulate(currents.repeat_interleave(steps), tau, threshold)\n"
                        "    return s.view(-1, steps).mean(1)"
                    )
                }
            ],
        ),
    ],
    "a2": [
        (
            "no W_EI on the divisive path",
            "I_div is a weighted sum over the interneurons, with the same W_EI as I_sub.",
            [
                {DIVISIVE: '(p["g_i"][:, None] * s_i).mean(1, True).expand_as(i_ee)'},
                {DIVISIVE: '(p["g_i"][:, None] * s_i).sum(1, True).expand_as(i_ee)'},
            ],
        ),
        (
            "no g_I",
            "The divisive path has the interneurons' gain: I_div = W_EI (g_I . s_I).",
            [{'p["g_i"][:, None] * s_i': "s_i"}],
        ),
        (
            "g_I on I_sub too",
            "g_I is on the divisive path alone: I_sub = W_EI s_I.",
            [{'i_sub = p["w_ei"] @ s_i': 'i_sub = p["w_ei"] @ (p["g_i"][:, None] * s_i)'}],
        ),
        (
            "g_E on b_E",
            "g_E multiplies the quotient only; b_E is added afterwards.",
            [{QUOTIENT: 'p["g_e"][:, None] * ((i_ee - i_sub) / stabilize(i_div) + p["b_e"][:, None])'}],
        ),
        ("no b_E", "b_E is added at the end.", [{' + p["b_e"][:, None]': ""}]),
        (
            "subtracts after dividing",
            "I_sub is subtracted first: the difference I_EE - I_sub is divided.",
            [{"(i_ee - i_sub) / stabilize(i_div)": "(i_ee / stabilize(i_div) - i_sub)"}],
        ),
        ("no subtraction", "The numerator is I_EE - I_sub.", [{"(i_ee - i_sub)": "i_ee"}]),
        (
            "b_E inside the quotient",
            "b_E is added after the division.",
            [{QUOTIENT: 'p["g_e"][:, None] * (i_ee - i_sub + p["b_e"][:, None]) / stabilize(i_div)'}],
        ),
        (
            "1 + I_div",
            "The paper divides by I_div itself; 1 + I_div is another kind of gain control, and no normalization.",
            [{"stabilize(i_div)": "(1 + i_div)"}, {"stabilize(i_div)": "stabilize(1 + i_div)"}],
        ),
        (
            "inhibition driven by I_EE",
            "The interneurons listen to the same presynaptic activity x as the excitatory neurons: I_IE = W_IE x.",
            [{'p["w_ie"] @ x': 'p["w_ie"] @ i_ee'}],
        ),
        (
            "a ReLU on the interneurons",
            "In the forward pass it changes nothing, but its derivative at 0 cuts the gradient of I_sub at silent "
            "positions, while that of I_EE passes. The paper's s_I is I_IE.",
            [
                {INTERNEURON: "    s_i = i_ie.relu()\n"},
                {INTERNEURON: "    s_i = torch.maximum(i_ie, torch.zeros_like(i_ie))\n"},
            ],
        ),
        (
            "W_EE transposed",
            "w_ee is (n_E, in): each excitatory neuron has a row.",
            [{'p["w_ee"] @ x\n    i_ie': 'p["w_ee"].T @ x\n    i_ie'}],
        ),
        (
            "b_E clamped too",
            "b_E is a bias, not a synapse; Dale's law leaves it free.",
            [{'if name != "b_e"': "if True"}],
        ),
        (
            "absolute values",
            "What an optimiser step made negative becomes 0, not positive again.",
            [{"p[name].clamp_(min=0)": "p[name].abs_()"}],
        ),
        (
            "nothing is changed in place",
            "The optimiser holds the tensors themselves: change these (clamp_), do not put new ones into the dict.",
            [
                {"p[name].clamp_(min=0)": "p[name] = p[name].clamp(min=0)"},
                {"p[name].clamp_(min=0)": "pass"},
            ],
        ),
        (
            "gains not clamped",
            "g_I and g_E are non-negative too.",
            [{'if name != "b_e"': 'if name.startswith("w")'}],
        ),
        (
            "SOM+ cells divide, PV+ cells subtract",
            "It is the other way round: PV+ cells act at the cell body and divide.",
            [{SOM: PV, PV_GAIN: SOM}, {SOM: PV_GAIN, PV_GAIN: SOM}],
        ),
        (
            "PV+ cells subtract too",
            "In this variant only SOM+ cells subtract: I_sub = W_ES (W_SE x).",
            [{SOM: PV}],
        ),
        (
            "no g_P",
            "The divisive path has the PV+ cells' gain.",
            [{'p["g_p"][:, None] * (p["w_pe"] @ x)': 'p["w_pe"] @ x'}],
        ),
    ],
    "a3": [
        (
            "biased variance",
            "Var[x] divides by N - 1, as torch.var does unless it is told otherwise.",
            [{"x.var(0)": "x.var(0, unbiased=False)"}],
        ),
        (
            "variance over all entries",
            "Var[x] is taken along the batch axis for each feature, and then averaged; a difference between features "
            "is no variance.",
            [{"x.var(0).mean()": "x.var()"}, {"x.var(0).mean()": "x.var(unbiased=False)"}],
        ),
        (
            "fan-in without k^2",
            "A neuron of a convolution has in * k * k inputs.",
            [{"w[0].numel()": "w.shape[1]"}],
        ),
        (
            "fan-out",
            "d counts the inputs of one neuron, not the neurons that receive.",
            [{"w[0].numel()": "w.shape[0]"}, {"w[0].numel()": "w[:, 0].numel()"}],
        ),
        (
            "E[x]^2 for E[x^2]",
            "The square comes first, then the mean.",
            [{"x.square().mean()": "x.mean().square()"}],
        ),
        (
            "no square root",
            "m and g_I are square roots.",
            [
                {"(var / (d * (square + var))) ** 0.5": "var / (d * (square + var))"},
                {"(square + var) ** 0.5 / (d**0.5 * mean)": "(square + var) / (d * mean)"},
                {"(square + var) ** 0.5 / (d**0.5 * mean)": "(square + var) / (d**0.5 * mean)"},
                {"(square + var) ** 0.5 / (d**0.5 * mean)": "(square + var) ** 0.5 / (d * mean)"},
                {"((2 + rate) / (d * rate)) ** 0.5": "(2 + rate) / (d * rate)"},
            ],
        ),
        (
            "the share of active inputs for the mean",
            "E[x] is the mean of x; it equals the share that is active only where all x are 0 or 1.",
            [{"mean, square, var = x.mean()": "mean, square, var = (x > 0).float().mean()"}],
        ),
        (
            "the formula for 0/1 spikes",
            "A Poisson count can be larger than 1: E[x^2] = lambda + lambda^2, Var[x] = lambda.",
            [{"(2 + rate)": "(2 - rate)"}],
        ),
        (
            "Poisson without its variance",
            "Under the root stands E[x^2] + Var[x], not E[x^2] alone.",
            [{"(2 + rate)": "(1 + rate)"}],
        ),
        (
            "E[x^2] = lambda for a Poisson count",
            "That is the variance; E[x^2] = Var[x] + E[x]^2.",
            [{"((2 + rate) / (d * rate))": "(2 / (d * rate))"}],
        ),
        (
            "W_EI = 1/n_E",
            "W_EI takes the mean over the interneurons: 1/n_I.",
            [{'p["w_ei"].shape[1]': 'p["w_ei"].shape[0]'}],
        ),
        (
            "another distribution of the same mean",
            "The paper draws from an exponential distribution, whose standard deviation equals its mean.",
            [
                {DRAW: "p[name].uniform_(0, 2).mul_(m)"},
                {DRAW: "p[name].normal_().abs_().mul_(m * (torch.pi / 2) ** 0.5)"},
                {DRAW: "p[name].fill_(float(m))"},
            ],
        ),
        (
            "normal weights of any sign",
            "By Dale's law no weight is negative; the paper draws from an exponential distribution.",
            [{DRAW: "p[name].normal_().mul_(m)"}, {DRAW: "p[name].normal_().mul_(m).add_(m)"}],
        ),
        (
            "m taken for the rate of the exponential",
            "torch's exponential_(lambd) has the mean 1/lambd: use lambd = 1/m, or multiply by m.",
            [{DRAW: "p[name].exponential_(float(m))"}],
        ),
        (
            "gains and bias left as they were",
            "E-I Init also sets g_E = 1 and b_E = 0.",
            [{'p["g_e"].fill_(1)': "pass", 'p["b_e"].fill_(0)': "pass"}],
        ),
        (
            "every layer measured on the image",
            "Each layer is initialised for what the layer before it sends.",
            [{"x = forward(p, x)": "forward(p, x)"}],
        ),
        (
            "the layer sends before it is initialised",
            "Initialise a layer first; the next one must see what it sends afterwards.",
            [
                {
                    "        init(p, x)\n        with torch.no_grad():\n            x = forward(p, x)": (
                        "        with torch.no_grad():\n            y = forward(p, x)\n"
                        "        init(p, x)\n        x = y"
                    )
                }
            ],
        ),
    ],
    "a4": [
        (
            "the smallest value of the whole batch",
            "Each sample has its own: one time step of one image.",
            [{"axes = tuple(range(1, i_div.dim()))": "axes = tuple(range(i_div.dim()))"}],
        ),
        (
            "the smallest value of each neuron",
            "A sample is one index of the first axis, with all its neurons and positions together.",
            [{"axes = tuple(range(1, i_div.dim()))": "axes = tuple(range(2, i_div.dim()))"}],
        ),
        (
            "a zero counts as the smallest value",
            "What is asked for is the smallest positive value, so that nothing is divided by 0.",
            [{SMALLEST: "smallest = i_div.amin(axes, keepdim=True)"}],
        ),
        (
            "all values replaced",
            "Only zeros are replaced.",
            [{WHERE: "smallest.expand_as(i_div)"}],
        ),
        (
            "added to all values",
            "Only zeros are replaced; nothing is added to the others.",
            [{WHERE: "i_div + smallest"}],
        ),
        (
            "zeros become a small constant",
            "A zero takes the smallest positive value of its sample.",
            [{WHERE: f"i_div.clamp(min={eps})"} for eps in ("1e-8", "1e-6", "1e-5", "1e-3")],
        ),
        (
            "zeros become 1",
            "A zero takes the smallest positive value of its sample; only where there is none it becomes 1.",
            [{WHERE: "torch.where(i_div > 0, i_div, 1.0)"}],
        ),
        (
            "no straight-through estimator",
            "With ste=True the gradient of a replaced zero reaches I_div there, not the element whose value was used.",
            [{"if ste:": "if False:"}],
        ),
        (
            "always a straight-through estimator",
            "With ste=False autograd goes through the replacement, to the element whose value was used.",
            [{"if ste:": "if True:"}],
        ),
        (
            "no gradient at all",
            "Only the difference between the replacement and I_div is detached; I_div itself is not.",
            [{"i_div + (out - i_div).detach()": "out.detach()"}],
        ),
        (
            "the gradient is 0 where I_div is 0",
            "The estimator is the identity everywhere: zeros receive their gradient too.",
            [{"out = i_div + (out - i_div).detach()": "out = torch.where(i_div > 0, i_div, smallest.detach())"}],
        ),
        (
            "a silent sample gives infinity",
            "A sample without any positive value has nothing to take: its zeros become 1.",
            [{"    smallest = smallest.masked_fill(smallest.isinf(), 1)\n": ""}],
        ),
        (
            "a fixed eps is not added",
            "With a number, the result is I_div + eps.",
            [
                {"return i_div + eps": "return i_div.clamp(min=eps)"},
                {"return i_div + eps": "return torch.where(i_div > 0, i_div, eps)"},
            ],
        ),
        (
            "scaled in the forward pass",
            "The values stay as they are; only the gradient is multiplied.",
            [{"w.detach() + factor * (w - w.detach())": "factor * w"}],
        ),
        (
            "the gradient is not scaled",
            "Forward nothing changes, but in the backward pass the gradient is multiplied by the factor.",
            [{"w.detach() + factor * (w - w.detach())": "w * 1"}],
        ),
        (
            "the weights get no gradient",
            "w.detach() alone is a constant; the part that is multiplied by the factor must keep its gradient.",
            [{"w.detach() + factor * (w - w.detach())": "w.detach()"}],
        ),
        (
            "scaled by 1/n_I",
            "The factor is 1/d; d counts the inputs of an excitatory neuron, not its interneurons.",
            [{"1 / fan_in": "1 / w_ei.shape[1]"}],
        ),
        ("scaled by 1/n_E", "The factor is 1/d, d being the fan-in.", [{"1 / fan_in": "1 / w_ei.shape[0]"}]),
        ("scaled by 1/sqrt(d)", "The factor is 1/d.", [{"1 / fan_in": "fan_in**-0.5"}]),
        (
            "scaled twice",
            "The factor is 1/d, once.",
            [{"scale_gradient(w_ei, 1 / fan_in)": "scale_gradient(scale_gradient(w_ei, 1 / fan_in), 1 / fan_in)"}],
        ),
        ("scaled by d", "The gradient becomes smaller: the factor is 1/d.", [{"1 / fan_in": "fan_in"}]),
    ],
}

# For A5 the names and sentences are in `check.fault`, which sees results.csv only; here is what leads to them.
ABLATION = {
    "network reused": {
        NETWORK: "    network = run.__dict__.setdefault('network', Network(condition))\n",
        'if condition != "no E-I Init":': "if run.__dict__.setdefault('first', seed) == seed and condition == 'full':",
    },
    "E-I Init forgotten": {'if condition != "no E-I Init":': "if False:"},
    "initialised on test data": {"train_x[batches(seed, 0)[0]]": "test_x"},
    "seed ignored": {
        NETWORK: "    torch.manual_seed(0)\n    asked, seed = seed, 0\n" + NETWORK,
        "seed=seed": "seed=asked",
    },
    "seeded once": {
        "    torch.manual_seed(seed)\n": "",
        "    rows = []\n": "    rows = []\n    torch.manual_seed(0)\n",
    },
    "no clamp": {"clamp_dale(p)": "pass"},
    "clamp before the step": {
        "            optimizer.step()\n            for p in network.layers:\n                clamp_dale(p)\n": (
            "            for p in network.layers:\n                clamp_dale(p)\n            optimizer.step()\n"
        )
    },
    "training accuracy reported": {"accuracy(network, test_x, test_y)": "accuracy(network, train_x, train_y)"},
    "best epoch reported": {"test_accuracy=accuracies[-1]": "test_accuracy=max(accuracies)"},
    "unequal steps": {"range(epochs)": "range(epochs + (condition == 'full'))"},
}
