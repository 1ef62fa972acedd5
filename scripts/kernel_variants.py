"""Times variants of the CUDA backward of factor attention on a GPU of compute capability 9.0: tiles, copies, ablations.

    python -m scripts.kernel_variants --build /tmp/variants           # compile each, side by side; needs nvcc alone
    python -m scripts.kernel_variants --time /tmp/variants --json docs/results/attention_backward.json
    python -m scripts.kernel_variants --table                         # docs/kernels.md alone

A variant is the sources of csrc/ with patterns replaced, compiled to a library of its own. Times are replays of a CUDA
graph over inputs that do not fit the L2 together, with masks that hide up to an eighth of every history; bytes are
those of H and dH whole and of all [B, K, D]. Variants that give right results are compared with Triton's backward
first; ablations leave work out and say where the time goes. ``copies only`` moves every byte and computes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/attention_backward.json", ROOT / "docs/kernels.md"
KERNEL, LAUNCH = "factor_attention_backward.cuh", "factor_attention_backward.cu"
NOTHING = "    if (task.p.size > 0) return;\n"
_MULTIPLY = (KERNEL, r"(void multiply\(.*\{\n)", rf"\1{NOTHING}")


def _columns(size: int, chunk: int, tokens: int) -> tuple[str, str, str]:
    name = "kExactColumns" if size == 2048 else str(size)
    return LAUNCH, rf"GradientColumns<{name}, \d+, \d+>", f"GradientColumns<{name}, {chunk}, {tokens}>"


#: name → (file, pattern, replacement), what is changed of the sources.
VARIANTS: dict[str, list[tuple[str, str, str]]] = {
    "as it is": [],
    "longer copies": [_columns(1536, 1536, 16)],
    "shorter copies": [_columns(1536, 512, 16), _columns(2048, 512, 16), _columns(4096, 512, 8)],
}
ABLATIONS: dict[str, list[tuple[str, str, str]]] = {
    "no scores": [_MULTIPLY],
    "no products of dH": [
        (KERNEL, r"if \(task\.d\.dh == nullptr\) return;\n(    (#pragma|T::mma))", rf"{NOTHING.strip()}\n\1")
    ],
    "copies only": [
        _MULTIPLY,
        (KERNEL, r"(bool two\) const \{\n)(    ldmatrix<true>\(h)", rf"\1{NOTHING}\2"),
        (KERNEL, r"(    if \(kWide\) pair_of_8)", rf"{NOTHING}\1"),
    ],
}
SHAPES = [(64, 512, 1536, 4), (64, 512, 4096, 4), (512, 64, 1536, 4), (16, 2048, 2048, 4), (4, 2048, 1536, 4)]
SHAPES += [(64, 512, 3072, 4), (512, 64, 256, 4)]


def _folder(base: Path, name: str) -> Path:
    return base / name.replace(" ", "-")


def build(base: Path, name: str) -> str:
    """Compile a variant; its spilled bytes, or what the compiler said."""
    folder = _folder(base, name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder)
    for file, pattern, replacement in (VARIANTS | ABLATIONS)[name]:
        text, count = re.subn(pattern, replacement, (folder / file).read_text())
        if not count:
            raise SystemExit(f"kernel_variants: {name}: expected {pattern!r} in {file}, found it nowhere")
        (folder / file).write_text(text)
    command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "--cudart=static"]
    command += ["-shared", "-Xcompiler=-fPIC", LAUNCH, "-o", "kernel.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr[-1000:]
    return "spills " + " ".join(re.findall(r"(\d+) bytes spill stores", done.stderr))


class _Problem(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("h", "u", "mask", "context", "lse", "overlap", "entropy")]
    _fields_ += [(n, ctypes.c_int64) for n in ("h_b", "h_l", "u_b", "u_k", "mask_b", "mask_l", "users", "length")]
    _fields_ += [("size", ctypes.c_int), ("factors", ctypes.c_int), ("half", ctypes.c_bool), ("last", ctypes.c_bool)]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("context", "lse", "overlap", "entropy", "dh", "du")]


def _function(library: Path) -> Any:
    names = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\S*factor_attention_backward_cuda\S*", names)
    assert found is not None
    function = getattr(ctypes.CDLL(str(library)), found[0])
    function.argtypes = [ctypes.POINTER(_Problem), ctypes.POINTER(_Gradients), ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_char_p
    return function


def _microseconds(call: Callable[[int], Any], count: int) -> float:
    """Of a call, in the median of twenty replays of a graph of ``count`` calls."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(count):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    times = []
    for _ in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / count)
    return sorted(times[3:])[10]


def _inputs(shape: tuple[int, ...], seed: int) -> tuple[Any, ...]:
    """h, u, mask, what the forward saves, gradients, and room for dh and du."""
    import torch

    from flr_kernels.ops.factor_attention import cuda_host

    users, length, size, factors = shape
    torch.manual_seed(seed)
    h = torch.randn(users, length, size, device="cuda", dtype=torch.bfloat16)
    u = (3 * torch.randn(users, factors, size, device="cuda") / size**0.5).bfloat16()
    mask = torch.arange(length, device="cuda") >= torch.randint(0, max(length // 8, 1), (users, 1), device="cuda")
    saved = cuda_host.forward(h, u, mask)
    return h, u, mask, saved, tuple(torch.randn_like(x) for x in saved), torch.empty_like(h), torch.empty_like(u)


def _call_of(function: Any, sets: list[tuple[Any, ...]]) -> Callable[[int], None]:
    import torch

    packed = []
    for h, u, mask, saved, grads, dh, du in sets:
        strides = (h.stride(0), h.stride(1), u.stride(0), u.stride(1), mask.stride(0), mask.stride(1))
        tensors = [x.data_ptr() for x in (h, u, mask, *saved)]
        problem = _Problem(*tensors, *strides, h.shape[0], h.shape[1], h.shape[2], u.shape[1], False, False)
        packed.append((problem, _Gradients(*[x.data_ptr() for x in (*grads, dh, du)])))

    def call(i: int) -> None:
        problem, gradients = map(ctypes.byref, packed[i])
        if error := function(problem, gradients, 0, torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(error.decode())

    return call


def _check(sets: list[tuple[Any, ...]], call: Callable[[int], None]) -> None:
    import torch

    from flr_kernels.ops.factor_attention import triton_host

    h, u, mask, saved, grads, dh, du = sets[0]
    call(0)
    torch.cuda.synchronize()
    for found, expected in zip((dh, du), triton_host.backward(h, u, mask, saved, grads, True), strict=True):
        error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
        if not error < 1e-2:
            raise SystemExit(f"kernel_variants: expected Triton's gradients, got an error of {error:.1e}")


def _measure(base: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    from flr_kernels.ops.factor_attention import triton_host

    users, length, size, factors = shape
    history, rows = 2 * users * length * size, users * factors * size
    sets = [_inputs(shape, seed) for seed in range(max(2, min(8, int(3e8 / history) + 1)))]

    def triton(i: int) -> None:
        h, u, mask, saved, grads, *_ = sets[i]
        triton_host.backward(h, u, mask, saved, grads, True)

    times = {"triton": _microseconds(triton, len(sets))}
    for name in VARIANTS | ABLATIONS:
        call = _call_of(_function(_folder(base, name) / "kernel.so"), sets)
        if name in VARIANTS:
            _check(sets, call)
        times[name] = _microseconds(call, len(sets))
    return {"shape": shape, "bytes": 2 * history + 12 * rows, "us": {n: round(t, 2) for n, t in times.items()}}


def measure(base: Path) -> dict[str, Any]:
    """All variants on all shapes, and a large copy."""
    import torch

    from bench.harness import Ceilings
    from bench.machine import facts

    found = facts()
    out = {name: found[name] for name in ("commit", "date", "device", "versions")}
    out["copy_gb_per_s"] = round(Ceilings("default").copy / 1e9, 1)
    out["cases"] = []
    for shape in SHAPES:
        out["cases"].append(_measure(base, shape))
        torch.cuda.empty_cache()
        print(json.dumps(out["cases"][-1]), flush=True)
    assert torch.cuda.get_device_capability() == (9, 0)
    return out


def table(found: dict[str, Any]) -> str:
    """In Markdown: µs of each, and the share of a copy's rate that Triton's kernels and this one reach."""
    names = ["triton", *VARIANTS, *ABLATIONS]
    head = ["B × L × D × K", *names, "triton, of a copy's rate", "as it is, of a copy's rate"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for case in found["cases"]:
        times = case["us"]
        shares = [case["bytes"] / (times[name] * found["copy_gb_per_s"] * 10) for name in ("triton", "as it is")]
        cells = [" × ".join(f"{n:,}" for n in case["shape"])]
        cells += [f"{times[name]:.0f}" if name in times else "" for name in names]
        lines.append(f"| {' | '.join([*cells, *(f'{share:.0f} %' for share in shares)])} |")
    about = f"{found['device']}, commit {found['commit']}, a large copy {found['copy_gb_per_s']:,.0f} GB/s."
    return "\n".join([*lines, "", about])


def page(text: str) -> str:
    """The page with its table as the results say."""
    return filled(text, "kernel:variants", table(json.loads(RESULT.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="FOLDER")
    parser.add_argument("--time", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="Only write the page, from the results.")
    args = parser.parse_args()
    if args.build:
        with ThreadPoolExecutor(8) as pool:
            said = {name: pool.submit(build, args.build, name) for name in VARIANTS | ABLATIONS}
            for name, one in said.items():
                print(f"{name}: {one.result()}", flush=True)
    elif args.time:
        args.json.write_text(json.dumps(measure(args.time), indent=1) + "\n")
    elif not args.table:
        parser.error("expected --build, --time or --table")
    if args.json == RESULT and RESULT.is_file():
        PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
