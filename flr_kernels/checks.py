"""Argument checks shared by the ops: a ``ValueError`` names the argument, what was expected and what came.

They read metadata alone, so they cost little and never wait for a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_results(x: torch.Tensor, *shapes: tuple[int, ...]) -> Any:
    """A tuple of tensors of ``shapes`` to write results of ``x`` into: on its device, in its accumulation dtype."""
    return tuple(x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) for shape in shapes)


def tensor(
    name: str,
    x: object,
    shape: str,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    beside: tuple[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``x`` as a dense tensor of ``len(shape.split())`` dimensions, of one of ``dtypes``, on the device of ``beside``.

    ``beside`` is another argument's name and value. Sparse, nested and opaque tensors are refused: kernels read memory
    by strides.
    """
    if (
        isinstance(x, torch.Tensor)
        and x.layout is torch.strided
        and not x.is_nested
        and x.ndim == shape.count(" ") + 1
        and x.dtype in dtypes
        and (beside is None or x.device == beside[1].device)
    ):
        return x
    raise _unfit(name, x, shape, dtypes, beside)


def _unfit(
    name: str, x: object, shape: str, dtypes: tuple[torch.dtype, ...], beside: tuple[str, torch.Tensor] | None
) -> ValueError:
    """Why :func:`tensor` refuses ``x``."""
    if not isinstance(x, torch.Tensor):
        return ValueError(f"{name}: expected a tensor [{', '.join(shape.split())}], got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        return ValueError(f"{name}: expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    if x.dim() != len(shape.split()):
        return ValueError(f"{name}: expected shape [{', '.join(shape.split())}], got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        return ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
    assert beside is not None
    return ValueError(f"{name}: expected device of {beside[0]} = {beside[1].device}, got {x.device}")


def number(name: str, value: object, least: float, most: float = math.inf) -> float:
    """``value`` as a finite float from ``least`` to ``most``."""
    real = not isinstance(value, bool) and isinstance(value, int | float)
    if not real or not least <= value <= most or value in (math.inf, -math.inf):  # type: ignore[operator]
        upper = f" to {most:g}" if most < math.inf else " up, finite"
        raise ValueError(f"{name}: expected a number from {least:g}{upper}, got {_short(value)}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float can hold, got {_short(value)}") from None


def integer(name: str, value: object, least: int, most: int) -> int:
    """``value`` as an int from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {_short(value)}")
    return value


def flag(name: str, value: object) -> bool:
    """``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {_short(value)}")
    return value


def same(name: str, actual: object, expected: object, what: str) -> None:
    """Raise unless ``actual == expected``; ``what`` says which property is compared with which."""
    if actual != expected:
        raise ValueError(f"{name}: expected {what} = {expected}, got {actual}")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {_short(value)}")


def _short(value: object) -> str:
    """A value for a message; what may be long, or may not be printable, by its type."""
    if isinstance(value, float) or value is None or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    return repr(value[:80]) if isinstance(value, str) else type(value).__name__
