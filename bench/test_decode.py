"""Catalogue decoding: one beam step and a whole evaluation, against what users have today, and the two scorings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flr.decode import beam_search
from flr.decode.filters import item_filter
from flr.decode.kernel_search import KernelSearch
from flr.decode.search import Search
from flr.model.head import HeadRows
from flr_kernels import Continuations
from flr_kernels.ops.trie_step.op import runs_as_kernel

from .baselines import generate_eval
from .baselines.constraint import Best, PythonDict, Static
from .decode_data import beams_at, catalogue, prefix_of, thinking_model
from .harness import kernel_clock, label
from .machine import DEVICE, ON_GPU

PROMPT = 150  # tokens of a prompt, which the Python dictionary has to cut off


def step_of(items: str, depth: int, vocabulary: int, users: int = 32, beams: int = 10) -> dict[str, Any]:
    return {"B": users, "W": beams, "V": vocabulary, "items": items, "depth": depth}


def search(items, users: int, beams: int, scoring: str, rows: HeadRows | None = None) -> Search:
    trie = items.trie.to(DEVICE)
    kind = KernelSearch if runs_as_kernel(torch.empty(1, 1, 1, device=DEVICE), beams) else Search  # as beam_search
    return kind(trie, item_filter(trie, users), beams, beams, scoring, 0.0, rows)


def hypotheses(nodes: torch.Tensor, scores: torch.Tensor) -> Continuations:
    return Continuations(scores, nodes, torch.zeros_like(nodes), torch.zeros_like(nodes))


def merged(found, trie, beams: int) -> Best:
    """Finished and unfinished continuations of our step as one list, for comparison."""
    unfinished, finished, _ = found
    parts = [x for x in (unfinished, finished) if x is not None]
    score = torch.cat([x.score for x in parts], 1)
    index = score.sort(dim=1, descending=True, stable=True).indices[:, :beams]
    node, parent = (torch.cat(x, 1).gather(1, index) for x in zip(*((p.node, p.parent) for p in parts), strict=True))
    return Best(score.gather(1, index), parent, trie.tokens[node].long())


@pytest.mark.cases(
    quick=[step_of("synthetic-titles", d, 10_432, 4) for d in (0, 2)] + [step_of("100000", 1, 10_432, 4)],
    default=[
        step_of(items, depth, vocabulary)
        for vocabulary in (32_000, 151_936)
        for items, depths in (("titles", (0, 1, 4)), ("100000", (0, 2)), ("1000000", (0, 2)))
        for depth in depths
    ],
)
def test_step(shape, race, tier):
    """Normalise over the vocabulary, constrain, take the best W of B·W beams.

    At the root all beams of a user are one hypothesis. Ours holds it once, as the engine does, and so do STATIC and the
    log_softmax; transformers has W rows, one of which counts, and ``flr, W rows`` is ours on those.

    On a GPU replays of CUDA graphs are timed, of STATIC's code also under torch.compile; the Python dictionary, which
    waits for the host at every beam, is left out.
    """
    users, beams, vocabulary, depth = (shape[x] for x in ("B", "W", "V", "depth"))
    items = catalogue(shape["items"])
    shape = shape | {"items": items.name}
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(users * beams, vocabulary, generator=generator)).to(DEVICE)
    scores = -torch.rand(users, beams, generator=generator).to(DEVICE).cumsum(1)
    if depth == 0:
        scores[:, 0] = 0
        scores[:, 1:] = -1e9  # all beams stand at the root, and only one of them counts
    nodes = beams_at(items, depth, users, beams)
    prefixes = [prefix_of(items, n, depth) for n in nodes.flatten().tolist()]
    ids = torch.cat(
        [
            torch.zeros(users * beams, PROMPT, dtype=torch.int64),
            torch.tensor(prefixes, dtype=torch.int64).view(users * beams, depth),
        ],
        1,
    )
    python = None if ON_GPU else PythonDict(items.sequences)
    static = Static(items.sequences, vocabulary, pad=0, device=DEVICE)
    states = torch.tensor([static.state(p) for p in prefixes]).to(DEVICE)
    ours, running = search(items, users, beams, "full"), hypotheses(nodes.to(DEVICE), scores)
    widths = ours.widths(depth)

    needed = beams if depth else 1
    few = logits if depth else logits[::beams].contiguous()  # for those that hold one row a user at the root

    def step(rows: int):
        some = Continuations(*(x[:, :rows] for x in running))
        return ours.expand((few if rows == needed else logits).view(users, rows, -1), some, depth, *widths)

    def by_static() -> Best:
        return static.step(logits, scores, states, depth) if depth else static.root(few, beams)

    def check():
        found = merged(step(needed), ours.trie, beams)
        for other in (by_static(), *(() if python is None else (python.step(logits, scores, ids, PROMPT),))):
            n = int((other.score > -1e8).sum(1).min())
            assert n > 0
            torch.testing.assert_close(found.score[:, :n], other.score[:, :n], atol=1e-4, rtol=1e-5)
            assert torch.equal(found.parent[:, :n], other.parent[:, :n])
            assert torch.equal(found.token[:, :n], other.token[:, :n])

    variants = {
        "flr": lambda: step(needed),
        **({} if depth else {"flr, W rows": lambda: step(beams)}),
        "static": by_static,
        "log_softmax alone": lambda: torch.log_softmax(few, dim=-1),
    }
    if python is None:
        variants["static, compiled"] = torch.compile(by_static, dynamic=False)
        target = {"static": 1.0 if depth else 2.5}
    else:
        variants["python dict"] = lambda: python.step(logits, scores, ids, PROMPT)
        target = {"python dict": 7.0 if depth else 10.0, "static": 1.5}
    race(f"step {label(shape)}", variants, suite="decode", shape=shape, check=check, target=target,
         bytes_moved=4 * few.numel(), clock=kernel_clock())  # fmt: skip


@pytest.mark.cases(
    quick=[step_of("synthetic-titles", 1, 10_432, 4) | {"D": 64}],
    default=[step_of("titles", depth, 32_000) | {"D": 512} for depth in (0, 2)]
    + [step_of("1000000", depth, 151_936) | {"D": 512} for depth in (0, 1, 2)],
)
def test_scorings(shape, race):
    """From hidden states of B·W beams (B at the root) to the best W: `catalogue` against `full`, with the lm_head."""
    users, beams, vocabulary, depth, size = (shape[x] for x in ("B", "W", "V", "depth", "D"))
    items = catalogue(shape["items"])
    shape = shape | {"items": items.name}
    generator = torch.Generator().manual_seed(1)
    beams_here = beams if depth else 1
    hidden = torch.randn(users, beams_here, size, generator=generator).to(DEVICE)
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(size, vocabulary, bias=False).to(DEVICE)
    model.get_output_embeddings = lambda: model.lm_head
    model.config = type("Config", (), {"get_text_config": lambda self, **_: self})()
    scores = -torch.rand(users, beams_here, generator=generator).to(DEVICE).cumsum(1)
    running = hypotheses(beams_at(items, depth, users, beams_here).to(DEVICE), scores)
    rows = HeadRows(model)
    few, all_ = search(items, users, beams, "catalogue", rows), search(items, users, beams, "full")

    @torch.no_grad()
    def by_children():
        return few.expand(hidden, running, depth, *few.widths(depth))

    @torch.no_grad()
    def by_vocabulary():
        return all_.expand(model.lm_head(hidden), running, depth, *all_.widths(depth))

    def check():
        with torch.no_grad():
            reference = search(items, users, beams, "catalogue")
            expected = reference.expand(model.lm_head(hidden), running, depth, *reference.widths(depth))
        for ours, theirs in zip(by_children()[:2], expected[:2], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours.score, theirs.score, atol=1e-4, rtol=1e-5)

    variants = {"flr": by_children, "full scoring": by_vocabulary}
    race(f"scorings {label(shape)}", variants, suite="decode", shape=shape, check=check)


def evaluation_of(prompt: int, beams: int, users: int = 8, hidden: int = 512, layers: int = 8) -> dict[str, Any]:
    return {"B": users, "W": beams, "L": prompt, "D": hidden, "layers": layers, "V": 10_432}


@pytest.mark.cases(
    quick=[evaluation_of(40, 4, 3, 64, 2)],
    default=[evaluation_of(prompt, beams) for prompt in (150, 256) for beams in (10, 20)],
)
def test_evaluation(shape, tier, race):
    """Prompts to ranked titles: one encoding, shared prompt cache; against two encodings and transformers' generate."""
    users, beams, length, vocabulary = (shape[x] for x in ("B", "W", "L", "V"))
    items = catalogue("synthetic-titles" if tier == "quick" else "titles")
    shape = shape | {"items": items.name}
    model = thinking_model(items, shape["D"], shape["layers"], vocabulary).to(DEVICE)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(10, items.tokens, (users, length), generator=generator)
    ids[:, -1] = vocabulary - 1
    mask = torch.ones_like(ids)
    for user in range(users):  # left-padded by up to a fifth, as in a batch sorted by length
        mask[user, : length * user // (5 * users)] = 0
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    inputs = {"input_ids": ids, "attention_mask": mask}
    trie, allowed = items.trie.to(DEVICE), PythonDict(items.sequences)
    index = {s: i for i, s in enumerate(items.sequences)}

    def ours(scoring: str):
        return lambda: beam_search(model, inputs, trie, beams, beams, scoring)

    def theirs(with_scores: bool = False):
        return generate_eval.evaluate(model, ids, mask, allowed, index, items.end, beams, with_scores)

    def check():
        found = ours("full")()
        for row, expected in enumerate(theirs(with_scores=True)):
            n = len(expected)
            assert n == beams
            torch.testing.assert_close(
                found.scores[row, :n].cpu(), torch.tensor([s for _, s in expected]), atol=1e-3, rtol=1e-4
            )
            assert found.items[row, :n].tolist() == [i for i, _ in expected]
        lengths = torch.tensor([len(items.sequences[i]) for i in found.items.flatten().tolist()])
        assert lengths.float().mean() > 2, "decoding must go through titles, not end with the shortest"

    variants = {"flr": ours("full"), "generate": theirs, "catalogue scoring": ours("catalogue")}
    target = {"generate": 20.0 if ON_GPU else 7.0}
    race(f"evaluation {label(shape)}", variants, suite="decode", shape=shape, check=check, target=target)
