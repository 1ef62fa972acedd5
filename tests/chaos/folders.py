"""Damaged folders of models: each loads and answers, or is refused by one error that names it.

python -m tests.chaos.folders --cases 1000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import flr
from flr.data import Catalogue, RecProcessor, build_tokenizer

from .attempt import attempt
from .figures import keep
from .mutate_data import damage

_SECONDS = 60  # a loader that takes longer hangs


def _made(codec: str, **options: Any) -> tuple[Any, RecProcessor]:
    torch.manual_seed(0)
    catalogue = Catalogue([f"i{n}" for n in range(12)], [f"Title {n}" for n in range(12)])
    tokenizer = build_tokenizer(catalogue, codec, vocab_size=300)
    thoughts = flr.FLRConfig(**options).thought_count
    processor = RecProcessor(tokenizer, catalogue, codec, num_thoughts=thoughts)  # may add tokens
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    return flr.patch_model(transformers.LlamaForCausalLM(config), tokenizer, **options), processor


def _whole(folder: Path, codec: str = "id", shards: str = "1GB") -> None:
    model, processor = _made(codec, num_factors=2)
    model.save_pretrained(folder, max_shard_size=shards)
    processor.save_pretrained(folder)


def _adapter(folder: Path) -> None:
    """A base model in a folder inside, which is what adapter_config.json names."""
    from peft import LoraConfig, get_peft_model

    model, processor = _made("id", num_factors=2)
    model.save_pretrained(folder / "base")
    lora = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["flr"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(folder / "base")})
    )
    processor.save_pretrained(folder)


#: What makes a folder of each form.
FORMS: dict[str, Callable[[Path], None]] = {
    "id": _whole,
    "title": lambda folder: _whole(folder, "title"),
    "shards": lambda folder: _whole(folder, shards="5KB"),
    "adapter": _adapter,
}


def answers(folder: Path) -> list[tuple[str, float]]:
    """What a recommender in ``folder`` says."""
    found = flr.Recommender.from_pretrained(folder).recommend([["i1", "i2", "i3"]], k=3)[0]
    return [(item.item_id, round(item.score, 5)) for item in found]


def check(form: str, good: Path, seed: int, folder: Path) -> tuple[str, str | None]:
    """One case: ("equal", "other" or "refused", what is wrong or None)."""
    rng = random.Random(f"{form} {seed}")
    shutil.copytree(good, folder)
    done = damage(folder, rng)
    places = (good,) if form == "adapter" else ()
    # weights that are NaN load, and are refused when they are to rank
    found, fault = attempt(answers, folder, _SECONDS, places, (FloatingPointError,))
    if fault is not None:
        return "refused", f"{done}: {fault}" if fault else None
    return ("equal" if found == answers(good) else "other"), None


def run(cases: int, seed: int = 0) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """Outcomes by form, and the cases in which something is wrong."""
    outcomes: dict[str, collections.Counter[str]] = {form: collections.Counter() for form in FORMS}
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        for form, make in FORMS.items():
            make(Path(place) / form)
        for case in range(seed, seed + cases):
            form = list(FORMS)[case % len(FORMS)]
            folder = Path(place) / f"case{case}"
            outcome, reason = check(form, Path(place) / form, case, folder)
            outcomes[form][outcome] += 1
            if reason is not None:
                outcomes[form]["wrong"] += 1
                wrong.append(f"case {case} ({form}): {reason}")
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to which the figures are added")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes, wrong = run(args.cases, args.seed)
    print(*wrong, json.dumps({**outcomes, "cases": args.cases, "seed": args.seed, "faults": len(wrong)}), sep="\n")
    keep(args.json, outcomes)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
