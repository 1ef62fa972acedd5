"""What ``flr sft`` and ``flr rl`` share: a run that continues where it was stopped, is saved, and sums itself up."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import voice

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from flr.train.run_folder import Start


@contextlib.contextmanager
def training_run(trainer: Any) -> Iterator[Start]:
    """Yield where the run begins; at the end of the block save model, state and the ``summary`` that the block set.

    A run that is finished is loaded instead, and the block should do nothing.
    """
    from .watch import watched

    folder = str(trainer.args.output_dir)
    with trainer.running() as start, contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        for notice in start.notices:
            voice.note(notice)
        if start.finished:
            trainer.load_finished()
            start.summary["output_dir"] = folder
            voice.note(f"{folder} holds the end of this run, {trainer.state.global_step} steps; nothing to do.")
            yield start
        else:
            _announce(trainer, start)
            with watched(trainer):
                yield start
        if not start.finished:
            trainer.conclude(start.summary)


def _announce(trainer: Any, start: Start) -> None:
    """What is trained, and from where on."""
    from flr.train.precision import trained_parameters

    computed = {"bf16": ", computed in bfloat16", "fp16": ", computed in float16"}
    how = computed.get(getattr(trainer.accelerator, "mixed_precision", None) or "no", "")
    what = trained_parameters(trainer.model)
    voice.detail(f"{what[:1].upper()}{what[1:]}{how}.")
    if start.checkpoint is not None:
        voice.note(f"Now continuing from {start.checkpoint}.")


def summarise(args: TrainingArguments, facts: dict[str, Any], outcome: Any, results: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run: its folder, ``facts`` about it, length and speed of the ``outcome``, results."""
    length = {"steps": outcome.global_step, "seconds": outcome.metrics.get("train_runtime")}
    length |= {name: outcome.metrics[name] for name in ("padding", "tokens_per_second") if name in outcome.metrics}
    return {"output_dir": str(args.output_dir), **facts, **length, **results}
