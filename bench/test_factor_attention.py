"""K-factor attention from queries to factor values: ours, the same absorbed form through what PyTorch offers (eager,
compiled, SDPA, FlexAttention), and projected keys and values as LatentR3 has them.

Most of the distance to ``projected`` is the algebra of the absorbed form, not the kernel: the other rows say how much.
SDPA and FlexAttention give values alone, ours log-sum-exp, overlap and entropy, too.

``flr`` is whatever dispatch picks: Triton on a GPU, the reference on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flr_kernels import factor_attention

from .backends import backend
from .baselines import attention as baselines
from .harness import kernel_clock, label, rotating, rotation
from .machine import DEVICE, ON_GPU

TARGETS = {"eager": 5.0, "compiled": 2.0, "projected": 8.0} if ON_GPU else {"projected": 5.0}


def shape_of(batch: int, length: int, size: int, factors: int = 4, dtype: torch.dtype = torch.float32) -> dict:
    return {"B": batch, "L": length, "D": size, "K": factors, "dtype": dtype}


BF16 = torch.bfloat16
CASES = pytest.mark.cases(
    quick=[shape_of(2, 128, 512)],
    default=[shape_of(4, 256, 1536), shape_of(32, 64, 256)],
    full=[shape_of(4, 256, 1536, k) for k in (1, 8, 16)] + [shape_of(1, 2048, 1536), shape_of(4, 256, 4096)],
    gpu=[
        shape_of(64, 512, 1536, 4, BF16),
        shape_of(64, 512, 4096, 4, BF16),
        shape_of(512, 64, 1536, 4, BF16),
        shape_of(1, 4096, 4096, 4, BF16),
        shape_of(16, 2048, 2048, 8, BF16),
    ],
    gpu_full=[shape_of(64, 512, 1536, 4, torch.float16), shape_of(16, 512, 1536)],
)


def ours(*inputs: Tensor) -> tuple[Tensor, ...]:
    return baselines.absorbed(factor_attention, *inputs)


def input_set(seed: int, shape: dict, grad: bool) -> tuple[Tensor, ...]:
    batch, length, size, factors, dtype = (shape[k] for k in ("B", "L", "D", "K", "dtype"))
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*dims: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(dims, generator=generator, device=DEVICE) * scale).to(dtype)

    h = normal(batch, length, size).requires_grad_(grad)
    q = normal(batch, factors, size // factors).requires_grad_(grad)
    weights = [normal(size, size, scale=size**-0.5) for _ in range(2)]
    first = torch.randint(0, max(length // 8, 1), (batch, 1), generator=generator, device=DEVICE)
    return h, q, *weights, torch.arange(length, device=DEVICE) >= first  # left padding of up to an eighth


def exact_of(inputs: tuple[Tensor, ...], backward: bool) -> list[Tensor]:
    """Of the first two users in float64: factor values, or the gradients of h and q for the values themselves."""
    h, q, *weights, mask = (x.detach().double() if x.is_floating_point() else x for x in inputs)
    h, q = (x[:2].requires_grad_(backward) for x in (h, q))
    values = baselines.projected(h, q, *weights, mask[:2])[0]
    return list(torch.autograd.grad(values, (h, q), values.detach())) if backward else [values]


def check_equal(name: str, found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """``found`` is what float64 gives, within what the dtype allows."""
    bound = {torch.float32: 5e-3 if ON_GPU else 1e-4, torch.float16: 5e-3, BF16: 3e-2}[dtype]
    for ours, theirs in zip(found, exact, strict=True):
        error = float((ours[:2].double() - theirs).norm() / theirs.norm())
        if not error < bound:
            raise AssertionError(f"{name}: expected a relative error below {bound}, got {error}")


def flex_of(sets: list[tuple[Tensor, ...]], factors: int) -> Callable[..., tuple[Tensor, ...]]:
    """FlexAttention for each input set's mask, made once.

    Where it cannot run (its kernel may ask for more shared memory than there is), the race says so.
    """
    each = {id(inputs[4]): baselines.flex(inputs[4], factors) for inputs in sets}

    def call(h: Tensor, q: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return each[id(mask)](h, q, w_k, w_v, mask)

    return call


@CASES
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
def test_factor_attention(shape, backward, tier, race):
    history = shape["B"] * shape["L"] * shape["D"] * shape["dtype"].itemsize
    vectors = shape["B"] * shape["K"] * shape["D"] * 4
    sets = [input_set(seed, shape, backward) for seed in range(rotation(history))]

    def train(call: Callable) -> Callable:
        def step(h, q, w_k, w_v, mask):
            values = call(h, q, w_k, w_v, mask)[0]
            return torch.autograd.grad(values, (h, q), values.detach())

        return step

    calls = {"flr": ours, "eager": baselines.eager, "sdpa": baselines.sdpa, "projected": baselines.projected}
    if tier != "quick":
        calls["compiled"] = baselines.compiled()
        if ON_GPU or not backward:
            calls["flex"] = flex_of(sets, shape["K"])
    exact = exact_of(sets[0], backward)

    def agree(name: str, results: tuple[Tensor, ...]) -> None:
        check_equal(name, list(results) if backward else [results[0]], exact, shape["dtype"])

    timed = {name: rotating(train(f) if backward else torch.no_grad()(f), sets) for name, f in calls.items()}
    race(
        f"{'train' if backward else 'forward'} {label(shape)}",
        timed,
        suite="factor_attention",
        clock=kernel_clock(),
        shape=shape,
        check=lambda: agree("flr", (train(ours) if backward else ours)(*sets[0])),
        agree=agree,
        # the history is read once forward; once more, and its gradient written, in the backward
        bytes_moved=history * (3 if backward else 1) + vectors * (4 if backward else 2),
        # scores and pooling: 2 products of [K, D] and [L, D]; their backward has 5, scores again included
        flops=2 * shape["B"] * shape["K"] * shape["L"] * shape["D"] * (7 if backward else 2),
        target={name: TARGETS[name] for name in TARGETS if name in timed and shape["D"] >= 1536},
    )


@CASES
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_factor_attention_op(shape, backward, tier, race):
    """The op alone, without the products that make queries and values: how near it comes to reading H once.

    The backward is the operator's own, from a forward that is not timed. ``eager`` has no backward of its own to call.
    """
    batch, length, size, factors, dtype = (shape[k] for k in ("B", "L", "D", "K", "dtype"))
    generator = torch.Generator(DEVICE).manual_seed(0)
    history, vectors = batch * length * size * dtype.itemsize, batch * factors * size
    sets = []
    for _ in range(rotation(history)):
        h, u = (torch.randn(batch, n, size, generator=generator, device=DEVICE) for n in (length, factors))
        h, u = h.to(dtype), (2 * u * size**-0.5).to(dtype)
        saved = factor_attention(h, u)
        grads = [torch.randn(x.shape, generator=generator, device=DEVICE) for x in saved]
        sets.append((h, u, None, *saved, *grads, True) if backward else (h, u))

    def check():
        h, u = (x[:2].double().requires_grad_(backward) for x in sets[0][:2])
        exact = factor_attention(h, u)
        if backward:
            found = [x[:2] for x in ours(*sets[0])]
            exact = torch.autograd.grad(exact, (h, u), [x[:2].double() for x in sets[0][7:11]])
        else:
            found = [x[:2] for x in ours(*sets[0])]
        bound = {torch.float32: 1e-4, torch.float16: 3e-3, BF16: 1e-2}[dtype]
        for x, y in zip(found, exact, strict=True):
            error = float((x.double() - y).norm() / y.norm())
            if not error < bound:
                raise AssertionError(f"factor_attention: expected a relative error below {bound}, got {error}")

    ours = torch.ops.flr.factor_attention_backward.default if backward else factor_attention
    calls = {"flr": ours}
    if ON_GPU:
        calls["triton"] = backend("factor_attention=triton")(ours)
    if not backward:
        calls["eager"] = lambda h, u: baselines.plain_attend(h, u, h.new_ones(1, 1, dtype=torch.bool))
    race(
        f"op {'backward' if backward else 'forward'} {label(shape)}",
        {name: rotating(torch.no_grad()(call), sets) for name, call in calls.items()},
        suite="factor_attention",
        clock=kernel_clock(),
        shape=shape,
        check=check,
        bytes_moved=history * (2 if backward else 1) + vectors * (dtype.itemsize + 4) * (2 if backward else 1),
        flops=2 * batch * factors * length * size * (5 if backward else 2),
    )
