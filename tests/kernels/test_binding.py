"""What the extension's binding refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flr_kernels.backends import extension
from flr_kernels.ops.group_advantage.op import KINDS, REWARDS
from tests.helpers.extension import needs_extension

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
