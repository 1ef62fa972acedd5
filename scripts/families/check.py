"""Whether a patched family equals the two-pass computation, which is written here anew and shares nothing with it.

Row by row, without padding and without a cache: a full forward of the unpatched model for the states, the reasoner, the
thought's embedding put into the sequence, a full forward again. What is compared: loss, gradients, logits, the
auxiliary loss of experts, greedy generation, beam search and exhaustive scores over a trie, and the forward of a group.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import flr
from flr.data.trie import CatalogueTrie
from flr.decode import beam_search, score_all_items
from flr.model.base import base_of
from flr.model.outputs import GroupInputs

from .tiny import THOUGHT, tiny_model

TOLERANCE = 2e-5  # relative, float32
ITEMS = [(5, 7), (5, 8, 9), (5, 8, 11), (6,), (12, 13), (12, 14, 15), (16, 7), (17, 18, 19)]
WEIGHTS = {"orthogonality_weight": 0.3, "diversity_weight": 0.2, "sparsity_weight": 0.1}


class Fault(Exception):
    """A patched model and the two-pass computation differ."""


class NoGradient(Exception):
    """The unpatched model cannot be trained: its own forward has no gradient."""


class Naive:
    """The two-pass computation with a patched model's weights."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model._flr_patch.config
        self.table = model.get_input_embeddings()
        base = getattr(model, "model", model) if model.base_model is model else model.base_model
        self.base = getattr(base, "decoder", base)
        takes = inspect.signature(type(model).forward).parameters
        self.options = {"use_cache": False} if "use_cache" in takes else {}

    @contextlib.contextmanager
    def put(self, where: list[int], embeds: list[Tensor], states: list[Tensor]) -> Iterator[None]:
        """The embeddings in those columns of all rows that are encoded inside, and the states that come of them."""

        def replace(_: Any, args: Any, output: Tensor) -> Tensor | None:
            if output.dim() != 3 or output.shape[1] <= max(where, default=-1):
                return None
            output = output.clone()
            for column, embedding in zip(where, embeds, strict=False):
                output[:, column] = embedding
            return output

        def look(_: Any, args: Any, output: Any) -> None:
            states.append(output[0])

        handles = [self.table.register_forward_hook(replace), self.base.register_forward_hook(look)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def original(self, ids: Tensor, **arguments: Any) -> Any:
        """The model's own forward, its base model not looking for thoughts among the tokens."""
        forward, base = self.model._flr_patch.original(self.model), base_of(self.model)
        ours = base.__dict__.pop("forward")
        try:
            return forward(input_ids=ids, return_dict=True, **self.options, **arguments)
        finally:
            base.__dict__["forward"] = ours

    def row(self, ids: Tensor, noise: Tensor | None = None, scale: float = 0.0) -> tuple[Tensor, list[Any], Tensor]:
        """Logits [L, V] of one sequence int64 [L], what the reasoner gave, and log N of its noisy thoughts.

        Args:
            noise: [N, D], added to the thoughts in units of ``scale`` times their RMS.
        """
        columns = (ids == THOUGHT).nonzero()[:, 0].tolist()
        embeds: list[Tensor] = []
        outs, logprob = [], torch.zeros(())
        for n, column in enumerate(columns):
            states: list[Tensor] = []
            with self.put(columns[:n], embeds, states):
                self.original(ids[None])
            out = self.model.flr(states[0][:, :column], None, column - 1)
            r = out.thought[0]
            if noise is not None:
                sigma = scale * r.detach().square().mean().sqrt()
                noisy = r + sigma * noise[n]
                logprob = logprob - (noisy.detach() - r).square().sum() / (2 * sigma.square() + 1e-38)
                r = noisy
            anchors = self.table(ids)
            embeds.append(anchors[column] + r)
            outs.append(out)
        with self.put(columns, embeds, []):
            logits = self.original(ids[None]).logits[0]
        return logits, outs, logprob

    def loss(self, rows: list[Tensor], prompts: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Loss of sequences whose targets begin at ``prompts``, and the logits of each."""
        total, count, outs, all_logits = torch.zeros(()), 0, [], []
        for ids, begin in zip(rows, prompts, strict=True):
            logits, made, _ = self.row(ids)
            target = ids[begin:]
            total = total + torch.nn.functional.cross_entropy(logits[begin - 1 : -1].float(), target, reduction="sum")
            count += len(target)
            outs += made
            all_logits.append(logits)
        loss = total / count
        for name in ("orthogonality", "diversity", "sparsity"):
            weight = getattr(self.config, f"{name}_weight")
            loss = loss + weight * torch.stack([o.losses[name] for o in outs]).mean()
        return loss, all_logits

    @torch.no_grad()
    def scores(self, prompts: list[Tensor]) -> dict[str, Tensor]:
        """Log-probability [B, C] of every item, under both scorings."""
        found = {scoring: torch.zeros(len(prompts), len(ITEMS)) for scoring in ("full", "catalogue")}
        for user, prompt in enumerate(prompts):
            for item, tokens in enumerate(ITEMS):
                logits = self.row(torch.cat([prompt, torch.tensor(tokens)]))[0].float()
                for n, token in enumerate(tokens):
                    at = logits[len(prompt) + n - 1]
                    siblings = sorted({s[n] for s in ITEMS if len(s) > n and s[:n] == tokens[:n]})
                    found["full"][user, item] += at[token] - at.logsumexp(0)
                    found["catalogue"][user, item] += at[token] - at[siblings].logsumexp(0)
        return found

    @torch.no_grad()
    def greedy(self, prompt: Tensor, count: int) -> list[int]:
        ids = prompt
        for _ in range(count):
            logits = self.row(ids)[0][-1].clone()
            logits[THOUGHT] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None]])
        return ids[len(prompt) :].tolist()


def compare(what: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise :class:`Fault` unless the norm of the difference is within ``tolerance`` of that of ``theirs``."""
    if ours.shape != theirs.shape:
        raise Fault(f"{what}: shape {tuple(ours.shape)} for {tuple(theirs.shape)}")
    error = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-9))
    if not error <= tolerance:
        raise Fault(f"{what}: off by {error:.1e}")


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    values = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, values, strict=True)}


def compare_gradients(what: str, model: Any, ours: Tensor, theirs: Tensor) -> None:
    """Every parameter's gradient, by norm; those below a hundredth of the largest count as that."""
    try:
        expected = gradients(model, theirs)
    except RuntimeError as error:
        raise NoGradient(str(error)) from error
    if not all(bool(g.isfinite().all()) for g in expected.values()):
        raise NoGradient("NaN")
    actual = gradients(model, ours)
    largest = max(float(g.norm()) for g in expected.values())
    for name, value in expected.items():
        error = float((actual[name] - value).norm()) / max(float(value.norm()), 1e-2 * largest, 1e-12)
        if not error <= 5 * TOLERANCE:
            raise Fault(f"{what}, gradient of {name}: off by {error:.1e}")


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, L] of rows of several lengths."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for n, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[n, at], mask[n, at] = row, 1
    return ids, mask


def patched(family: str, thoughts: int, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model of a family with a reasoner that is awake: its effect is large, its gates are uneven."""
    model = tiny_model(family).to(dtype)
    config = flr.FLRConfig(num_factors=4, num_thoughts=thoughts, thought_token_id=THOUGHT, **WEIGHTS)
    flr.patch_model(model, config=config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.flr.rescale(50)
        for name in ("gate", "gate_factor", "query"):
            weight = getattr(model.flr, name)
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def sequences(thoughts: int, seed: int = 0) -> tuple[list[Tensor], list[int]]:
    """Prompts with thoughts at their end and targets behind, and where the targets begin."""
    generator = torch.Generator().manual_seed(seed)
    thought = torch.full((thoughts,), THOUGHT)
    rows, begin = [], []
    for prompt, target in ((11, 3), (7, 4), (13, 2)):
        tokens = torch.randint(3, THOUGHT, (prompt + target,), generator=generator)
        rows.append(torch.cat([tokens[:prompt], thought, tokens[prompt:]]))
        begin.append(prompt + thoughts)
    return rows, begin


def positions_of(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Positions of padded rows, for models that take them."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def labels_of(rows: list[Tensor], begin: list[int], mask: Tensor, ids: Tensor) -> Tensor:
    labels = torch.full_like(ids, -100)
    for n, (row, start) in enumerate(zip(rows, begin, strict=True)):
        first = int((mask[n] != 0).int().argmax())
        labels[n, first + start : first + len(row)] = row[start:]
    return labels


def check_loss(model: Any, thoughts: int, sides: tuple[str, ...]) -> None:
    """Loss, gradients and logits of padded batches in training."""
    rows, begin = sequences(thoughts)
    naive = Naive(model)
    model.train()
    for side in sides:
        ids, mask = padded(rows, side)
        labels = labels_of(rows, begin, mask, ids)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, **positions_of(model, mask)}
        out = model(**inputs, skip_logits=False)
        loss, logits = naive.loss(rows, begin)
        compare(f"loss ({side} padding)", out.loss, loss)
        for n, expected in enumerate(logits):
            compare(f"logits ({side} padding)", out.logits[n][mask[n] != 0], expected)
        compare_gradients(f"loss ({side} padding)", model, out.loss, loss)
    lean = model(**inputs)
    compare("loss without logits", lean.loss, loss)


def check_experts(model: Any) -> bool:
    """The routers' auxiliary loss, with thoughts and without; whether the family has one."""
    config = model.config.get_text_config(decoder=True)
    if not hasattr(config, "output_router_logits"):
        return False
    rows, begin = sequences(model._flr_patch.config.num_thoughts)
    ids, mask = padded(rows, "right")
    labels = labels_of(rows, begin, mask, ids)
    naive = Naive(model)
    before, config.output_router_logits = config.output_router_logits, True
    try:
        plain = ids.masked_fill(ids == THOUGHT, 7)
        theirs = naive.original(plain, attention_mask=mask, labels=labels)
        if getattr(theirs, "aux_loss", None) is None:
            return False
        ours = model(input_ids=plain, attention_mask=mask, labels=labels, skip_logits=False, insert_thought=False)
        compare("auxiliary loss without thoughts", ours.loss, theirs.loss)
        compare("auxiliary loss", ours.aux_loss, theirs.aux_loss)
        compare_gradients("auxiliary loss without thoughts", model, ours.loss, theirs.loss)
        ours = model(input_ids=ids, attention_mask=mask, labels=labels)
        if not torch.isfinite(ours.loss) or abs(float(ours.loss - ours.flr.loss)) < 1e-6:
            raise Fault("auxiliary loss: not finite")
        with_thoughts = _batched_loss(naive, ids, mask, labels)
        compare("auxiliary loss with thoughts", ours.loss - ours.flr.loss, with_thoughts)
    finally:
        config.output_router_logits = before
    return True


def _batched_loss(naive: Naive, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The original's loss of a padded batch whose thoughts were made row by row."""
    columns = [(row == THOUGHT).nonzero()[:, 0].tolist() for row in ids]
    embeds = naive.table(ids).clone()
    for b, row in enumerate(ids):
        made: list[Tensor] = []
        for n, column in enumerate(columns[b]):
            states: list[Tensor] = []
            with naive.put(columns[b][:n], made, states):
                naive.original(row[None][:, mask[b] != 0])
            made.append(naive.table(row)[column] + naive.model.flr(states[0][:, :column], None, column - 1).thought[0])
            embeds[b, column] = made[-1]
    handle = naive.table.register_forward_hook(lambda *_: embeds)
    try:
        return naive.original(ids, attention_mask=mask, labels=labels).loss
    finally:
        handle.remove()


@torch.no_grad()
def check_generation(model: Any, together: bool) -> None:
    """Greedy generation, with the cache and without."""
    model.eval()
    naive, rows = Naive(model), [row[:start] for row, start in zip(*sequences(1), strict=True)]
    expected = [naive.greedy(row, 5) for row in rows]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for use_cache in (None, False):
        given = options if use_cache is None else {**options, "use_cache": use_cache}
        if together:
            ids, mask = padded(rows, "left")
            found = [r[-5:].tolist() for r in model.generate(ids, attention_mask=mask, **given)]
        else:
            found = [model.generate(row[None], **given)[0, -5:].tolist() for row in rows]
        if found != expected:
            raise Fault(f"generate{'' if use_cache is None else '(use_cache=False)'}: {found} for {expected}")


@torch.no_grad()
def check_decoding(model: Any) -> None:
    """Beam search and exhaustive scores, both scorings, prompts padded on the left."""
    model.eval()
    rows = [row[:start] for row, start in zip(*sequences(1), strict=True)]
    ids, mask = padded(rows, "left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    sizes = torch.tensor([0, *(len(item) for item in ITEMS)]).cumsum(0).tolist()
    trie = CatalogueTrie.from_sequences([t for item in ITEMS for t in item], sizes)
    for scoring, expected in Naive(model).scores(rows).items():
        compare(f"scores ({scoring})", score_all_items(model, inputs, trie, scoring), expected, 10 * TOLERANCE)
        found = beam_search(model, inputs, trie, num_beams=len(ITEMS), k=len(ITEMS), scoring=scoring)
        order = expected.sort(dim=1, descending=True)
        compare(f"beam search ({scoring})", found.scores, order.values, 10 * TOLERANCE)
        if not bool((expected.gather(1, found.items) - order.values).abs().max() < 1e-3):
            raise Fault(f"beam search ({scoring}): another order")


def check_group(model: Any) -> None:
    """The forward of a group: log-probabilities of targets and of thoughts, and gradients."""
    model.eval()
    rows, begin = sequences(1)
    prompts = [row[:start] for row, start in zip(rows, begin, strict=True)]
    ids, mask = padded(prompts, "left")
    targets, target_mask = padded([row[start:] for row, start in zip(rows, begin, strict=True)], "right")
    generator = torch.Generator().manual_seed(2)
    size = model.get_input_embeddings()(ids).shape[-1]
    noise = torch.randn(len(rows), 3, 1, size, generator=generator)
    noise[:, 0] = 0
    out = model(
        input_ids=ids,
        attention_mask=mask,
        group=GroupInputs(targets=targets, target_mask=target_mask.bool(), noise=noise, noise_scale=2.0),
    )
    naive, logprobs, thoughts = Naive(model), torch.zeros_like(out.logprobs), torch.zeros_like(out.thought_logprobs)
    for b, (row, start) in enumerate(zip(rows, begin, strict=True)):
        for g in range(3):
            logits, _, made = naive.row(row, noise[b, g], 2.0)
            own = logits[start - 1 : -1].float().log_softmax(-1).gather(1, row[start:, None])[:, 0]
            logprobs = logprobs.index_put((torch.tensor(b), torch.tensor(g), torch.arange(len(own))), own)
            thoughts = thoughts.index_put((torch.tensor(b), torch.tensor(g), torch.tensor(0)), made)
    compare("group's log-probabilities", out.logprobs, logprobs)
    compare("group's thoughts", out.thought_logprobs, thoughts)
    ours = out.logprobs.sum() + 0.1 * out.thought_logprobs.sum()
    compare_gradients("group", model, ours, logprobs.sum() + 0.1 * thoughts.sum())


def check_family(family: str) -> dict[str, Any]:
    """The outcome for one family: what is done instead where something does not hold, and what was not compared.

    Raises:
        Fault: something differs. ValueError: the family is refused.
    """
    model = patched(family, thoughts=2)
    traits = model._flr_patch.traits
    omitted = []
    try:
        check_loss(model, 2, ("right", "left") if traits.left_padding else ("right",))
        experts = check_experts(model)
    except NoGradient:
        experts, omitted = False, ["gradients"]
    model = patched(family, thoughts=1)
    check_generation(model, traits.left_padding)
    check_decoding(model)
    if not omitted:
        check_group(model)
    fallbacks = [name for name in vars(traits) if not getattr(traits, name)]
    return {"fallbacks": fallbacks, "experts": experts, "omitted": omitted}
