"""Triton kernels of :func:`flr_kernels.factor_attention`: one read of H from device memory, forward and backward.

The formulas and symbols are those of ``op.py``. Each kernel walks over D twice, the second time backwards: the end of
the tile is still in the caches. Forward, for a tile of tokens (split s of user b), p relative to its own maximum m:

    p_kl = exp(s_kl - m_k),  l_k = Σ_l p_kl,  e_k = Σ_l p_kl (s_kl - m_k),  O_jk = Σ_l p_jl p_kl      after the first
    c_kd = Σ_l p_kl h_ld                                                                              on the second

Combination of the splits, with M_k = max_s m_sk and w_sk = exp(m_sk - M_k):

    l_k = Σ_s w_sk l_sk,                   lse_k = M_k + log l_k
    c_k = Σ_s w_sk c_sk / l_k,             O_jk = Σ_s w_sj w_sk O_sjk / (l_j l_k)
    E_k = log l_k - Σ_s w_sk (e_sk + (m_sk - M_k) l_sk) / l_k      no difference of large numbers: exact for |s| = 1e4

Backward, from α_kl = exp(s_kl - lse_k): Δ by a small kernel, s and dp on the first walk, dh and du on the second; du is
summed over the splits in fixed order.

Shapes: ``KP`` = K padded to 16 rows for the tensor cores, ``BLOCK_L`` tokens and ``BLOCK_D`` columns a step; per-factor
values are [KP, BLOCK_L] with tokens along the columns. A tile without a valid token reads nothing and costs nothing;
its partial results are never written, and the combination leaves them out. All reductions have a fixed order.

Forward program p takes tile |last - p|: with last = 0 from the first user on, with last = programs - 1 from the last
one, so that a refinement starts with the users whose history the one before has left in the L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton_launch import dot_inputs, dot_weights, dot_wide

#: Arguments whose value must not lead to one more compilation of a kernel.
_SIZES = ["length", "splits", "last", "mask_length", "mask_stride_b", "mask_stride_l", "K"]


@triton.jit
def _valid_rows(mask_ptr, mask_length, mask_stride_l, rows, length):
    """Which of ``rows`` are tokens of the history; ``mask_length`` is L, or 0 where there is no mask to read."""
    offsets = rows.to(tl.int64) * mask_stride_l
    return (rows < length) & (tl.load(mask_ptr + offsets, mask=rows < mask_length, other=1) != 0)


@triton.jit
def _combination(K, D, BLOCK_D: tl.constexpr):
    """Of a combination's program: row of the result, its user and factor, block of columns and the columns."""
    column_blocks = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)
    row, block = program // column_blocks, program % column_blocks
    return row, row // K, row % K, block, block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    h_ptr,  # [B, L, D]
    u_ptr,  # [B, K, D]
    mask_ptr,  # [B, L], bytes
    context_ptr,  # [B, splits, K, D]; with one split the result itself, as the following
    max_ptr,  # [B, splits, K]; lse with one split
    sum_ptr,  # [B, splits, K]; not written with one split
    overlap_ptr,  # [B, splits, K, K]
    entropy_ptr,  # [B, splits, K]
    h_stride_b,
    h_stride_l,
    u_stride_b,
    u_stride_k,
    mask_stride_b,
    mask_stride_l,
    length,
    splits,
    last,
    mask_length,
    D,
    K,
    KP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CACHE: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.abs(last - tl.program_id(0))
    program = tile.to(tl.int64)
    b = (tile // splits).to(tl.int64)
    rows = tile % splits * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.arange(0, KP)
    columns = tl.arange(0, BLOCK_D)
    real = k < K
    valid = _valid_rows(mask_ptr + b * mask_stride_b, mask_length, mask_stride_l, rows, length)
    some = tl.max(valid.to(tl.int32), 0)
    steps = tl.cdiv(D, BLOCK_D)
    h_rows = h_ptr + b * h_stride_b + rows.to(tl.int64)[:, None] * h_stride_l
    u_rows = u_ptr + b * u_stride_b + k.to(tl.int64)[:, None] * u_stride_k

    scores = tl.zeros([KP, BLOCK_L], ACC)
    for step in range(steps * some):
        d = step * BLOCK_D + columns
        h = tl.load(h_rows + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0, cache_modifier=CACHE)
        u = tl.load(u_rows + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        scores = dot_inputs(u, tl.trans(h), scores, WIDE, ACC)

    largest = tl.max(tl.where(valid[None, :], scores, -float("inf")), 1)
    shifted = scores - tl.where(some != 0, largest, 0.0)[:, None]
    p = tl.where(valid[None, :], tl.exp(shifted), 0.0)
    total = tl.sum(p, 1)
    entropy = tl.sum(tl.where(valid[None, :], p * shifted, 0.0), 1)
    overlap = dot_wide(p, tl.trans(p), FINE, ACC)
    if not SPLIT:  # the results themselves; a user without a valid token gets zeros and lse = -inf
        inverse = tl.where(some != 0, 1.0 / total, 0.0)
        entropy = tl.where(some != 0, tl.log(total) - entropy * inverse, 0.0)
        overlap = overlap * inverse[:, None] * inverse[None, :]
        largest = largest + tl.log(total)
        p = p * inverse[:, None]

    factors = program * K + k
    tl.store(max_ptr + factors, largest, mask=real)
    tl.store(entropy_ptr + factors, entropy, mask=real)
    tl.store(overlap_ptr + factors[:, None] * K + k[None, :], overlap, mask=real[:, None] & real[None, :])
    if SPLIT:
        tl.store(sum_ptr + factors, total, mask=real)
        walk = steps * some
    else:
        walk = steps
    for step in range(walk):
        d = (walk - 1 - step) * BLOCK_D + columns
        h = tl.load(h_rows + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0, cache_modifier=CACHE)
        context = dot_weights(p, h, tl.zeros([KP, BLOCK_D], ACC), WIDE, ACC)
        tl.store(context_ptr + factors[:, None] * D + d[None, :], context, mask=real[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def combine_kernel(
    part_context_ptr,  # [B, splits, K, D]
    part_max_ptr,  # [B, splits, K]
    part_sum_ptr,  # [B, splits, K]
    part_overlap_ptr,  # [B, splits, K, K]
    part_entropy_ptr,  # [B, splits, K]
    context_ptr,  # [B, K, D]
    lse_ptr,  # [B, K]
    overlap_ptr,  # [B, K, K]
    entropy_ptr,  # [B, K]
    splits,
    D,
    K,
    KP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row, b, k, block, d = _combination(K, D, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    j = tl.arange(0, KP)

    # the maximum of every factor; the first column of programs needs all of them for the overlap
    largest = tl.full([KP], -float("inf"), ACC)
    for start in range(0, splits, BLOCK_S):
        at = (b * splits + start + s)[:, None] * K + j[None, :]
        here = ((start + s) < splits)[:, None] & (j < K)[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(part_max_ptr + at, mask=here, other=-float("inf")), 0))
    largest = tl.where(largest > -float("inf"), largest, 0.0)  # a user without a valid token
    own = tl.sum(tl.where(j == k, largest, 0.0), 0)

    total = tl.zeros([KP], ACC)
    overlap = tl.zeros([KP], ACC)
    entropy = tl.zeros([], ACC)
    context = tl.zeros([BLOCK_D], ACC)
    for start in range(0, splits, BLOCK_S):
        split = b * splits + start + s
        inside = (start + s) < splits
        at = split[:, None] * K + j[None, :]
        here = inside[:, None] & (j < K)[None, :]
        maxima = tl.load(part_max_ptr + at, mask=here, other=-float("inf"))
        weights = tl.exp(maxima - largest[None, :])  # [BLOCK_S, KP]; 0 for tiles without a valid token
        total += tl.sum(weights * tl.load(part_sum_ptr + at, mask=here, other=0.0), 0)
        own_max = tl.load(part_max_ptr + split * K + k, mask=inside, other=-float("inf"))
        weight = tl.exp(own_max - own)
        if block == 0:
            pairs = tl.load(part_overlap_ptr + (split * K + k)[:, None] * K + j[None, :], mask=here, other=0.0)
            overlap += tl.sum(weights * weight[:, None] * pairs, 0)
            part_sum = tl.load(part_sum_ptr + split * K + k, mask=inside, other=0.0)
            shift = tl.where(weight > 0, own_max - own, 0.0)
            entropy += tl.sum(
                weight * (tl.load(part_entropy_ptr + split * K + k, mask=inside, other=0.0) + shift * part_sum)
            )
        written = (own_max > -float("inf"))[:, None] & (d < D)[None, :]
        rows = tl.load(part_context_ptr + (split * K + k)[:, None] * D + d[None, :], mask=written, other=0.0)
        context += tl.sum(weight[:, None] * rows, 0)

    own_total = tl.sum(tl.where(j == k, total, 0.0), 0)
    some = own_total > 0
    inverse = tl.where(some, 1.0 / own_total, 0.0)
    tl.store(context_ptr + row * D + d, context * inverse, mask=d < D)
    if block == 0:
        tl.store(lse_ptr + row, tl.where(some, own + tl.log(own_total), -float("inf")))
        tl.store(entropy_ptr + row, tl.where(some, tl.log(own_total) - entropy * inverse, 0.0))
        others = tl.where(total > 0, 1.0 / total, 0.0)
        tl.store(overlap_ptr + row * K + j, overlap * inverse * others, mask=j < K)


@triton.jit(do_not_specialize=_SIZES)
def delta_kernel(
    d_context_ptr,  # [B, K, D]
    context_ptr,  # [B, K, D]
    d_overlap_ptr,  # [B, K, K]
    overlap_ptr,  # [B, K, K]
    d_entropy_ptr,  # [B, K]
    entropy_ptr,  # [B, K]
    d_lse_ptr,  # [B, K]
    delta_ptr,  # [B, K]
    D,
    K,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # user and factor
    b, k = row // K, row % K
    columns = tl.arange(0, BLOCK_D)
    products = tl.zeros([BLOCK_D], ACC)
    for start in range(0, D, BLOCK_D):
        d = start + columns
        d_context = tl.load(d_context_ptr + row * D + d, mask=d < D, other=0.0)
        products += d_context * tl.load(context_ptr + row * D + d, mask=d < D, other=0.0)
    j = tl.arange(0, KP)
    down = tl.load(d_overlap_ptr + row * K + j, mask=j < K, other=0.0)
    across = tl.load(d_overlap_ptr + (b * K + j) * K + k, mask=j < K, other=0.0)
    pairs = (down + across) * tl.load(overlap_ptr + row * K + j, mask=j < K, other=0.0)
    delta = tl.sum(products) + tl.sum(pairs) - tl.load(d_lse_ptr + row)
    tl.store(delta_ptr + row, delta + tl.load(d_entropy_ptr + row) * tl.load(entropy_ptr + row))


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    h_ptr,  # [B, L, D]
    u_ptr,  # [B, K, D]
    mask_ptr,  # [B, L], bytes
    lse_ptr,  # [B, K]
    delta_ptr,  # [B, K]
    d_context_ptr,  # [B, K, D]
    d_overlap_ptr,  # [B, K, K]
    d_entropy_ptr,  # [B, K]
    dh_ptr,  # [B, L, D]
    du_ptr,  # [B, splits, K, D]; with one split the result itself
    written_ptr,  # [B, splits], whether du_ptr was written
    h_stride_b,
    h_stride_l,
    u_stride_b,
    u_stride_k,
    mask_stride_b,
    mask_stride_l,
    length,
    splits,
    mask_length,
    D,
    K,
    KP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CACHE: tl.constexpr,
    SPLIT: tl.constexpr,
    NEEDS_DH: tl.constexpr,
    DH_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // splits
    rows = (program % splits).to(tl.int32) * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.arange(0, KP)
    columns = tl.arange(0, BLOCK_D)
    real = k < K
    valid = _valid_rows(mask_ptr + b * mask_stride_b, mask_length, mask_stride_l, rows, length)
    some = tl.max(valid.to(tl.int32), 0)
    steps = tl.cdiv(D, BLOCK_D)
    h_rows = h_ptr + b * h_stride_b + rows.to(tl.int64)[:, None] * h_stride_l
    u_rows = u_ptr + b * u_stride_b + k.to(tl.int64)[:, None] * u_stride_k
    factors = b * K + k

    scores = tl.zeros([KP, BLOCK_L], ACC)
    dp = tl.zeros([KP, BLOCK_L], ACC)
    for step in range(steps * some):
        d = step * BLOCK_D + columns
        inside = real[:, None] & (d < D)[None, :]
        h = tl.trans(
            tl.load(h_rows + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0, cache_modifier=CACHE)
        )
        u = tl.load(u_rows + d[None, :], mask=inside, other=0.0)
        d_context = tl.load(d_context_ptr + factors[:, None] * D + d[None, :], mask=inside, other=0.0)
        scores = dot_inputs(u, h, scores, WIDE, ACC)
        dp = dot_weights(d_context, h, dp, WIDE, ACC)

    live = real[:, None] & valid[None, :]
    shifted = scores - tl.load(lse_ptr + factors, mask=real, other=0.0)[:, None]
    alpha = tl.where(live, tl.exp(shifted), 0.0)
    pairs = real[:, None] & real[None, :]
    down = tl.load(d_overlap_ptr + factors[:, None] * K + k[None, :], mask=pairs, other=0.0)
    across = tl.load(d_overlap_ptr + factors[None, :] * K + k[:, None], mask=pairs, other=0.0)
    dp += dot_wide(down + across, alpha, FINE, ACC)
    d_entropy = tl.load(d_entropy_ptr + factors, mask=real, other=0.0)
    dp -= d_entropy[:, None] * tl.where(alpha > 0, shifted, 0.0)
    ds = alpha * (dp - tl.load(delta_ptr + factors, mask=real, other=0.0)[:, None])
    ds = tl.where(live, ds, 0.0)

    if SPLIT:
        tl.store(written_ptr + program, some)
    if SPLIT and not NEEDS_DH:
        walk = steps * some
    else:
        walk = steps
    for step in range(walk):
        d = (walk - 1 - step) * BLOCK_D + columns
        inside = real[:, None] & (d < D)[None, :]
        h = tl.load(h_rows + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0, cache_modifier=CACHE)
        du = dot_weights(ds, h, tl.zeros([KP, BLOCK_D], ACC), WIDE, ACC)
        tl.store(du_ptr + (program * K + k)[:, None] * D + d[None, :], du, mask=inside)
        if NEEDS_DH:
            u = tl.load(u_rows + d[None, :], mask=inside, other=0.0).to(ACC)
            d_context = tl.load(d_context_ptr + factors[:, None] * D + d[None, :], mask=inside, other=0.0)
            dh = dot_wide(tl.trans(alpha), d_context, DH_PRECISION, ACC)
            dh += dot_wide(tl.trans(ds), u, DH_PRECISION, ACC)
            at = (b * length + rows)[:, None] * D + d[None, :]
            tl.store(dh_ptr + at, dh, mask=(rows < length)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def combine_du_kernel(
    part_ptr,  # [B, splits, K, D]
    written_ptr,  # [B, splits]
    du_ptr,  # [B, K, D]
    splits,
    D,
    K,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row, b, k, _, d = _combination(K, D, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    du = tl.zeros([BLOCK_D], ACC)
    for start in range(0, splits, BLOCK_S):
        split = b * splits + start + s
        written = tl.load(written_ptr + split, mask=(start + s) < splits, other=0) != 0
        at = (split * K + k)[:, None] * D + d[None, :]
        du += tl.sum(tl.load(part_ptr + at, mask=written[:, None] & (d < D)[None, :], other=0.0), 0)
    tl.store(du_ptr + row * D + d, du, mask=d < D)
