"""K-factor attention from queries to factor values: ours, PyTorch eager and compiled, and projected keys and values.

Every variant computes, from the hidden states ``h`` [B, L, D] and factor queries ``q`` [B, K, F], the factor values
``v`` [B, K, F] = W_v Σ_l α_l h_l with α = softmax((W_k h) · q / √F). ``flr``, ``eager`` and ``compiled`` absorb W_k into
the query and pool raw hidden states; they also compute log-sum-exp, overlap and entropy. ``projected`` projects all L
tokens to keys and values and calls scaled_dot_product_attention, as LatentR3 does, without overlap and entropy: less work.
``flr`` is whatever dispatch picks: Triton on a GPU, the reference on the CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, ON_GPU, rotation

from flr_kernels import factor_attention

GPU_CASES = [
    # B, L, D, K, dtype
    (64, 512, 1536, 4, torch.bfloat16),
    (64, 512, 4096, 4, torch.bfloat16),
    (512, 64, 1536, 4, torch.bfloat16),
    (1, 4096, 4096, 4, torch.bfloat16),
    (16, 2048, 2048, 8, torch.bfloat16),
    (64, 512, 1536, 4, torch.float16),
    (16, 512, 1536, 4, torch.float32),
]
CPU_CASES = [(4, 256, 1536, 4, torch.float32), (32, 64, 256, 4, torch.float32)]
VARIANTS = ("flr", "eager", "compiled", "projected")


def absorbed(attend, h, q, w_k, w_v, mask):
    """Factor values by absorbed queries; ``attend`` gives context, lse, overlap, entropy."""
    factors, head = q.shape[1:]
    u = torch.einsum("kfd,bkf->bkd", w_k.view(factors, head, -1), q) / math.sqrt(head)
    context, lse, overlap, entropy = attend(h, u, mask)
    values = torch.einsum("kfd,bkd->bkf", w_v.view(factors, head, -1), context.to(h.dtype))
    return values, lse, overlap, entropy


def plain(h, u, mask):
    scores = (u @ h.transpose(1, 2)).float().masked_fill(~mask[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    alpha = (scores - lse[..., None]).exp()
    entropy = -torch.special.xlogy(alpha, alpha).sum(-1)
    return alpha.to(h.dtype) @ h, lse, alpha @ alpha.transpose(1, 2), entropy


def projected(h, q, w_k, w_v, mask):
    batch, length, _ = h.shape
    factors, head = q.shape[1:]
    keys = (h @ w_k.T).view(batch, length, factors, head).transpose(1, 2)
    values = (h @ w_v.T).view(batch, length, factors, head).transpose(1, 2)
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask[:, None, None])
    return (out[:, :, 0],)


_COMPILED = torch.compile(lambda *a: absorbed(plain, *a), dynamic=False)


def variant_call(variant):
    if variant == "projected":
        return projected
    if variant == "compiled":
        return _COMPILED
    attend = factor_attention if variant == "flr" else plain
    return lambda *a: absorbed(attend, *a)


def input_set(seed, batch, length, size, factors, dtype, grad):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)

    h = normal(batch, length, size).requires_grad_(grad)
    q = normal(batch, factors, size // factors).requires_grad_(grad)
    weights = [normal(size, size, scale=size**-0.5) for _ in range(2)]
    first = torch.randint(0, max(length // 8, 1), (batch, 1), generator=generator, device=DEVICE)
    return h, q, *weights, torch.arange(length, device=DEVICE) >= first  # left padding of up to an eighth


def check_against_float64(call, inputs, dtype):
    """No speed without a right answer: values against float64, within what the dtype allows."""
    h, q, w_k, w_v, mask = (x.detach()[:2] if x.dim() == 3 or x.dtype == torch.bool else x.detach() for x in inputs)
    exact = projected(h.double(), q.double(), w_k.double(), w_v.double(), mask)[0]
    error = (call(h, q, w_k, w_v, mask)[0].double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 5e-3 if ON_GPU else 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype], error


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize(("batch", "length", "size", "factors", "dtype"), GPU_CASES if ON_GPU else CPU_CASES)
def test_factor_attention(batch, length, size, factors, dtype, backward, variant, measure):
    call = variant_call(variant)
    shape = (batch, length, size, factors, dtype)
    # the history's bytes: read once forward; read once more and its gradient written in the backward
    history = batch * length * size * dtype.itemsize
    moved = history * (3 if backward else 1) + (4 if backward else 2) * batch * factors * size * 4
    sets = [input_set(seed, *shape, grad=backward) for seed in range(rotation(history))]
    if variant == "compiled":
        check_against_float64(lambda *a: absorbed(plain, *a), sets[0], dtype)
        torch.testing.assert_close(call(*sets[0])[0], absorbed(plain, *sets[0])[0], rtol=5e-2, atol=5e-2)
    else:
        check_against_float64(call, sets[0], dtype)

    def train(h, q, w_k, w_v, mask):
        values = call(h, q, w_k, w_v, mask)[0]
        torch.autograd.grad(values, (h, q), values.detach())

    def forward(*inputs):
        with torch.no_grad():
            call(*inputs)

    short = str(dtype).removeprefix("torch.")
    case = f"{'train' if backward else 'forward'} B{batch} L{length} D{size} K{factors} {short}"
    measure(train if backward else forward, sets, moved, case=case, variant=variant)
