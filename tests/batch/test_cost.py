"""Costs from measured times: rates are those that the rows were made from, and costs rise with what they are of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from flr.batch.cost import Size, Work, cost, rates
from flr.cli import main
from tests.helpers.models import tiny_config
from tests.helpers.serving import save

COMMITTED = Path(__file__).parents[2] / "bench/results"
SIZE = Size(512, 8, 10_432, 28_000_000, 0)
PROMPT, BEAM, FLOOR = 5e10, 2e10, 0.004  # operations a second, and seconds a step


def row(work: str, length: int, beams: int, seconds: float) -> dict:
    shape = {"work": work, "B": 4, "L": length, "W": beams, "D": 512, "layers": 8, "V": 10_432, "weights": SIZE.weights}
    return {"suite": "cost", "case": work, "shape": shape, "variant": "flr", "p50_ms": 1e3 * seconds}


@pytest.fixture
def results(tmp_path) -> Path:
    """Rows of a device whose rates are known."""
    prompts = {length: 4 * SIZE.prompt_flops(length) / PROMPT for length in (128, 256)}
    rows = [row("prompt", length, 0, seconds) for length, seconds in prompts.items()]
    for beams in (10, 20, 50):
        step = FLOOR + 4 * beams * SIZE.beam_flops(128) / BEAM
        rows.append(row("search", 128, beams, prompts[128] + 3 * step))
    folder = tmp_path / "results/cpu-made-up"
    folder.mkdir(parents=True)
    run = {"date": "2026-01-01", "tier": "default", "device": "CPU made up", "rows": rows}
    older = {**run, "date": "2025-01-01", "rows": [{**r, "p50_ms": 10 * r["p50_ms"]} for r in rows]}
    (folder / "abc.json").write_text(json.dumps({"device": "CPU made up", "commit": "abc", "runs": [run, older]}))
    return tmp_path / "results"


def test_rates_are_those_that_the_newest_rows_were_made_from(results):
    found = rates(results, "cpu")
    assert found.prompt == pytest.approx(PROMPT)
    assert found.beam == pytest.approx(BEAM)
    assert found.step == pytest.approx(FLOOR / 8)
    assert "cpu-made-up/abc.json" in found.measured[0]
    parts = cost(SIZE, Work(128, 4, 1, 1, 20, False, 4), found)
    measured = json.loads((results / "cpu-made-up/abc.json").read_text())["runs"][0]["rows"]
    search = next(r["p50_ms"] / 1e3 / 4 for r in measured if r["shape"]["W"] == 20)
    without = sum(parts.values()) - parts["thought"] - parts["steps"] / 4  # the first step's logits are the prompt's
    assert without == pytest.approx(search)


def test_costs_rise_with_tokens_beams_factors_and_refinements(results):
    found = rates(results, "cpu")
    base = Work(128, 4, 2, 1, 20, False, 4)
    parts = cost(SIZE, base, found)
    for name, value, part in (
        ("prompt", 256, "prompt"),
        ("factors", 4, "thought"),
        ("refinements", 3, "thought"),
        ("beams", 40, "beams"),
        ("item_tokens", 7, "beams"),
        ("full", True, "head"),
    ):
        more = cost(SIZE, replace(base, **{name: value}), found)
        assert more[part] > parts[part], name
    assert cost(SIZE, replace(base, batch=8), found)["steps"] == pytest.approx(parts["steps"] / 2)
    assert cost(SIZE, replace(base, beams=40), found)["beams"] == pytest.approx(2 * parts["beams"])
    full = replace(base, full=True)
    parts, mixed = cost(SIZE, full, found), cost(SIZE, replace(full, mixed=2), found)
    assert [round(mixed[part] / parts[part], 6) for part in ("prompt", "beams", "steps", "head")] == [1, 2, 1, 2]
    second = cost(SIZE, replace(base, thoughts=2), found)
    assert second["steps"] / parts["steps"] == pytest.approx(5 / 4)
    assert second["thought"] == pytest.approx(2 * parts["thought"] + SIZE.beam_flops(128) / PROMPT)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_a_size_counts_the_matrices_of_a_real_model(family):
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config)
    layers = getattr(model.model, "layers", None) if hasattr(model, "model") else model.transformer.h
    wanted = sum(p.numel() for p in layers.parameters() if p.dim() > 1)
    assert Size.of_config(config.to_dict()).weights == wanted


@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_committed_results_are_enough(device, capsys):
    flags = ["--hidden", "512", "--layers", "8", "--vocabulary", "10000", "--device", device, "--json"]
    assert (
        main(["plan", *flags, "--users", "1e8", "--items", "1e6", "--price_per_hour", "2", "--per_machine", "4"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["device_hours_a_day"] == pytest.approx(found["seconds_a_user"] * 1e8 / 3600)
    assert found["price_a_day"] == pytest.approx(found["device_hours_a_day"] / 4 * 2)
    assert found["machines"] == -(-found["machine_hours_a_day"] // 24)
    files = [word for line in found["measured"] for word in line.split() if word.endswith(".json")]
    assert files
    assert all((COMMITTED / file).is_file() for file in files)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "model: expected a folder, or hidden, layers and vocabulary, got neither whole"),
        (["--model", "absent"], "model: expected a folder with config.json, got 'absent'"),
        (["--users", "0"], "users: expected a whole number from 1 to 1e+12, got 0.0"),
        (["--users", "1.5"], "users: expected a whole number, got 1.5"),
        (["--users", "nan"], "users: expected a whole number from 1 to 1e+12, got nan"),
        (["--items", "1e13"], "items: expected a whole number from 1 to 1e+12, got 10000000000000.0"),
        (["--hidden", "0"], "hidden: expected a whole number from 1 to 65536, got 0"),
        (["--hours", "25"], "hours: expected more than 0 and at most 24, got 25.0"),
        (["--price_per_hour", "-1"], "price_per_hour: expected a number of at least 0, got -1.0"),
        (["--scoring", "auto"], "scoring: expected catalogue or full, got 'auto'"),
        (["--device", "tpu"], "device: expected one of h200, h100, cpu, got 'tpu'"),
        (["--device", "h100"], "device: expected one whose costs were measured (flr bench run), got 'h100'"),
        (["--results", "absent"], "results: expected a folder of results"),
    ],
)
def test_what_cannot_be_planned_is_refused(flags, message, capsys):
    size = [] if not flags or "--model" in flags else ["--hidden", "64", "--layers", "2", "--vocabulary", "100"]
    assert main(["plan", *size, *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_damaged_results_file_is_named(results):
    (results / "cpu-made-up/abc.json").write_text('{"device": "x"}')
    with pytest.raises(ValueError, match=r"abc\.json"):
        rates(results, "cpu")


def test_a_saved_model_is_as_large_as_its_backbone(tmp_path, capsys):
    """flr writes the backbone's configuration under a name of its own; its trained weights are what is counted."""
    folder = save(tmp_path / "model", num_factors=3)
    config = json.loads((folder / "config.json").read_text())
    assert Size.of_config(config) == Size.of_config(config["base_config"])
    assert main(["plan", "--model", str(folder), "--users", "100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["K"] == 3
    assert told["parameters"] == Size.of_config(config).parameters


@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        ({"num_factors": 3, "aggregation": "mixture"}, {"K": 3, "N": 1, "mixed": 3}),
        ({"num_factors": 3, "num_thoughts": 2}, {"K": 3, "N": 2, "mixed": 1}),
        ({"variant": "anchor"}, {"K": 0, "N": 1, "mixed": 1}),
        ({"variant": "none"}, {"K": 0, "N": 0, "mixed": 1}),
    ],
)
def test_a_saved_model_is_planned_as_it_thinks_and_scores(tmp_path, capsys, thought, expected):
    folder = save(tmp_path / "model", **thought)
    file = folder / "processor_config.json"
    saved = json.loads(file.read_text())

    def planned(**processor):
        file.write_text(json.dumps({**saved, **processor}))
        assert main(["plan", "--model", str(folder), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    told = planned(scoring="catalogue")
    assert {name: told[name] for name in expected} == expected
    assert bool(told["parts"]["thought"]) == bool(expected["K"])
    assert told["parts"]["head"] == 0
    assert planned(scoring="full")["parts"]["head"] > 0
    views = "the model's views"
    assert not any(line.startswith(views) for line in told["extrapolated"])
    seen = planned(views={"weight": 0.3, "decay": 0.6, "neighbours": 0.0})
    assert any(line.startswith(views) for line in seen["extrapolated"])
