"""A LoRA step with rows of new tokens trained: flr's token tables beside PEFT's own.

Both are the same model, adapters and loss; ``peft`` puts ``TrainableTokensLayer`` back, which writes the trained rows
into a copy of the whole table wherever it is used. The catalogue is of semantic IDs, three codes an item.
"""

from __future__ import annotations

import pytest
import torch

from flr.data.trie import CatalogueTrie
from flr.model.catalogue_loss import CatalogueLoss
from flr.train.lora import LoraSettings, add_lora

from .harness import label
from .machine import DEVICE
from .test_train_step import build, from_nothing

CODES, LEVELS, ITEMS = 256, 3, 5000
QWEN = {"D": 896, "layers": 24, "V": 151936}  # Qwen2.5-0.5B


def adapted(shape: dict, new: int):
    """A patched model with adapters on queries and values, and rows of the last ``new`` tokens trained."""
    rows, width = shape["V"] + new, shape["D"]
    kind = {"inner": width * 11 // 2, "heads": width // 64, "of_keys": 2, "tied": True}
    model = build({**shape, "V": rows, **kind}).to(shape.get("dtype", torch.float32))
    settings = LoraSettings(rank=16, alpha=32, targets=("q_proj", "v_proj"))
    return add_lora(model, settings, range(shape["V"], rows)).train()


@pytest.mark.cases(
    quick=[{"D": 128, "layers": 2, "V": 32768, "B": 8, "L": 64}],
    default=[{**QWEN, "B": 8, "L": 64}, {**QWEN, "layers": 4, "B": 8, "L": 64}],
    gpu=[{**QWEN, "B": b, "L": 256, "dtype": torch.bfloat16} for b in (8, 32)],
)
@pytest.mark.parametrize("normalisation", ["catalogue", "vocabulary"])
def test_lora_step(shape, normalisation, tier, race):
    pytest.importorskip("peft")
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    from flr.model.trained_rows import trained_rows

    model = adapted(shape, CODES * LEVELS + 1)
    codes = torch.cartesian_prod(*3 * [torch.arange(CODES)])[:: CODES**LEVELS // ITEMS][:ITEMS]
    items = shape["V"] + codes + torch.arange(LEVELS) * CODES
    loss = CatalogueLoss(CatalogueTrie.from_sequences(items.flatten().tolist(), range(0, ITEMS * LEVELS + 1, LEVELS)))
    ids = torch.randint(5, shape["V"], (shape["B"], shape["L"] + LEVELS + 1))
    ids[:, shape["L"]] = shape["V"] + CODES * LEVELS
    ids[:, -LEVELS:] = items[torch.randint(ITEMS, (shape["B"],))]
    labels = ids.masked_fill(torch.arange(ids.shape[1]) <= shape["L"], -100)
    given = {"input_ids": ids.to(DEVICE), "labels": labels.to(DEVICE)}
    if normalisation == "catalogue":
        given |= {"labels": loss.target_nodes(labels).to(DEVICE), "catalogue_loss": loss}
    tables = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]

    def step(kind: type):
        for module in tables:
            module.__class__ = kind
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = model(**given).loss
        value.backward()
        return value.detach()

    def check():
        found = []
        for kind in (trained_rows(), TrainableTokensLayer):
            model.zero_grad()
            value = step(kind)
            found.append([value, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for ours, theirs in zip(*found, strict=True):
            if not (ours - theirs).norm() <= 5e-2 * theirs.norm() + 1e-7:
                raise AssertionError(f"expected a relative difference up to .05, got {(ours - theirs).norm()}")

    variants = {"flr": lambda: step(trained_rows()), "peft": lambda: step(TrainableTokensLayer)}
    race(
        f"lora step {label({**shape, 'normalisation': normalisation})}", from_nothing(model, variants),
        suite="adapters", shape=shape, check=check, rounds=5 if tier != "quick" else None,
    )  # fmt: skip
