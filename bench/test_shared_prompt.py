"""Members that attend to the prompt and to their own tokens in two calls, against one call under a mask of all columns.

Both are a whole RL step of policy "tokens", as in test_train_step.py; ``masked`` is what is taken elsewhere: keys and
values of prompt and members joined, every row under its mask, query heads that share a key head folded.
"""

from __future__ import annotations

import pytest
import torch

from flr.model.outputs import GroupInputs
from flr.model.shared_prompt import shared_prompts

from .harness import label
from .machine import DEVICE
from .test_train_step import MODEL, SMALL, build, from_nothing, prompts_of


def shape_of(users: int, prompt: int, members: int, steps: int, heads: int, key_heads: int) -> dict:
    return {**MODEL, "B": users, "L": prompt, "G": members, "S": steps, "heads": heads, "of_keys": key_heads}


@pytest.mark.cases(
    quick=[{**SMALL, "B": 2, "L": 256, "G": 16, "S": 8, "heads": 4, "of_keys": 2}],
    default=[
        *(shape_of(*size, 8, 16, 8, 4) for size in ((1, 256), (4, 256), (1, 1024))),
        *(shape_of(4, 256, 8, 16, 8, of_keys) for of_keys in (2, 8)),
        shape_of(4, 256, 16, 16, 8, 4),
        shape_of(4, 256, 8, 4, 8, 4),
    ],
    gpu=[
        {"D": 1536, "layers": 28, "V": 151936, "B": b, "L": 256, "S": 16, "G": 8, "heads": 12, "of_keys": 2,
         "dtype": torch.bfloat16}
        for b in (4, 16)
    ],
)  # fmt: skip
def test_rl_step(shape, tier, race):
    model = build(shape).requires_grad_(False).eval().to(shape.get("dtype", torch.float32))
    model.flr.requires_grad_(True)
    prompts = prompts_of(shape)
    targets = torch.randint(5, shape["V"] - 1, (shape["B"], shape["S"]), device=DEVICE)
    noise = torch.randn(shape["B"], shape["G"], 1, shape["D"], device=DEVICE)
    noise[:, 0] = 0
    group = GroupInputs(targets, torch.ones_like(targets, dtype=torch.bool), noise, noise_scale=3.0)
    weights = torch.randn(shape["B"], shape["G"], 1, device=DEVICE)  # in the place of advantages

    def step(shared: bool):
        with shared_prompts(shared):
            out = model(**prompts, group=group)
        (out.logprobs * weights).mean().backward()
        return out.logprobs.detach()

    def check():
        found = []
        for shared in (True, False):
            model.zero_grad()
            found.append((step(shared), model.flr.output.grad.clone()))
        bound = 1e-4 if shape.get("dtype", torch.float32) == torch.float32 else 5e-2
        for ours, theirs in zip(*found, strict=True):
            if not (ours - theirs).norm() <= bound * theirs.norm():
                raise AssertionError(f"expected a relative difference up to {bound}, got {(ours - theirs).norm()}")

    variants = from_nothing(model, {"flr": lambda: step(True), "masked": lambda: step(False)})
    race(
        f"rl {label(shape)}", variants, suite="shared_prompt", shape=shape, check=check,
        rounds=9 if tier != "quick" else None,
    )  # fmt: skip
