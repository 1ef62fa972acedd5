"""What Triton compiles for an H100 or an H200, compiled on a machine without a GPU and carried to one with it.

    python scripts/triton_cache.py --fill build/triton_cache     # here, under the Triton and the Python of the device
    python scripts/triton_cache.py --place build/triton_cache    # there; gpu_pass.sh does so where the folder is
    python scripts/triton_cache.py --check build/triton_cache    # exit status 1 where something is missing

The host code of the ops runs on CPU tensors, and Triton's own ``run`` specialises, compiles and keeps the kernels under
a driver that says it is of compute capability 9.0, so keys are those of a launch on the device. They hold the sources
of the kernels and of Triton, its library (another for every Python), ptxas, types, alignment and constants; no path and
nothing of PyTorch. The files of a key name each other by whole paths, which ``--place`` writes anew.

Covered are the calls of ``python -m flr_kernels.inspect`` in bfloat16, float16 and float32, of both directions, one
split and several, with D a multiple of 16: the shapes of bench/, training and decoding. Not covered are odd sizes and
unaligned tensors, which tests ask for, and kernels of ``torch.compile``. Where Triton compiles a launcher for every
signature (up to 3.6), it is carried, too, and so is its module for the driver: both are C that names the driver's
library, in whose place an empty one is linked here.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: D by which kernels differ: the last has what all large ones have, the others smaller blocks in sums over splits.
SIZES = (32, 64, 128, 1552)
#: Numbers that no device has had in this process, since Triton remembers what it compiled for one.
_DEVICES = itertools.count(1)


def calls() -> Iterator[Callable[[], Any]]:
    """Calls that between them launch every covered kernel."""
    import torch

    from flr_kernels import variants

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in SIZES:
            for label, run in variants.calls(dtype, size, empty):
                if not label.startswith("prefix") or size == SIZES[-1]:
                    yield run


@contextlib.contextmanager
def _drivers_library() -> Iterator[None]:
    """An empty library of the driver's name, for the linker alone."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        library = "libcuda.so.1"
        command = ["cc", "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{library}", "-o", f"{folder}/{library}"]
        subprocess.run(command, check=True)
        before, knobs.nvidia.libcuda_path = knobs.nvidia.libcuda_path, folder
        try:
            yield
        finally:
            knobs.nvidia.libcuda_path = before


class _NotLoaded:
    """In the place of a module that needs the driver's library."""

    def __getattr__(self, name: str) -> None:
        return None


def _host_modules(source: Any = None, metadata: Any = None) -> None:
    """Compile Triton's module for the driver, or the launcher of a kernel where there is one for every signature."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    before, build._load_module_from_path = build._load_module_from_path, lambda *_: _NotLoaded()
    try:
        if source is None:
            driver.CudaUtils()
            del driver.CudaUtils.instance
        elif hasattr(driver, "make_launcher"):
            driver.CudaLauncher(source, metadata)
    finally:
        build._load_module_from_path = before


@contextlib.contextmanager
def _without_device(folder: Path, launchers: bool) -> Iterator[None]:
    """Triton compiles into ``folder`` and launches nothing."""
    from triton import knobs

    from flr_kernels.backends import triton_config, triton_plan
    from tests.helpers.triton_driver import Driver, recording

    class Silent(Driver):
        def __init__(self, device: int = next(_DEVICES)) -> None:
            super().__init__()
            self.device = device

        def get_current_device(self) -> int:
            return self.device

        def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
            if launchers:
                _host_modules(source, metadata)
            return lambda *_: None

    before = (knobs.cache.dir, triton_config.check_device, os.environ.get("FLR_BACKEND"))
    binary = knobs.compilation.store_binary_only
    knobs.cache.dir, knobs.compilation.store_binary_only = str(folder.resolve()), True  # a sixth of the size
    triton_config.check_device = lambda _: None
    os.environ["FLR_BACKEND"] = "triton"
    triton_plan.forget()
    known, triton_plan._Shortcut.compiled = triton_plan._Shortcut.compiled, {}
    try:
        with recording(Silent()):
            yield
    finally:
        triton_plan._Shortcut.compiled = known
        triton_plan.forget()
        knobs.cache.dir, triton_config.check_device = before[:2]
        knobs.compilation.store_binary_only = binary
        os.environ.pop("FLR_BACKEND")
        if before[2] is not None:
            os.environ["FLR_BACKEND"] = before[2]


class Missing(RuntimeError):
    """A kernel that would be compiled."""


@contextlib.contextmanager
def compiling_nothing() -> Iterator[None]:
    """Whatever Triton would compile raises :class:`Missing`."""
    from triton.backends.nvidia.compiler import CUDABackend

    def refuse(self: Any, stages: Any, options: Any, language: Any) -> None:
        raise Missing(f"a kernel for {self.target} is not in the folder")

    before, CUDABackend.add_stages = CUDABackend.add_stages, refuse
    try:
        yield
    finally:
        CUDABackend.add_stages = before


def fill(folder: Path, given: Callable[[], Iterator[Callable[[], Any]]] = calls, launchers: bool = True) -> int:
    """Compile what ``given`` calls launch, by Triton's own way; how many kernels the folder has then."""
    folder.mkdir(parents=True, exist_ok=True)
    library = _drivers_library() if launchers else contextlib.nullcontext()
    with library, _without_device(folder, launchers):
        if launchers:
            _host_modules()
        for run in given():
            run()
    return len(list(folder.glob("*/*.cubin")))


def missing(folder: Path, given: Callable[[], Iterator[Callable[[], Any]]] = calls) -> int:
    """How many of the calls would compile something, were they on a device."""
    with _without_device(folder, launchers=False), compiling_nothing():
        return sum(_misses(run) for run in given())


def _misses(run: Callable[[], Any]) -> bool:
    try:
        run()
    except Missing:
        return True
    return False


def place(folder: Path) -> int:
    """Write paths within the folder anew, for where it lies now; how many groups of files there are."""
    groups = list(folder.resolve().glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    return len(groups)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("fill", "place", "check"):
        what.add_argument(f"--{name}", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.place is not None:
        print(f"{place(arguments.place)} kernels in place")
        return 0
    import triton

    told = f"triton {triton.__version__}, Python {sys.version.split()[0]}"
    if arguments.check is not None:
        count = missing(arguments.check)
        print(f"{count} calls would compile something ({told})")
        return int(count > 0)
    start = time.time()
    kernels = fill(arguments.fill)
    size = sum(file.stat().st_size for file in arguments.fill.rglob("*") if file.is_file())
    print(f"{kernels} kernels, {size / 1e6:.1f} MB, {time.time() - start:.0f} s ({told})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
