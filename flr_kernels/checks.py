"""Argument checks shared by the ops: a ``ValueError`` names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_results(x: torch.Tensor, *shapes: tuple[int, ...]) -> Any:
    """A tuple of tensors of ``shapes`` to write results of ``x`` into: on its device, in its accumulation dtype."""
    return tuple(x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) for shape in shapes)


def tensor(name: str, x: object, shape: str, *, dtypes: tuple[torch.dtype, ...] = FLOATS) -> torch.Tensor:
    """``x`` as a tensor of ``len(shape.split())`` dimensions and one of ``dtypes``."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor [{', '.join(shape.split())}], got {type(x).__name__}")
    if x.dim() != len(shape.split()):
        raise ValueError(f"{name}: expected shape [{', '.join(shape.split())}], got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
    return x


def same(name: str, actual: object, expected: object, what: str) -> None:
    """Raise unless ``actual == expected``; ``what`` says which property is compared with which."""
    if actual != expected:
        raise ValueError(f"{name}: expected {what} = {expected}, got {actual}")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
