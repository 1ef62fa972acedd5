"""A Triton driver without a device: kernels are compiled for an H100, and launches are recorded instead of run.

With it the host side of the Triton kernels runs on CPU tensors as it does on CUDA tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch


class Launched(NamedTuple):
    """A launch as the device would get it: the compiled kernel, programs, and arguments with addresses for tensors."""

    kernel: str
    programs: int
    arguments: tuple


class Driver:
    """What Triton asks of its driver, 3.4 to 3.9."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 1, 128, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            assert (y, z) == (1, 1)
            plain = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
            if enter is not None:
                enter(launch_metadata)
            self.launches.append(Launched(f"{metadata.name} {metadata.hash}", x, plain))

        return launch


#: One for the process: Triton keeps the launchers that it got.
_DRIVER = Driver()


@contextmanager
def recording(stand_in: Driver | None = None) -> Iterator[Driver]:
    """Launches of the block go to the driver that it gets. Not beside a device, whose compiled kernels it shares."""
    from triton.runtime import driver

    stand_in = stand_in or _DRIVER
    before = dict(vars(driver))
    driver.set_active(stand_in)
    stand_in.launches.clear()
    try:
        yield stand_in
    finally:
        vars(driver).update(before)
