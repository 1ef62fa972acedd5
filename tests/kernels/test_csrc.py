"""Group advantages of the extension: host twin and CUDA kernel against the reference; the sanitizers."""

import gc
import math
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flr_kernels
from flr_kernels import reference
from flr_kernels.backends import extension
from flr_kernels.ops.group_advantage.op import KINDS, REWARDS
from tests.helpers.extension import BUILT, needs_extension

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
on_gpu = pytest.mark.gpu
#: G, S: one, warp widths and their neighbours, a block a group, the largest.
SIZES = [(1, 1), (2, 5), (3, 0), (7, 31), (8, 16), (32, 33), (33, 4), (5, 700), (257, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_the_extension_is_built_where_a_compiler_is():
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    pytest.importorskip("pybind11")
    extension.load()
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")  # where set, setup.py looks nowhere else
    if shutil.which(f"{home}/bin/nvcc" if home else "nvcc"):
        assert extension.load().architectures


@pytest.fixture(params=["host", pytest.param("cuda", marks=on_gpu)])
def backend(request, monkeypatch):
    """The backend's name; uninitialised memory holds NaN meanwhile."""
    if not BUILT:
        pytest.skip(f"no extension: {extension._load()}")
    monkeypatch.setenv("FLR_BACKEND", request.param)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def inputs(groups, size, length, dtype, backend="host", mask="random", seed=0):
    """Log-probabilities [B·G, S] and a mask, in strides of their own."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    logp = -4 * torch.rand(rows, length, generator=generator, dtype=torch.float64).to(dtype)
    valid = torch.rand(rows, length, generator=generator) < 0.6
    if rows > 1 and length:
        logp[1, 0] = -math.inf
        valid[0] = False  # a sequence without a target
        valid[1, 0] = True
    device = "cuda" if backend == "cuda" else "cpu"
    logp, valid = logp.to(device), valid.to(device)
    if mask is None:
        return logp, None
    if mask == "random":
        return logp, valid
    wide = torch.empty(rows, 2 * length, dtype=dtype, device=device)[:, ::2]
    return wide.copy_(logp), valid.T.contiguous().T  # mask "strided"


def assert_equals_reference(actual, logp, mask, size, kind, reward, eps=1e-4):
    """Against the definition on the same values.

    A reward may differ by the last bits of exp and of the order of its sum; what is computed from rewards by that much
    of the largest, divided by what it is divided by.
    """
    logp = logp.cpu()
    rewards = reference.sequence_rewards(logp, None if mask is None else mask.cpu(), reward).view(-1, size)
    mean, std, _ = reference.group_statistics(rewards)
    tolerance = 2 * torch.finfo(torch.float32).eps if rewards.dtype == torch.float32 else 1e-12
    largest = rewards.abs().double().amax(1, keepdim=True)
    divisor = std + eps if kind == "grpo" else 1.0
    if kind == "latentr3" and len(rewards):
        largest = largest.amax()
        divisor = (rewards.double() - rewards[:, 0].double().mean()).norm() + eps
    expected = {
        "rewards": (rewards, tolerance * rewards.abs()),
        "advantages": (reference.group_advantages(rewards, kind, eps), tolerance * largest / divisor),
        "mean": (mean[:, 0], tolerance * rewards.abs().amax(1)),
        "std": (std[:, 0], tolerance * rewards.abs().amax(1)),
    }
    for name, (wanted, bound) in expected.items():
        result = getattr(actual, name)
        assert result.dtype == rewards.dtype, name
        error = (result.cpu().double() - wanted.double()).abs()
        bound = bound + tolerance * wanted.abs()
        assert (error <= bound).all(), f"{name}: {(error / bound).nan_to_num(math.inf).max()} times the bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "length"), SIZES)
def test_equals_the_reference(backend, size, length, dtype):
    for kind, reward, mask in product(KINDS, REWARDS[:2], ("random", None, "strided")):
        logp, valid = inputs(5, size, length, dtype, backend, mask)
        out = flr_kernels.group_advantage(logp, valid, size, kind, reward)
        assert_equals_reference(out, logp, valid, size, kind, reward)
    for kind in KINDS:
        given_rewards = inputs(5, size, 1, dtype, backend)[0][:, 0]
        given_rewards[-1] = -math.inf
        out = flr_kernels.group_advantage(given_rewards, None, size, kind, "given")
        assert_equals_reference(out, given_rewards, None, size, kind, "given")


@pytest.mark.parametrize("kind", KINDS)
def test_no_group_and_many_groups(backend, kind):
    for groups in (0, 1, 3000):  # 3000: several blocks, the last of which combines the batch
        logp, valid = inputs(groups, 4, 16, torch.float32, backend)
        assert_equals_reference(
            flr_kernels.group_advantage(logp, valid, 4, kind), logp, valid, 4, kind, "neg_perplexity"
        )


def test_the_largest_groups(backend):
    logp, valid = inputs(2, 1024, 4096, torch.bfloat16, backend)
    for kind in ("grpo", "latentr3"):
        assert_equals_reference(
            flr_kernels.group_advantage(logp, valid, 1024, kind), logp, valid, 1024, kind, "neg_perplexity"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_nan_inf_and_degenerate_groups_as_the_reference(backend, kind, monkeypatch):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -1.0, 5.0])
    generator = torch.Generator().manual_seed(0)
    for reward in REWARDS:
        logp = special[torch.randint(0, 6, (24,) if reward == "given" else (24, 2), generator=generator)]
        logp = logp.to("cuda" if backend == "cuda" else "cpu")
        monkeypatch.setenv("FLR_BACKEND", backend)
        actual = flr_kernels.group_advantage(logp, None, 4, kind, reward)
        monkeypatch.setenv("FLR_BACKEND", "reference")
        for a, b in zip(actual, flr_kernels.group_advantage(logp, None, 4, kind, reward), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-6, atol=1e-6)  # NaN and inf in the same places


def test_advantages_of_a_batch_in_parts(backend, monkeypatch):
    device = "cuda" if backend == "cuda" else "cpu"
    for dtype in (torch.float32, torch.float64):
        rewards = -1e3 + 1e-3 * torch.randn(300, 3, dtype=torch.float64)
        rewards = rewards.to(dtype).to(device)
        parts = rewards.split([0, 200, 1, 99])
        partials = []
        for part in parts:
            *_, batch = torch.ops.flr.group_advantage(part.flatten(), None, 3, "latentr3", "given", 1e-4)
            torch.testing.assert_close(batch, reference.batch_partial(part), rtol=1e-9, atol=0)
            partials.append(batch)
        together = torch.cat([torch.ops.flr.batch_advantage(part, torch.stack(partials), 1e-4) for part in parts])
        alone = flr_kernels.group_advantage(rewards.flatten(), None, 3, "latentr3", "given").advantages
        bound = 2**-23 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(together, alone, rtol=bound, atol=bound)
        torch.testing.assert_close(
            together, reference.group_advantages(rewards, "latentr3", 1e-4), rtol=bound, atol=bound
        )


def test_gradients_and_registration(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    logp = (-torch.rand(6, 3, dtype=torch.float64, device=device)).requires_grad_()
    mask = torch.ones(6, 3, dtype=torch.bool, device=device)
    assert torch.autograd.gradcheck(lambda x: flr_kernels.group_advantage(x, mask, 3).rewards, (logp,))
    for kind in ("grpo", "latentr3"):
        torch.library.opcheck(torch.ops.flr.group_advantage.default, (logp, mask, 3, kind, "neg_perplexity", 1e-4))
    compiled = torch.compile(lambda x: flr_kernels.group_advantage(x, mask, 3), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logp), flr_kernels.group_advantage(logp, mask, 3), strict=True):
        assert torch.equal(a, b)


@needs_extension
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzz_the_public_function(data):
    """A wrong argument is a ValueError (or an unavailable backend); a right one gives the reference's numbers."""
    draw = data.draw
    number = st.sampled_from([0.0, -1.0, -1e4, 5.0, math.nan, math.inf, -math.inf])
    rows, length = draw(st.integers(0, 6)), draw(st.integers(0, 4))
    dtype = draw(st.sampled_from([*DTYPES, torch.float32, torch.int64, torch.bool, torch.complex64]))
    logp = torch.tensor(draw(st.lists(number, min_size=rows * length, max_size=rows * length))).reshape(rows, length)
    logp = logp.nan_to_num() if not dtype.is_floating_point else logp
    logp = draw(
        st.sampled_from(
            [
                lambda x: x,
                lambda x: x.T,
                lambda x: x.new_full((), -1).expand(4, 3),
                lambda x: x[::2],
                lambda x: x.flatten(),
                lambda x: x.to("meta"),
            ]
        )
    )(logp.to(dtype))
    shape = draw(st.sampled_from([tuple(logp.shape), (rows, length), (2, 2)]))
    mask = draw(
        st.sampled_from(
            [
                None,
                torch.ones(shape, dtype=torch.bool),
                torch.zeros(shape),
                torch.ones(1, dtype=torch.bool).expand(shape),
                3,
            ]
        )
    )
    size = draw(st.sampled_from([1, 2, 3, 0, -1, 2.0, None, 10**30]))
    kind, reward = draw(st.sampled_from([*KINDS, "ppo"])), draw(st.sampled_from([*REWARDS, 3]))
    eps = draw(st.sampled_from([1e-4, 0, 1.0, -1.0, math.nan, "x"]))
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for backend in ("host", "reference"):
            patch.setenv("FLR_BACKEND", backend)
            try:
                results.append(flr_kernels.group_advantage(logp, mask, size, kind, reward, eps))
            except (ValueError, flr_kernels.BackendUnavailable) as error:
                results.append(type(error))
    host, plain = results
    if isinstance(host, type) or isinstance(plain, type):
        assert host == plain or (host is flr_kernels.BackendUnavailable and logp.device.type == "meta")
    else:
        for a, b in zip(host, plain, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_host_twin_under_the_sanitizers(tmp_path):
    flags = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread"]
    sources = [ROOT / "csrc/group_advantage.cpp", ROOT / "csrc/log_normaliser.cpp"]
    files = [*sources, ROOT / "tests/kernels/csrc_driver.cpp", "-o", tmp_path / "driver"]
    build = [COMPILER, *flags, "-fsanitize=address,undefined", *map(str, files)]
    compiled = subprocess.run(build, capture_output=True, text=True)
    if "cannot find" in compiled.stderr and "san" in compiled.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([tmp_path / "driver"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "1410 cases\n"


def _cuda_inputs(groups=64, size=8, length=16):
    logp, mask = inputs(groups, size, length, torch.float32, "cuda")
    return logp, mask, size


@on_gpu
@needs_extension
class TestOnTheDevice:
    @pytest.fixture(autouse=True)
    def _cuda(self, monkeypatch):
        monkeypatch.setenv("FLR_BACKEND", "cuda")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(64, 8, 16), (3000, 4, 16), (40, 300, 70), (2000, 64, 40)])
    def test_runs_are_bitwise_equal(self, kind, shape):
        logp, mask, size = _cuda_inputs(*shape)
        first = flr_kernels.group_advantage(logp, mask, size, kind)
        for _ in range(20):
            for a, b in zip(flr_kernels.group_advantage(logp, mask, size, kind), first, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("kind", ["grpo", "latentr3"])
    @pytest.mark.parametrize("groups", [64, 3000])
    def test_in_a_cuda_graph(self, kind, groups):
        logp, mask, size = _cuda_inputs(groups)
        flr_kernels.group_advantage(logp, mask, size, kind)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flr_kernels.group_advantage(logp, mask, size, kind)
        for seed in (1, 2, 3):
            logp.copy_(inputs(groups, 8, 16, torch.float32, seed=seed)[0])
            for result in out:
                result.fill_(math.nan)
            graph.replay()
            assert_equals_reference(out, logp, mask, size, kind, "neg_perplexity")

    @pytest.mark.parametrize("kind", ["grpo", "latentr3"])
    def test_on_the_callers_stream(self, kind):
        logp, mask, size = _cuda_inputs(3000)
        expected = flr_kernels.group_advantage(logp, mask, size, kind)
        late = torch.full_like(logp, math.nan)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # 10 ms: a launch on another stream would read NaN
            late.copy_(logp)
            out = flr_kernels.group_advantage(late, mask, size, kind)
        torch.cuda.synchronize()
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.gpu(2)
    def test_on_another_device_than_the_current_one(self):
        logp, mask, size = _cuda_inputs()
        out = flr_kernels.group_advantage(logp.to("cuda:1"), mask.to("cuda:1"), size, "latentr3")
        assert torch.cuda.current_device() == 0
        assert out.rewards.device.index == 1
        assert_equals_reference(out, logp, mask, size, "latentr3", "neg_perplexity")

    def test_auto_takes_the_kernel_and_does_not_wait(self, monkeypatch):
        monkeypatch.setenv("FLR_BACKEND", "auto")
        logp, mask, size = _cuda_inputs()
        assert flr_kernels.dispatch.select("group_advantage", logp, mask, size, "grpo", "given", 1e-4) == "cuda"
        gc.collect()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for kind in KINDS:
                flr_kernels.group_advantage(logp, mask, size, kind)
        finally:
            torch.cuda.set_sync_debug_mode("default")
