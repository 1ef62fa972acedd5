"""Rewards that decode the catalogue for every group member: behind the one encoded prompt, against a prompt for each
member.

Both variants are a group forward without gradients, then the target's place in every member's beam search.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from flr.decode import CatalogueTrie, beam_search
from flr.decode.group import group_ranks
from flr.model.outputs import GroupInputs

from .harness import label
from .machine import DEVICE
from .test_train_step import MODEL, SMALL, build, prompts_of

CODES = 4


@pytest.mark.cases(
    quick=[{**SMALL, "B": 2, "L": 48, "G": 4, "W": 5, "C": 200}],
    default=[{**MODEL, "B": b, "L": 256, "G": 8, "W": 20, "C": 10_000} for b in (1, 4)],
    gpu=[
        {"D": 1536, "layers": 28, "V": 151936, "B": 4, "L": 256, "G": 8, "W": 20, "C": 100_000, "dtype": torch.bfloat16}
    ],
)
@torch.no_grad()
def test_group_ranks(shape, race):
    model = build(shape).eval().to(shape.get("dtype", torch.float32))
    prompts, members, beams = prompts_of(shape), shape["G"], shape["W"]
    size = min(256, shape["V"] // 8)
    codes = np.random.default_rng(0).integers(0, size, (shape["C"], CODES)) + 5 + size * np.arange(CODES)
    items = np.unique(codes, axis=0)
    trie = CatalogueTrie.from_sequences(items.ravel(), np.arange(len(items) + 1) * CODES).to(DEVICE)
    wanted = torch.randint(0, len(items), (shape["B"],), device=DEVICE)
    targets = torch.from_numpy(items).to(DEVICE)[wanted]
    noise = torch.randn(shape["B"], members, 1, shape["D"], device=DEVICE)
    noise[:, 0] = 0
    group = GroupInputs(targets, torch.ones_like(targets, dtype=torch.bool), noise, policy="thoughts")

    def ours():
        out = model(**prompts, group=dataclasses.replace(group, decodable=True))
        return group_ranks(model, out.prompts, trie, wanted, beams, "catalogue")

    def repeated():
        out = model(**prompts, group=group)
        rows = {name: x.repeat_interleave(members, 0) for name, x in prompts.items()}
        found = beam_search(model, {**rows, "thoughts": out.thoughts.flatten(0, 1)}, trie, beams, beams, "catalogue")
        hits = found.items == wanted.repeat_interleave(members)[:, None]
        return (hits * torch.arange(1, beams + 1, device=DEVICE)).amax(1).view(-1, members)

    def check():
        top = {**prompts, "thoughts": model(**prompts, group=group).thoughts[:, 0]}
        wanted.copy_(
            beam_search(model, top, trie, beams, beams, "catalogue").items[:, beams // 2]
        )  # targets that are found
        a, b = ours(), repeated()
        if not torch.equal(a, b) or not bool((a > 0).any()):
            raise AssertionError(f"expected equal places, got {a.tolist()} and {b.tolist()}")

    race(label(shape), {"flr": ours, "repeated": repeated}, suite="group_ranks", shape=shape, check=check)
