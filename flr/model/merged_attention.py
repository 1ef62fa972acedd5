"""Attention to a prompt that many rows share and to each row's own few tokens, in two calls that are merged.

Rows i attend to L columns of the prompt (part 1) and to columns of their own (part 2). Each part gives its result and
the logarithm of its softmax's denominator:

    o_p = Σ_j exp(s_ij - z_p) v_j,    z_p = log Σ_j exp(s_ij),    j over the columns of part p
    z = log(exp z_1 + exp z_2),       o = exp(z_1 - z) o_1 + exp(z_2 - z) o_2

Backward, P_ij = exp(s_ij - z) and δ_i = do_i · o_i are those of the whole row. A part's own backward computes P and δ
from the denominator and the result that it is given, so with the merged z and o its gradients are the part's share,
exactly: those of its keys and values as they are, those of the queries to be added up (as ring attention does).

No mask of the rows by all columns exists, the prompt's keys and values are neither copied nor joined with the rows'
own, and none are repeated for the query heads that share them. What a GPU computes has been called with shapes alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ATEN = torch.ops.aten
_SCORES = 1 << 16  # of a block of rows that are in the cache of one core (256 KB in float32)
_FEW = 1 << 15  # scores of a key head, below which a call of the kernel costs less than Python's of three products
_ROWS = 32  # to which the memory-efficient kernel wants the denominators aligned


class _Part(NamedTuple):
    """What some rows [R, H, n, d] look at."""

    key: Tensor  # [R, H_kv, c, d]
    value: Tensor  # [R, H_kv, c, d]
    mask: Tensor | None  # added to scores, broadcast to [R, H, n, c]
    causal: bool  # column j by rows from j on alone; c = n, no mask
    scale: float


class _Found(NamedTuple):
    """What a part gives."""

    out: Tensor  # [R, H, n, d]
    lse: Tensor  # [R, H, n], float32 or float64
    random: tuple[Tensor, ...]  # what a device's backward is given back


def prompt_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a prompt's columns, ``dtype`` [B, 1, 1, L]: 0 on tokens of ``mask`` [B, L].

    Elsewhere it is so low that the columns weigh nothing beside any other, yet a number: a row that sees no column of
    the prompt has a finite result of part 1, whose weight in the whole is 0.

    Example:
        >>> prompt_bias(torch.tensor([[0, 1]]), torch.float16)
        tensor([[[[-32752.,      0.]]]], dtype=torch.float16)
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(mask == 0, torch.finfo(dtype).min / 2)[:, None, None]


def merged_attention(
    query: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    own_mask: Tensor | None = None,
    members: int = 1,
    scale: float | None = None,
) -> Tensor:
    """softmax(q · [prompt's keys, own keys]ᵀ) · [prompt's values, own values]: [B, H, G·n, d], in the queries' dtype.

    Gradients reach queries, keys and values, those of the prompt, too, where they need one. Under autocast all are of
    its dtype first, as for ``scaled_dot_product_attention``.

    Args:
        query: [B, H, G·n, d], the n rows of one member after the other's.
        prompt: keys and values [B, H_kv, L, d]; H is a multiple of H_kv.
        own: keys and values [B·G, H_kv, c, d], of the members.
        bias: [B, 1, 1, L], see :func:`prompt_bias`; None where all rows see the whole prompt.
        own_mask: added to the scores of own columns, broadcast to [B·G, H, n, c]; every row must see one. None for
            causal: c = n, and row i sees the columns up to i.
        members: G.
        scale: of scores; by default d^-½.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4, 8)  # two members of two tokens
        >>> prompt = torch.randn(2, 1, 2, 5, 8).unbind()
        >>> out = merged_attention(q, prompt, (apart(k, 2), apart(v, 2)), members=2)
        >>> sees = torch.ones(4, 9).tril(5)
        >>> sees[2:, 5:7] = 0  # the other member's
        >>> k, v = torch.cat([prompt[0], k], 2), torch.cat([prompt[1], v], 2)
        >>> torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, sees.bool()), atol=1e-6)
        True
    """
    kind = query.device.type
    tensors: tuple[Tensor, ...] = (query, *prompt, *own)
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        tensors = tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    masks = (None if x is None else _in_dtype(x, tensors[0].dtype) for x in (bias, own_mask))
    return _Merged.apply(*tensors, *masks, members, scale)


def _in_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask if mask.dtype == dtype else mask.clamp_min(torch.finfo(dtype).min / 2).to(dtype)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        own_mask: Tensor | None,
        members: int,
        scale: float,
    ) -> Tensor:
        first = _attend(query, _Part(prompt_key, prompt_value, bias, False, scale))
        own = _attend(apart(query, members), _Part(key, value, own_mask, own_mask is None, scale))
        own_out, own_lse = together(own.out, members), together(own.lse, members)
        weight = torch.sigmoid(first.lse - own_lse)[..., None]  # exp(z_1 - z)
        out = torch.lerp(own_out.to(weight.dtype), first.out.to(weight.dtype), weight)
        # torch 2.11 compiles a result of a cast to its own dtype with a gradient of 0
        out = out if out.dtype == query.dtype else out.to(query.dtype)
        lse = torch.logaddexp(first.lse, own_lse)
        ctx.members, ctx.scale, ctx.randoms = members, scale, len(first.random)
        ctx.save_for_backward(
            query, prompt_key, prompt_value, key, value, bias, own_mask, out, lse, *first.random, *own.random
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, prompt_key, prompt_value, key, value, bias, own_mask, out, lse, *random = ctx.saved_tensors
        grad = grad.contiguous() if grad.stride(-1) != 1 else grad  # of a sum it is one number, expanded
        part = _Part(prompt_key, prompt_value, bias, False, ctx.scale)
        whole = _Found(out, lse, tuple(random[: ctx.randoms]))
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]) and _by_blocks(query, part):
            first: tuple[Tensor | None, ...] = (_query_gradient(grad, query, part, whole), None, None)
        else:
            first = _attend_backward(grad, query, part, whole)
        part = _Part(key, value, own_mask, own_mask is None, ctx.scale)
        whole = _Found(apart(out, ctx.members), apart(lse, ctx.members), tuple(random[ctx.randoms :]))
        own = _attend_backward(apart(grad, ctx.members), apart(query, ctx.members), part, whole)
        assert first[0] is not None
        return first[0] + together(own[0], ctx.members), *first[1:], *own[1:], None, None, None, None


def _by_blocks(query: Tensor, part: _Part) -> bool:
    """Whether :func:`_query_gradient` is to be taken: a compiler would unroll its loops, and few scores do not pay."""
    if query.device.type != "cpu" or query.element_size() < 4 or torch.compiler.is_compiling():
        return False
    return query.shape[1] * query.shape[2] * part.key.shape[2] >= _FEW * part.key.shape[1]


def apart(x: Tensor, members: int) -> Tensor:
    """[B, H, G·n, …] as [B·G, H, n, …], without a copy where a token's heads lie together, as projections give them."""
    if members == 1:
        return x
    return x.transpose(1, 2).unflatten(1, (members, -1)).flatten(0, 1).transpose(1, 2)


def together(x: Tensor, members: int) -> Tensor:
    """[B·G, H, n, …] as [B, H, G·n, …]."""
    if members == 1:
        return x
    return x.transpose(1, 2).unflatten(0, (-1, members)).flatten(1, 2).transpose(1, 2)


def _attend(query: Tensor, part: _Part) -> _Found:
    """Result and denominators, by the device's own attention."""
    key, value, mask, causal, scale = part
    kernel = _kernel(query, part)
    if kernel == "cpu":
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        return _Found(out, lse, ())
    if kernel == "flash":
        out, lse, _, _, _, _, *random, _ = _ATEN._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return _Found(out, lse, tuple(random))
    if kernel == "efficient":
        groups = query.shape[1] // key.shape[1]
        rows, mask, causal = folded(query, groups), _rows_of(mask, query, part, groups), causal and groups == 1
        out, lse, *random = _ATEN._scaled_dot_product_efficient_attention(
            rows, key, value, mask, True, 0.0, causal, scale=scale
        )
        return _Found(unfolded(out, groups), unfolded(lse[..., : rows.shape[2]], groups), tuple(random))
    scores = _scores(query, part)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(value.dtype)
    return _Found((weights @ value[:, :, None]).flatten(1, 2), lse.flatten(1, 2), ())


def _attend_backward(grad: Tensor, query: Tensor, part: _Part, whole: _Found) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values by a part, given result and denominators of the whole rows."""
    key, value, mask, causal, scale = part
    out, lse, random = whole
    kernel = _kernel(query, part)
    if kernel == "cpu":
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    if kernel == "flash":
        sizes = (None, None, query.shape[2], key.shape[2], 0.0, causal)
        return _ATEN._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse.contiguous(), *sizes, *random, scale=scale
        )
    if kernel == "efficient":
        groups = query.shape[1] // key.shape[1]
        rows, mask, causal = folded(query, groups), _rows_of(mask, query, part, groups), causal and groups == 1
        room = -rows.shape[2] % _ROWS
        lse = torch.nn.functional.pad(folded(lse, groups), (0, room), value=torch.inf).contiguous()
        of_rows, of_key, of_value, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            folded(grad, groups), rows, key, value, mask, folded(out, groups), lse, *random, 0.0,
            [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        return unfolded(of_rows, groups), of_key, of_value
    grad, rows, out, lse = (x.unflatten(1, (key.shape[1], -1)) for x in (grad, query, out, lse))
    weights = (_scores(query, part) - lse[..., None]).exp()
    delta = (grad * out).sum(-1, keepdim=True)
    of_scores = scale * weights * (grad @ value[:, :, None].mT - delta)
    of_key = (of_scores.to(rows.dtype).mT @ rows).sum(2)
    of_value = (weights.to(grad.dtype).mT @ grad).sum(2)
    return (of_scores.to(key.dtype) @ key[:, :, None]).flatten(1, 2), of_key, of_value


def _kernel(query: Tensor, part: _Part, kind: str = "") -> str:
    """Which attention of a kind of device, by default the tensors', gives denominators and takes those of the whole."""
    kind, size = kind or query.device.type, query.shape[-1]
    if kind == "cpu":
        return "cpu"
    if kind == "cuda" and size % 8 == 0:
        half = query.dtype in (torch.float16, torch.bfloat16)
        if half and part.mask is None and size <= 256 and torch.version.hip is None:
            return "flash"
        if half or query.dtype == torch.float32:
            return "efficient"
    return "plain"


def _scores(query: Tensor, part: _Part) -> Tensor:
    """[R, H_kv, H / H_kv, n, c] in float32 or float64."""
    key, _, mask, causal, scale = part
    rows = query.unflatten(1, (key.shape[1], -1))
    scores = (rows @ key[:, :, None].mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if mask is not None:
        scores = scores + mask[:, :, None]  # [R or 1, 1, 1, n or 1, c]
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def _rows_of(mask: Tensor | None, query: Tensor, part: _Part, groups: int) -> Tensor | None:
    """The mask of folded rows [R, H_kv, g·n, c]; that of causal ones, too, where there are several heads a key head.

    Columns are padded to 16 in memory, as kernels want them.
    """
    count, columns = query.shape[2], part.key.shape[2]
    if part.causal and groups > 1:
        later = torch.ones(count, columns, dtype=torch.bool, device=query.device).triu(1)
        mask = torch.zeros(1, 1, count, columns, dtype=query.dtype, device=query.device).masked_fill(later, -torch.inf)
    if mask is None:
        return None
    mask = torch.nn.functional.pad(mask, (0, -columns % 16))
    if mask.shape[-2] > 1:
        mask = mask.repeat(1, 1, groups, 1)
    return mask[..., :columns].expand(query.shape[0], part.key.shape[1], groups * count, columns)


def folded(x: Tensor, groups: int) -> Tensor:
    """Heads that share a key head as rows of one: [R, g·H, n, …] as [R, H, g·n, …]."""
    return x if groups == 1 else x.unflatten(1, (-1, groups)).flatten(2, 3)


def unfolded(x: Tensor, groups: int) -> Tensor:
    """[R, H, g·n, …] as [R, g·H, n, …]."""
    return x if groups == 1 else x.unflatten(2, (groups, -1)).flatten(1, 2)


def _query_gradient(grad: Tensor, query: Tensor, part: _Part, whole: _Found) -> Tensor:
    """That of the queries alone, for a CPU: three products of rows and columns instead of five.

    Block by block of rows, so that the scores between the products stay in the core's cache.
    """
    key, value, mask, _, scale = part
    groups, step = query.shape[1] // key.shape[1], max(16, _SCORES // key.shape[2])
    rows, grads = folded(query, groups), folded(grad, groups)
    delta = (grads * folded(whole.out, groups)).sum(-1, keepdim=True)
    lse = folded(whole.lse, groups)[..., None].to(rows.dtype)
    made = torch.empty_like(rows)
    for user in range(len(rows)):
        for head in range(key.shape[1]):
            keys, values = key[user, head], value[user, head].T
            for block in range(0, rows.shape[2], step):
                at = (user, head, slice(block, block + step))
                weights = torch.addmm(lse[at], rows[at], keys.T, alpha=scale, beta=-1)
                if mask is not None:
                    weights += mask[user % len(mask), 0]
                of_weights = torch.addmm(delta[at], grads[at], values, beta=-1)
                torch.mm(weights.exp_().mul_(of_weights), keys, out=made[at])
    return unfolded(made.mul_(scale), groups)
