"""``python -m flr_kernels.inspect``: what every kernel variant costs, compiled ahead of time, without a GPU.

The host code of the ops runs on tensors of the ``meta`` device, with its launches handed to the compiler instead of to
a device, so the variants listed are the ones that dispatch launches: every tile of
:mod:`flr_kernels.backends.triton_config`, one split and several, with and without the history's gradient, and each
input dtype. Registers and stack come from the ``cuobjdump`` that Triton ships, loads from its ``nvdisasm``, shared
memory from the compiler. The CUDA kernels of the extension (csrc/), where it is built, are read from its file. AMD's
architectures are compiled when asked for (``--arch gfx942,gfx950``), and read from the assembly.

The exit status is 1 if a kernel uses stack (a spill: local memory, several times slower), more shared memory than the
architecture gives one program, or fewer loads of 16 bytes than a step over H or the logits takes (narrower ones cost
more instructions than there is time for).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch

from .backends import triton_config
from .variants import calls

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
#: Of one multiprocessor, on all three architectures: registers, and threads that can be resident (sm_80, 90, 100).
_REGISTERS, _THREADS = 65536, 2048
#: Bytes of shared memory of a program on AMD's architectures.
_AMD = {"gfx942": 64 << 10, "gfx950": 160 << 10}


@dataclass(frozen=True)
class Variant:
    """One compiled kernel; ``programs`` fit a multiprocessor at once by registers, threads and shared memory.

    ``wide`` of its loads are of 16 bytes, and ``wide_needed`` would have to be. ``arch`` is a compute capability times
    ten, or AMD's name of an architecture; there ``programs`` is not worked out, 0.
    """

    kernel: str
    label: str
    arch: int | str
    registers: int
    stack: int
    shared: int
    shared_limit: int
    warps: int
    programs: int
    wide: int = 0
    wide_needed: int = 0

    @property
    def ok(self) -> bool:
        return self.fits()

    def fits(self, stack: int = 0) -> bool:
        """Whether it needs no more than so many bytes of stack and shared memory than there is, and loads are wide."""
        return self.stack <= stack and self.shared <= self.shared_limit and self.wide >= self.wide_needed


@dataclass(frozen=True)
class _Launch:
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def _name(kernel: Any) -> str:
    """E.g. ``attention forward``, from module and function."""
    words = {"aggregate": "aggregate", "token_logprob": "logprob", "normaliser": "normaliser"}
    words |= {"trie_step": "trie step", "trie_advance": "trie", "trie_collect": "trie"}
    op = next((name for word, name in words.items() if word in kernel.__module__), "attention")
    return f"{op} {kernel.__name__.removesuffix('_kernel')}"


def _describe(kernel: Any, arguments: dict, constants: dict, options: dict) -> _Launch:
    """Types and alignment of a launch, as Triton's run time would specialise them."""
    fixed = {param.name for param in kernel.params if param.do_not_specialize}
    signature, constexprs, aligned = {}, dict(constants), []
    for index, name in enumerate(kernel.arg_names):
        value = arguments.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            aligned.append(index)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in fixed:
            signature[name], constexprs[name] = "constexpr", 1
        else:
            assert isinstance(value, int), f"{kernel.__name__}: no value for {name}"
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                aligned.append(index)
    items = tuple(tuple(x.items()) for x in (signature, constexprs, options))
    return _Launch(kernel, items[0], items[1], tuple(aligned), items[2])


@contextmanager
def _recorded() -> Iterator[list[_Launch]]:
    """Launches of the block, described instead of run."""
    from .backends import triton_launch

    launches: list[_Launch] = []

    def record(kernel: Any, programs: int, arguments: dict, constants: dict, options: dict) -> None:
        launches.append(_describe(kernel, arguments, constants, options))

    before, triton_launch.launcher = triton_launch.launcher, record
    try:
        yield launches
    finally:
        triton_launch.launcher = before


def variants(amd: bool = False) -> dict[_Launch, str]:
    """Every distinct launch, with a label; on AMD's devices some are others."""
    from .backends import triton_launch, triton_plan

    before, triton_launch.amd = triton_launch.amd, amd
    triton_plan.forget()
    try:
        return _variants()
    finally:
        triton_launch.amd = before
        triton_plan.forget()


def _variants() -> dict[_Launch, str]:
    found: dict[_Launch, str] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        for label, run in calls(dtype):
            with _recorded() as launches:
                run()
            for launch in launches:
                found.setdefault(launch, f"{short} {label}".strip())
    return found


def compile_variant(launch: _Launch, label: str, arch: int | str) -> Variant:
    """Compile for one architecture (cached by Triton) and read the resource usage."""
    compiled = _compiled(launch, arch)
    name, needed = _name(launch.kernel), _wide_needed(launch, arch)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if isinstance(arch, str):
        assembly = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.findall(rf"\.{field}:\s*(\d+)", assembly)[0])
            for field in ("vgpr_count", "private_segment_fixed_size")
        )
        wide = len(re.findall(r"(?:global|buffer)_load_(?:lds_)?dwordx4", assembly))
        return Variant(name, label, arch, registers, stack, shared, _AMD[arch], warps, 0, wide, needed)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        ((_, registers, stack, _),) = _resources(cubin.name)
        wide = _wide_loads(cubin.name) if needed else 0
    return _variant(name, label, arch, registers, stack, shared, warps, wide, needed)


def _compiled(launch: _Launch, arch: int | str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .backends import triton_launch

    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={**dict(launch.options), **triton_launch.OPTIONS})


def _wide_needed(launch: _Launch, arch: int | str) -> int:
    """How many loads of 16 bytes a thread needs for a step over the tensor that the kernel is bound by."""
    name, constants, options = _name(launch.kernel), dict(launch.constants), dict(launch.options)
    if name not in ("attention forward", "attention backward", "normaliser forward"):
        return 0
    itemsize = {"*fp32": 4, "*fp16": 2, "*bf16": 2}[launch.signature[0][1]]
    at_once = 16 * options["num_warps"] * (64 if isinstance(arch, str) else 32)
    if name == "normaliser forward":
        return constants["BLOCK"] * itemsize // at_once
    return 2 * (constants["BLOCK_L"] * constants["BLOCK_D"] * itemsize // at_once)  # both walks over H


def _wide_loads(path: str) -> int:
    """Loads of 16 bytes from device memory to registers or shared memory."""
    import triton

    command = [triton.knobs.nvidia.nvdisasm.path, "-c", path]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*\b128\b", code))


def _resources(path: str, *options: str) -> list[tuple[str, int, int, int]]:
    """Function, registers, stack and static shared memory of the device code in a file."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", *options, path]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    if not found:
        raise RuntimeError(f"cuobjdump reported no resource usage for {path}:\n{report}")
    return [(name, int(registers), int(stack), int(shared)) for name, registers, stack, shared in found]


def _variant(
    kernel: str, label: str, arch: int, registers: int, stack: int, shared: int, warps: int,
    wide: int = 0, needed: int = 0,
) -> Variant:  # fmt: skip
    limit = triton_config.ARCHES[arch].shared
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256
    programs = min(_REGISTERS // (per_warp * warps), _THREADS // (32 * warps), (limit + 1024) // (shared + 1024))
    return Variant(kernel, label, arch, registers, stack, shared, limit, warps, programs, wide, needed)


def extension_variants(arch: int) -> list[Variant]:
    """The CUDA kernels of the extension; none where it, its CUDA half or this architecture is not built."""
    from .backends import extension

    try:
        module = extension.load()
    except extension.BackendUnavailable:
        return []
    if f"{arch // 10}.{arch % 10}" not in module.architectures.replace("+PTX", "").split():
        return []
    rows = []
    for name, registers, stack, shared in _resources(str(module.__file__), "-arch", f"sm_{arch}"):
        if attention := _attention_variant(name, arch, registers, stack):
            rows.append(attention)
            continue
        match = re.search(r"\d(group|batch)_advantage_kernelI(f|d|NS_\d+(\w*?float16)E)(Lb(\d)E)?E", name)
        assert match, name
        dtype = match[3] or {"f": "float32", "d": "float64"}[match[2]]
        team = {None: "", "0": " warp", "1": " block"}[match[5]]
        rows.append(
            _variant(f"{match[1]} advantage", dtype + team, arch, registers, stack, shared, 4 if team == " warp" else 8)
        )
    return rows


def _attention_variant(name: str, arch: int, registers: int, stack: int) -> Variant | None:
    """A kernel of csrc/factor_attention*.cuh, or None; it asks for all shared memory at its launch."""
    match = re.search(r"factor_attention_(forward|backward)(?:INS_\d+(B?[Ff]loat16))?\w*?ColumnsILi(\d+)ELi(\d+)", name)
    if match is None:
        return None
    label = f"{(match[2] or 'bfloat16').lower()} D{match[3]} by {match[4]}"
    return _variant(f"attention {match[1]} cuda", label, arch, registers, stack, triton_config.ARCHES[arch].shared, 12)


def _chosen_on(arch: int | str, label: str) -> bool:
    """Whether dispatch may choose the label's tile, if it has one, on an architecture."""
    known = {tile.name: tile for size in (2, 4) for back in (False, True) for tile in triton_config.tiles(size, back)}
    found = [known[word] for word in label.split() if word in known]
    return isinstance(arch, str) or all(tile.suits(triton_config.ARCHES[arch]) for tile in found)


def _compile_all(asked_for: list[str]) -> Iterator[Variant]:
    """Triton's variants, an architecture after another for each, then AMD's, then those of the extension."""
    arches = [int(arch) for arch in asked_for if arch not in _AMD]
    for group, amd in ((arches, False), ([arch for arch in asked_for if arch in _AMD], True)):
        launches = variants(amd) if group else {}
        yield from (
            compile_variant(launch, label, arch)
            for launch, label in launches.items()
            for arch in group
            if _chosen_on(arch, label)
        )
    yield from chain(*map(extension_variants, arches))


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit status is 1 if a variant exceeds ``--max_stack`` or shared memory, or loads narrowly."""
    parser = argparse.ArgumentParser(prog="python -m flr_kernels.inspect", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--arch",
        default=",".join(map(str, triton_config.ARCHES)),
        help="comma-separated compute capabilities times ten, gfx942, gfx950 (default: %(default)s)",
    )
    parser.add_argument(
        "--max_stack", type=int, default=0, help="bytes of stack a thread that are no fault (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    known = [*map(str, triton_config.ARCHES), *_AMD]
    if unknown := [a for a in arguments.arch.split(",") if a not in known]:
        parser.error(f"--arch: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if triton_config.interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    rows, stack = [], arguments.max_stack
    for row in _compile_all(arguments.arch.split(",")):
        rows.append(row)
        if not arguments.json:
            if len(rows) == 1:
                print(f"{'kernel':20} {'variant':34}   arch  regs  stack  shared warps per SM  wide")
            arch = row.arch if isinstance(row.arch, str) else f"sm_{row.arch}"
            wide = f"{row.wide}" if row.wide_needed else "-"
            print(
                f"{row.kernel:20} {row.label:34} {arch:6} {row.registers:>5} {row.stack:>6} {row.shared:>7} "
                f"{row.warps:>5} {row.programs:>6} {wide:>5}{'' if row.fits(stack) else '  <- over the limit'}",
                flush=True,
            )
    bad = [row for row in rows if not row.fits(stack)]
    if arguments.json:
        print(
            json.dumps(
                {
                    "triton": version("triton"),
                    "variants": [{**asdict(row), "ok": row.fits(stack)} for row in rows],
                    "ok": not bad,
                },
                indent=1,
            )
        )
    else:
        faults = f"over {stack} bytes of stack, too much shared memory or narrow loads"
        print(f"{len(rows)} variants, {len(bad)} with {faults}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
