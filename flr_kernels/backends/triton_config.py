"""Launch configurations of the Triton kernels: pure functions of (architecture, shapes, dtype), no triton, no device.

The attention kernels give one tile of ``block_l`` tokens to a program, which walks over D twice (scores, then
pooling). The choice of ``block_l`` is a trade between three costs, counted in bytes of device memory a token:

* the tile is read a second time; that read is free of device-memory traffic only while all tiles in flight fit the L2;
* every tile writes K partial rows of D accumulators, which the combine kernel reads again (short tiles pay more);
* a grid that does not fill the multiprocessors leaves bandwidth unused (long tiles pay more).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..dispatch import BackendUnavailable

#: Factors are padded to the row count of a tensor-core tile.
FACTOR_BLOCK = 16
MAX_FACTORS = 16
MIN_SIZE, MAX_SIZE, SIZE_STEP = 32, 8192, 8
#: Programs of one multiprocessor at a time, roughly: the depth of the 16-bit configurations' pipelines (``num_stages``)
#: is chosen so that shared memory has room for 2 or 3. More would hide more latency and overflow the caches with tiles.
PROGRAMS_PER_SM = 2
#: Rows of partial results that a combine program sums at a time.
COMBINE_ROWS = 16


@dataclass(frozen=True)
class Arch:
    """What the choice depends on: multiprocessors, bytes of L2, bytes of shared memory one program may use."""

    sms: int
    l2: int
    shared: int


#: By compute capability: A100, H100, B200.
ARCHES = {80: Arch(108, 40 << 20, 163 << 10), 90: Arch(132, 50 << 20, 227 << 10), 100: Arch(148, 126 << 20, 227 << 10)}


@dataclass(frozen=True)
class Tile:
    """A named configuration of the attention kernels.

    ``cache`` ".ca" lets the tile pass through the L1 on its way to shared memory, so that the second walk finds the end
    of it there; ".cg" goes past the L1.
    """

    name: str
    block_l: int
    block_d: int
    num_warps: int
    num_stages: int
    cache: str = ".ca"


_FORWARD = {
    2: (Tile("long", 64, 128, 4, 4), Tile("medium", 32, 128, 4, 7), Tile("short", 16, 128, 4, 10)),
    4: (Tile("long32", 64, 32, 4, 3), Tile("short32", 16, 64, 4, 3)),
}
_BACKWARD = {
    2: (Tile("long", 64, 64, 4, 3), Tile("medium", 32, 64, 4, 7), Tile("short", 16, 64, 4, 5)),
    4: (Tile("long32", 32, 32, 4, 3), Tile("short32", 16, 32, 4, 3)),
}
#: One configuration under the interpreter, with blocks small enough for awkward sizes to cross them.
_INTERPRETED = Tile("interpreted", 16, 32, 4, 1)


def stages(tile: Tile, itemsize: int, amd: bool) -> int:
    """The depth of a tile's pipeline: on AMD's devices what 64 KB hold, the shared memory of all of them up to gfx942.

    Example:
        >>> [stages(tile, 2, amd=True) for tile in tiles(2, backward=False)]
        [4, 6, 9]
    """
    step = (tile.block_l + FACTOR_BLOCK) * tile.block_d * itemsize
    return min(tile.num_stages, (64 << 10) // step + 1) if amd else tile.num_stages


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` asks for the interpreter; it must have been set before the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def arch_of(capability: tuple[int, int], sms: int | None = None) -> tuple[int, Arch]:
    """The nearest known architecture not newer than ``capability``, with the device's own multiprocessor count."""
    number = capability[0] * 10 + capability[1]
    if number < min(ARCHES):
        raise BackendUnavailable(f"triton backend: needs compute capability 8.0 or newer, got {number / 10}")
    key = max(known for known in ARCHES if known <= number)
    arch = ARCHES[key]
    return key, Arch(sms or arch.sms, arch.l2, arch.shared)


def tiles(itemsize: int, backward: bool) -> tuple[Tile, ...]:
    """Every tile that :func:`attention_tile` can return for an element size."""
    return (_BACKWARD if backward else _FORWARD)[itemsize]


def token_cost(tile: Tile, arch: Arch, batch: int, length: int, size: int, factors: int, itemsize: int) -> float:
    """Device-memory bytes that the busiest multiprocessor moves, by the model in the module docstring."""
    programs = batch * -(-length // tile.block_l)
    in_flight = min(programs, arch.sms * PROGRAMS_PER_SM) * tile.block_l * size * itemsize
    usable = 0.7 * arch.l2  # the rest holds queries and partial results
    missed = max(0.0, 1 - usable / in_flight)
    partial = 1.5 * 4 * factors * size / tile.block_l if length > tile.block_l else 0.0  # half of it is read from L2
    waves = -(-programs // arch.sms)
    return waves * tile.block_l * (size * itemsize * (1 + missed) + partial)


def attention_tile(
    arch: Arch, batch: int, length: int, size: int, factors: int, dtype: torch.dtype, backward: bool
) -> Tile:
    """The cheapest tile of :func:`token_cost`; the longest among equals.

    Example:
        >>> h100 = ARCHES[90]
        >>> attention_tile(h100, 1, 4096, 4096, 4, torch.bfloat16, backward=False).block_l  # 128 programs, one wave
        32
        >>> attention_tile(h100, 512, 64, 1536, 4, torch.bfloat16, backward=False).block_l  # one program a user
        64
    """
    if interpreted():
        return _INTERPRETED
    itemsize = dtype.itemsize
    return min(tiles(itemsize, backward), key=lambda t: token_cost(t, arch, batch, length, size, factors, itemsize))


def combine_block(size: int) -> int:
    """Columns of a combine program: enough programs for small batches, 16-byte loads of float32."""
    return min(256, max(32, 1 << (size - 1).bit_length()))


def aggregate_block() -> int:
    """Columns a step of the aggregation kernels, where one program serves a user."""
    return 32 if interpreted() else 256


def _check_capability(index: int | None) -> None:
    if not interpreted():
        arch_of(torch.cuda.get_device_capability(index))


_check_capability_once = functools.cache(_check_capability)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_device(tensor: torch.Tensor) -> None:
    """Raise :class:`BackendUnavailable` unless Triton can run on ``tensor``'s device here."""
    if not _installed():
        raise BackendUnavailable("triton backend: the package triton is not installed; pip install triton (Linux only)")
    if tensor.is_cuda:
        index = tensor.device.index  # None is the current device, which may be another one next time
        (_check_capability if index is None else _check_capability_once)(index)
    elif not interpreted():
        raise BackendUnavailable(
            f"triton backend: needs a CUDA tensor, got one on {tensor.device}; on the CPU set TRITON_INTERPRET=1 "
            "before the first call (slow, for tests) or use FLR_BACKEND=reference"
        )


def check_shape(name: str, tensor: Any, factors: int) -> None:
    """Raise ``ValueError`` unless D, K and the dtype are ones that the kernels are written for.

    ``tensor`` may also be what is known of one (:class:`flr_kernels.backends.triton_plan.Spec`).
    """
    size = tensor.shape[-1]
    if size % SIZE_STEP or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"{name}: the triton backend expects D a multiple of {SIZE_STEP} from {MIN_SIZE} to {MAX_SIZE}, "
            f"got D = {size}"
        )
    if not 1 <= factors <= MAX_FACTORS:
        raise ValueError(f"{name}: the triton backend expects K from 1 to {MAX_FACTORS}, got K = {factors}")
    if tensor.dtype == torch.float64 and not interpreted():
        raise ValueError(f"{name}: the triton backend takes float64 under the interpreter only, got float64")


def check_rows(name: str, tensor: Any) -> None:
    """Raise ``ValueError`` unless the last dimension is contiguous; the other strides are free. As above."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: the triton backend expects a contiguous last dimension, got strides {tuple(tensor.stride())}"
        )
