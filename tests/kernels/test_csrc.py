"""The extension: host twin and CUDA kernel against the reference, the binding's checks, the sanitizers."""

import gc
import math
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flr_kernels
from flr_kernels import dispatch, extension, reference
from flr_kernels.group_advantage import KINDS, REWARDS

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
BUILT = not isinstance(extension._load(), str)
needs_extension = pytest.mark.skipif(not BUILT, reason=f"no extension: {extension._load()}")
on_gpu = pytest.mark.gpu
#: G, S: one, warp widths and their neighbours, a block a group, the largest.
SIZES = [(1, 1), (2, 5), (3, 0), (7, 31), (8, 16), (32, 33), (33, 4), (5, 700), (257, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_the_extension_is_built_where_a_compiler_is():
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    pytest.importorskip("pybind11")
    extension.load()
    if shutil.which("nvcc"):
        assert extension.load().architectures


@pytest.fixture(params=["host", pytest.param("cuda", marks=on_gpu)])
def backend(request, monkeypatch):
    """The backend's name; uninitialised memory holds NaN meanwhile."""
    if not BUILT:
        pytest.skip(f"no extension: {extension._load()}")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
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
    """Against the definition on the same values. A reward may differ by the last bits of exp and of the order of its sum;
    what is computed from rewards by that much of the largest, divided by what it is divided by."""
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


#: What is changed in a right call, by argument and field of its view, and what the refusal says.
FAULTS = [
    ("token_logprobs", "bytes", 4 * 4 * 3 - 1, "token_logprobs: expected 11 elements and one more within its storage"),
    ("token_logprobs", "bytes", -1, "within its storage"),
    ("token_logprobs", "strides", (4, 1), "token_logprobs: expected 14 elements and one more"),
    ("token_logprobs", "strides", (3, -1), "token_logprobs: expected sizes and strides >= 0"),
    ("token_logprobs", "strides", (1 << 62, 1), r"token_logprobs: expected sizes below 2\^63"),
    ("token_logprobs", "strides", (3,), "token_logprobs: expected a stride for every size"),
    ("token_logprobs", "shape", (4,), r"token_logprobs: expected \[BG, S\]"),
    ("token_logprobs", "shape", (-4, 3), "token_logprobs: expected sizes and strides >= 0"),
    ("token_logprobs", "shape", (4, 1 << 61), "within its storage|below 2"),
    ("token_logprobs", "dtype", "int32", "token_logprobs: expected float32, float64"),
    ("token_logprobs", "dtype", "bool", "token_logprobs: expected a known name, got bool"),
    ("token_logprobs", "address", 0, "token_logprobs: expected an aligned address"),
    ("token_logprobs", "address", 2, "token_logprobs: expected an aligned address"),
    ("token_logprobs", "device", 0, "token_logprobs: expected device -1, got 0"),
    ("mask", "dtype", "float32", "mask: expected bool"),
    ("mask", "shape", (4, 2), r"mask: expected shape \[4, 3\], got \[4, 2\]"),
    ("mask", "bytes", 11, "mask: expected 11 elements and one more"),
    ("mask", "device", 1, "mask: expected device -1"),
    ("rewards", "dtype", "float64", "rewards: expected float32"),
    ("rewards", "shape", (4, 1), r"rewards: expected shape \[2, 2\]"),
    ("rewards", "strides", (1, 2), "rewards: expected a contiguous tensor"),
    ("rewards", "bytes", 15, "rewards: expected 3 elements and one more"),
    ("advantages", "bytes", 15, "advantages: expected 3"),
    ("mean", "shape", (1,), "mean: expected shape"),
    ("std", "bytes", 7, "std: expected 1 elements and one more"),
    ("batch", "shape", (3,), r"batch: expected shape \[4\]"),
    ("scratch", "shape", (4,), r"scratch: expected shape \[5\]"),
    ("scratch", "bytes", 39, "scratch: expected 4 elements and one more"),
    ("scratch", None, None, "batch and scratch: expected tensors for latentr3 only"),
    ("group_size", None, 0, "group_size: expected at least 1"),
    ("group_size", None, 3, "group_size: expected a divisor of 4, got 3"),
    ("kind", None, "ppo", "kind: expected a known name, got ppo"),
    ("kind", None, "grpo", "batch and scratch: expected tensors for latentr3 only"),
    ("reward", None, "given", r"token_logprobs: expected \[BG\]"),
    ("device", None, -2, "device: expected -1 or a device index"),
]


@needs_extension
@pytest.mark.parametrize(("argument", "part", "value", "message"), FAULTS)
def test_the_binding_refuses(argument, part, value, message):
    def view(*shape, dtype=torch.float32):
        tensor = torch.zeros(shape, dtype=dtype)
        keep.append(tensor)
        fields = ("address", "dtype", "device", "shape", "strides", "bytes")
        return dict(zip(fields, extension._view(tensor), strict=True))

    keep = []
    arguments = {
        "token_logprobs": view(4, 3),
        "mask": view(4, 3, dtype=torch.bool),
        **{name: view(2, 2) for name in ("rewards", "advantages")},
        **{name: view(2) for name in ("mean", "std")},
        **{name: view(n, dtype=torch.float64) for name, n in (("batch", 4), ("scratch", 5))},
        "group_size": 2,
        "kind": "latentr3",
        "reward": "neg_perplexity",
        "eps": 1e-4,
        "device": -1,
        "stream": 0,
    }

    def call():
        extension.load().group_advantage(*(tuple(a.values()) if isinstance(a, dict) else a for a in arguments.values()))

    call()  # right as it is
    if part is None:
        arguments[argument] = value
    else:
        arguments[argument][part] = value
    with pytest.raises(ValueError, match=message):
        call()


@needs_extension
@settings(max_examples=500, deadline=None)
@given(st.data())
def test_fuzz_the_binding(data):
    """Whatever sizes, strides, dtypes and names come with an address: an exception, or an access inside the storage."""
    draw = data.draw
    device = st.sampled_from([-1, -1, -1, -2] if torch.cuda.is_available() else [-1, -1, -1, -2, 0, 7, 1 << 20])
    whole = [torch.full((24,), -1.0, dtype=torch.float64) for _ in range(8)]
    buffers = [x[8:16] for x in whole]  # with 64 bytes on either side that nothing may write
    sizes = st.integers(-1, 5) | st.sampled_from([1 << 40, (1 << 63) - 1])
    place = draw(device)

    def view(buffer, shape, dtype):
        address, bytes_left = buffer.data_ptr(), 64
        if draw(st.integers(0, 9)) == 0:
            shape = draw(st.lists(sizes, max_size=3))
        if draw(st.integers(0, 9)) == 0:
            dtype = draw(st.sampled_from(["float32", "float64", "bfloat16", "float16", "bool", "int64", ""]))
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if draw(st.integers(0, 9)) == 0:
            strides = draw(st.lists(sizes, max_size=3))
        if draw(st.integers(0, 19)) == 0:
            address, bytes_left = draw(st.sampled_from([(0, 64), (address + 1, 63), (address, 0), (address, -5)]))
        return address, dtype, draw(st.sampled_from([place, place, place, draw(device)])), shape, strides, bytes_left

    groups, size, length = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    dtype = draw(st.sampled_from(["float32", "float64", "bfloat16", "float16"]))
    acc = "float64" if dtype == "float64" else "float32"
    kind, reward = draw(st.sampled_from(KINDS)), draw(st.sampled_from(REWARDS))
    shape = [groups * size] if reward == "given" else [groups * size, length]
    shapes = [
        (shape, dtype),
        (shape, "bool"),
        *[([groups, size], acc)] * 2,
        *[([groups], acc)] * 2,
        ([4], "float64"),
        ([2 * groups + 1], "float64"),
    ]
    views = [view(b, *s) for b, s in zip(buffers, shapes, strict=True)]
    if reward == "given" or draw(st.booleans()):
        views[1] = None
    if kind != "latentr3":
        views[6:] = [None, None]
    if draw(st.integers(0, 9)) == 0:
        size = draw(st.sampled_from([0, -1, 3, 1 << 62]))
    before = [b.clone() for b in buffers]
    try:
        extension.load().group_advantage(
            *views, size, kind, draw(st.sampled_from([reward] * 9 + ["x"])), 1e-4, place, 0
        )
    except (ValueError, TypeError, RuntimeError):
        assert all(
            torch.equal(a, b) for a, b in zip(before, buffers, strict=True)
        )  # refused before anything was written
    try:
        table = view(buffers[0], [draw(st.integers(0, 2)), 4], "float64")
        extension.load().batch_advantage(
            view(buffers[1], [groups, size], acc), table, view(buffers[2], [groups, size], acc), 1e-4, place, 0
        )
    except (ValueError, TypeError, RuntimeError):
        pass
    assert all(torch.cat([x[:8], x[16:]]).eq(-1).all() for x in whole)


@needs_extension
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 64, 2047, 2048, 2049, 100_003])
def test_log_normaliser_of_rows_on_a_cpu(size):
    torch.manual_seed(size)
    logits = 5 * torch.randn(6, size + 3)[:, :size]  # rows further apart than V
    logits[0, size // 2], logits[1], logits[2] = 1e4, logits[1] - 1e4, logits[2] + 1e4
    logits[3, : size - 1] = -torch.inf
    assert dispatch.select("log_normaliser", logits) == "host"
    found = flr_kernels.log_normaliser(logits)
    expected = logits.double().logsumexp(-1)
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=2e-6)
    assert torch.equal(found, flr_kernels.log_normaliser(logits))
    broken = logits.clone()
    broken[0, -1], broken[1, 0], broken[2] = torch.nan, torch.inf, -torch.inf
    assert flr_kernels.log_normaliser(broken).isfinite().tolist() == [False] * 3 + [True] * 3


@needs_extension
def test_log_normaliser_takes_what_the_kernel_does_not(monkeypatch):
    logits = torch.randn(4, 50)
    for other in (logits.double(), logits.bfloat16(), logits.T):
        assert dispatch.select("log_normaliser", other) == "reference"
        torch.testing.assert_close(flr_kernels.log_normaliser(other).double(), other.double().logsumexp(-1))
        monkeypatch.setenv("FLR_BACKEND", "log_normaliser=host")
        with pytest.raises(ValueError, match="backend 'host' expects"):
            flr_kernels.log_normaliser(other)
        monkeypatch.delenv("FLR_BACKEND")
    module = extension.load()
    view, out = extension._view(logits), extension._view(torch.empty(4))
    for views, message in (
        ((extension._view(logits.double()), out, -1, 0), "logits: expected float32"),
        ((extension._view(logits.T), out, -1, 0), "contiguous last dimension"),
        ((view, extension._view(torch.empty(3)), -1, 0), "out: expected shape"),
        (((*view[:5], 796), out, -1, 0), "within its storage"),
        ((extension._view(logits[0]), out, -1, 0), r"logits: expected \[R, V\]"),
        ((view, out, 0, 0), "no CUDA half"),
    ):
        with pytest.raises(ValueError, match=message):
            module.log_normaliser(*views)


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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
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

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
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
