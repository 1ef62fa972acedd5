"""``flr merge``: an adapter and its base model as one ordinary model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from flr.config import DTYPES, option

from . import voice
from .options import check_option
from .parsing import REVISION, emit, parse
from .written import new_folder, writing_model

ABOUT = "Merge an adapter into its base model: writes a folder that needs neither PEFT nor the base model."
_CARD = "README.md"


@dataclass
class MergeOptions:
    """What to merge, and where to."""

    model: str = option("runs/sft", "Folder of the adapter that flr sft --lora_rank wrote, or its id on the Hub.")
    revision: str | None = option(None, REVISION)
    output: str | None = option(None, "Folder to write, new or empty.")
    dtype: str = option(
        "auto",
        f"What the backbone's weights are written in: {', '.join(DTYPES)}. They are added in float32 and rounded once. "
        "Default: what the base model is saved in.",
    )

    def __post_init__(self) -> None:
        check_option(self, f"one of {', '.join(DTYPES)}", self.dtype in DTYPES, "dtype")


def merge(options: MergeOptions) -> dict[str, str | int]:
    """Write the merged model; returns a summary."""
    import torch

    from flr.data import RecProcessor
    from flr.model.adapter import merged
    from flr.model.backbone import causal_lm
    from flr.model.checkpoint import load_from
    from flr.model.folder import ADAPTER_CONFIG, is_adapter, local_folder

    if not options.output:
        raise ValueError("output: expected a folder to write, got none")
    folder = local_folder(options.model, revision=options.revision)
    if not is_adapter(folder):
        raise ValueError(f"model: expected the folder of an adapter, with {ADAPTER_CONFIG}, got {options.model}")
    output = new_folder("output", options.output)
    processor = RecProcessor.from_pretrained(folder)
    model, _ = load_from(folder)
    dtype = causal_lm(model).dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = merged(model.float())
    reasoner = getattr(model, "flr", None)
    model.to(dtype)
    if reasoner is not None:
        reasoner.float()  # as it is loaded: its thoughts are computed in it
    with writing_model(output, model, processor) as place:
        if (folder / _CARD).is_file():
            shutil.copyfile(folder / _CARD, place / _CARD)
    return {"output": str(output), "dtype": str(dtype).removeprefix("torch."), "parameters": model.num_parameters()}


def main(argv: list[str]) -> int:
    words = ["--model", *argv] if argv and not argv[0].startswith("-") else argv  # flr merge ADAPTER --output FOLDER
    options, rest = parse("merge", ABOUT, (MergeOptions,), words)
    summary = merge(options)
    voice.result(f"Saved in {summary['output']}: {summary['parameters']:,} parameters in {summary['dtype']}.")
    emit(summary, rest.json)
    return 0
