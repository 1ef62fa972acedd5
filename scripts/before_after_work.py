"""Work that scripts/before_after.py measures at two commits; it runs in a process of its own, for one commit.

Whoever starts it says by PYTHONPATH which commit's ``flr`` and ``flr_kernels`` are imported. Competitors are those of
bench/baselines beside this file, at either commit. A piece of work is a function that prepares inputs from fixed seeds
and gives a round (numbers by name, of which CPU seconds are this process's) and what was computed, to be compared.
Names that one of the commits does not have are looked up when they are used, not before.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
Round = Callable[[], dict[str, float]]
HISTORIES = 4


class Work(NamedTuple):
    """Gives numbers; ``found`` holds lists of numbers that both commits must give alike."""

    round: Round
    found: dict[str, list[float]]


def cpu(call: Callable[[], Any], calls: int = 1) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - began) / calls


def status(name: str) -> int:
    """Bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def rise(call: Callable[[], Any]) -> int:
    """By how many bytes resident memory rises at most during a call, which is not the first of its kind."""
    call()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)


def baseline(name: str) -> Any:
    """A module of bench/baselines beside this file, or of bench."""
    package = ModuleType("competitors")
    package.__path__ = [str(ROOT / "bench/baselines"), str(ROOT / "bench")]
    sys.modules.setdefault("competitors", package)
    return importlib.import_module(f"competitors.{name}")


def listed(*tensors: Any) -> list[float]:
    """Numbers of tensors: all of a small one, of a large one some hundred and its norm."""
    numbers: list[float] = []
    for tensor in tensors:
        flat = torch.as_tensor(tensor).detach().double().flatten()
        numbers += [float(flat.norm()), *flat[:: max(1, len(flat) // 100)].tolist()]
    return numbers


def titles(count: int) -> Any:
    """A catalogue of made-up titles of five words."""
    from flr.data import Catalogue

    draw = random.Random(0)
    letters = ("bcdfghklmnprstvz", "aeiou")
    words = ["".join(draw.choice(letters[i % 2]) for i in range(draw.randint(3, 8))) for _ in range(2000)]
    return Catalogue((f"i{i}" for i in range(count)), (" ".join(draw.choices(words, k=5)) for _ in range(count)))


def in_smollm2(scoring: str) -> tuple[Any, list[np.ndarray]]:
    """A recommender over 1,000 titles with SmolLM2's layers, four of thirty and a vocabulary cut alike; histories."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import flr
    from flr.data import RecProcessor, build_tokenizer

    catalogue = titles(1000)
    tokenizer = build_tokenizer(catalogue, "title", vocab_size=2048)
    processor = RecProcessor(tokenizer, catalogue, "title", scoring=scoring)
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=6554, **sizes, **heads))
    flr.patch_model(model, tokenizer, flr.FLRConfig(num_factors=4))
    model.flr.output.data *= 1000  # factors move scores by a nat or so, as trained ones do
    rng = np.random.default_rng(0)
    return flr.Recommender(model.eval(), processor), [rng.integers(0, 1000, 3) for _ in range(HISTORIES)]


def shares() -> Work:
    """The part of the search's time that shares take on top of it, a user at a time."""
    recommenders = {scoring: in_smollm2(scoring) for scoring in ("full", "catalogue")}

    def lists(scoring: str, wanted: bool) -> list[Any]:
        recommender, histories = recommenders[scoring]
        return [recommender.recommend([h], k=10, num_beams=20, shares=wanted)[0] for h in histories]

    found: dict[str, list[float]] = {}
    for scoring in recommenders:
        found[f"{scoring}: items"] = [r.index for user in lists(scoring, True) for r in user]
        found[f"{scoring}: scores"] = [r.score for user in lists(scoring, True) for r in user]
        found[f"{scoring}: shares"] = [x for user in lists(scoring, True) for r in user for x in r.factor_shares]

    def measure() -> dict[str, float]:
        numbers = {}
        for scoring in recommenders:
            search, both = (cpu(lambda w=wanted: lists(scoring, w)) for wanted in (False, True))  # noqa: B023
            numbers[f"{scoring}"] = (both - search) / search
            numbers[f"{scoring} search"], numbers[f"{scoring} both"] = search / HISTORIES, both / HISTORIES
        return numbers

    return Work(measure, found)


def one_token() -> Work:
    """Ranks and lists of 64 users from scores of 10⁵ items, as evaluation takes them."""
    from flr.evaluate import rank

    users, items = 64, 100_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(users, items, generator=generator)
    targets = np.random.default_rng(0).integers(0, items, users)
    groups = torch.arange(items) // 2

    def ranked() -> Any:
        return rank._from_scores(scores, targets, groups, 20)

    bytes_a_cell = rise(ranked) / scores.numel()
    found = {name: np.asarray(x).flatten().tolist() for name, x in ranked()._asdict().items()}
    return Work(lambda: {"time": cpu(ranked), "memory": bytes_a_cell}, found)


def loading(count: int = 100_000) -> Work:
    """A saved processor of titles is loaded, and its trie made, as a server does."""
    from flr.data import RecProcessor, build_tokenizer
    from flr.decode import CatalogueTrie

    catalogue = titles(count)
    processor = RecProcessor(build_tokenizer(titles(2000), "title", vocab_size=2048), catalogue, "title")
    folder = tempfile.TemporaryDirectory()
    saving = cpu(lambda: processor.save_pretrained(folder.name))

    def load() -> Any:
        return CatalogueTrie.from_codec(RecProcessor.from_pretrained(folder.name).item_codec)

    trie = load()
    found = {"nodes": [len(trie.tokens)], "tokens": listed(trie.tokens), "items": listed(trie.items)}

    def measure(kept: Any = folder) -> dict[str, float]:
        return {"load": cpu(load), "save": saving}

    return Work(measure, found)


def forced_runs() -> Work:
    """Forwards of the model in a search for one user."""
    found, numbers = {}, {}
    for scoring in ("full", "catalogue"):
        recommender, histories = in_smollm2(scoring)
        calls: list[int] = []
        recommender.model.model.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for history in histories:
            recommender.recommend([history], k=10, num_beams=20, shares=False)
        numbers[scoring] = len(calls) / len(histories)
        found[f"{scoring}: items"] = [
            r.index for h in histories for r in recommender.recommend([h], k=10, num_beams=20, shares=False)[0]
        ]
    return Work(lambda: numbers, found)


def heads() -> Work:
    """Attention at 12 query heads and 2 key heads, as a search and as a group forward have it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import flr
    from flr.model.outputs import GroupInputs

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 64}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=512, num_hidden_layers=2, **sizes))
    flr.patch_model(model, config=flr.FLRConfig(num_factors=4, thought_token_id=511))
    model.requires_grad_(False).eval().flr.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    drawn_for = {}
    for users in (1, 8):
        mask = torch.rand(users, 1, 20, 210, generator=generator) < 0.9
        drawn_for[users] = drawn(users, 12, 20, 64), drawn(users, 2, 210, 64), drawn(users, 2, 210, 64), mask
    try:
        from flr.model.folded_heads import folded_heads as way
    except ModuleNotFoundError:
        way = contextlib.nullcontext  # what transformers does
    module = model.model.layers[0].self_attn

    def beams(users: int) -> torch.Tensor:
        with way(), torch.inference_mode():
            attention = ALL_ATTENTION_FUNCTIONS["sdpa"]  # looked up inside, as a layer does
            for _ in range(50):
                out = attention(module, *drawn_for[users], scaling=0.125, dropout=0.0)[0]
        return out

    ids = torch.randint(5, 511, (1, 257), generator=generator)
    ids[:, -1] = 511
    targets = torch.randint(5, 511, (1, 16), generator=generator)
    noise = drawn(1, 8, 1, 768)
    noise[:, 0] = 0
    group = GroupInputs(targets, torch.ones_like(targets, dtype=torch.bool), noise, noise_scale=3.0)

    def step() -> torch.Tensor:
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), group=group)
        (out.logprobs * noise[:, :, 0, :1]).mean().backward()
        return out.logprobs

    gradients = [step(), *(p.grad for p in model.flr.parameters() if p.grad is not None)]
    found = {"one": listed(beams(1)), "eight": listed(beams(8)), "step": listed(*gradients)}

    def measure() -> dict[str, float]:
        one, eight = (cpu(lambda n=users: beams(n), calls) / 50 for users, calls in ((1, 10), (8, 2)))
        return {"one": one, "eight": eight, "step": cpu(step, 10)}

    return Work(measure, found)


def item_knn() -> Work:
    """Item-kNN counted in 4·10⁵ rows over 10⁵ items."""
    from flr.data import CSR, Interactions
    from flr.evaluate.baselines import ItemKNN

    rows, items, rng = 400_000, 100_000, np.random.default_rng(0)
    lengths = rng.integers(1, 8, rows)
    histories = CSR(rng.integers(0, items, lengths.sum()), np.concatenate([[0], lengths.cumsum()]))
    train = Interactions([str(row // 4) for row in range(rows)], histories, rng.integers(0, items, rows))
    tables: list[Any] = [None]

    def fit() -> None:
        tables[0] = ItemKNN(train, items)

    memory = rise(fit)
    found = {"scores": listed(tables[0].scores(histories.take(np.arange(64))))}
    tables[0] = None
    return Work(lambda: {"time": cpu(fit), "memory": memory}, found)
