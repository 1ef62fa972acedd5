"""What a user's list costs by its parts, for ``flr plan``: the prompt with its thought, and the search after it.

Rows of the suite ``cost``, from which ``flr.batch.cost`` takes rates: the prompts' floating-point operations a second
from "prompt", and from "search" at two numbers of beams what a step costs whatever it computes, and what a beam adds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flr.batch.cost import Size
from flr.decode import beam_search
from flr.decode.prompts import prefill

from .decode_data import catalogue, thinking_model
from .harness import DEVICE, label

CODES = 4  # tokens an item


def case(work: str, users: int, prompt: int, beams: int, hidden: int, layers: int, vocabulary: int, **more: Any) -> Any:
    shape = {"work": work, "B": users, "L": prompt, "W": beams, "D": hidden, "layers": layers, "V": vocabulary}
    return {**shape, **more}


def cases(users: int, prompts: list[int], beams: list[int], *model: int, **more: Any) -> list[dict[str, Any]]:
    found = [case("prompt", users, prompt, 0, *model, **more) for prompt in prompts]
    return found + [case("search", users, prompts[0], width, *model, **more) for width in beams]


@pytest.mark.cases(
    quick=cases(2, [40], [4, 8], 64, 2, 10_432),
    default=cases(4, [128, 256], [10, 20, 50], 256, 4, 10_432),
    gpu=cases(64, [256, 1024], [20, 50], 1536, 28, 151_936, dtype="torch.bfloat16"),
)
@torch.no_grad()
def test_cost(shape, tier, race):
    users, beams, length, vocabulary = (shape[x] for x in ("B", "W", "L", "V"))
    items = catalogue("1000" if tier == "quick" else "10000")
    model = thinking_model(items, shape["D"], shape["layers"], vocabulary).to(DEVICE)
    if "dtype" in shape:
        model.to(torch.bfloat16)
    size = Size.of_config(model.config.to_dict())
    shape = shape | {"weights": size.weights, "items": items.name}
    ids = torch.randint(10, items.tokens, (users, length), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = vocabulary - 1
    inputs = {"input_ids": ids.to(DEVICE), "attention_mask": torch.ones_like(ids).to(DEVICE)}
    trie = items.trie.to(DEVICE)

    def prompt() -> Any:
        return prefill(model, inputs, CODES, want_hidden=True)

    def search() -> Any:
        return beam_search(model, inputs, trie, beams, min(beams, 10), "catalogue")

    def check() -> None:
        assert size.weights == sum(p.numel() for name, p in model.model.layers.named_parameters() if p.dim() > 1)
        found = beam_search(model, inputs, trie, max(beams, 1), 1, "catalogue")
        assert int((found.items < 0).sum()) == 0

    work = {"prompt": prompt, "search": search}[shape["work"]]
    flops = users * size.prompt_flops(length) if shape["work"] == "prompt" else None
    race(label(shape), {"flr": work}, suite="cost", shape=shape, check=check, flops=flops)
