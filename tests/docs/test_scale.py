"""The generated tables of docs/scale.md, docs/serving.md and docs/engines.md are those of their results."""

from __future__ import annotations

import pytest

from flr.files import read_json
from scripts import plan_tables, scale_memory
from scripts.families import exports


def test_the_tables_of_costs_are_those_of_flr_plan():
    assert plan_tables.tables() in plan_tables.PAGE.read_text(), "stale: run python -m scripts.plan_tables"


def test_the_table_of_memory_is_that_of_the_result():
    report = read_json(scale_memory.RESULT, 1 << 20)
    assert scale_memory.table(report) in scale_memory.PAGE.read_text(), "stale: python -m scripts.scale_memory --table"
    assert list(report["sizes"]) == [str(size) for size in scale_memory.SIZES]


def test_what_processes_share_is_one_copy():
    """The trie and item-kNN lie in their files: of two processes each is charged half."""
    for size, rows in read_json(scale_memory.RESULT, 1 << 20)["sizes"].items():
        for name, file in (("trie: open", scale_memory.TRIE), ("item-kNN: open", scale_memory.KNN)):
            row = rows.get(name)
            if row is None:
                assert size != "1000000", name
                continue
            assert row["processes"] == 2
            assert row["own"] < 0.35 * rows["files"][file], (size, name)
            assert row["Pss"] < 0.75 * row["Rss"], (size, name)


def test_every_piece_of_work_that_is_measured_runs_in_small(tmp_path):
    for name, (work, _) in scale_memory.WORK.items():
        if name == "ids and titles: open for a server":
            pytest.importorskip("uvicorn")
        work(tmp_path, 13_000)()
    assert {file.name for file in tmp_path.iterdir()} == {scale_memory.TRIE, scale_memory.KNN, scale_memory.CATALOGUE}


@pytest.mark.slow
def test_two_processes_have_one_copy_of_a_trie(tmp_path):
    """What the kernel says, of 200,000 items: the table's measurement, run."""
    scale_memory.save_trie(tmp_path, 200_000)()
    row = scale_memory.measured("trie: open", tmp_path, 200_000)
    assert row["processes"] == 2
    assert row["Rss"] > (tmp_path / scale_memory.TRIE).stat().st_size
    assert row["Pss"] < 0.75 * row["Rss"]


def test_the_tables_of_replicas_are_those_of_the_result():
    pytest.importorskip("uvicorn")
    from scripts import serve_replicas

    report = read_json(serve_replicas.RESULT, 1 << 20)
    text = serve_replicas.PAGE.read_text()
    assert serve_replicas.table(report) in text, "stale: python -m scripts.serve_replicas --table"


def test_the_simulated_router_follows_the_load():
    pytest.importorskip("uvicorn")
    from scripts.serve_replicas import simulate

    service = {"1": [0.1], "32": [1.0]}
    light, heavy = (simulate(4, load, service, 0.0) for load in (0.05, 0.95))
    assert light["p50_s"] < 0.2
    assert heavy["p50_s"] > 2 * light["p50_s"]
    assert heavy["per_s"] == pytest.approx(0.95 * 4 * 32)
    assert simulate(4, 0.05, service, 0.5)["p50_s"] == pytest.approx(light["p50_s"] + 0.5)


def test_the_families_that_are_exported_are_those_of_the_result():
    found = read_json(exports.RESULT, 1 << 20)["families"]
    assert exports.block(found) in exports.PAGE.read_text(), "stale: python -m scripts.families.exports --page"
    assert not [family for family, row in found.items() if row["outcome"] == "FAULT"]
