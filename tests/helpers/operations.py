"""Operations that a device would run, counted on the CPU by what they belong to."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unsqueeze", "view", "unbind", "_unsafe_view", "unfold",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts in ``found`` operators that launch something: views and allocations are left out, an op of ours is one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._paused = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.found.values())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is left out."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def leave_out(self, function: Any) -> Any:
        """``function``, not counted."""

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            with self.paused():
                return function(*args, **kwargs)

        return uncounted

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if not self._paused and name not in _NO_KERNEL:
            self.found[f"flr::{name}" if func.namespace == "flr" else name] += 1
        return func(*args, **kwargs or {})
