"""Plans: everything about an op's launches that follows from shapes, strides and dtypes, worked out once.

A kernel of this package takes tens of microseconds, and so does Triton's way from a call to a launch: it binds, types
and formats every argument again. A :class:`Plan` keeps what a call with the same metadata would repeat: sizes of grids,
constants, the order of arguments, how much memory is needed, and the compiled kernels. A run allocates the results and
one block of working memory, and hands addresses to the kernels.

Triton's own way runs a kernel for the first time and returns it compiled; later launches of the same specialisation
call what Triton itself would call last (the same from 3.4 to 3.9). Where that is not known to hold (other versions,
AMD's larger set of specialisations), where it ever fails, and for profilers' hooks, launches go Triton's own way.
Importing this module needs triton.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from . import triton_config, triton_launch

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger("flr_kernels")

#: How many plans of one host function are kept: training meets a new length with every batch.
KEPT = 1024
#: Addresses inside of working memory, and those of tensors that Triton compiles wide loads for, are multiples of them.
_STEP, _ALIGNED = 128, 16
_CACHES: list[Any] = []


def planned(make: Callable[P, T]) -> Callable[P, T]:
    """Decorates the function that makes a plan from hashable arguments: the latest plans are kept."""
    kept: Any = functools.lru_cache(maxsize=KEPT)(make)
    _CACHES.append(kept)
    return kept


def forget() -> None:
    """Make every plan anew, for tests and inspection."""
    for kept in _CACHES:
        kept.cache_clear()


class Spec(NamedTuple):
    """What a plan may know of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        """As of a tensor."""
        return self.device.type == "cuda"

    def stride(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.strides if dim is None else self.strides[dim]


def spec(x: Tensor) -> Spec:
    """The metadata of a tensor, which can be hashed."""
    return tuple.__new__(Spec, (x.shape, x.stride(), x.dtype, x.device))  # past Spec's own __new__, which is Python


@dataclass(frozen=True)
class Memory:
    """A tensor of a run, for the arguments of a launch: ``tensors[index]`` from byte ``offset``, seen as ``dtype``."""

    index: int
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    offset: int = 0

    def viewed(self, dtype: torch.dtype) -> Memory:
        """The same bytes in another dtype."""
        return Memory(self.index, dtype, self.shape, self.offset)


class Plan:
    """Allocations and launches for tensors of given metadata: made by a host function, then run any number of times.

    Args:
        device: of all tensors.
        dtypes: of the tensors that every run is given.
    """

    def __init__(self, device: torch.device, *dtypes: torch.dtype):
        self.inputs = [Memory(index, dtype) for index, dtype in enumerate(dtypes)]
        self.device = device
        self._allocations: list[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype | None]] = []
        self._dtypes = [*dtypes]
        self._working = 0  # bytes
        self._launches: list[_Launch] = []

    def result(self, shape: tuple[int, ...], dtype: torch.dtype) -> Memory:
        """A tensor that :meth:`run` allocates and returns; results come in the order of these calls."""
        same = next((index for index, known in enumerate(self._dtypes) if known == dtype), None)
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        self._allocations.append((same or 0, shape, strides, dtype if same is None else None))
        self._dtypes.append(dtype)
        return Memory(len(self._dtypes) - 1, dtype)

    def working(self, shape: tuple[int, ...], dtype: torch.dtype) -> Memory:
        """Memory for the kernels alone, a part of the one block that a run allocates and frees."""
        memory = Memory(-1, dtype, shape, self._working)
        self._working += -(-prod(shape) * dtype.itemsize // _STEP) * _STEP
        return memory

    def launch(self, kernel: Any, programs: int, arguments: dict, constants: dict, **options: int) -> None:
        """One more launch, of ``programs``; ``arguments`` holds numbers and :class:`Memory`."""
        if programs:
            self._launches.append(_Launch(kernel, programs, arguments, constants, options, self.device))

    def run(self, *inputs: Tensor) -> Any:
        """Allocate and launch on the current stream; the tuple of results. Nothing waits for the device."""
        tensors = list(inputs)
        for like, shape, strides, dtype in self._allocations:
            if dtype is None:
                tensors.append(tensors[like].new_empty_strided(shape, strides))
            else:
                tensors.append(tensors[like].new_empty_strided(shape, strides, dtype=dtype))
        results = tuple(tensors[len(inputs) :])
        if self._working:
            last = tensors[-1]
            tensors.append(last.new_empty_strided((self._working // last.itemsize,), (1,)))
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                self._launch_all(tensors)
        else:
            self._launch_all(tensors)
        return results

    def _launch_all(self, tensors: list[Tensor]) -> None:
        if not _Shortcut.is_open() or self.device.type == "meta":
            for launch in self._launches:
                launch.run_by_triton(tensors)
            return
        addresses = [x.data_ptr() for x in tensors]
        together = 0  # allocated memory is aligned
        for address in addresses[: len(self.inputs)]:
            together |= address
        aligned = () if together % _ALIGNED == 0 else tuple([address % _ALIGNED == 0 for address in addresses])
        stream = driver.active.get_current_stream(self.device.index or 0)
        for launch in self._launches:
            launch.run(tensors, addresses, aligned, stream)


class _Launch:
    """A launch of a plan, for tensors of a run and their addresses."""

    def __init__(
        self, kernel: Any, programs: int, arguments: dict, constants: dict, options: dict, device: torch.device
    ):
        self._kernel, self._programs = kernel, programs
        self._arguments, self._constants, self._options = arguments, constants, options
        self._device = device
        values = {**arguments, **constants}
        self._values = [values[name] for name in kernel.arg_names]
        self._places = [(at, x.index, x.offset) for at, x in enumerate(self._values) if isinstance(x, Memory)]
        self._found: dict[tuple[bool, ...], tuple] = {}

    def run_by_triton(self, tensors: list[Tensor]) -> Any:
        """Triton's own way, or that of who took its place; the compiled kernel, if there is one."""
        arguments = {k: _tensor(x, tensors) if isinstance(x, Memory) else x for k, x in self._arguments.items()}
        return triton_launch.launcher(self._kernel, self._programs, arguments, self._constants, self._options)

    def run(self, tensors: list[Tensor], addresses: list[int], aligned: tuple[bool, ...], stream: int) -> None:
        """The short way, where this specialisation has been compiled; ``aligned``: which tensors are, () for all."""
        found = self._found.get(aligned)
        if found is None:
            found = self._compiled(tensors, aligned)
            if found is None:
                return
        launcher, function, metadata = found
        values = self._values.copy()
        for at, index, offset in self._places:
            values[at] = addresses[index] + offset
        try:
            launcher(self._programs, 1, 1, stream, function, metadata, None, None, None, *values)
        except Exception as error:  # whatever it is, Triton's own way runs the kernel or says what is wrong
            _Shortcut.close(error)
            self.run_by_triton(tensors)

    def _compiled(self, tensors: list[Tensor], aligned: tuple[bool, ...]) -> tuple | None:
        """What a short launch needs of the compiled kernel; None after a run that compiled it."""
        key = self._specialisation(aligned)
        if key not in _Shortcut.compiled:
            compiled = self.run_by_triton(tensors)
            try:
                _Shortcut.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata
            except Exception as error:
                _Shortcut.close(error)
            return None
        self._found[aligned] = _Shortcut.compiled[key]
        return self._found[aligned]

    def _specialisation(self, aligned: tuple[bool, ...]) -> tuple:
        """All that Triton compiles a kernel for: no coarser than its own key of a launch on an NVIDIA device."""
        kinds: list[tuple] = []
        for parameter, value in zip(self._kernel.params, self._values, strict=True):
            if isinstance(value, Memory):
                kinds.append((value.dtype, not aligned or aligned[value.index]))
            elif parameter.is_constexpr or parameter.do_not_specialize or not isinstance(value, int):
                kinds.append((type(value), isinstance(value, int) and value.bit_length() > 31))
            else:
                kinds.append((value == 1, value % _ALIGNED == 0, value.bit_length() > 31))
        return id(self._kernel), self._device, *kinds, *self._constants.items(), *self._options.items()


def _tensor(memory: Memory, tensors: list[Tensor]) -> Tensor:
    """The tensor that Triton's own way, its interpreter and the inspection take."""
    x = tensors[memory.index]
    if memory.index < 0:
        size = prod(memory.shape) * memory.dtype.itemsize
        return x.view(torch.uint8)[memory.offset : memory.offset + size].view(memory.dtype).view(memory.shape)
    return x if x.dtype == memory.dtype else x.detach().view(memory.dtype)


class _Shortcut:
    """Compiled kernels by specialisation, and whether they are launched without Triton's binder."""

    compiled: ClassVar[dict[tuple, tuple]] = {}
    _closed = False

    @classmethod
    def is_open(cls) -> bool:
        return not (cls._closed or _hooked()) and _known_launcher()

    @classmethod
    def close(cls, error: Exception) -> None:
        """For good: what failed once is not tried at every call."""
        if not cls._closed:
            cls._closed = True
            logger.warning("triton %s: kernels are launched through its binder, because %r", triton.__version__, error)


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches; None or, from Triton 3.6 on, a chain of calls."""
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


@functools.cache
def _known_launcher() -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return (3, 4) <= version < (3, 10) and torch.version.hip is None and not triton_config.interpreted()
