"""What a patch puts into an instance: functions bound to it, and hooks that belong to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class Method:
    """A function bound to a model as an attribute of that instance; unlike a bound method it pickles and copies."""

    def __init__(self, function: Callable[..., Any], model: Any, like: Callable[..., Any] | None = None) -> None:
        """``like`` is the class's function whose signature callers shall see; that of ``function`` if None."""
        self.__func__, self.__self__, self.like = function, model, like

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # what Trainer and generate look at
        signature = inspect.signature(self.like or self.__func__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def add_hooks(model: Any, before: Callable[..., Any], after: Callable[..., Any]) -> list[int]:
    """Register hooks of the model's call that see its keyword arguments; their ids, for :func:`remove_hooks`."""
    first = model.register_forward_pre_hook(before, with_kwargs=True)
    last = model.register_forward_hook(after, with_kwargs=True, always_call=True)
    return [first.id, last.id]


def remove_hooks(model: Any, ids: list[int]) -> None:
    for name in (
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        for key in ids:
            getattr(model, name).pop(key, None)
