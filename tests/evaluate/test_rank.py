"""The evaluation engine on real processors and small models: against naive ranks, batches, kills, files, tables."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

import flr
import flr.evaluate
from flr.data import CSR, Catalogue, HistoryViews, Interactions, RecProcessor, build_tokenizer
from flr.evaluate import EvalResult, evaluate, evaluate_scorer
from flr.evaluate.baselines import ItemKNN, Popularity
from tests.helpers.inputs import row_of
from tests.helpers.models import tiny_llama
from tests.helpers.naive import naive_scores

NUM_ITEMS = 15


def make_catalogue() -> Catalogue:
    words = ["blue", "train", "kind", "of", "giant", "steps"]
    titles = [f"{words[i % 6]} {words[(i * i) % 5]}" for i in range(NUM_ITEMS)]
    assert len(set(titles)) < NUM_ITEMS, "some titles repeat"
    sids = [(f"<a_{i % 3}>", f"<b_{i % 5}>") for i in range(NUM_ITEMS)]
    return Catalogue([f"item{i}" for i in range(NUM_ITEMS)], titles, sids)


def make_rows(rows: int = 23, seed: int = 0) -> Interactions:
    generator = np.random.default_rng(seed)
    histories = [generator.integers(0, NUM_ITEMS, generator.integers(0, 7)) for _ in range(rows)]
    users = [f"u{i // 2}" for i in range(rows)]
    return Interactions(users, CSR.from_rows(histories), generator.integers(0, NUM_ITEMS, rows))


def make_model(codec: str, variant: str = "flr"):
    catalogue = make_catalogue()
    processor = RecProcessor(build_tokenizer(catalogue, codec), catalogue, codec)
    torch.manual_seed(0)
    model = tiny_llama(len(processor.tokenizer), num_key_value_heads=2, initializer_range=0.3)
    flr.patch_model(model, processor.tokenizer, flr.FLRConfig(variant=variant, num_factors=4))
    return model, processor


def sequences_of(processor) -> list[tuple[int, ...]]:
    codec = processor.item_codec
    return [tuple(codec.encode(i)) for i in range(NUM_ITEMS)]


def slow_rank(scores: torch.Tensor, target: int, titles: list[str]) -> tuple[int, int]:
    by_item = 1 + sum(float(s) >= float(scores[target]) for i, s in enumerate(scores) if i != target)
    best: dict[str, float] = {}
    for title, score in zip(titles, scores.tolist(), strict=True):
        best[title] = max(best.get(title, -np.inf), score)
    own = titles[target]
    return by_item, 1 + sum(s >= best[own] for t, s in best.items() if t != own)


@pytest.mark.parametrize(
    ("codec", "method"), [("id", "auto"), ("sid", "auto"), ("title", "auto"), ("title", "exhaustive")]
)
def test_a_patched_model_ranks_as_naive_scoring_says(codec, method):
    model, processor = make_model(codec)
    rows = make_rows(8)
    result = evaluate(model, processor, rows, method=method, batch_size=3, progress=False, num_beams=20)
    assert result.settings["method"] == ("exhaustive" if codec == "id" else "beam" if method == "auto" else method)
    model.eval()
    expected = naive_scores(model, processor(rows), sequences_of(processor))
    titles = processor.catalogue.titles
    slow = [slow_rank(scores, int(t), titles) for scores, t in zip(expected, rows.targets, strict=True)]
    assert result.ranks["item"].tolist() == [a for a, _ in slow]
    assert result.ranks["title"].tolist() == [b for _, b in slow]
    assert result.items[:, :NUM_ITEMS].tolist() == expected.argsort(1, descending=True).tolist()
    assert (result.items[:, NUM_ITEMS:] == -1).all()
    np.testing.assert_allclose(
        result.scores[:, :NUM_ITEMS], expected.sort(1, descending=True).values.numpy(), atol=1e-4, rtol=1e-5
    )


def test_the_thought_matters():
    """The comparison with naive scoring is of a model that thinks: without its factors, the scores differ."""
    model, processor = make_model("title")
    inputs = processor(make_rows(4))
    with_factors = flr.decode.score_all_items(model, inputs, processor.item_codec)
    with torch.no_grad():
        for parameter in model.flr.parameters():
            parameter.mul_(3.0)
    assert not torch.allclose(flr.decode.score_all_items(model, inputs, processor.item_codec), with_factors, atol=1e-3)


@pytest.mark.parametrize("variant", ["anchor", "none"])
def test_controls_evaluate_too(variant):
    model, processor = make_model("sid", variant)
    result = evaluate(model, processor, make_rows(5), progress=False)
    assert len(result) == 5
    assert row_of(processor(make_rows(5)), 0).numel() > 0


@pytest.mark.parametrize("bound", [1, 2 * NUM_ITEMS + 1])
def test_scores_of_every_item_are_made_for_few_users_at_a_time(bound, monkeypatch):
    """Whatever the batch: exhaustive scoring of a model, and baselines, alone and as scorers."""
    model, processor = make_model("title")
    rows, train = make_rows(), make_rows(40, seed=1)
    baselines = [Popularity(train, NUM_ITEMS), ItemKNN(train, NUM_ITEMS)]

    def everything() -> list[list[int]]:
        found = [evaluate(model, processor, rows, method="exhaustive", progress=False).ranks["item"]]
        found += [evaluate_scorer(one, rows, processor.catalogue).ranks["item"] for one in baselines]
        return [ranks.tolist() for ranks in (*found, *(one.ranks(rows) for one in baselines))]

    wanted, sizes = everything(), []

    def counted(module: str, name: str) -> None:
        real = getattr(__import__(module, fromlist=[name]), name)

        def wrapped(scores, *args, **kwargs):
            sizes.append(len(scores))
            return real(scores, *args, **kwargs)

        monkeypatch.setattr(f"{module}.{name}", wrapped)

    counted("flr.evaluate.rank", "ranks_from_scores")
    counted("flr.evaluate.baselines", "ranks_from_scores")
    monkeypatch.setattr("flr.evaluate.metrics._MAX_SCORES", bound)
    assert everything() == wanted
    assert max(sizes) == max(1, bound // NUM_ITEMS)


@pytest.mark.parametrize("codec", ["id", "sid", "title"])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_batch_size_does_not_matter(codec, scoring):
    model, processor = make_model(codec)
    model.train()
    results = [
        evaluate(model, processor, make_rows(), batch_size=b, num_beams=4, scoring=scoring, progress=False)
        for b in (1, 5, 64)
    ]
    assert model.training
    for other in results[1:]:
        assert other.metrics == results[0].metrics
        assert other.intervals == results[0].intervals
        assert other.items.tolist() == results[0].items.tolist()
        np.testing.assert_allclose(other.scores, results[0].scores, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("views", [None, HistoryViews(0.5, 0.6)])
def test_the_longest_prompts_come_first_and_results_as_the_rows_stand(views):
    model, processor = make_model("title")
    processor.views = views
    rows, widths = make_rows(), []
    expected = [evaluate(model, processor, rows.select([i]), progress=False) for i in range(len(rows))]
    handle = model.register_forward_hook(lambda m, a, k, o: widths.append(k["input_ids"].shape), with_kwargs=True)
    result = evaluate(model, processor, rows, batch_size=4, progress=False)
    handle.remove()
    assert result.ranks["item"].tolist() == [one.ranks["item"][0] for one in expected]
    assert result.items.tolist() == [one.items[0].tolist() for one in expected]
    longest = processor.prompt_lengths(rows.histories)
    prompts = [width for size, width in widths if width >= longest.min() and size in (3, 4)]
    if views is None:
        assert prompts == sorted(prompts, reverse=True)
    assert prompts[0] == longest.max()


@pytest.mark.parametrize("codec", ["id", "title"])
def test_seen_items_are_never_given(codec):
    model, processor = make_model(codec)
    rows = make_rows()
    result = evaluate(model, processor, rows, exclude_seen=True, progress=False, batch_size=4)
    baseline = evaluate_scorer(Popularity(rows, NUM_ITEMS), rows, processor.catalogue, exclude_seen=True, batch_size=4)
    for row, (history, target) in enumerate((r.history.tolist(), r.target) for r in rows):
        for found in (result, baseline):
            given = [i for i in found.items[row].tolist() if i >= 0]
            assert sorted(given) == sorted(set(range(NUM_ITEMS)) - set(history))
            assert (found.ranks["item"][row] == 0) == (target in history)


def test_more_rows_than_a_part_and_few_logits(monkeypatch):
    model, processor = make_model("sid")
    expected = evaluate(model, processor, make_rows(), progress=False)
    monkeypatch.setattr(flr.evaluate.parts, "_PART_ROWS", 7)
    monkeypatch.setattr("flr.decode.memory._MAX_LOGITS", 1)
    sizes = []
    handle = model.register_forward_hook(lambda m, a, k, o: sizes.append(len(k["input_ids"])), with_kwargs=True)
    result = evaluate(model, processor, make_rows(), progress=False)
    handle.remove()
    assert set(sizes) == {1}
    assert result.items.tolist() == expected.items.tolist()


def test_a_killed_evaluation_goes_on(tmp_path, monkeypatch):
    model, processor = make_model("sid")
    monkeypatch.setattr(flr.evaluate.parts, "_PART_ROWS", 6)
    expected = evaluate(model, processor, make_rows(), progress=False)
    calls = {"n": 0, "stop": 3}
    real = flr.evaluate.rank.beam_search

    def counted(*args, **kwargs):
        if calls["n"] == calls["stop"]:
            raise KeyboardInterrupt
        calls["n"] += 1
        return real(*args, **kwargs)

    def run(**kwargs) -> EvalResult:
        calls["n"] = 0
        return evaluate(
            model, processor, make_rows(), output_dir=tmp_path / "run", batch_size=6, progress=False, **kwargs
        )

    monkeypatch.setattr(flr.evaluate.rank, "beam_search", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "run" / "metrics.json").exists()
    parts = sorted((tmp_path / "run" / "parts").rglob("*.npz"))
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[:100])  # cut short: done again
    calls["stop"] = 99

    # what was found with other settings or weights is not used
    weight = model.lm_head.weight
    with torch.no_grad():
        saved = weight[0, 0].clone()
        weight[0, 0] += 1
    calls["stop"] = 0
    with pytest.raises(KeyboardInterrupt):
        run()
    calls["stop"] = 99
    with torch.no_grad():
        weight[0, 0] = saved
    result = run()
    assert calls["n"] == 2  # the damaged part and the missing one
    assert result.items.tolist() == expected.items.tolist()
    assert result.metrics == expected.metrics
    assert not (tmp_path / "run" / "parts").exists()
    run(scoring="catalogue")
    assert calls["n"] == 4


def test_saved_loaded_compared_and_shown(tmp_path):
    model, processor = make_model("id")
    rows = make_rows(40)
    result = evaluate(model, processor, rows, progress=False, output_dir=tmp_path, name="FLR")
    again = EvalResult.load(tmp_path)
    assert again.metrics == result.metrics
    assert again.intervals == result.intervals
    assert again.items.tolist() == result.items.tolist()
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["metrics"]["item"]["ndcg@10"] == result.metrics["item"]["ndcg@10"]
    assert report["rows"] == 40

    baselines = [
        evaluate_scorer(kind(make_rows(50, 1), NUM_ITEMS), rows, processor.catalogue) for kind in (Popularity, ItemKNN)
    ]
    assert baselines[0].ranks["item"].tolist() == Popularity(make_rows(50, 1), NUM_ITEMS).ranks(rows).tolist()
    difference = result.difference(baselines[1])
    assert difference.mean == pytest.approx(baselines[1].metrics["item"]["ndcg@10"] - result.metrics["item"]["ndcg@10"])
    assert difference.low <= difference.mean <= difference.high
    with pytest.raises(ValueError, match="expected the rows"):
        result.difference(evaluate_scorer(Popularity(rows, NUM_ITEMS), make_rows(3), processor.catalogue))
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(result.table(*baselines, level="title"))
    text = console.export_text()
    for part in ("FLR", "popularity", "item-kNN", "HR@10", "Coverage@10", f"{result.metrics['title']['hr@10']:.4f}"):
        assert part in text


def test_refuses():
    model, processor = make_model("id")
    with pytest.raises(ValueError, match="at least one row"):
        evaluate(model, processor, make_rows().select([]))
    with pytest.raises(ValueError, match="method: expected"):
        evaluate(model, processor, make_rows(), method="fast")
    with pytest.raises(ValueError, match="top_k"):
        evaluate(model, processor, make_rows(), top_k=10)
    with pytest.raises(ValueError, match="scoring"):
        evaluate(model, processor, make_rows(), scoring="half")
    with pytest.raises(ValueError, match="item indices below"):
        evaluate_scorer(Popularity(make_rows(), NUM_ITEMS), make_rows(), Catalogue(["a"], ["A"]))
    with pytest.raises(ValueError, match="expected a saved evaluation"):
        EvalResult.load("nowhere")
