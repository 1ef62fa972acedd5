"""What a patch puts into an instance: functions bound to it, and hooks that belong to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class Method:
    """A function bound to a model as an attribute of that instance; unlike a bound method it pickles and copies."""

    def __init__(
        self,
        function: Callable[..., Any],
        model: Any,
        like: Callable[..., Any] | None = None,
        more: Callable[..., Any] | None = None,
    ) -> None:
        """``like`` is the class's function whose signature callers shall see; that of ``function`` if None.

        ``more`` is one whose parameters they shall see beside these, which ``function`` takes as ``**kwargs``.
        """
        self.__func__, self.__self__, self.like, self.more = function, model, like, more

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # what Trainer and generate look at
        signature = inspect.signature(self.like or self.__func__)
        _, *parameters = signature.parameters.values()
        if self.more is not None:
            others = list(inspect.signature(self.more).parameters.values())[1:]
            taken = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            parameters[-1:-1] = [
                x.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for x in others
                if x.name not in signature.parameters and x.kind in taken
            ]
        return signature.replace(parameters=parameters)


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
