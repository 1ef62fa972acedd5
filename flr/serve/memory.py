"""What Python's collector looks at, and when a model that was replaced gives its memory back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from typing import Any

#: Seconds from the end of what is replaced to a collection, and from that to another.
_PAUSES = (0.1, 1.0)
_lock = threading.Lock()
_frozen = False


def freeze() -> None:
    """Collect, and look no more at what stands now.

    Else every few thousand requests wait while packages and catalogue are looked through.
    """
    global _frozen
    _frozen = True
    collect()


def collect() -> None:
    """Collect what is not in use, also of what :func:`freeze` froze.

    One at a time: what one thread freezes again, another would not collect. That the process froze is known here and
    not asked of ``gc.get_freeze_count``, which counts immortal objects in Python 3.12.
    """
    with _lock:
        if _frozen:
            gc.unfreeze()
        gc.collect()
        if _frozen:
            gc.freeze()


def collect_after(gone: Any) -> None:
    """Collect once ``gone`` has no reference left; call it on the event loop, in whose threads that happens.

    Its model refers to itself, so Python frees it when it collects, which it may not do for hours. A collection finds
    it when ``gone`` has let go of it, which the thread that had the last reference does after it has told of the end:
    so a little later, and once more if the model is there still.
    """
    loop, model = asyncio.get_running_loop(), weakref.ref(gone.model)
    tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps none alive

    async def collected() -> None:
        for pause in _PAUSES:
            await asyncio.sleep(pause)
            await asyncio.to_thread(collect)
            if model() is None:
                break
        tasks.clear()

    def begin() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the process about to end
            loop.call_soon_threadsafe(lambda: tasks.add(loop.create_task(collected())))

    weakref.finalize(gone, begin).atexit = False
