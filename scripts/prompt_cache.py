"""What keeping the prompts of a frozen backbone saves: CPU seconds of a training step with and without.

    python -m scripts.prompt_cache --model FOLDER    # measure: docs/results/prompt_cache.json
    python -m scripts.prompt_cache                   # put that into docs/training.md
    python -m scripts.prompt_cache --check           # exit 1 where the page is stale

Four rows of one length, targets of eight tokens, groups of eight, one thread; steps with and without alternate in one
process, and the least of several counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import flr
from flr.config import IGNORE
from flr.files import read_json, write_json
from flr.model.outputs import GroupInputs
from flr.model.prompt_cache import PromptCache

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULT = "docs/training.md", "docs/results/prompt_cache.json"
ROWS, TARGET, GROUP = 4, 8, 8


def seconds(run) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def steps(model, length: int):
    """A supervised step and one of latent GRPO on prompts of ``length`` tokens."""
    thought = model.config.flr["thought_token_id"]
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(5, 1000, (ROWS, length + 1), generator=generator)
    prompts[:, -1] = thought
    targets = torch.randint(5, 1000, (ROWS, TARGET), generator=generator)
    labels = torch.cat([torch.full_like(prompts, IGNORE), targets], 1)
    noise = torch.randn(ROWS, GROUP, 1, model.config.hidden_size, generator=generator)
    noise[:, 0] = 0
    group = GroupInputs(targets, torch.ones_like(targets, dtype=torch.bool), noise, noise_scale=0.3)
    group.policy = "thoughts"

    def sft() -> None:
        model(input_ids=torch.cat([prompts, targets], 1), labels=labels).loss.backward()

    def rl() -> None:
        model(input_ids=prompts, group=group).thought_logprobs.mean().backward()

    return {"sft": sft, "rl": rl}


def measured(folder: str, gguf_file: str | None, lengths: list[int], repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, dtype=torch.float32, trust_remote_code=False
    )
    flr.patch_model(model.requires_grad_(False))
    model.train()
    rows = []
    for length in lengths:
        for kind, step in steps(model, length).items():
            plain, kept = [], []
            cache = PromptCache(model, 4.0)
            with cache.used():
                step()  # fills the cache
                size = cache.bytes / (ROWS * length)
                for _ in range(repeats):
                    kept.append(seconds(step))
                    model._flr_patch.prompt_cache = None
                    plain.append(seconds(step))
                    model._flr_patch.prompt_cache = cache
            row = {"step": kind, "prompt_tokens": length, "plain_s": min(plain), "kept_s": min(kept)}
            rows.append({**row, "bytes_per_token": size})
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "torch": torch.__version__, "rows": rows}


def page(root: Path = ROOT) -> str:
    """What the page should hold."""
    names = {"sft": "supervised", "rl": "latent GRPO"}
    lines = ["| step | prompt | CPU seconds without | with | times faster |", "| --- | --- | --- | --- | --- |"]
    for row in read_json(root / RESULT)["rows"]:
        plain, kept = row["plain_s"], row["kept_s"]
        cells = (names[row["step"]], row["prompt_tokens"], f"{plain:.2f}", f"{kept:.2f}", f"{plain / kept:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return filled((root / PAGE).read_text(encoding="utf-8"), "prompt_cache", "\n".join(lines))


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal LM to measure with")
    parser.add_argument("--gguf_file", help="the file in it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256], help="tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is stale")
    options = parser.parse_args(argv)
    if options.model is not None:
        write_json(root / RESULT, measured(options.model, options.gguf_file, options.lengths, options.repeats))
    if page(root) == (root / PAGE).read_text(encoding="utf-8"):
        return 0
    if options.check:
        print(f"{PAGE}: expected what {RESULT} says; run python -m scripts.prompt_cache", file=sys.stderr)
        return 1
    (root / PAGE).write_text(page(root), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
