"""How time and memory grow: one operation, one symbol varied, everything else fixed. ``flr bench report`` fits the
laws.

Ours alone is timed; the competitors' suites hold the ratios. Sweeps run with ``--full``; ``--quick`` runs one size of
each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import flr
from flr.config import FLRConfig
from flr.decode import CatalogueTrie, beam_search
from flr.model.outputs import GroupInputs
from flr.model.reasoner import FactorizedReasoner
from flr.train.policy_loss import clipped_surrogate
from flr_kernels import factor_attention, group_advantage

from .machine import DEVICE

#: operation -> (symbols and their base values, symbol -> the values it takes)
SWEEPS: dict[str, tuple[dict[str, int], dict[str, list[int]]]] = {
    "attention step": (
        {"B": 4, "L": 256, "D": 512, "K": 4},
        {
            "L": [64, 128, 256, 512, 1024, 2048, 4096, 8192],
            "B": [1, 4, 16, 64, 256],
            "D": [64, 128, 256, 512, 1024, 2048, 4096],
            "K": [1, 2, 4, 8, 16],
        },
    ),
    "reasoner step": ({"B": 4, "L": 256, "D": 512, "K": 4, "T": 1}, {"T": [1, 2, 3, 4, 6, 8]}),
    "SFT step": (
        {"B": 2, "L": 256, "D": 256, "layers": 4, "V": 4096, "S": 16},
        {"L": [64, 128, 256, 512, 1024, 2048, 4096, 8192], "B": [1, 2, 4, 8, 16], "D": [64, 128, 256, 512]},
    ),
    "RL step": (
        {"B": 2, "L": 256, "G": 8, "D": 256, "layers": 4, "V": 4096, "S": 16},
        {"G": [2, 4, 8, 16, 32], "L": [64, 256, 1024, 4096], "B": [1, 2, 4, 8]},
    ),
    "trie build": ({"C": 1000}, {"C": [10**3, 10**4, 10**5, 10**6, 10**7]}),
    "constrained search": (
        {"B": 4, "W": 20, "L": 32, "D": 64, "layers": 1, "C": 1000},
        {"C": [10**3, 10**4, 10**5, 10**6, 10**7]},
    ),
}
CODES = 256


def cases(operation: str) -> pytest.MarkDecorator:
    base, varied = SWEEPS[operation]
    every = [
        {"operation": operation, "varied": s, **base, s: value} for s, values in varied.items() for value in values
    ]
    smallest = [{"operation": operation, "varied": s, **base, s: values[0]} for s, values in list(varied.items())[:1]]
    return pytest.mark.cases(quick=smallest, full=every)


@pytest.fixture
def grow(race) -> Callable[..., Any]:
    """Race of ours alone, named by operation and varied symbol."""

    def run(shape: dict[str, Any], call: Callable[[], Any], check: Callable[[], None], **more: Any) -> None:
        case = f"{shape['operation']}: {shape['varied']}={shape[shape['varied']]}"
        race(case, {"flr": call}, suite="scaling", shape=shape, check=check, rounds=3, **more)

    return run


def finite(call: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], None]:
    """The operations' equality with their references is checked in their own suites; here, that nothing overflows."""

    def check() -> None:
        if not all(bool(x.isfinite().all()) for x in call()):
            raise AssertionError("expected finite results, got inf or NaN")

    return check


@cases("attention step")
def test_attention(shape, grow):
    h = torch.randn(shape["B"], shape["L"], shape["D"], device=DEVICE).requires_grad_()
    u = (torch.randn(shape["B"], shape["K"], shape["D"], device=DEVICE) / shape["D"] ** 0.5).requires_grad_()

    def step():
        out = factor_attention(h, u)
        return torch.autograd.grad((out.context, out.overlap), (h, u), (out.context.detach(), out.overlap.detach()))

    grow(shape, step, finite(step), bytes_moved=3 * h.nbytes)


@cases("reasoner step")
def test_reasoner(shape, grow):
    config = FLRConfig(num_factors=shape["K"], num_refinements=shape["T"])
    module = FactorizedReasoner(shape["D"], config).to(DEVICE)
    h = torch.randn(shape["B"], shape["L"], shape["D"], device=DEVICE).requires_grad_()
    mask = torch.ones(h.shape[:2], dtype=torch.bool, device=DEVICE)

    def step():
        return torch.autograd.grad(module(h, mask).thought.square().sum(), h)

    grow(shape, step, finite(step))


def patched(shape: dict[str, Any]):
    torch.manual_seed(0)
    heads = max(shape["D"] // 64, 1)
    config = Qwen2Config(
        vocab_size=shape["V"], hidden_size=shape["D"], intermediate_size=shape["D"] * 11 // 4,
        num_hidden_layers=shape["layers"], num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=16384,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(DEVICE)
    return flr.patch_model(model, config=FLRConfig(num_factors=4, thought_token_id=shape["V"] - 1))


def prompts(shape: dict[str, Any]) -> torch.Tensor:
    ids = torch.randint(5, shape["V"] - 1, (shape["B"], shape["L"]), device=DEVICE)
    ids[:, -1] = shape["V"] - 1
    return ids


@cases("SFT step")
def test_sft(shape, grow):
    model = patched(shape).train()
    ids = torch.cat([prompts(shape), torch.randint(5, shape["V"] - 1, (shape["B"], shape["S"]), device=DEVICE)], 1)
    labels = ids.clone()
    labels[:, : shape["L"]] = -100

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        return (loss.detach(),)

    grow(shape, step, finite(step))


@cases("RL step")
def test_rl(shape, grow):
    model = patched(shape).requires_grad_(False).eval()
    model.flr.requires_grad_(True)
    ids = prompts(shape)
    targets = torch.randint(5, shape["V"] - 1, (shape["B"], shape["S"]), device=DEVICE)
    mask = torch.ones_like(targets, dtype=torch.bool)
    noise = torch.randn(shape["B"], shape["G"], 1, shape["D"], device=DEVICE)
    noise[:, 0] = 0
    group = GroupInputs(targets, mask, noise)

    def step():
        model.zero_grad()
        logprobs = model(input_ids=ids, attention_mask=torch.ones_like(ids), group=group).logprobs
        rows = mask.repeat_interleave(shape["G"], 0)
        advantages = group_advantage(logprobs.detach().flatten(0, 1), rows, shape["G"]).advantages
        loss = clipped_surrogate(logprobs, logprobs.detach(), mask, advantages).loss.mean()
        loss.backward()
        return (loss.detach(),)

    grow(shape, step, finite(step))


def catalogue(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of ``size`` distinct items of four codes, 256 values each, like semantic IDs."""
    generator = np.random.default_rng(0)
    keys = np.unique(generator.integers(0, CODES**4, int(size * 1.02) + 100))
    keys = generator.permutation(keys)[:size]
    return np.stack([keys // CODES**level % CODES for level in range(4)], axis=1).ravel(), np.arange(size + 1) * 4


@cases("trie build")
def test_trie_build(shape, grow):
    size = shape["C"]
    tokens, offsets = catalogue(size)

    def build():
        return CatalogueTrie.from_sequences(tokens, offsets)

    def check():
        trie = build()
        if trie.num_items != size or trie.item_at(trie.walk(tokens[:4])) != 0:
            raise AssertionError(f"expected a trie of {size} items with item 0 below its tokens, got {trie}")

    grow(shape, build, check, memory="numpy")


@cases("constrained search")
def test_constrained_search(shape, grow):
    model = patched({**shape, "V": CODES + 8}).eval()
    trie = CatalogueTrie.from_sequences(*catalogue(shape["C"])).to(DEVICE)
    inputs = {"input_ids": prompts({**shape, "V": CODES + 8})}

    def search():
        return beam_search(model, inputs, trie, num_beams=shape["W"], k=10)

    def check():
        items = search().items
        if not bool((items >= 0).all()) or any(len(set(row)) < 10 for row in items.tolist()):
            raise AssertionError(f"expected 10 different items a user, got {items}")

    grow(shape, search, check)
