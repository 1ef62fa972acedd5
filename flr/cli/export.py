"""``flr export``: prompt and thought as a program of torch.export, and the catalogue's trie, for engines of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flr.config import COUNT, Numbers, check_numbers, option

from . import voice
from .parsing import REVISION, emit, parse
from .weights import InferenceOptions
from .written import new_folder, writing

ABOUT = "Write prompt and thought as a program that runs without this package, and the catalogue's trie."
PROGRAM, TRIE, FACTS = "prompt.pt2", "trie.safetensors", "export.json"


@dataclass
class ExportOptions(InferenceOptions):
    """What to export, and where to."""

    model: str = option("runs/sft", "Folder that flr sft or flr rl wrote, or id of such a model on the Hub.")
    revision: str | None = option(None, REVISION)
    output: str | None = option(None, "Folder to write, new or empty.")
    max_length: int | None = option(
        None, "Tokens of the longest prompt. Default: what the model has positions for, at most 4096."
    )

    numbers: ClassVar[Mapping[str, Numbers]] = {"max_length": COUNT.or_none}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, self.numbers)


def export(options: ExportOptions) -> dict[str, object]:
    """Write program, trie and what a reader must know; returns the last."""
    import torch

    from flr.files import write_json
    from flr.model.export import INPUTS, OUTPUTS, export_prompt, longest_prompt

    from .options import load_trained

    if not options.output:
        raise ValueError("output: expected a folder to write, got none")
    output = new_folder("output", options.output)
    model, processor = load_trained(options.model, None, revision=options.revision, **options.as_saved())
    program = export_prompt(model, options.max_length)
    facts = {
        "format": "flr-export-1",
        "inputs": list(INPUTS),
        "outputs": list(OUTPUTS),
        "max_length": longest_prompt(model, options.max_length),
        "num_thoughts": model._flr_patch.config.num_thoughts,
        "thought_token_id": model._flr_patch.config.thought_token_id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "items": len(processor.catalogue),
        "torch": torch.__version__,
    }
    with writing(output) as place:
        torch.export.save(program, str(place / PROGRAM))
        processor.item_codec.trie().save(place / TRIE)
        write_json(place / FACTS, facts)
    return {"output": str(output), **facts}


def main(argv: list[str]) -> int:
    words = ["--model", *argv] if argv and not argv[0].startswith("-") else argv  # flr export MODEL --output FOLDER
    options, rest = parse("export", ABOUT, (ExportOptions,), words)
    facts = export(options)
    voice.result(
        f"Wrote {facts['output']}: {PROGRAM}, for prompts of up to {facts['max_length']} tokens, and {TRIE}, "
        f"{facts['items']:,} items. docs/engines.md says how they are read."
    )
    emit(facts, rest.json)
    return 0
