"""scripts/study: what is done in which order, what a killed study leaves, and what stands beside a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flr.data import HistoryViews, NeighbourTable, RecProcessor, build_tokenizer, fit_linear, planted_dataset
from flr.evaluate import evaluate, fit_tables
from flr.evaluate.metrics import row_metrics
from scripts.study import page
from scripts.study.job import Shared, mixed_ranks, own_views
from scripts.study.jobs import CHANGES, MODELS, SETTINGS, by_recipe, study
from scripts.study.kept import keep, of_part
from scripts.study.queue import Plan, Results, read_ranks, read_results
from scripts.study.stats import Resampled
from scripts.study.summary import METRICS, REPEATED, chosen_settings, summary
from tests.helpers.models import tiny_llama


def _job(name, priority, **more):
    return {"name": name, "priority": priority, "argv": ["sft"], "seed": 0, **more}


def _trials(variant, settings):
    return [_job(f"{variant}-{s}-0", 1, variant=variant, setting=s, tune=True) for s in settings]


def _result(valid):
    return {"metrics": {"valid": {"ndcg@10": valid}, "test": {"ndcg@10": 0.0}}}


def _plan(folder, jobs, seconds=100.0, tune_seconds=50.0):
    settings = {"a": {"argv": ["--a"], "cost": 1.0}, "b": {"argv": ["--b"], "cost": 2.0}}
    return Plan([{"settings": settings, "jobs": jobs}], Results(folder), seconds, tune_seconds)


def _do(plan, valid, elapsed=0.0, seconds=1.0):
    job = plan.next(elapsed)
    plan.ended(job, _result(valid), {"test": np.array([1, 40_000, 0])}, seconds)
    return job["name"]


def test_seeds_wait_for_the_setting_that_is_best_on_valid(tmp_path):
    jobs = [*_trials("x", "ab"), _job("x-best-1", 2, variant="x", setting="best", last=["--z"]), _job("other", 3)]
    plan = _plan(tmp_path, jobs)
    assert _do(plan, 0.2) == "x-b-0"  # the longer one first
    first = plan.next(0.0)
    assert first["name"] == "x-a-0"
    assert plan.next(0.0)["name"] == "other"  # x-best-1 has to wait
    plan.ended(first, _result(0.1), {}, 1.0)
    assert plan.next(0.0)["argv"] == ["sft", "--b", "--z"]


def test_of_trials_that_were_cut_only_shared_settings_count(tmp_path):
    jobs = [*_trials("x", "ab"), *_trials("y", "ab"), _job("x-best-1", 2, variant="x", setting="best")]
    plan = _plan(tmp_path, jobs)
    assert [_do(plan, v) for v in (0.9, 0.1, 0.2)] == ["x-b-0", "y-b-0", "x-a-0"]
    plan.results.done.pop("y-b-0")
    plan.results.done["y-a-0"] = {**_result(0.3), "name": "y-a-0"}
    assert plan.next(51.0)["argv"] == ["sft", "--a"]  # y-a-0 is too late; b is better for x, but y has not tried it


def test_nothing_begins_that_cannot_end(tmp_path):
    plan = _plan(tmp_path, [_job("short", 1), _job("long", 2, cost=30.0), _job("small", 3, cost=0.5)])
    assert _do(plan, 0.1, seconds=10.0) == "short"
    assert _do(plan, 0.1, elapsed=90.0) == "small"
    assert plan.next(0.0) is None


def test_a_killed_study_goes_on(tmp_path):
    plan = _plan(tmp_path, [_job("one", 1), _job("two", 2)])
    _do(plan, 0.5)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"name": "two", "met')  # a line that was cut
    again = _plan(tmp_path, [_job("one", 1), _job("two", 2)])
    assert [job["name"] for job in again.waiting] == ["two"]
    line = read_results(tmp_path)[0]
    np.testing.assert_array_equal(read_ranks(tmp_path, line)["test"], [1, 32767, 0])


def test_names_are_different(tmp_path):
    with pytest.raises(ValueError, match="different names"):
        _plan(tmp_path, [_job("one", 1), _job("one", 2)])


def test_intervals_hold_the_noise_of_seeds():
    rng = np.random.default_rng(0)
    users = rng.normal(size=400)
    same, shifted = np.stack([users] * 5), np.stack([users + shift for shift in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    drawn = Resampled(np.arange(400), samples=400)
    mean, low, high = drawn.difference(same, shifted)
    assert mean == pytest.approx(0.0, abs=1e-6)
    assert low < -0.3
    assert high > 0.3
    assert drawn.difference(same, same)[1:] == pytest.approx((0.0, 0.0), abs=1e-6)
    narrow = drawn.interval(same, np.arange(100))
    assert narrow[0] == pytest.approx(users[:100].mean())
    assert narrow[2] - narrow[1] == pytest.approx(4 * users[:100].std() / 10, rel=0.25)


def test_chosen_settings_are_those_of_the_plan():
    lines = [
        {"variant": v, "setting": s, "tune": True, **_result(x)}
        for v, s, x in (("x", "a", 0.1), ("x", "b", 0.3), ("y", "a", 0.2))
    ]
    assert chosen_settings(lines) == {"x": "a", "y": "a"}


def test_ranks_beside_a_model_are_those_of_the_package():
    weights = (0.0, 0.3, 0.7)  # item-kNN alone has scores that are level, or not, by rounding
    dataset = planted_dataset(num_items=80, num_users=60)
    processor = RecProcessor(build_tokenizer(dataset.catalogue, "id"), dataset.catalogue, num_thoughts=0)
    torch.manual_seed(0)
    model = tiny_llama(len(processor.tokenizer)).eval()
    shared = Shared([])
    partners = {**shared.partners("planted", dataset, torch.device("cpu")), "views": own_views(model, processor)}
    found = mixed_ranks(model, processor, dataset.valid, {n: (p, weights) for n, p in partners.items()}, batch_size=7)
    size = len(dataset.catalogue)
    tables = {"neighbours": NeighbourTable.fit(dataset.train, size), "linear": fit_linear(dataset.train, size)}
    expected = fit_tables(model, processor, tables, dataset.valid, weights)
    for place, weight in enumerate(weights):
        for name in tables:
            ndcg = row_metrics(found[name][place])["ndcg@10"]
            np.testing.assert_array_equal(ndcg, expected[name].metrics["ndcg@10"][place])
        views = HistoryViews(weight, 0.6)
        ranked = evaluate(model, processor, dataset.valid, views=views, progress=False, samples=1)
        np.testing.assert_array_equal(found["views"][place], ranked.ranks["item"])


def test_the_page_is_what_the_results_say():
    text = page.PAGE.read_text()
    assert page.page(text) == text, "run python -m scripts.study page"


def _line(folder, variant, setting, seed, ranks, **more):
    line = {"name": f"{variant}-{setting}-{seed}", "variant": variant, "setting": setting, "seed": seed, **more}
    line |= {"tags": {"data": "instruments", "codec": "id"}, "device": folder.name, "parameters": 1, "train_seconds": 1}
    line["metrics"] = {split: {"hr@10": 0.5, "ndcg@10": 0.5} for split in ("valid", "test")}
    return line, {"test": np.array(ranks)}


def test_a_table_compares_models_of_as_many_trainings(tmp_path):
    """Two folders, of which one has further seeds of some models by the recipe."""
    dataset = planted_dataset(num_items=20, num_users=40)
    dataset.save(tmp_path / "instruments")
    good, bad = [1] * len(dataset.test), [9] * len(dataset.test)
    first, second = Results(tmp_path / "first"), Results(tmp_path / "second")
    for variant, ranks in (("anchor", bad), ("offsets-mixture", bad), ("flr-mixture", good)):
        first.add(*_line(first.folder, variant, "recipe", 0, ranks, tune=True))
        if variant != "offsets-mixture":
            second.add(*_line(second.folder, variant, "recipe", 1, ranks))
    found = summary([first.folder, second.folder], tmp_path)
    assert [own["seeds"] for own in found["tables"][0]["models"].values()] == [1, 1, 1]
    assert found["repeated"]["seeds"] == [0, 1]
    assert sorted(found["repeated"]["recipe"]["test"]) == ["anchor", "flr-mixture"]  # the offsets have no seed 1
    assert [len(one["pairs"]) for one in found["repeated"]["trainings"]] == [3, 1]
    second.add(*_line(second.folder, "offsets-mixture", "recipe", 1, good))
    found = summary([first.folder, second.folder], tmp_path)
    assert [own["seeds"] for own in found["tables"][0]["models"].values()] == [2, 2, 2]
    found = found["repeated"]
    assert [(one["seed"], one["device"]) for one in found["trainings"]] == [(0, ["first"]), (1, ["second"])]
    pairs = [{(a, b): values for a, b, *values in one["pairs"]} for one in (*found["trainings"], found["recipe"])]
    lead = 1 - 1 / np.log2(10)
    wanted = {("flr-mixture", "anchor"): (lead, lead, lead), ("flr-mixture", "offsets-mixture"): (lead, 0, lead / 2)}
    for pair, means in wanted.items():
        np.testing.assert_allclose([one[pair][0] for one in pairs], means, atol=1e-6)
    low, high = pairs[-1]["flr-mixture", "offsets-mixture"][1:]
    assert low == pytest.approx(0.0, abs=1e-6)  # seeds are drawn, too: both times the one, or the other
    assert high == pytest.approx(lead, abs=1e-6)


def test_the_lists_of_jobs_are_of_one_form():
    trials = [job for job in study("data", "examples")["jobs"] if job.get("tune")]
    assert len(trials) == len(MODELS) * len(SETTINGS) == 21
    made = by_recipe("repeats", "data", "examples", "--use_cpu true", [1, 2])
    assert [job["name"] for job in made["jobs"][:3]] == [f"{name}-recipe-1" for name in REPEATED]
    trial = next(job for job in trials if job["name"] == "flr-mixture-recipe-0")
    again = next(job for job in made["jobs"] if job["name"] == "flr-mixture-recipe-2")
    assert again["argv"] == [*trial["argv"], "--use_cpu", "true"]
    reversed_ = by_recipe("reversed", "data", "examples", "--use_cpu true", [2])
    assert [job["argv"] for job in reversed_["jobs"]] == [job["argv"] for job in made["jobs"][3:]]
    assert {job["setting"] for job in reversed_["jobs"]} <= set(reversed_["settings"])
    taught = by_recipe("taught", "data", "examples", "--use_cpu true", [2])
    assert {"--teacher"} <= set(taught["settings"]["taught"]["argv"])
    same = [job["argv"] for job in taught["jobs"] if job["variant"] in REPEATED]
    assert same == [job["argv"] for job in reversed_["jobs"]]


def test_trainings_of_a_setting_make_a_table_of_their_own(tmp_path):
    """Those of other settings, and seeds that not every model has, are not in it."""
    dataset = planted_dataset(num_items=20, num_users=40)
    dataset.save(tmp_path / "instruments")
    good, bad = [1] * len(dataset.test), [9] * len(dataset.test)
    results = Results(tmp_path / "found")
    for variant, setting, seed, ranks in (
        ("flr", "taught", 1, good),
        ("anchor", "taught", 1, bad),
        ("anchor", "taught", 2, good),
        ("anchor", "recipe", 1, good),
    ):
        results.add(*_line(results.folder, variant, setting, seed, ranks))
    found = of_part([results.folder], tmp_path, "taught")
    assert [(run["variant"], run["setting"], run["seed"]) for run in found["runs"]] == [
        ("flr", "taught", 1),
        ("anchor", "taught", 1),
    ]
    each = {name: own["each"] for name, own in found["tables"][0]["models"].items()}
    assert each == {"anchor": [[1, pytest.approx(1 / np.log2(10))]], "flr": [[1, 1.0]]}


def test_what_is_kept_of_trainings_makes_the_same_table_with_those_that_follow(tmp_path):
    """Ranks past ten are not kept, nor where a training was made; another result of the same name is refused."""
    dataset = planted_dataset(num_items=20, num_users=40)
    dataset.save(tmp_path / "instruments")
    found = [Results(tmp_path / name / "cpu") for name in ("first", "second", "other")]
    for place, (results, seed) in enumerate(((found[0], 0), (found[1], 1), (found[1], 2), (found[2], 0))):
        for variant in ("anchor", "flr"):
            ranks = np.random.default_rng((len(variant), place)).integers(0, 20, len(dataset.test))
            line, by_way = _line(results.folder, variant, "taught", seed, ranks)
            line["metrics"] = {
                "valid": dict.fromkeys(METRICS, 0.0),
                "test": dict.fromkeys(METRICS, float(ranks.mean())),
            }
            results.add({**line, "argv": ["--data", str(tmp_path)]}, by_way)
    kept = tmp_path / "kept"
    for results in (found[0], found[1], found[0]):  # the last adds nothing
        keep([results.folder], kept, "taught")
    assert of_part([kept], tmp_path, "taught") == of_part([x.folder for x in found[:2]], tmp_path, "taught")
    assert [line["seed"] for line in read_results(kept)] == [0, 0, 1, 1, 2, 2]
    assert str(tmp_path) not in (kept / "results.jsonl").read_text()
    assert max(read_ranks(kept, line)["test"].max() for line in read_results(kept)) == 10
    with pytest.raises(ValueError, match="expected no other results of anchor-taught-0"):
        keep([found[2].folder], kept, "taught")


def test_parts_of_the_list_are_those_of_the_recipe():
    """The same options as in the whole list, but for the setting, which there is chosen on the way."""
    whole = {job["name"]: job for job in study("data", "examples")["jobs"]}
    changed = by_recipe("changes", "data", "examples", "", [1])
    assert [job["name"] for job in changed["jobs"]] == [f"flr-mixture-{change}-1" for change in CHANGES]
    assert changed["data"] == ["data/instruments"]
    others = by_recipe("others", "data", "examples", "", [0])
    assert others["data"] == ["data/instruments", "data/amazon-cds", "data/amazon-office"]
    for job in (*changed["jobs"], *others["jobs"]):
        other = whole[job["name"]]
        assert (job["argv"], job.get("last"), job["tags"]) == (other["argv"], other.get("last"), other["tags"])
    assert {job["setting"] for job in changed["jobs"]} == {"recipe"}


def test_a_change_is_compared_with_trainings_that_differ_by_it_alone(tmp_path):
    """The same seed, setting and device: trainings of other seeds are not in its base."""
    dataset = planted_dataset(num_items=20, num_users=40)
    dataset.save(tmp_path / "instruments")
    good, bad = [1] * len(dataset.test), [9] * len(dataset.test)
    results = Results(tmp_path / "found")
    for seed, ranks in ((0, bad), (1, good)):
        results.add(*_line(results.folder, "flr-mixture", "recipe", seed, ranks, tune=seed == 0))
    line, ranks = _line(results.folder, "flr-mixture", "recipe", 1, good)
    line |= {"name": "changed", "tags": {**line["tags"], "change": "K=2"}}
    results.add(line, ranks)
    found = summary([results.folder], tmp_path)
    own = next(t for t in found["tables"] if t["change"])["models"]["flr-mixture"]
    assert own["each"] == [[1, 1.0]]
    assert own["unchanged"] == 1.0
    np.testing.assert_allclose(own["less"], 0.0, atol=1e-6)
    row = page.changes(found).splitlines()[-1]
    assert row.startswith("| K = 2 | 1 | 0.5000 | 1.0000 | 1.0000 | ")
