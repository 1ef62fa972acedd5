"""Building and loading the extension: what setup.py does with what it finds, and what the user is told."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flr_kernels
from flr_kernels import dispatch
from flr_kernels.backends import extension

ROOT = Path(__file__).parents[2]
GXX = shutil.which("g++")
pytest.importorskip("pybind11")
#: nvcc as far as setup.py asks: it lists three architectures, notes how it is called and fails to link.
FAKE_NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_75; echo compute_80; echo compute_90; exit 0; fi
if [ "$1" = --version ]; then echo "Cuda compilation tools, release ${FAKE_RELEASE:-13.0}, V1"; exit 0; fi
echo "$@" >> "$(dirname "$0")/called"
if [ "$1" != -shared ] && [ "$3" != -shared ]; then exit 0; fi  # -ccbin and its argument may come first
echo "fake compiler error" >&2
exit 1
"""


@pytest.fixture
def build(tmp_path):
    """setup.py build_ext into a temporary folder, with a PATH of our own and a torch that must not be imported."""
    tools = tmp_path / "bin"
    cuda = tmp_path / "cuda" / "bin"
    for folder in (tools, cuda, tmp_path / "poison"):
        folder.mkdir(parents=True)
    for tool in ("g++", "as", "ld", "sh", "dirname"):
        if path := shutil.which(tool):
            (tools / tool).symlink_to(path)
    (tmp_path / "poison" / "torch.py").write_text("raise SystemExit('setup.py imported torch')\n")

    def run(nvcc=True, **environment):
        if nvcc:
            (cuda / "nvcc").write_text(FAKE_NVCC)
            (cuda / "nvcc").chmod(0o755)
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("FLR_", "CUDA_", "CXX", "MAX_JOBS"))}
        settings = {
            "CXXFLAGS": "-O0",
            "PATH": str(tools),
            "CUDA_HOME": str(cuda.parent),
            "PYTHONPATH": str(tmp_path / "poison"),
        }
        folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        result = subprocess.run(
            [sys.executable, "setup.py", "build_ext", *folders],
            cwd=ROOT,
            env={**keep, **settings, **environment},
            capture_output=True,
            text=True,
        )
        result.output = result.stdout + result.stderr
        result.built = list((tmp_path / "lib").rglob("_C*"))
        result.nvcc = (cuda / "called").read_text().split() if (cuda / "called").exists() else []
        return result

    return run


@pytest.mark.skipif(GXX is None, reason="no g++")
def test_a_failing_nvcc_and_no_ninja_leave_the_host_twin(build):
    result = build()
    assert result.returncode == 0, result.output
    assert "fake compiler error" in result.output
    assert "could not build the CUDA half" in result.output
    assert "built flr_kernels._C (host only" in result.output
    flags = [word for word in result.nvcc if word.startswith("-gencode")]
    assert sorted(
        flags
    ) == [  # the default list, of what this nvcc knows, PTX of the newest, and the two kernels for 9.0 alone
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_90,code=sm_90",
        *["-gencode=arch=compute_90a,code=sm_90a"] * 2,
    ]
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('_C', sys.argv[1]); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); print(repr(m.architectures), m.source_hash, hasattr(m, 'driver_problem'))"
    )
    shown = subprocess.run([sys.executable, "-c", code, *map(str, result.built)], capture_output=True, text=True)
    assert shown.stdout.split() == ["''", extension.source_hash(ROOT / "csrc"), "False"], shown.stderr


def test_without_any_compiler_installation_goes_on_unless_required(build):
    result = build(nvcc=False, CXX="no-such-compiler")
    assert result.returncode == 0, result.output
    assert "could not build the extension" in result.output
    assert "going on without flr_kernels._C" in result.output
    assert not result.built
    required = build(nvcc=False, CXX="no-such-compiler", FLR_REQUIRE_EXTENSION="1")
    assert required.returncode != 0
    assert "FLR_REQUIRE_EXTENSION is set" in required.output


def test_the_architecture_list(build):
    result = build(CXX="no-such-compiler", FLR_CUDA_ARCH_LIST="8.0; 9.0+PTX,7.5", FLR_REQUIRE_EXTENSION="1")
    assert result.returncode != 0
    codes = [word.rpartition("code=")[2] for word in result.nvcc if word.startswith("-gencode")]
    assert sorted(codes) == ["compute_90", "sm_75", "sm_80", "sm_90", "sm_90a", "sm_90a"]
    without = build(CXX="no-such-compiler", FLR_CUDA_ARCH_LIST="8.0", FLR_REQUIRE_EXTENSION="1")
    assert "sm_90a" not in " ".join(without.nvcc[len(result.nvcc) :])
    old = build(CXX="no-such-compiler", FLR_CUDA_ARCH_LIST="9.0", FLR_REQUIRE_EXTENSION="1", FAKE_RELEASE="11.8")
    codes = " ".join(old.nvcc[len(without.nvcc) :])
    assert "code=sm_90" in codes
    assert "sm_90a" not in codes  # which 11.8 does not know
    for wrong in ("12.0", "9", "sm_90", "9.0+ptx"):
        result = build(FLR_CUDA_ARCH_LIST=wrong)
        assert result.returncode != 0
        assert f"FLR_CUDA_ARCH_LIST: expected some of ['75', '80', '90'], got '{wrong}'" in result.output


def test_a_number_of_jobs_that_is_none_is_refused(build):
    result = build(MAX_JOBS="many")
    assert result.returncode != 0
    assert "MAX_JOBS: expected a number of compilers, got 'many'" in result.output
    assert "Traceback" not in result.output


def test_what_an_editor_leaves_beside_the_sources_does_not_make_the_extension_old(tmp_path):
    for path in (ROOT / "csrc").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "CMakeFiles").mkdir()
    (tmp_path / ".bindings.cpp.swp").write_bytes(b"x")
    (tmp_path / ".#bindings.cpp").symlink_to("nobody@nowhere")
    assert extension.source_hash(tmp_path) == extension.source_hash(ROOT / "csrc")
    (tmp_path / "bindings.cpp").write_bytes(b"another")
    assert extension.source_hash(tmp_path) != extension.source_hash(ROOT / "csrc")


@pytest.fixture
def loader():
    """Caches of the loader, empty before and after."""

    def clear():
        extension._load.cache_clear()
        extension._device_problem.cache_clear()
        dispatch._SAID.clear()

    clear()
    yield
    clear()


class FakeCuda:
    """What dispatch reads of a tensor on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


ARGUMENTS = (None, 2, "grpo", "given", 1e-4)


def test_a_missing_extension_is_named_at_the_call(loader, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flr_kernels._C", None)
    flr_kernels.group_advantage(torch.zeros(2, 2), None, 2)  # the reference serves
    monkeypatch.setenv("FLR_BACKEND", "group_advantage=host")
    with pytest.raises(flr_kernels.BackendUnavailable, match=r"is not built; build it with `python setup.py build_ext"):
        flr_kernels.group_advantage(torch.zeros(2, 2), None, 2)
    monkeypatch.setenv("FLR_BACKEND", "group_advantage=cuda")
    with pytest.raises(flr_kernels.BackendUnavailable, match="expects CUDA tensors, got cpu"):
        flr_kernels.group_advantage(torch.zeros(2, 2), None, 2)
    with pytest.raises(flr_kernels.BackendUnavailable, match="is not built"):
        dispatch.select("group_advantage", FakeCuda(), *ARGUMENTS)
    monkeypatch.delenv("FLR_BACKEND")
    for _ in range(3):
        assert dispatch.select("group_advantage", FakeCuda(), *ARGUMENTS) == "reference"
    (record,) = caplog.records  # once
    assert "group_advantage: using the PyTorch reference: the extension flr_kernels._C is not built" in record.message


def test_a_broken_or_stale_extension_is_named(loader, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: x")

    with monkeypatch.context() as patch:
        patch.setattr(extension.importlib, "import_module", broken)
        with pytest.raises(flr_kernels.BackendUnavailable, match=r"does not load \(undefined symbol: x\)"):
            extension.load()
    extension._load.cache_clear()
    monkeypatch.setitem(sys.modules, "flr_kernels._C", SimpleNamespace(source_hash="0" * 16))
    with pytest.raises(flr_kernels.BackendUnavailable, match="built from other sources than csrc/ holds now"):
        extension.load()


@pytest.mark.parametrize(
    ("architectures", "problem", "capability", "message"),
    [
        ("", None, (9, 0), "without its CUDA half"),
        ("8.0 9.0", "CUDA driver version is insufficient for CUDA runtime version", (9, 0), "update the driver"),
        ("8.0 9.0", None, (7, 5), "built for 8.0 9.0, device 0 is 7.5; FLR_CUDA_ARCH_LIST=7.5, build"),
        ("8.0 9.0", None, (12, 0), "device 0 is 12.0"),
        ("8.0 9.0+PTX", None, (12, 0), None),
        ("8.0", None, (8, 9), None),
    ],
)
def test_what_the_device_and_driver_cannot_run(architectures, problem, capability, message, loader, monkeypatch):
    module = SimpleNamespace(
        source_hash=extension.source_hash(ROOT / "csrc"), architectures=architectures, driver_problem=lambda: problem
    )
    monkeypatch.setitem(sys.modules, "flr_kernels._C", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch.select("group_advantage", FakeCuda(), *ARGUMENTS) == ("reference" if message else "cuda")
    if message:
        with pytest.raises(flr_kernels.BackendUnavailable, match=message):
            extension.check_cuda(FakeCuda())


def test_the_cuda_half_spills_nothing():
    pytest.importorskip("triton", reason="its cuobjdump is used")
    from flr_kernels import inspect

    if isinstance(extension._load(), str) or not extension.load().architectures:
        pytest.skip("no CUDA half")
    architectures = extension.load().architectures.split()
    functions = inspect._resources(extension.load().__file__)
    attention = [function for function in functions if "factor_attention" in function[0]]
    advantages = [function for function in functions if function not in attention]
    assert len(advantages) == 10 * len(architectures)  # 4 dtypes, warp and block; the finish in 2
    assert all(stack == 0 for _, _, stack, _ in functions), functions
    assert all(registers <= 64 for _, registers, _, _ in advantages)  # 1024 threads a block
    if {"9.0", "9.0+PTX"} & set(architectures):
        assert len(attention) == 22 + 6  # forward: 2 dtypes, 11 sets of columns; backward: 6 sets
        assert all(registers == 168 for _, registers, _, _ in attention)  # what a block starts with, and deals out anew
        rows = inspect.extension_variants(90)
        assert len(rows) == 38
        assert all(row.ok for row in rows)
