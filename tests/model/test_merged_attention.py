"""Two calls and their denominators: the attention under one mask over all columns, and its gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from flr.model import merged_attention as module
from flr.model.merged_attention import apart, merged_attention, prompt_bias, together

#: Users, members, tokens of a member, earlier ones, prompt columns, query heads, key heads, head size.
SIZES = [(2, 3, 4, 0, 9, 6, 2, 8), (1, 1, 7, 0, 33, 4, 4, 16), (3, 2, 5, 2, 17, 8, 1, 8), (2, 1, 1, 3, 1, 3, 3, 4)]


def case(size, dtype, padding=False, frozen=False):
    """Arguments of ``merged_attention``, and those of the same under one mask."""
    torch.manual_seed(0)
    users, members, count, before, length, heads, key_heads, width = size

    def states(rows, heads, columns):  # as projections leave them: [rows, columns, heads, width] in memory
        return torch.randn(rows, columns, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()

    query = states(users, heads, members * count)
    prompt = tuple(states(users, key_heads, length).detach().requires_grad_(not frozen) for _ in "kv")
    own = tuple(states(users * members, key_heads, before + count) for _ in "kv")
    mask = torch.ones(users, length, dtype=torch.int64)
    if padding:
        mask[0, : length // 2] = 0
        mask[-1] = 0  # nothing at all
    seen = torch.ones(count, before + count, dtype=torch.bool).tril(before)
    whole = torch.zeros(users, 1, members * count, length + members * (before + count), dtype=torch.bool)
    whole[..., :length] = mask[:, None, None].bool()
    for n in range(members):
        columns = length + n * (before + count)
        whole[:, :, n * count : (n + 1) * count, columns : columns + before + count] = seen
    own_mask = torch.zeros(1, 1, *seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf) if before else None
    bias = prompt_bias(mask, dtype) if padding else None
    return SimpleNamespace(
        query=query, prompt=prompt, own=own, whole=whole, arguments=(bias, own_mask, members, 0.3), members=members
    )


def merged(given):
    return merged_attention(given.query, given.prompt, given.own, *given.arguments)


def masked(given):
    keys, values = (torch.cat([a, together(b, given.members)], 2) for a, b in zip(given.prompt, given.own, strict=True))
    return scaled_dot_product_attention(given.query, keys, values, given.whole, scale=0.3, enable_gqa=True)


def differentiated(out, given):
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    wanted = [x for x in (given.query, *given.prompt, *given.own) if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, seed)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kernel", ["cpu", "plain"])
@pytest.mark.parametrize("size", SIZES)
def test_result_and_gradients_equal_those_under_one_mask(size, kernel, dtype, bound, padding, frozen, monkeypatch):
    monkeypatch.setattr(module, "_kernel", lambda *_: kernel)
    monkeypatch.setattr(module, "_by_blocks", lambda *_: frozen and dtype.itemsize > 2)
    given = case(size, dtype, padding, frozen)
    found, expected = (differentiated(way(given), given) for way in (merged, masked))
    assert found[0].shape == given.query.shape
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound * float(theirs.abs().max()))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_the_mask_does(dtype, frozen):
    given, exact = case(SIZES[0], dtype, True, frozen), case(SIZES[0], torch.float64, True, frozen)
    pairs = zip((exact.query, *exact.prompt, *exact.own), (given.query, *given.prompt, *given.own), strict=True)
    for wide, narrow in pairs:
        wide.data.copy_(narrow.data)
    truth = differentiated(masked(exact), exact)
    for ours, theirs, true in zip(
        differentiated(merged(given), given), differentiated(masked(given), given), truth, strict=True
    ):
        assert ours.dtype == dtype
        error, bound = ((x.double() - true).abs().max() for x in (ours, theirs))
        assert error <= 2 * bound + 2 * torch.finfo(dtype).eps * true.abs().max()


def test_gradients_by_differences():
    given = case((2, 2, 3, 0, 4, 2, 1, 4), torch.float64, True)
    inputs = (given.query, *given.prompt, *given.own)

    def function(query, *rest):
        return merged_attention(query, rest[:2], rest[2:], *given.arguments)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("field", ["lse", "out"])
def test_the_statistics_of_a_part_alone_would_be_found(field, monkeypatch):
    """A backward with what a part itself gave, not with what the whole rows have. Values need no result."""
    given = case(SIZES[0], torch.float64)
    expected = differentiated(masked(given), given)
    real, attend = module._attend_backward, module._attend

    def wrong(grad, query, part, whole):
        return real(grad, query, part, whole._replace(**{field: getattr(attend(query, part), field)}))

    monkeypatch.setattr(module, "_attend_backward", wrong)
    found = differentiated(merged(given), given)
    torch.testing.assert_close(found[0], expected[0])
    for name, ours, theirs in zip(("q", "k", "v", "k", "v"), found[1:], expected[1:], strict=True):
        assert (ours - theirs).norm() > 0.05 * theirs.norm() or (name, field) == ("v", "out")


def test_extreme_scores():
    given = case(SIZES[0], torch.float64, True)
    with torch.no_grad():
        given.query.mul_(1e4)
    found, expected = (differentiated(way(given), given) for way in (merged, masked))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * max(1.0, float(theirs.abs().max())))


def test_rows_apart_are_views():
    x = torch.randn(2, 6, 3, 8).transpose(1, 2)  # [B, H, G·n, d]
    assert apart(x, 2).data_ptr() == x.data_ptr()
    assert apart(x, 2)[1, 0, 0].tolist() == x[0, 0, 3].tolist()
    assert torch.equal(together(apart(x, 2), 2), x)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_whole(padding, frozen):
    torch._dynamo.reset()
    given = case(SIZES[2], torch.float32, padding, frozen)
    program = torch.compile(merged_attention, fullgraph=True, backend="aot_eager")
    found = differentiated(program(given.query, given.prompt, given.own, *given.arguments), given)
    for ours, theirs in zip(found, differentiated(masked(given), given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 3])
def test_a_gpus_operations_take_what_they_are_given(before, dtype, padding, monkeypatch):
    """Shapes and arguments alone: their kernels have not run (docs/gpu-todo.md)."""
    called, real = [], module._kernel
    monkeypatch.setattr(module, "_kernel", lambda query, part: real(query, part, "cuda"))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # which knows no meta

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_scaled_dot_product" in func.name():
                called.append(func.name().split("_scaled_dot_product_")[1])
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), Called():
        query = torch.empty(2, 10, 14, 64, dtype=dtype).transpose(1, 2).requires_grad_()
        prompt = tuple(torch.empty(2, 2, 37, 64, dtype=dtype, requires_grad=True) for _ in "kv")
        own = tuple(torch.empty(4, 2, before + 5, 64, dtype=dtype, requires_grad=True) for _ in "kv")
        bias = prompt_bias(torch.ones(2, 37), dtype) if padding else None
        own_mask = torch.zeros(1, 1, 5, before + 5, dtype=dtype) if before else None
        out = merged_attention(query, prompt, own, bias, own_mask, 2)
        found = torch.autograd.grad(out.sum(), (query, *prompt, *own))
        assert out.shape == query.shape
        assert out.dtype == dtype
        assert [x.shape for x in found] == [x.shape for x in (query, *prompt, *own)]
    flash = [dtype == torch.bfloat16 and not mask for mask in (padding, before > 0)]
    kinds = ["flash_attention" if x else "efficient_attention" for x in flash]
    assert called == [*kinds, *(f"{kind}_backward" for kind in kinds)]


def test_autocast():
    given = case(SIZES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = merged(given), masked(given)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
