"""Products of masks in full float32, also where others may be rounded to TF32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import energy_score, monte_carlo_nll
from models.products import exact_product


class Products(TorchDispatchMode):
    """Notes for each product of matrices whether TF32 was allowed in it."""

    def __init__(self):
        super().__init__()
        self.allowed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.baddbmm):
            self.allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32():
    """Allows it, as --tf32 True does."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("loss, products", [
    (lambda x, masks: monte_carlo_nll(x, masks), 2),  # masks have no gradient
    (lambda x, masks: energy_score(x.sigmoid(), masks), 2 + 3)])
def test_neither_loss_is_computed_in_tf32_nor_is_its_gradient(loss, products, tf32):
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with Products() as found:
        loss(x, (torch.rand(2, 3, 6, 6) < 0.5).float()).backward()
    assert found.allowed == [False] * products
    assert torch.backends.cuda.matmul.allow_tf32 and x.grad.abs().sum() > 0


def test_it_is_torch_s_product_and_has_its_gradient():
    a, b = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 4, 5, requires_grad=True)
    found = exact_product(a, b)
    torch.testing.assert_close(found, a @ b.transpose(1, 2))
    both = a.double(), b.double()  # the product is of float32 whatever it is given
    assert torch.autograd.gradcheck(exact_product, both, atol=1e-2, eps=1e-2)


def test_under_bfloat16_it_stays_in_float32():
    a = torch.randn(1, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = exact_product(a, a)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, a @ a.transpose(1, 2), rtol=1e-6, atol=1e-6)
