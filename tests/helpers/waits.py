"""Operations that would make the host wait for a device, found on the CPU: each with its file and line."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = str(Path(__file__).parents[2])
#: Their result's shape, or a number that Python reads, depends on the data.
_WAITING = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.masked_scatter_backward.default",
    "aten.unique_dim.default",
    "aten._unique2.default",
    "aten.is_nonzero.default",
    "aten.equal.default",
}
_INDEXING = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default")


#: Methods that read values, without an operator.
_READING = ("tolist", "numpy", "cpu")


class HostWaits(TorchDispatchMode):
    """Counts in ``found`` every operation inside that would make the host wait, by its name and where it was called.

    Only what runs under the mode is seen. Copies to the CPU are no operators here, where everything lies there: those
    by ``tolist()``, ``numpy()`` and ``cpu()`` are seen, others are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self._methods: list[dict[str, Any]] = []

    def __enter__(self) -> HostWaits:
        self._methods.append({name: getattr(torch.Tensor, name) for name in _READING})
        for name, method in self._methods[-1].items():
            setattr(torch.Tensor, name, self._counted(name, method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._methods.pop().items():
            setattr(torch.Tensor, name, method)

    def _counted(self, name: str, method: Any) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found[f"Tensor.{name}", _place()] += 1
            return method(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        waits = name in _WAITING
        if name == "aten.repeat_interleave.Tensor":
            waits = (kwargs or {}).get("output_size") is None
        if name in _INDEXING:
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if waits:
            self.found[name, _place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of ours or of transformers, and ours before it."""
    lines = [x for x in traceback.extract_stack() if "transformers/" in x.filename or x.filename.startswith(_ROOT)]
    lines = [x for x in lines if not x.filename.endswith("helpers/waits.py")]
    if not lines:
        return "a backward"
    own = [x for x in lines if x.filename.startswith(_ROOT)]
    where = [lines[-1]] if not own or own[-1] is lines[-1] else [lines[-1], own[-1]]
    return " via ".join(f"{x.filename.removeprefix(_ROOT + '/').split('site-packages/')[-1]}:{x.lineno}" for x in where)
