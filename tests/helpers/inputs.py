"""Batches for the tiny models: supervised, prompts alone, and groups of noisy thoughts."""

from __future__ import annotations

import numpy as np
import torch

from flr.model.outputs import GroupInputs
from tests.helpers.models import HIDDEN, THOUGHT, VOCAB, patched_model

#: Prompt and target of every user of a group.
LENGTHS = ((9, 3), (5, 4), (12, 1))


def supervised_batch(layout: str, num_thoughts: int = 1, seed: int = 0, rows_without: int = 1):
    """input_ids, attention_mask, labels of four users. layout: "left", "right" or "columns" (thoughts off line)."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, THOUGHT, (n,), generator=generator)

    users = []
    for i, (prompt, target) in enumerate([(9, 3), (5, 4), (12, 2), (7, 3)]):
        if layout == "left":
            target = 3  # left padding and common thought columns: targets of one length
        thought = torch.full((0 if i < rows_without else num_thoughts,), THOUGHT)
        p, t = tokens(prompt), tokens(target)
        users.append((torch.cat([p, thought, t]), torch.cat([torch.full((len(p) + len(thought),), -100), t])))
    length = max(len(x) for x, _ in users) + 1
    ids, mask, labels = [], [], []
    for i, (x, y) in enumerate(users):
        pad = length - len(x)
        left = {"left": pad, "right": 0, "columns": i % 2 * pad}[layout]
        ids.append(torch.nn.functional.pad(x, (left, pad - left), value=0))
        labels.append(torch.nn.functional.pad(y, (left, pad - left), value=-100))
        mask.append(torch.nn.functional.pad(torch.ones_like(x), (left, pad - left), value=0))
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask), "labels": torch.stack(labels)}


def toy_inputs(
    lengths: tuple[int, ...] = (7, 3, 5), seed: int = 0, pad_to: int | None = None
) -> dict[str, torch.Tensor]:
    """Left-padded prompts, and item_positions, which models do not take; row b depends on ``seed`` and b alone."""
    width = pad_to or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        rng = np.random.default_rng([seed, row])
        ids[row, width - length :] = torch.from_numpy(rng.integers(20, VOCAB, 64)[:length])
        mask[row, width - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "item_positions": ids}


def row_of(inputs: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """A user's prompt without padding."""
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


def group_case(
    family,
    dtype=torch.float64,
    *,
    members=4,
    thoughts=1,
    refinements=2,
    backbone=False,
    lengths=LENGTHS,
    seed=0,
    **config,
):
    """A patched model, prompts and group inputs."""
    options = {"num_factors": 4, "num_thoughts": thoughts, "num_refinements": refinements}
    model = patched_model(family, dtype, seed, **{**options, **config}).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(backbone or name.startswith("flr."))
    generator = torch.Generator().manual_seed(seed)
    width, steps = max(p for p, _ in lengths) + thoughts, max(s for _, s in lengths)
    ids = torch.randint(3, THOUGHT, (len(lengths), width), generator=generator)
    ids[:, width - thoughts :] = THOUGHT
    mask = torch.stack([(torch.arange(width) >= width - thoughts - p).long() for p, _ in lengths])
    prompts = {"input_ids": ids * mask, "attention_mask": mask}
    noise = torch.randn(len(lengths), members, thoughts, HIDDEN, generator=generator, dtype=dtype)
    noise[:, 0] = 0
    targets = torch.randint(3, THOUGHT, (len(lengths), steps), generator=generator)
    target_mask = torch.stack([torch.arange(steps) < s for _, s in lengths])
    return model, prompts, GroupInputs(targets, target_mask, noise, noise_scale=3.0)


def states_and_targets(
    seed: int = 0, dtype: torch.dtype = torch.float64, rows: int = 9
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states before a tiny model's head, and the tokens that are asked for."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), torch.randint(0, VOCAB, (rows,), generator=generator)


def filters(kind: str, users: int, items: int) -> dict[str, torch.Tensor]:
    """Arguments of a search that restrict its items, of a kind."""
    generator = torch.Generator().manual_seed(users)
    mask, few = (
        torch.rand(users, items, generator=generator) < 0.7,
        torch.randint(-1, items, (users, 3), generator=generator),
    )
    return {
        "none": {},
        "mask": {"allowed": mask},
        "shared": {"allowed": mask[0]},
        "exclude": {"exclude": few},
        "only": {"only": few},
    }[kind]
