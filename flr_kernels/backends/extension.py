"""The compiled half (csrc/, built by setup.py): loading it, saying why it cannot run, and the backends it serves.

Backends of ``group_advantage`` and ``batch_advantage``: "cuda" for CUDA tensors, "host" (the same C++ core on one
thread) for CPU tensors. "host", that of ``log_normaliser`` too, is what ``auto`` runs on a CPU. The backend "cuda" of
``factor_attention`` is in ops/factor_attention/cuda_host.py.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import BackendUnavailable
from .source_hash import source_hash

BUILD = "build it with `python setup.py build_ext --inplace` or `pip install -e .` (docs/extension.md)"
_CSRC = Path(__file__).parents[2] / "csrc"


@functools.cache
def _load() -> ModuleType | str:
    """The extension, or why there is none."""
    try:
        module = importlib.import_module("flr_kernels._C")
    except ImportError as error:
        reason = "is not built" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        return f"the extension flr_kernels._C {reason}; {BUILD}"
    if (_CSRC / "bindings.cpp").exists() and source_hash(_CSRC) != module.source_hash:
        return f"the extension flr_kernels._C was built from other sources than csrc/ holds now; {BUILD}"
    return module


def load() -> ModuleType:
    """The extension ``flr_kernels._C``.

    Raises:
        BackendUnavailable: it is not built, does not load, or is older than its sources.
    """
    module = _load()
    if isinstance(module, str):
        raise BackendUnavailable(module)
    return module


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` ("8.0 9.0+PTX") runs on a device: same major, minor no newer; PTX, any newer.

    Example:
        >>> [runs_on("8.0 9.0+PTX", c) for c in ((8, 0), (8, 6), (7, 5), (9, 0), (12, 0))]
        [True, True, False, True, True]
    """
    for name in architectures.split():
        major, minor = map(int, name.removesuffix("+PTX").split("."))
        if (capability[0] == major and capability[1] >= minor) or (
            name.endswith("+PTX") and capability >= (major, minor)
        ):
            return True
    return False


@functools.cache
def _device_problem(index: int) -> str | None:
    module = load()
    if not module.architectures:
        return f"the extension flr_kernels._C was built without its CUDA half; with nvcc in PATH, {BUILD}"
    if problem := module.driver_problem():
        return f"CUDA says '{problem}'; update the driver, or with an nvcc no newer than the driver, {BUILD}"
    capability = torch.cuda.get_device_capability(index)
    if not runs_on(module.architectures, capability):
        name = ".".join(map(str, capability))
        built = f"the extension was built for {module.architectures}, device {index} is {name}"
        return f"{built}; FLR_CUDA_ARCH_LIST={name}, {BUILD}"
    return None


@functools.cache
def attention_problem(index: int) -> str | None:
    """Why the extension's kernel of ``factor_attention`` does not run on a device where its CUDA half does, or None."""
    capability = torch.cuda.get_device_capability(index)
    if capability != (9, 0):
        name = ".".join(map(str, capability))
        return f"the extension's kernel of factor_attention is for compute capability 9.0, device {index} is {name}"
    if not load().has_factor_attention:
        return (
            f"the extension was built without its kernel for compute capability 9.0; with 9.0 among the listed, {BUILD}"
        )
    return None


def check_cuda(tensor: Tensor, *_: Any) -> None:
    """Raise unless the CUDA half serves the device of ``tensor``."""
    if not tensor.is_cuda:
        raise BackendUnavailable(
            f"backend 'cuda' expects CUDA tensors, got {tensor.device}; FLR_BACKEND=host is its twin"
        )
    if problem := _device_problem(tensor.device.index):
        raise BackendUnavailable(problem)


def check_host(tensor: Tensor, *_: Any) -> None:
    """Raise unless the host twin serves the device of ``tensor``."""
    if tensor.device.type != "cpu":
        raise BackendUnavailable(
            f"backend 'host' expects CPU tensors, got {tensor.device}; FLR_BACKEND=cuda is its twin"
        )
    load()


_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*checks.FLOATS, torch.bool)}


def _view(x: Tensor) -> tuple:
    """What bindings.cpp needs to know of a tensor, and checks."""
    bytes_left = x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize
    device = x.device.index if x.is_cuda else -1
    return x.data_ptr(), _DTYPES[x.dtype], device, x.shape, x.stride(), bytes_left


def _views(tensors: tuple[Tensor, ...]) -> list[tuple]:
    return [_view(x) for x in tensors]


def call(name: str, tensor: Tensor, *arguments: Any) -> None:
    """Call into the extension on the device and current stream of ``tensor``; arguments may be tuples of tensors."""
    views = [_view(a) if isinstance(a, Tensor) else _views(a) if isinstance(a, tuple) else a for a in arguments]
    function = getattr(load(), name)
    if not tensor.is_cuda:
        function(*views, -1, 0)
        return
    index = tensor.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    if index == torch.cuda.current_device():  # the guard below costs as much as all the rest
        function(*views, index, stream)
        return
    with torch.cuda.device(index):
        function(*views, index, stream)


def group_advantage(
    token_logprobs: Tensor, mask: Tensor | None, group_size: int, kind: str, reward: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference; one launch (csrc/group_advantage.cu)."""
    groups = token_logprobs.shape[0] // group_size
    shapes = (groups, group_size), (groups, group_size), (groups,), (groups,)
    rewards, advantages, mean, std = checks.empty_results(token_logprobs, *shapes)
    whole_batch = kind == "latentr3"
    batch = token_logprobs.new_empty(4 if whole_batch else 0, dtype=torch.float64)
    scratch = batch.new_empty(2 * groups + 1) if whole_batch else None
    results = (rewards, advantages, mean, std, batch if whole_batch else None, scratch)
    call("group_advantage", token_logprobs, token_logprobs, mask, *results, group_size, kind, reward, eps)
    return rewards, advantages, mean, std, batch


def batch_advantage(rewards: Tensor, partials: Tensor, eps: float) -> Tensor:
    """As the reference; one launch."""
    advantages = torch.empty_like(rewards)
    call("batch_advantage", rewards, rewards, partials, advantages, eps)
    return advantages


def log_normaliser(logits: Tensor) -> Tensor:
    """As the reference, for float32 on a CPU; every logit is read from memory once (csrc/log_normaliser.cpp)."""
    out = logits.new_empty(logits.shape[0])
    call("log_normaliser", logits, logits, out)
    return out
