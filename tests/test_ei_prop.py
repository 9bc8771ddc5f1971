import pytest
import torch

import ei_prop
from ei_prop import divide, scale_gradient, smallest_positive, stabilize, straight_through

# One sample each: no zeros, some zeros, silent.
I_DIV = torch.tensor([[[3.0, 2.0], [5.0, 4.0]], [[0.0, 0.5], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])


def test_a_zero_borrows_the_smallest_positive_value_of_its_own_sample():
    out = stabilize(I_DIV)
    assert torch.equal(out[0], I_DIV[0])
    assert out[1].tolist() == [[0.5, 0.5], [2.0, 0.5]]
    assert (out[2] == 1).all() and (stabilize(I_DIV, silent=7.0)[2] == 7).all()
    assert smallest_positive(I_DIV).tolist() == [[[2]], [[0.5]], [[torch.inf]]]
    for shape in ((3, 4), (3, 2, 2), (3, 2, 1, 2)):
        assert smallest_positive(I_DIV.view(shape)).shape == (3, *[1] * (len(shape) - 1))


def test_straight_through_the_gradient_reaches_i_div_itself():
    x = I_DIV.clone().requires_grad_()
    grad = torch.randn(I_DIV.shape)
    stabilize(x).backward(grad)
    assert torch.equal(x.grad, grad)
    value = torch.randn(I_DIV.shape, requires_grad=True)
    x.grad = None
    out = straight_through(x, value)
    torch.testing.assert_close(out, value)
    out.backward(grad)
    assert torch.equal(x.grad, grad) and value.grad is None


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


def test_scale_gradient():
    w = torch.randn(3, 2, requires_grad=True)
    out = scale_gradient(w, 0.25)
    assert torch.equal(out, w)
    out.backward(torch.ones(3, 2))
    assert torch.equal(w.grad, torch.full((3, 2), 0.25))
    for factor in (3.0, -1.0, 0.0):
        (grad,) = torch.autograd.grad(scale_gradient(w, factor).square().sum(), w)
        assert torch.equal(scale_gradient(w, factor), w) and torch.equal(grad, factor * 2 * w)


def test_each_name_of_the_table_is_a_stabilization(monkeypatch):
    def largest(i_div):
        return i_div.amax(tuple(range(1, i_div.dim())), keepdim=True)

    monkeypatch.setitem(ei_prop.STABILIZERS, "largest", largest)
    out = stabilize(I_DIV, "largest")
    assert out[0].tolist() == I_DIV[0].tolist() and out[1].tolist() == [[2, 0.5], [2, 2]]
    assert not out[2].any()  # what it returns is taken as it is; only infinity stands for "nothing positive"
    current = torch.ones_like(I_DIV)
    assert divide(current, I_DIV, "largest")[1].tolist() == [[0.5, 2], [0.5, 0.5]]
    with pytest.raises(TypeError):
        stabilize(I_DIV, "unknown")


def test_first_and_second_derivatives_of_the_quotient():
    """The divisor counts as I_div plus a constant, so d(c / v) = dc / v - c dv / v^2, and so on, with v the divisor."""
    i_div = I_DIV[:2].double().requires_grad_()
    current = torch.randn(2, 2, 2, dtype=torch.double, requires_grad=True)
    v = stabilize(i_div).detach()
    grads = torch.autograd.grad(divide(current, i_div).sum(), (current, i_div), create_graph=True)
    torch.testing.assert_close(grads[0], 1 / v)
    torch.testing.assert_close(grads[1], -current / v**2)
    torch.testing.assert_close(torch.autograd.grad(grads[1].sum(), i_div)[0], 2 * current / v**3)


def test_the_demonstration(demonstration):
    lines = demonstration("ei_prop.py").splitlines()
    table = lines[lines.index("adaptive, STE") :]
    for i, (divided, balanced_grad, i_div_grad) in enumerate([
        ([2, 0.5, 0.5, 0.5], [0.5, 2, 2, 2], [-0.15, 0, 1.2, -1.6]),
        ([2, 0.5, 0.5, 0.5], [0.5, 2, 2, 2], [-0.15, 0, 0, -0.4]),
        ([2, 1e-8, 1e-8, 0.5], [0.5, 1e8, 1e8, 2], [-0.15, 0, 3e15, -1.6]),
    ]):  # fmt: skip
        rows = [[float(v) for v in line.split()[-4:]] for line in table[7 * i + 1 : 7 * i + 7]]
        assert rows[0] == [0.6, 0, -0.3, 0.4] and rows[1] == [2, 0, 0, 0.5]
        assert rows[2] == pytest.approx(divided) and rows[4] == pytest.approx(balanced_grad)
        assert rows[3] == pytest.approx([a / b for a, b in zip(rows[0], divided, strict=True)])
        assert rows[5] == pytest.approx(i_div_grad)
    assert [table[i] for i in (0, 7, 14)] == ["adaptive, STE", "adaptive, no STE", "eps = 1e-8"]
    assert lines[-1].startswith("scale_gradient(w, 1/9): forward [1.0, 2.0], dL/dw [0.1111, 0.1111]")
