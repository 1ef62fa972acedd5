"""The study of pretrained weights: what it chooses, what is left of a cut result, and the tables."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.pretrained_study import chosen, finished, studies, trials
from scripts.pretrained_table import PAGE, RESULTS, difference, interval, page, tables

ROWS = 40


def _run(job, found_rows, valid=None):
    found = {"name": job.name, "data": job.data, "codec": job.codec, "weights": job.weights, "mode": job.mode}
    found |= {"seed": job.seed, "rate": job.rate, "steps": 7, "batch_size": 4, "seconds": [2.0, 1.0]}
    found |= {"test": {"rows": found_rows, "ranks": [1] * len(found_rows), "of": ROWS}}
    return found if valid is None else {**found, "valid": {"ndcg@10": valid, "of": 9}}


@pytest.fixture
def done():
    """Trials, of which the second rate of ``lora`` and the first of ``random`` are the best, and item-kNN."""
    values = {("lora", 5e-4): 0.1, ("lora", 2e-3): 0.2, ("random", 3e-4): 0.09, ("random", 1e-3): 0.01}
    made = [
        _run(job, [0] if job.weights == "lora" else [], values.get((job.weights, job.rate), 0.0)) for job in trials()
    ]
    knn = {"name": "amazon-cds.item-kNN", "data": "amazon-cds", "weights": "item-kNN", "users": list(range(ROWS))}
    made.append({**knn, "test": {"rows": [1, 2], "ranks": [1, 1], "of": ROWS}})
    return {one["name"]: one for one in made}


def test_valid_rows_choose_rates_and_the_kind_of_random_weights(done):
    assert chosen(done) == {"pretrained": ("lora", 2e-3), "random": ("random", 3e-4)}
    jobs = list(studies(chosen(done)))
    assert len({job.name for job in jobs}) == len(jobs)
    assert {(job.weights, job.rate) for job in jobs} == {("lora", 2e-3), ("random", 3e-4)}
    failed = {name: {"name": name, "error": "x"} if ".lora." in name else one for name, one in done.items()}
    assert {job.weights for job in studies(chosen(failed))} == {"random"}


def test_a_line_that_was_cut_is_left_out(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text('{"name": "a", "error": "first"}\n{"name": "a", "seed": 1}\n{"name": "b", "se')
    assert finished(file) == {"a": {"name": "a", "seed": 1}}
    assert finished(tmp_path / "nothing") == {}


def test_tables_show_the_chosen_rates_alone(done, tmp_path):
    text = tables(done, done)
    assert text.count("| SmolLM2, adapters | none | 1 | 0.0250 |") == 1
    assert text.count("| random, all weights trained | none | 1 | 0.0000 |") == 1
    assert "| item-kNN | | | 0.0500 |" in text
    assert "random, adapters | none" not in text
    assert "0.0005: 0.1000" in text  # the trials are in the sentence below
    file = tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in done.values()))
    around = "a\n<!-- quality:pretrained -->\nold\n<!-- /quality -->\nb"
    assert page(around, {"pretrained": file}) == f"a\n<!-- quality:pretrained -->\n\n{text}\n\n<!-- /quality -->\nb"


def test_results_without_trials_take_the_rates_of_others(done):
    jobs = [job for job in studies(chosen(done)) if job.data == "amazon-cds" and job.mode == "anchor"]
    runs = [done["amazon-cds.item-kNN"], *(_run(job, [0, 1]) for job in jobs)]
    text = tables({one["name"]: one for one in runs}, done)
    assert "| SmolLM2, adapters | anchor | 3 | 0.0500 |" in text
    assert "by learning rate" not in text


def test_an_interval_draws_users_and_seeds():
    rng = np.random.default_rng(1)
    values = rng.random((3, 500))
    mean, low, high = interval(values, np.arange(500))
    assert mean == pytest.approx(values.mean())
    spread = (high - low) / (2 * 1.96)
    of_users = values.mean(0).std() / np.sqrt(500)
    assert of_users < spread < 2.5 * of_users  # and of the seeds' own noise
    apart = values + np.array([[0.0], [1.0], [2.0]])
    assert interval(apart, np.arange(500))[2] - interval(apart, np.arange(500))[1] > 1  # seeds that disagree
    one_user = interval(values[:1], np.zeros(500, np.int64))
    assert one_user[1] == pytest.approx(one_user[2])


def test_a_difference_is_paired_by_seed_and_row():
    job = trials()[0]
    worse, better = _run(job, [3]), _run(job, [3, *range(10, 20)])
    text = difference({0: better, 1: better}, {0: worse, 2: worse}, np.arange(ROWS))
    assert text.startswith("**+0.2500 (+0.1")
    assert text.endswith(", seed 0 alone")  # the other seeds have no partner
    assert difference({0: better}, {0: worse}, np.arange(ROWS)).endswith(")**")
    assert difference({1: better}, {0: worse}, np.arange(ROWS)) == ""


def test_the_tables_are_of_the_committed_result():
    text = Path(PAGE).read_text()
    assert all(f"<!-- quality:{name} -->" in text for name in RESULTS)
    assert page(text) == text, "run python -m scripts.pretrained_table"
