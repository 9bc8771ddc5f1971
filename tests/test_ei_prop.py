import pytest
import torch

from ei_prop import divide, gain_control, scale_gradient, stabilize

# One sample each: no zeros, some zeros, silent.
I_DIV = torch.tensor([[[3.0, 2.0], [5.0, 4.0]], [[0.0, 0.5], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])


def test_a_zero_borrows_the_smallest_positive_value_of_its_own_sample():
    out = stabilize(I_DIV)
    assert torch.equal(out[0], I_DIV[0])
    assert out[1].tolist() == [[0.5, 0.5], [2.0, 0.5]]
    assert out[2].isfinite().all() and (out[2] > 0).all()


def test_straight_through_the_gradient_reaches_i_div_itself():
    x = I_DIV.clone().requires_grad_()
    grad = torch.randn(I_DIV.shape)
    stabilize(x).backward(grad)
    assert torch.equal(x.grad, grad)


def test_without_ste_the_lender_collects_the_gradient_of_the_borrowers():
    x = I_DIV.clone().requires_grad_()
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(3, 2, 2)
    out = stabilize(x, ste=False)
    assert torch.equal(out, stabilize(I_DIV))
    out.backward(grad)
    assert x.grad[0].tolist() == [[1, 2], [3, 4]]
    assert x.grad[1].tolist() == [[0, 2 + 1 + 4], [3, 0]]
    assert x.grad[2].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("ste", [True, False])
def test_all_samples_silent(ste):
    x = torch.zeros(4, 6, 2, 2, requires_grad=True)
    current = torch.randn(4, 6, 2, 2, requires_grad=True)
    assert stabilize(x, ste=ste).isfinite().all()
    out = divide(current, x, ste=ste)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(current.grad, torch.zeros_like(x))


@pytest.mark.parametrize("ste", [True, False])
def test_fixed_epsilon_adds_the_constant(ste):
    x = I_DIV.clone().requires_grad_()
    out = stabilize(x, eps=1e-6, ste=ste)
    assert torch.equal(out, I_DIV + 1e-6)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3, 3)])
@pytest.mark.parametrize("eps, ste", [("adaptive", True), ("adaptive", False), (1e-3, True)])
def test_divide_is_the_quotient_forward_and_backward(shape, eps, ste):
    i_div = torch.rand(shape) * (torch.rand(shape) < 0.6)
    i_div[0], i_div[1] = 0, i_div[1] + 0.1  # a silent sample, one without zeros
    current, grad = torch.randn(shape), torch.randn(shape)
    current[0] = 0
    ours = [t.clone().requires_grad_() for t in (current, i_div)]
    plain = [t.clone().requires_grad_() for t in (current, i_div)]
    out = divide(*ours, eps, ste)
    out.backward(grad)
    (plain[0] / stabilize(plain[1], eps, ste)).backward(grad)
    heard = slice(1 if eps == "adaptive" else 0, None)
    for sample, i, d in zip(out[heard], current[heard], i_div[heard], strict=True):
        divisor = torch.where(d > 0, d, d[d > 0].min()) if eps == "adaptive" else d + eps
        torch.testing.assert_close(sample, i / divisor)
    assert not out[0].any()  # the silent sample
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad[heard], b.grad[heard])


@pytest.mark.parametrize("shape", [(5,), (5, 3, 3)])
@pytest.mark.parametrize("eps", ["adaptive", 1e-3])
def test_gain_control_is_the_division_and_b_e(shape, eps):
    n_e, n_i = 8, 2
    currents = torch.rand(*shape, n_e + n_i, dtype=torch.double)
    currents[..., n_e:] *= torch.rand(*shape, 1) < 0.6  # positions without inhibition
    currents[0, ..., n_e:], currents[1, ..., n_e:] = 0, 0.5  # a silent sample, one without zeros
    w, b_e = torch.rand(n_e, n_i, dtype=torch.double), torch.randn(n_e, dtype=torch.double)
    inputs = [t.requires_grad_() for t in (currents, w, b_e)]
    fused = gain_control(*inputs, eps)
    plain = divide(currents[..., :n_e], currents[..., n_e:] @ w.t(), eps) + b_e
    grad = torch.randn_like(plain)
    torch.testing.assert_close(fused, plain)
    for a, b in zip(*(torch.autograd.grad(out, inputs, grad) for out in (fused, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_scale_gradient():
    w = torch.randn(3, 2, requires_grad=True)
    out = scale_gradient(w, 0.25)
    assert torch.equal(out, w)
    out.backward(torch.ones(3, 2))
    assert torch.equal(w.grad, torch.full((3, 2), 0.25))
