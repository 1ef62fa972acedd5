"""The CUDA kernels of csrc/ on a CPU: emulator/ compiles the sources themselves, with ThreadSanitizer too.

Every CUDA thread is a thread to it, so a missing barrier is a data race; each of the kernels' barriers is left out in
turn, and has to be missed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
COMPILER = shutil.which("g++")
RACE = "WARNING: ThreadSanitizer: data race"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

#: What is left out of a source, by what goes wrong then: file, text before, statement, and the case that shows it.
FAULTS = {
    "scores are read before every worker has written its part": (
        "factor_attention.cuh",
        "s1[2 * n], s1[2 * n + 1]};\n",
        "bar_sync<1, kWorkerThreads>();",
        "turn",
    ),
    "scores of the next tile are written over those still read": (
        "factor_attention.cuh",
        "control.scores[turn];\n",
        "turn ^= 1;",
        "turn",
    ),
    "rows beyond the tile's tokens have weight": (
        "factor_attention.cuh",
        "if (t() + (i & 1) + i / 2 % 2 * 8 >= count) ",
        "s[i / 4][i % 4] = -INFINITY;",
        "turn",
    ),
    "a chunk is read before it has come": (
        "factor_attention.cuh",
        "const Slot here = slot_of(c);\n",
        "mbar_wait(&control.full[here.index], here.phase);",
        "turn",
    ),
    "a chunk is overwritten while it is read": (
        "factor_attention_producer.cuh",
        "Mbarrier* full = &control.full[slot.index];\n",
        "mbar_wait(&control.empty[slot.index], slot.phase ^ 1);",
        "turn",
    ),
    "queries are read before they have come": (
        "factor_attention.cuh",
        "",
        "mbar_wait(&control.queries_full[buffer], served / task.plan.buffers & 1);",
        "turn",
    ),
    "queries are overwritten while they are read": (
        "factor_attention_producer.cuh",
        "",
        "mbar_wait(&control.queries_empty[buffer], (round & 1) ^ 1);",
        "turn",
    ),
    "sums are written where the ring still is": (
        "factor_attention.cuh",
        "FLR_DEVICE void publish(int pitch) {\n    const auto& p = task.p;\n",
        "bar_sync<1, kWorkerThreads>();",
        "slot",
    ),
    "another block's sums are read before they are written": (
        "factor_attention.cuh",
        "publish(pitch);\n",
        "cluster_sync();",
        "cluster",
    ),
    "weights are read before they are written": (
        "factor_attention.cuh",
        "combine_factor(user, thread);\n",
        "bar_sync<1, kWorkerThreads>();",
        "cluster",
    ),
    "a block leaves while others read from it": (
        "factor_attention.cuh",
        "read from it\n",
        "cluster_sync();",
        "cluster",
    ),
    "another block's scores are read before they have come": (
        "factor_attention_producer.cuh",
        "",
        "mbar_wait_remote(&control.crossed[buffer], crossings >> 1 & 1);",
        "split",
    ),
    "a block says that its scores have come before all lanes have written": (
        "factor_attention_producer.cuh",
        "// all lanes have written\n",
        "__syncwarp();",
        "split",
    ),
    "a block arrives at a barrier that is not there yet": (
        "factor_attention.cuh",
        "that is not there yet\n",
        "cluster_sync();",
        "split",
    ),
    "a block of gradients arrives at a barrier that is not there yet": (
        "factor_attention_backward.cuh",
        "that is not there yet\n",
        "cluster_sync();",
        "back split",
    ),
    "the next user's rows are written while they are read": (
        "factor_attention_backward.cuh",
        "rows of the user before\n",
        "bar_sync<1, kWorkerThreads>();",
        "back",
    ),
    "rows are read before they are written": (
        "factor_attention_backward.cuh",
        "control.delta[warp][k] = products[k];\n    }\n",
        "bar_sync<1, kWorkerThreads>();",
        "back",
    ),
    "products are read before every worker has written its part": (
        "factor_attention_backward.cuh",
        "gather_two(part);\n",
        "bar_sync<1, kWorkerThreads>();",
        "back",
    ),
    "products of the next tile are written over those still read": (
        "factor_attention_backward.cuh",
        "control.scores[turn];\n",
        "turn ^= 1;",
        "back",
    ),
    "a chunk's gradients are computed before it has come": (
        "factor_attention_backward.cuh",
        "const Slot here = slot_of(c);\n",
        "mbar_wait(&control.full[here.index], here.phase);",
        "back",
    ),
    "gradients leave, and a chunk comes, before the workers are done": (
        "factor_attention_backward_producer.cuh",
        "",
        "mbar_wait(&control.empty[slot.index], slot.phase ^ 1);",
        "back",
    ),
    "a chunk comes while the gradients before it are leaving": (
        "factor_attention_backward_producer.cuh",
        "",
        "bulk_wait_read();",
        "back",
    ),
    "sums are written where gradients still are": (
        "factor_attention_backward.cuh",
        "",
        "mbar_wait(&control.drained, 0);",
        "back slot",
    ),
    "another block's gradients are read before they are written": (
        "factor_attention_backward.cuh",
        "sums[i][j];\n      }\n    }\n",
        "cluster_sync();",
        "back cluster",
    ),
    "a block leaves while others read its gradients": (
        "factor_attention_backward.cuh",
        "read from it\n",
        "cluster_sync();",
        "back cluster",
    ),
    "a warp's sum is read before it is written": (
        "group_advantage.cu",
        "buffer[segment()] = x;\n",
        "__syncthreads();",
        "few",
    ),
    "a warp's sum is overwritten while it is read": (
        "group_advantage.cu",
        "total += buffer[w];\n",
        "__syncthreads();",
        "few",
    ),
    "rewards are read before they are written": (
        "group_advantage.cu",
        "__device__ void sync() const { ",
        "__syncthreads();",
        "few",
    ),
}
#: B, L, D, K, float16, multiprocessors, percent of tokens kept, gain of the logits.
CASES = {
    "several users a block, one without a token": (5, 70, 896, 5, 1, 2, 50, 3),
    "8 factors": (3, 100, 1536, 8, 0, 2, 80, 3),
    "one factor, logits of 1000": (1, 140, 1024, 1, 1, 4, 100, 1000),
    "cluster of 2": (2, 130, 2048, 3, 0, 4, 60, 30),
    "cluster of 4": (1, 200, 520, 2, 0, 4, 90, 2),
    "cluster of 16": (1, 600, 96, 2, 1, 16, 30, 3),
    "half a chunk of padding": (3, 30, 2560, 6, 0, 2, 80, 20),
    "the largest D of one block": (1, 40, 4096, 4, 0, 1, 100, 2),
    "the largest D of one block and 8 factors, two queries' buffers do not fit": (3, 24, 4096, 8, 1, 2, 80, 3),
    "the largest D of one block, two queries' buffers": (3, 20, 4000, 3, 0, 1, 70, 5),
    "16 factors, several users a block": (4, 50, 896, 16, 0, 1, 70, 3),
    "9 factors, logits of 1000": (2, 40, 1536, 9, 1, 2, 80, 1000),
    "12 factors, cluster of 4": (1, 150, 2048, 12, 0, 4, 60, 3),
    "16 factors, two blocks a user": (3, 40, 2056, 16, 1, 4, 70, 3),
    "the largest D, two blocks a user, users in turn": (3, 40, 8192, 4, 0, 2, 80, 3),
    "two blocks a user, clusters of 4": (2, 70, 5128, 7, 1, 8, 80, 20),
    "the largest D and K, four blocks a user": (2, 40, 8192, 16, 0, 4, 60, 3),
    "four blocks a user, clusters of 8": (1, 70, 7000, 11, 1, 8, 80, 3),
}
#: B, L, D, K, whether dH is wanted, multiprocessors, percent of tokens kept, gain of the logits.
BACKWARD_CASES = {
    "several users a block, one without a token": (5, 70, 896, 4, 1, 2, 50, 3),
    "one factor, logits of 1000": (1, 140, 1024, 1, 1, 4, 100, 1000),
    "three factors": (3, 60, 1536, 3, 1, 2, 80, 3),
    "cluster of 2": (2, 130, 2048, 3, 1, 4, 60, 30),
    "cluster of 4": (1, 200, 528, 2, 1, 4, 90, 2),
    "cluster of 16": (1, 600, 96, 2, 1, 16, 30, 3),
    "tiles of 8 tokens, half a chunk": (3, 30, 2560, 4, 1, 2, 80, 20),
    "the largest D of one block": (1, 40, 4096, 4, 1, 1, 100, 2),
    "without dH": (3, 24, 4096, 4, 0, 2, 80, 3),
    "the largest D, two blocks a user, users in turn": (3, 30, 8192, 4, 1, 2, 80, 3),
    "two blocks a user, clusters of 4": (1, 70, 5136, 3, 1, 4, 80, 20),
}


#: Fewer columns a worker, so that a run is short: every path of the kernel is there with 128 and 512 of them.
SMALL = {
    r"p\.size <= 1024(.*)<1024, 1024>": r"p.size <= 128\1<128, 128>",
    r"p\.size <= 1536(.*)<1536, 1536>": r"p.size <= 512\1<512, 256>",
    r"p\.size <= 1024(.*)<1024, 1024, 16>": r"p.size <= 128\1<128, 128, 16>",
    r"p\.size <= 2048(.*)<2048, 1024, 16>": r"p.size <= 256\1<256, 128, 16>",
    r"<2048, 1024, 16, 4>": "<256, 128, 16, 4>",
    r".* Columns<(2048, 1024|3072, 1024|4096, 512|4096, 1024, 4)>>.*\n": "",
    r"<4096, 512, 8, 2>": "<512, 256, 8, 2>",
    r"<4096, 1024, 4, 2>": "<512, 256, 4, 2>",
    r"&& D <= 2048": "&& D <= 128",
    r"p\.size <= 1024(.*)<1024, 512, 16>": r"p.size <= 256\1<256, 256, 16>",
    r"p\.size <= 1536(.*)<1536, 768, 16>": r"p.size <= 512\1<512, 256, 8>",
    r"kExactColumns = 2048": "kExactColumns = 256",
    r".*GradientColumns<(kExactColumns|3072|4096, 1024, 8>).*\n": "",
    r"GradientColumns<4096, 1024, 8, 2>": "GradientColumns<512, 256, 8, 2>",
}


def leave_out(text: str, before: str, statement: str, fault: int) -> str:
    """``text`` whose ``statement`` after ``before`` is not executed where ``emu::fault`` is ``fault``."""
    parts = re.split(f"({re.escape(before)}\\s*){re.escape(statement)}", text)
    assert len(parts) == 3, f"{statement} after {before}: expected once, found {len(parts) // 2} times"
    return f"{parts[0]}{parts[1]}if (emu::fault != {fault}) {{ {statement} }}{parts[2]}"


def prepare(folder: Path, changes: dict[str, str]) -> None:
    """The sources in ``folder``, with ``changes`` by pattern, in the C++ that g++ takes."""
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        for number, (name, before, statement, _) in enumerate(FAULTS.values(), 1):
            if name == path.name:
                text = leave_out(text, before, statement, number)
        for pattern, replacement in changes.items():
            text = re.sub(pattern, replacement, text)
        text = re.sub(r"(?<![.\w])(threadIdx|blockIdx|blockDim|gridDim)\b", r"emu::self().\1", text)
        # a block's own variables, all of one type and length each
        text = re.sub(r"__shared__ (\w+) (\w+);", r"auto& \2 = emu::shared<\1, __LINE__>();", text)
        text = re.sub(r"__shared__ (\w+) (\w+)(\[\w+\]);", r"auto& \2 = emu::shared<\1\3, __LINE__>();", text)
        text = re.sub(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?), 0, stream>>>\(", r"emulated_launch((\1), \2, stream, ", text)
        (folder / path.name).write_text(text)
    for path in EMULATOR.iterdir():  # device.cuh takes the place of csrc's
        shutil.copy(path, folder)


def build(folder: Path, *flags: str) -> None:
    """``attention``, ``backward`` and ``advantage`` in ``folder``."""
    command = [COMPILER, "-std=c++20", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]
    units = {
        "attention": ["forward.cpp"],
        "backward": ["backward.cpp"],
        "advantage": ["advantage.cpp", "group_advantage.cpp", "-x", "c++", "group_advantage.cu"],
    }
    for name, sources in units.items():
        result = subprocess.run(
            [*command, "-I", ".", *sources, "-o", name], cwd=folder, capture_output=True, text=True, timeout=300
        )
        if "cannot find" in result.stderr and "tsan" in result.stderr:
            pytest.skip("the compiler has no ThreadSanitizer")
        assert result.returncode == 0, result.stderr[:4000]


def run(folder: Path, name: str, *arguments: object, fault: int = 0) -> str:
    """What the program prints; ends with ``exit STATUS``. One that hangs says so and fails."""
    environment = {**os.environ, "EMULATED_FAULT": str(fault), "TSAN_OPTIONS": "halt_on_error=1"}
    command = [str(folder / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, env=environment)
    return f"{result.stdout}{result.stderr}exit {result.returncode}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    prepare(folder, {})
    build(folder)
    return folder


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    prepare(folder, SMALL)
    build(folder, "-fsanitize=thread")
    shown = run(folder, "advantage", "few")
    if "unexpected memory mapping" in shown:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    return folder


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_factor_attention_equals_float64(plain, case):
    shown = run(plain, "attention", *case)
    assert shown.endswith("exit 0"), shown
    assert shown.startswith("ok"), shown


@pytest.mark.parametrize("case", BACKWARD_CASES.values(), ids=BACKWARD_CASES)
def test_backward_equals_float64(plain, case):
    shown = run(plain, "backward", *case)
    assert shown.endswith("exit 0"), shown
    assert shown.startswith("ok"), shown


def test_group_advantage_equals_its_host_twin_to_the_bit(plain):
    assert run(plain, "advantage") == "67 problems\nexit 0"


#: Users in turn, with queries in shared memory; a cluster of 2; one with all of its tokens in the first slot; users
#: in turn of two blocks each; two times two blocks, and more than eight factors. Of
#: the backward likewise, with tiles of 8 first and last and of 16 in between.
SMALL_CASES = {
    "turn": (4, 90, 296, 2, 0, 1, 70, 3),
    "cluster": (2, 130, 96, 2, 0, 4, 80, 3),
    "slot": (2, 130, 96, 8, 1, 4, 20, 3),
    "split": (3, 70, 680, 3, 0, 2, 70, 3),
    "split cluster": (1, 70, 496, 11, 1, 4, 80, 3),
    "back": (3, 70, 400, 2, 1, 1, 70, 3),
    "back cluster": (2, 130, 96, 4, 1, 4, 80, 3),
    "back slot": (2, 130, 96, 4, 1, 4, 20, 3),
    "back split": (3, 70, 688, 3, 1, 2, 70, 3),
    "back split cluster": (1, 70, 688, 2, 1, 4, 80, 3),
}


def _program(case: str) -> str:
    return "backward" if case.startswith("back") else "attention"


def test_no_data_race(sanitized):
    assert run(sanitized, "advantage", "few") == "5 problems\nexit 0"
    for name in ("attention", "backward"):
        cases = (case for key, case in SMALL_CASES.items() if _program(key) == name)
        shown = run(sanitized, name, *(number for case in cases for number in case))
        assert shown.endswith("exit 0"), shown


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(sanitized, name):
    _, _, _, case = FAULTS[name]
    program = ("advantage", "few") if case == "few" else (_program(case), *SMALL_CASES[case])
    shown = run(sanitized, *program, fault=list(FAULTS).index(name) + 1)
    assert RACE in shown or "FAIL" in shown, shown[-2000:]
