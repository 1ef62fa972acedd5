"""A training as it is watched: the live line of its steps, and a row for each evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import Progress
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from flr.model.backbone import may_look

from . import voice

_SHOWN = ("hr@10", "ndcg@10")


@contextmanager
def watched(trainer: Any) -> Iterator[None]:
    """Show how the trainer works, in the voice of the commands; its own lines with ``--verbose`` alone.

    Transformers would say them on each node, in the process that is the first there.
    """
    if not (voice.manner.verbose and voice.first_process()):
        for kind in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(kind)
    with voice.live() as line:
        watch = Watch(trainer, line)
        trainer.add_callback(watch)
        try:
            yield
        finally:
            trainer.remove_callback(watch)


class Watch(TrainerCallback):
    """Moves the live line at each step, and says a row at each evaluation, unless it is part of a longer work.

    Args:
        trainer: a :class:`flr.train.base.RecTrainer`, whose ``step_loss`` is read and set to zero.
        line: of :func:`flr.cli.voice.live`.
    """

    def __init__(self, trainer: Any, line: Progress) -> None:
        chosen = str(trainer.args.metric_for_best_model).removeprefix("eval_")
        self._trainer, self._line = trainer, line
        self._names = (*_SHOWN, *(() if chosen in _SHOWN else (chosen,)))
        self._chosen, self._more = chosen, bool(trainer.args.greater_is_better)
        self._best: float | None = None
        self._sum: Any = 0.0  # of the steps' losses since the last row
        self._steps = 0
        self._looked, self._shown = 0.0, ""
        self._task: Any = None
        self._began, self._headed, self._ended = time.perf_counter(), False, False

    def _stage(self, text: str) -> str:
        return f"{voice.manner.stage}: {text}" if voice.manner.stage else text

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        self._task = self._line.add_task(
            self._stage("training"), total=state.max_steps, completed=state.global_step, facts=""
        )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._task is not None:
            of = f" of {state.num_train_epochs}" if args.max_steps <= 0 else ""
            self._line.update(self._task, description=self._stage(f"epoch {math.floor(state.epoch or 0) + 1}{of}"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss, self._trainer.step_loss = torch.as_tensor(self._trainer.step_loss), 0.0
        self._sum, self._steps = self._sum + loss, self._steps + 1
        if self._task is None:
            return
        now = time.perf_counter()
        if may_look(loss) or now - self._looked >= 1:  # a look waits for the device
            self._looked, self._shown = now, f"loss {float(loss):.3f}"
        self._line.update(self._task, completed=state.global_step, facts=self._shown)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._task is not None:
            self._line.update(self._task, description=self._stage("ranking valid"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended = True
        if self._task is not None:
            self._line.remove_task(self._task)
            self._task = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        values = {name: (metrics or {}).get(f"eval_{name}") for name in self._names}
        if self._ended or voice.manner.stage or None in values.values():
            return
        value = float(values[self._chosen] or 0.0)
        best = self._best is None or (value > self._best if self._more else value < self._best)
        self._best = value if best else self._best
        if not self._headed:
            names = "".join(f"{name.upper():>10}" for name in self._names)
            voice.note(f"{'epoch':>6}{'loss':>9}{names}{'time':>8}   (valid split)")
            self._headed = True
        loss = f"{float(self._sum) / self._steps:.3f}" if self._steps else "–"
        numbers = "".join(f"{values[name]:>10.4f}" for name in self._names)
        seconds = f"{time.perf_counter() - self._began:.0f} s"
        mark = "   best so far" if best else ""
        voice.note(f"{state.epoch or 0:>6.4g}{loss:>9}{numbers}{seconds:>8}{mark}")
        self._sum, self._steps = 0.0, 0
