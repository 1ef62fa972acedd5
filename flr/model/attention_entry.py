"""The way of getting between a model of transformers and its attention, for the threads that ask for it.

transformers looks an attention up by the name that a model's config gives. While some thread is inside
:func:`entered`, an entry stands at that name; it calls what the thread asked for, and for other threads what stood
there. A compiler knows no threads: it is told by the option ``flr_attention`` of the call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Module, queries, keys, values, mask and options to the result [B, n, H, d] and weights or None.
Attention = Callable[..., tuple[Tensor, Any]]
_LOCK = threading.Lock()


@dataclass
class _Entry:
    """What stands at a name meanwhile.

    The option ``flr_attention`` of a call names the attention to take, None for the original; without it that is the
    thread's.
    """

    original: Attention
    local: bool  # whether the original was not transformers' own
    threads: dict[int, list[Attention]] = field(default_factory=dict)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        wanted = options.pop("flr_attention", "the thread's")
        if isinstance(wanted, str):
            wanted = self.of_thread()
        if wanted is None:
            wanted = self.original
        return wanted(module, query, key, value, attention_mask, **options)

    def of_thread(self) -> Attention | None:
        known = self.threads.get(threading.get_ident())
        return known[-1] if known else None


_entries: dict[str, _Entry] = {}


def inside(name: str) -> Attention | None:
    """What this thread has entered by this name, or None."""
    entry = _entries.get(name)
    return None if entry is None else entry.of_thread()


def original(name: str) -> Attention:
    """What stands, or stood, at the name."""
    with _LOCK:
        entry = _entries.get(name)
        return ALL_ATTENTION_FUNCTIONS[name] if entry is None else entry.original


@contextlib.contextmanager
def entered(name: str, attention: Attention) -> Iterator[None]:
    """Models whose attention has this name, and which this thread runs inside, attend by ``attention``.

    Nothing may be run again in a backward that was run inside (gradient checkpointing).
    """
    thread = threading.get_ident()
    with _LOCK:
        if name not in _entries:
            local = name in ALL_ATTENTION_FUNCTIONS._local_mapping
            _entries[name] = ALL_ATTENTION_FUNCTIONS[name] = _Entry(ALL_ATTENTION_FUNCTIONS[name], local)
        entry = _entries[name]
        entry.threads.setdefault(thread, []).append(attention)
    try:
        yield
    finally:
        with _LOCK:
            entry.threads[thread].pop()
            if not entry.threads[thread]:
                del entry.threads[thread]
            if not entry.threads:
                del _entries[name]
                if ALL_ATTENTION_FUNCTIONS[name] is entry and entry.local:
                    ALL_ATTENTION_FUNCTIONS[name] = entry.original
                elif ALL_ATTENTION_FUNCTIONS[name] is entry:
                    del ALL_ATTENTION_FUNCTIONS[name]
