"""A trained model learns what has come since: new rows, new items; it is kept only where it is not worse.

Two folders hold all there is. ``.NAME.update`` beside the output is for the work: the evaluations, the run of the
trainer with its checkpoints, and the finished model, sealed. The output gets the finished model's files at the end, in
the way of every save (:func:`flr.files.move_files`). So a kill at any point leaves the old model, or a folder that is
refused for as long as the same call has not moved the rest.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from flr.data import Augment, Interactions, RecDataset, RecProcessor
from flr.data.growth import cut
from flr.evaluate import EvalResult, evaluate
from flr.files import check_seal, exclusive_folder, move_files, read_json, seal_folder, sha256, write_json
from flr.model.backbone import causal_lm
from flr.model.checkpoint import load_from
from flr.model.fingerprint import model_fingerprint
from flr.model.folder import MODEL_FILES, UPDATE_NAME, is_adapter, local_folder
from flr.model.vocabulary import grow

from .arguments import UpdateConfig
from .base import RecTrainer
from .features import init_grown_tokens
from .grpo import check_one_thought
from .precision import choose_autocast, raise_trained
from .run_folder import MARKS, STAGING
from .settings import APART, digest, rows_digest
from .sft import SFTTrainer
from .stream import METRIC, Stream, decide, stream
from .update_rl import reinforce, reinforcement, run_to_end

logger = logging.getLogger("flr")

_BEFORE, _AFTER, _RUN, _KEPT, _SETTINGS = "before", "after", "run", "kept", "settings.json"
_RL, _REINFORCED = "rl", "reinforced"


@dataclass(frozen=True)
class Outcome:
    """What an update did.

    Attributes:
        kept: whether the updated model took its place in the output.
        why: the decision in a sentence.
        repeated: the output has learned these very rows before, and nothing was done.
        facts: plain values, for JSON: rows, items, steps, metrics before and after, their difference; ``rl``: those
            of the reinforcement, its difference that from the supervised model.
        after: the evaluation of the updated model on the newest rows; None where nothing was done.
    """

    kept: bool
    why: str
    repeated: bool
    facts: dict[str, Any]
    after: EvalResult | None = None


def update(
    model: str,
    dataset: RecDataset,
    args: UpdateConfig,
    *,
    replay: RecDataset | None = None,
    share: float = 0.5,
    since: float | None = None,
    revision: str | None = None,
    loading: Callable[[bool], dict[str, Any]] = lambda adapted: {"dtype": "float32"},
    vary: Callable[[RecDataset, int, Interactions], tuple[Interactions, Augment]] | None = None,
    watching: Callable[[RecTrainer], contextlib.AbstractContextManager[Any]] = lambda _: contextlib.nullcontext(),
    say: Callable[[str], None] = logger.info,
    more: Mapping[str, Any] | None = None,
) -> Outcome:
    """Update a saved model, and put it into ``args.output_dir`` (default: its own folder) if it is not worse.

    The same call after a kill goes on where it was. After the end it does nothing, where the update was kept.

    Args:
        model: folder, or id on the Hub, of a whole model or an adapter.
        dataset, replay, share, since: as for :func:`stream`.
        args: of the training; rows of an epoch are the mixture, and ``max_steps`` bounds the steps. ``rl_steps`` of
            reinforcement on the newest of the new rows follow (:func:`~flr.train.update_rl.reinforce`).
        revision: of a model on the Hub.
        loading: of ``flr.from_pretrained``, given whether the model is an adapter.
        vary: training rows and how to vary them, given all rows at hand as a data set, max_history, and those of the
            mixture. Default: these as they are.
        watching: around the training, given the trainer.
        say: takes lines for the user.
        more: what ``vary`` and ``loading`` go by, as plain values by name: a call with others is another update.

    Raises:
        ValueError: data that do not fit the model, an adapter whose items need new tokens, another process at work,
            ``rl_steps`` for a model that has not one thought.
    """
    if args.world_size > 1:
        raise ValueError(f"processes: expected one for an update, got {args.world_size}")
    if not args.output_dir and not Path(model).is_dir():
        raise ValueError(f"output_dir: expected a folder for the updated model, got none for {model!r}")
    output = Path(args.output_dir or model).resolve()
    work = output.parent / f".{output.name}.update"
    with _working(work):
        job = _Job(model, revision, output, work, args, dataset, replay, share, since, say, more or {})
        if (done := job.before_all()) is not None:
            return done
        return job.run(loading, vary, watching)


@contextlib.contextmanager
def _working(work: Path) -> Iterator[None]:
    """Have ``work`` to oneself. It goes with the block, unless that failed and has something to go on from."""
    with exclusive_folder(work):
        try:
            yield
        except BaseException:
            if not any((work / name).exists() for name in (_BEFORE, _RUN, _KEPT)):
                shutil.rmtree(work, ignore_errors=True)  # nothing to go on from
            raise
        shutil.rmtree(work, ignore_errors=True)


class _Job:
    """One update; see :func:`update`."""

    def __init__(
        self,
        model: str,
        revision: str | None,
        output: Path,
        work: Path,
        args: UpdateConfig,
        dataset: RecDataset,
        replay: RecDataset | None,
        share: float,
        since: float | None,
        say: Callable[[str], None],
        more: Mapping[str, Any],
    ) -> None:
        self.model, self.revision, self.output, self.work, self.say = model, revision, output, work, say
        self.args, self.dataset, self.replay, self.share, self.since = args, dataset, replay, share, since
        data = [dataset, *([] if replay is None else [replay])]
        digests = [
            [part.catalogue.digest(), rows_digest(part.train), rows_digest(part.valid), digest([part.train.timestamps])]
            for part in data  # times, too: by them rows are new, and the newest
        ]
        options = {name: value for name, value in args.to_dict().items() if name not in APART}
        asked = {"data": digests, "share": share, "since": since, "options": options}
        asked |= {"more": dict(more)} if more else {}
        self.asked: dict[str, Any] = json.loads(json.dumps(asked, sort_keys=True, default=str))

    def before_all(self) -> Outcome | None:
        """What an earlier call has done already; None where the work is still to be done."""
        kept, stored = self.work / _KEPT, self._stored(self.work / _SETTINGS)
        whole = all((self.output / name).is_file() for name in MARKS)
        finished = stored is not None and stored.get("asked") == self.asked and _sealed(kept)
        # the output is half moved, or as it was
        if finished and (not whole or self._fingerprint(self.output) == stored.get("output")) and self._learned(stored):
            self.say(f"The update was finished before; its files are moved into {self.output} now.")
            return self._publish(read_json(kept / UPDATE_NAME))
        last = self._stored(self.output / UPDATE_NAME) if whole else None
        if last is not None and last.get("asked") == self.asked and self._learned(last):
            now = _weights(self.output)
            if last.get("weights", now) == now:
                return Outcome(True, str(last.get("why")), True, dict(last.get("facts", {})))
        return None

    def _learned(self, earlier: Mapping[str, Any]) -> bool:
        """Whether an earlier call began with this model, which in place is not there any more."""
        return self.output == Path(self.model).resolve() or self._fingerprint(self._source()) == earlier.get("before")

    @staticmethod
    def _stored(file: Path) -> dict[str, Any] | None:
        return read_json(file) if file.is_file() else None

    def _source(self) -> Path:
        return local_folder(self.model, revision=self.revision)

    def _fingerprint(self, folder: Path) -> str | None:
        return model_fingerprint(folder) if (folder / MARKS[0]).is_file() else None

    def run(
        self,
        loading: Callable[[bool], dict[str, Any]],
        vary: Callable[[RecDataset, int, Interactions], tuple[Interactions, Augment]] | None,
        watching: Callable[[RecTrainer], contextlib.AbstractContextManager[Any]],
    ) -> Outcome:
        """Evaluate, train, evaluate, decide, and put the model in its place."""
        source, args = self._source(), self.args
        settings = {"asked": self.asked, "before": self._fingerprint(source), "output": self._fingerprint(self.output)}
        if self._stored(self.work / _SETTINGS) != settings:
            for name in (_SETTINGS, _BEFORE, _AFTER, _RUN, _RL, _REINFORCED, _KEPT):
                path = self.work / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            write_json(self.work / _SETTINGS, settings)
        else:
            self.say("Now continuing an update that was cut.")
        set_seed(args.seed)
        choose_autocast(args)
        adapted = is_adapter(source)
        lm, _ = load_from(self.model, revision=self.revision, is_trainable=True, **loading(adapted))
        lm = raise_trained(lm) if adapted else lm
        if args.rl_steps:
            check_one_thought(causal_lm(lm))
        known = RecProcessor.from_pretrained(source)
        limits: dict[str, Any] = {"share": self.share, "since": self.since, "seed": args.seed}
        limits["valid_rows"] = args.eval_max_users
        rows = stream(known.catalogue, known.codec, self.dataset, self.replay, **limits)
        for note in rows.notes:
            self.say(note[:1].upper() + note[1:] + ".")
        processor = known.grown(rows.growth.catalogue)
        check_growth(lm, known, processor)
        old_rows, knows = cut(rows.valid, len(known.catalogue))
        before = self._evaluated(lm, known, old_rows, _BEFORE) if len(old_rows) else None
        for line in grow_model(lm, known, processor):
            self.say(line)
        trainer = self._trainer(lm, processor, rows, vary)
        run_to_end(trainer, watching)
        lm = trainer.accelerator.unwrap_model(trainer.model)
        after = self._evaluated(lm, processor, rows.valid, _AFTER)
        kept, why, figures = decide(before, after, knows)
        facts = self._facts(rows, known, trainer.state.global_step, figures)
        if not kept:
            return Outcome(False, why, False, facts, after)
        if args.rl_steps:
            better, facts["rl"] = self._reinforced(lm, processor, rows, watching, before, after, knows)
            if better is not None:
                after = better
                _, why, facts[METRIC] = decide(before, after, knows)
        trainer.save_model(str(self.work / _KEPT))
        record = {**settings, "weights": _weights(self.work / _KEPT), "why": why, "facts": facts}
        write_json(self.work / _KEPT / UPDATE_NAME, record)
        seal_folder(self.work / _KEPT)
        return dataclasses.replace(self._publish({"why": why, "facts": facts}), after=after)

    def _reinforced(
        self,
        model: Any,
        processor: RecProcessor,
        rows: Stream,
        watching: Callable[[RecTrainer], contextlib.AbstractContextManager[Any]],
        before: EvalResult | None,
        after: EvalResult,
        knows: np.ndarray,
    ) -> tuple[EvalResult | None, dict[str, Any]]:
        fresh = rows.train.select(np.arange(rows.new_rows))
        args = reinforcement(self.args, self.work / _RL, len(fresh))

        def evaluated() -> EvalResult:
            return self._evaluated(model, processor, rows.valid, _REINFORCED)

        return reinforce(model, processor, fresh, args, watching, evaluated, after, before, knows)

    def _evaluated(self, model: Any, processor: RecProcessor, rows: Interactions, name: str) -> EvalResult:
        """The evaluation in the folder ``name``, made where it is not there."""
        if (self.work / name / "metrics.json").is_file():
            return EvalResult.load(self.work / name)
        batch, beams = self.args.per_device_eval_batch_size, self.args.eval_num_beams
        options: dict[str, Any] = {"batch_size": batch, "num_beams": beams, "output_dir": self.work / name}
        return evaluate(model.to(self.args.device), processor, rows, progress=False, **options)

    def _trainer(
        self,
        model: Any,
        processor: RecProcessor,
        rows: Stream,
        vary: Callable[[RecDataset, int, Interactions], tuple[Interactions, Augment]] | None,
    ) -> SFTTrainer:
        parts = (rows.everything, rows.valid, rows.valid.select([]))
        whole = RecDataset(processor.catalogue, *parts, self.dataset.name)
        train, changes = (rows.train, None) if vary is None else vary(whole, processor.max_history, rows.train)
        args = self.args
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        needed = math.ceil(args.num_train_epochs * len(train) / step)
        args = copy.copy(args)
        args.output_dir = str(self.work / _RUN)
        args.max_steps = min(needed, args.max_steps) if args.max_steps > 0 else needed
        args.normalisation = processor.scoring
        return SFTTrainer(model, args, processor, train, None, changes)

    def _facts(self, rows: Stream, known: RecProcessor, steps: int, figures: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "new_rows": rows.new_rows,
            "replay_rows": rows.replay_rows,
            "items": len(rows.growth.catalogue),
            "new_items": len(rows.growth.catalogue) - len(known.catalogue),
            "steps": steps,
            METRIC: dict(figures),
        }

    def _publish(self, record: Mapping[str, Any]) -> Outcome:
        """Move the finished model into the output; the work keeps its own copy until then."""
        staging = self.output / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name in check_seal(self.work / _KEPT):
            _linked(self.work / _KEPT / name, staging / name)
        move_files(staging, self.output, last=MARKS, owned=MODEL_FILES)
        shutil.rmtree(staging)
        return Outcome(True, str(record["why"]), False, dict(record["facts"]))


def check_growth(model: Any, known: RecProcessor, grown: RecProcessor) -> None:
    """ValueError where ``model`` cannot get rows for the tokens that ``grown`` has and ``known`` has not."""
    more = len(grown.tokenizer) - len(known.tokenizer)
    if more and hasattr(model, "peft_config"):
        wanted = f"a whole model (flr merge makes one), whose token table can grow by {more} for new items"
        raise ValueError(f"model: expected {wanted}, got an adapter")


def grow_model(model: Any, known: RecProcessor, grown: RecProcessor) -> list[str]:
    """Give ``model``, trained with ``known``, rows for the tokens of ``grown``; lines for the user.

    The rows begin with what is known of the new items (:func:`~flr.train.init_grown_tokens`).
    """
    lm = causal_lm(model)
    grow(lm, len(grown.tokenizer))
    lines = [f"{line}." for line in init_grown_tokens(lm, grown, len(known.tokenizer))]
    if grown.item_knn is not None and len(grown.catalogue) > len(known.catalogue):
        lines.append("The table of flr neighbours says nothing of the new items; run it again to make another one.")
    return lines


def _sealed(folder: Path) -> bool:
    try:
        check_seal(folder)
    except (ValueError, OSError):
        return False
    return True


def _weights(folder: Path) -> dict[str, str]:
    """SHA-256 of a model's files of weights by name: what was learned, whatever its answers are mixed with."""
    forms = (form for form in MODEL_FILES if form.endswith("model*.safetensors"))
    return {path.name: sha256(path) for form in forms for path in sorted(folder.glob(form))}


def _linked(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)
