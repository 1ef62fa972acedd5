"""The Triton backend around its kernels: interpreter run, dispatch, configurations, ahead-of-time inspection."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flr_kernels
from flr_kernels import dispatch
from flr_kernels.backends import triton_config

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import triton"], capture_output=True).returncode != 0,
    reason="triton is not installed",
)


def python(*arguments, **environment):
    """A fresh interpreter in the repository; variables given as None are unset."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    env = {key: value for key, value in env.items() if value is not None}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)  # some 240 tests in one process, whose share of a machine others may have
@needs_triton
def test_kernels_under_the_interpreter():
    """A process of its own: TRITON_INTERPRET is set before the kernels are imported, and must not touch other tests."""
    files = [str(f) for f in Path(__file__).parent.glob("test_triton_*.py") if f.name != Path(__file__).name]
    run = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *files,
        TRITON_INTERPRET="1", PYTEST_ADDOPTS="-W ignore::RuntimeWarning", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_import_needs_only_torch_and_a_missing_triton_is_named():
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.modules["triton"] = None
import torch, flr_kernels
h, u = torch.randn(1, 3, 32), torch.randn(1, 2, 32)
assert flr_kernels.factor_attention(h, u).context.shape == (1, 2, 32)
import os
os.environ["FLR_BACKEND"] = "triton"
try:
    flr_kernels.factor_attention(h, u)
except flr_kernels.BackendUnavailable as error:
    print(error)
"""
    run = python("-c", code, TRITON_INTERPRET=None, FLR_BACKEND=None)
    assert run.returncode == 0, run.stderr
    assert "the package triton is not installed" in run.stdout


@needs_triton
def test_importing_flr_kernels_does_not_import_triton():
    run = python("-c", "import sys, flr_kernels; print('triton' in sys.modules)")
    assert run.stdout.strip() == "False", run.stderr


@needs_triton
@pytest.mark.skipif(triton_config.interpreted(), reason="the interpreter takes CPU tensors")
def test_triton_by_name_on_a_cpu_tensor_says_what_to_do(monkeypatch):
    h, u = torch.randn(1, 3, 32), torch.randn(1, 2, 32)
    assert dispatch.select("factor_attention", h, u) == "reference"
    monkeypatch.setenv("FLR_BACKEND", "triton")
    with pytest.raises(
        flr_kernels.BackendUnavailable, match=r"needs a CUDA tensor, got one on cpu; .*TRITON_INTERPRET=1"
    ):
        flr_kernels.factor_attention(h, u)
    with pytest.raises(flr_kernels.BackendUnavailable, match="needs a CUDA tensor"):
        flr_kernels.factor_aggregate(u, torch.zeros(1, 2))


class FakeCuda:
    """What dispatch reads of a tensor."""

    is_cuda = True

    def __init__(self, size=1536, dtype=torch.bfloat16):
        self.shape, self.dtype, self.device = (2, 7, size), dtype, torch.device("cuda")


@needs_triton
def test_auto_picks_triton_on_cuda_and_falls_back_with_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch.select("factor_attention", FakeCuda(), FakeCuda()) == "triton"
    assert dispatch.select("factor_aggregate", FakeCuda()) == "triton"
    dispatch._SAID.clear()
    for _ in range(2):
        assert dispatch.select("factor_attention", FakeCuda(20), FakeCuda(20)) == "reference"
    said = [
        r.message for r in caplog.records if r.message.startswith("factor_attention: using the PyTorch reference: ")
    ]
    assert len(said) == 1
    assert said[0].endswith("h: the triton backend expects D a multiple of 8 from 32 to 8192, got D = 20")
    monkeypatch.setenv("FLR_BACKEND", "triton")
    with pytest.raises(ValueError, match="got D = 20"):
        dispatch.select("factor_attention", FakeCuda(20), FakeCuda(20))
    monkeypatch.delenv("FLR_BACKEND")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.select("factor_attention", FakeCuda(), FakeCuda()) == "reference"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("capability", sorted(triton_config.ARCHES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_choice_of_tiles(capability, dtype, backward, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arch = triton_config.ARCHES[capability]

    def tile(batch, length):
        return triton_config.attention_tile(arch, batch, length, dtype, backward)

    assert 4096 / tile(1, 4096).block_l > 0.5 * arch.sms  # one long history reaches most of the chip
    for length in {t.block_l for t in triton_config.tiles(dtype.itemsize, backward) if t.suits(arch)}:
        assert tile(512, length).block_l == length  # many short ones: a program a user, nothing to combine
    for batch, length in ((0, 5), (1, 1), (3, 77), (4096, 4096)):
        assert tile(batch, length) in triton_config.tiles(dtype.itemsize, backward)
        assert tile(batch, length).suits(arch)


def test_architectures(monkeypatch):
    assert triton_config.arch_of((9, 0), 114)[1].sms == 114
    assert triton_config.arch_of((8, 6))[0] == 80
    assert triton_config.arch_of((12, 0))[0] == 100
    with pytest.raises(flr_kernels.BackendUnavailable, match=r"8\.0 or newer, got 7\.5"):
        triton_config.arch_of((7, 5))


@needs_triton
@pytest.mark.skipif(triton_config.interpreted(), reason="the interpreter compiles nothing")
def test_inspection_compiles_what_dispatch_launches():
    from flr_kernels import inspect

    launches = inspect.variants()
    kernels = {inspect._name(launch.kernel) for launch in launches}
    assert kernels == {
        "attention forward", "attention combine", "attention delta", "attention backward", "attention combine_du",
        "aggregate forward", "aggregate backward", "normaliser forward", "logprob gradient",
        "trie advance", "trie collect",
        "trie step normaliser", "trie step candidates", "trie step reduce", "trie step finish",
    }  # fmt: skip
    tiles = {t.name for itemsize in (2, 4) for back in (False, True) for t in triton_config.tiles(itemsize, back)}
    assert tiles <= {word for label in launches.values() for word in label.split()}
    launch, label = next((x, y) for x, y in launches.items() if inspect._name(x.kernel) == "aggregate forward")
    variant = inspect.compile_variant(launch, label, 90)
    assert variant.ok
    assert 0 < variant.registers <= 255
    assert variant.programs >= 1


@needs_triton
@pytest.mark.skipif(triton_config.interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [90, "gfx942", "gfx950"])
def test_histories_and_logits_are_loaded_16_bytes_at_a_time(arch):
    from flr_kernels import inspect

    wanted = ("attention forward bfloat16 medium split", "attention backward bfloat16 long whole",
              "normaliser forward bfloat16", "aggregate backward bfloat16")  # fmt: skip
    found = {f"{inspect._name(x.kernel)} {y}": x for x, y in inspect.variants(isinstance(arch, str)).items()}
    rows = [inspect.compile_variant(found[name], name, arch) for name in wanted]
    assert [row.label for row in rows if not row.ok] == []
    assert all(row.wide_needed > 0 for row in rows[:3])
    # a tensor that begins anywhere cannot be loaded so, and that shows
    aligned = tuple(index for index in found[wanted[2]].aligned if index)
    narrow = inspect.compile_variant(dataclasses.replace(found[wanted[2]], aligned=aligned), "", arch)
    assert not narrow.ok
    assert narrow.stack == 0


@needs_triton
@pytest.mark.skipif(triton_config.interpreted(), reason="the interpreter compiles nothing")
def test_inspection_fails_on_a_spill(monkeypatch, capsys):
    from flr_kernels import inspect

    launches = dict(list(inspect.variants().items())[:1])
    good = inspect.Variant("attention forward", "x", 90, 128, 0, 1000, 2000, 4, 4)
    monkeypatch.setattr(inspect, "variants", lambda amd: launches)
    monkeypatch.setattr(inspect, "extension_variants", lambda arch: [])
    for change, status in (({}, 0), ({"stack": 8}, 1), ({"shared": 3000}, 1), ({"wide": 7, "wide_needed": 8}, 1)):
        row = inspect.Variant(**{**good.__dict__, **change})
        monkeypatch.setattr(inspect, "compile_variant", lambda *_, row=row: row)
        assert inspect.main(["--json", "--arch", "90"]) == status
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] == (status == 0)
        assert report["variants"][0]["ok"] == (status == 0)
        assert inspect.main(["--json", "--arch", "90", "--max_stack", "8"]) == (bool(change) and "stack" not in change)
        assert json.loads(capsys.readouterr().out)["ok"] == (not change or "stack" in change)
    with pytest.raises(SystemExit):
        inspect.main(["--arch", "70"])
