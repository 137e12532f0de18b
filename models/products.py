"""A product of matrices in full float32, whatever --tf32 says: for sums over all the pixels of a mask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def without_tf32() -> Iterator[None]:
    """While the block runs, CUDA rounds no factor of a product to the 10 bits of TF32."""
    matmul = torch.backends.cuda.matmul
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed


class Product(torch.autograd.Function):
    """a @ b^T of (b, n, p) and (b, m, p), (b, n, m): without TF32, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with without_tf32():
            return torch.bmm(a, b.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        with without_tf32():
            return torch.bmm(grad, b) if of_a else None, torch.bmm(grad.transpose(1, 2), a) if of_b else None


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Products of all rows of a (b, n, p) with all rows of b (b, m, p): (b, n, m), differentiable once.

    TF32 keeps 10 bits of each factor, and these products are differences of near-equal sums of thousands."""
    with torch.autocast(a.device.type, enabled=False):
        return Product.apply(a.float(), b.float())
