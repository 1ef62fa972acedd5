"""Every user's list once, that of the recommender; a run that was killed ends as if it had not been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flr.batch import BatchSettings, plan, write_lists
from flr.batch.run import exclusive_folder
from flr.batch.worker import Worker
from flr.cli import main
from flr.recommend import Recommender
from tests.batch.inputs import OPTIONS, SHARDS, USERS, histories, read_lists, save_model, write_histories
from tests.helpers.kills import in_child, kill_at

SETTINGS = BatchSettings(**OPTIONS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_histories(tmp_path_factory.mktemp("histories") / "in")


@pytest.fixture(scope="module")
def undisturbed(model, source, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out.parquet"
    seen = []
    done = write_lists(model, [source], str(output), SETTINGS, progress=seen.append)
    assert done.failed == []
    assert [at.now for at in seen] == sorted(at.now for at in seen)
    assert (len(seen), seen[-1].now, seen[-1].users, done.shards) == (SHARDS + 1, USERS, USERS, SHARDS)
    return output


def test_lists_are_those_of_the_recommender(model, undisturbed):
    recommender, rows = Recommender.from_pretrained(model), histories().to_pylist()
    found = read_lists(undisturbed)
    assert [row["user_id"] for row in found] == [row["user_id"] for row in rows]
    short = 0
    for asked, given in zip(rows, found, strict=True):
        where = None if asked["where.interest"] is None else {"interest": asked["where.interest"]}
        filters = {"allow": asked["allow"], "deny": asked["deny"] or (), "where": where}
        [expected] = recommender.recommend(
            [asked["history"]], k=6, num_beams=10, exclude_seen=bool(asked["exclude_seen"]), **filters
        )
        assert given["item_ids"] == [item.item_id for item in expected]
        np.testing.assert_allclose(given["scores"], [item.score for item in expected], atol=5e-5)
        assert given["unknown"] == 0
        short += len(expected) < 6
    assert 0 < short < USERS  # filters matter


def test_a_finished_run_is_whole_and_is_not_done_again(model, source, undisturbed):
    names = {path.name for path in undisturbed.iterdir()} - {".lock"}
    assert names == {"_manifest.json", "_SUCCESS", *(f"part-{i:06d}.parquet" for i in range(SHARDS))}
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("part-*")}
    done = write_lists(model, [source], str(undisturbed), SETTINGS)
    assert (done.progress.before, done.progress.now) == (USERS, 0)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("part-*")} == before


@pytest.mark.parametrize("number", [1, 3, 6, 8, 11, 18])
def test_killed_at_a_change_of_the_output_it_computes_the_rest(number, model, source, undisturbed, tmp_path):
    output = tmp_path / "out.parquet"

    def run():
        kill_at(number, tmp_path)
        write_lists(model, [source], str(output), SETTINGS)

    assert in_child(run) == -9
    there = {path: path.stat().st_mtime_ns for path in output.glob("part-*")} if output.exists() else {}
    assert not (output / "_SUCCESS").exists()
    done = write_lists(model, [source], str(output), SETTINGS)
    assert done.progress.before + done.progress.now == USERS
    for path, time in there.items():
        assert path.stat().st_mtime_ns == time, f"{path} was computed again"
    assert read_lists(output) == read_lists(undisturbed)
    assert not list(output.glob(".*.tmp"))


@pytest.mark.parametrize("how", ["cut", "other", "gone"])
def test_a_part_that_is_not_whole_is_computed_again(how, model, source, undisturbed, tmp_path):
    output = tmp_path / "out.parquet"
    shutil.copytree(undisturbed, output)
    part = output / "part-000003.parquet"
    if how == "cut":
        part.write_bytes(part.read_bytes()[:-9])
    elif how == "other":
        shutil.copy(output / "part-000002.parquet", part)
    else:
        part.unlink()
    done = write_lists(model, [source], str(output), SETTINGS)
    assert done.progress.now == 6  # the shard's users
    assert read_lists(output) == read_lists(undisturbed)


@pytest.mark.slow
def test_processes_give_the_same_and_one_that_dies_is_replaced(model, source, undisturbed, tmp_path):
    import multiprocessing
    import os
    import signal

    killed = []

    def kill_one(at):
        if at.now and not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    done = write_lists(model, [source], str(tmp_path / "out"), SETTINGS, workers=2, progress=kill_one)
    assert killed
    assert done.failed == []
    assert read_lists(tmp_path / "out") == read_lists(undisturbed)
    assert not multiprocessing.active_children()


def test_no_lists_are_made_of_a_model_that_has_taken_the_place_of_the_planned_one(model, source, tmp_path, monkeypatch):
    """A worker loads it after the plan has looked at it; one that takes the place of a dead one, long after."""
    place, other, look = tmp_path / "m", save_model(tmp_path / "other", num_factors=2), plan.look_at
    shutil.copytree(model, place)
    made = plan.Plan.make(str(place), [source], str(tmp_path / "out"), SETTINGS)

    def replace_and_look(*given):
        shutil.rmtree(place)
        shutil.copytree(other, place)
        return look(*given)

    monkeypatch.setattr(plan, "look_at", replace_and_look)
    for start in (
        lambda: write_lists(str(place), [source], str(tmp_path / "out"), SETTINGS),
        lambda: Worker(made, "cpu"),
    ):
        with pytest.raises(ValueError, match=r"model: expected the plan's, got another one in .*/m"):
            start()
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.slow
def test_processes_that_cannot_load_the_model_say_why(model, source, tmp_path):
    table = histories().rename_columns(["user_id", "history", "allow", "deny", "exclude_seen", "where.colour"])
    with pytest.raises(ValueError, match=r"where.colour': expected one of the catalogue's attributes \(interest"):
        write_lists(model, [write_histories(tmp_path / "in", table)], str(tmp_path / "out"), SETTINGS, workers=2)


def test_another_run_is_refused(model, source, undisturbed, tmp_path):
    def refused(message, model=model, source=source, **options):
        with pytest.raises(ValueError, match=message):
            write_lists(model, [source], str(undisturbed), BatchSettings(**{**OPTIONS, **options}))

    refused("with k 6, num_beams 10, got k 7, num_beams 11; choose another output", k=7, num_beams=11)
    refused("got other histories", source=write_histories(tmp_path / "in", histories(seed=1)))
    other = tmp_path / "model"
    shutil.copytree(model, other)
    (other / "README.md").write_text("a card is not read")
    assert not write_lists(str(other), [source], str(undisturbed), SETTINGS).progress.now
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    refused("got another model", model=str(other))
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)  # the same contents elsewhere
    assert not write_lists(model, [str(moved)], str(undisturbed), SETTINGS).progress.now
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("")
    with pytest.raises(ValueError, match=r"output: expected a free name .* got .*mine with \['work.txt'\]"):
        write_lists(model, [source], str(tmp_path / "mine"), SETTINGS)
    assert not (tmp_path / "mine" / ".lock").exists()
    with pytest.raises(ValueError, match="got the file"):
        write_lists(model, [source], str(tmp_path / "mine" / "work.txt"), SETTINGS)


@pytest.mark.parametrize(("inside", "refused"), [("lists", True), ("lists/deeper", True), ("_lists", False)])
def test_an_output_that_would_be_read_as_histories_is_refused(model, source, tmp_path, inside, refused):
    """Its own parts would be in the way of a run that is continued."""
    folder = shutil.copytree(source, tmp_path / "in")
    arguments = (model, [str(folder)], str(folder / inside), SETTINGS)
    if refused:
        with pytest.raises(ValueError, match="output: expected a place that is not read"):
            write_lists(*arguments)
        assert not (folder / "lists").exists()
    else:
        assert write_lists(*arguments).failed == write_lists(*arguments).failed == []


def test_two_runs_at_once_are_refused(model, source, undisturbed):
    def run():
        with pytest.raises(ValueError, match="output: expected a folder that no other run writes to"):
            write_lists(model, [source], str(undisturbed), SETTINGS)

    with exclusive_folder(undisturbed):
        assert in_child(run) == 0


def test_failed_shards_are_told_and_the_others_done(model, source, undisturbed, tmp_path, capsys):
    table = histories()
    names = table["history"].to_pylist()
    names[9], names[40] = ["item_3", "nothing"], None
    table = table.set_column(1, "history", pa.array(names, pa.list_(pa.string())))
    broken, output = write_histories(tmp_path / "in", table), tmp_path / "out.parquet"
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    arguments = ["batch", "--model", model, "--histories", broken, "--output", str(output), *options, "--device", "cpu"]
    assert main([*arguments, "--json"]) == 1
    told = capsys.readouterr()
    failed = json.loads(told.out)["failed"]
    assert [(shard["shard"], shard["first_row"], shard["rows"]) for shard in failed] == [(1, 8, 8), (5, 8, 8)]
    assert (
        failed[0]["reason"]
        == f"{broken}/a.parquet: row 9: history[1]: 'nothing' is no id and no title of the catalogue"
    )
    assert failed[1]["reason"] == f"{broken}/b.parquet: row 10: history: expected a list, got null"
    assert "Shard 1 failed (rows 8 to 15 of " in told.err
    assert "2 of 6 shards failed, 16 users" in told.err
    assert json.loads((output / "_failed.json").read_text()) == failed
    assert not (output / "_SUCCESS").exists()
    expected = [row for place, row in enumerate(read_lists(undisturbed)) if not (8 <= place < 16 or 38 <= place < 46)]
    assert read_lists(output) == expected


def test_the_command(model, source, undisturbed, tmp_path, capsys):
    output = str(tmp_path / "out.parquet")
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    arguments = ["batch", "--model", model, "--histories", source, *options, "--device", "cpu"]
    assert main([*arguments, "--output", output]) == 0
    told = capsys.readouterr()
    assert f"{output}: 46 of 46 users in " in told.out
    assert "users/s" in told.out
    assert read_lists(output) == read_lists(undisturbed)
    assert main([*arguments, "--output", output, "--exclude_seen", "true"]) == 1
    assert "with exclude_seen False, got exclude_seen True" in capsys.readouterr().err
    assert main(arguments) == 1
    assert "output: expected a folder for the lists, got none" in capsys.readouterr().err


def test_names_that_are_skipped_are_counted(model, tmp_path):
    table = pa.table({"user": ["u", "v"], "seen": [["item_1", "?", "!"], []], "deny": [["none"], ["item_2"]]})
    pq.write_table(table, tmp_path / "in.parquet")
    settings = BatchSettings(k=2, history="seen", on_unknown="skip")
    write_lists(model, [str(tmp_path / "in.parquet")], str(tmp_path / "out"), settings)
    assert [(row["user"], row["unknown"], len(row["item_ids"])) for row in read_lists(tmp_path / "out")] == [
        ("u", 3, 2),
        ("v", 0, 2),
    ]


def test_urls(model, source, undisturbed):
    memory = fsspec.filesystem("memory")
    memory.put(source, "/flr/in", recursive=True)
    try:
        write_lists(model, ["memory://flr/in/*.parquet"], "memory://flr/out", SETTINGS)
        parts = sorted(path for path in memory.find("/flr/out") if "part-" in path)
        rows = [row for path in parts for row in pq.read_table(memory.open(path)).to_pylist()]
        assert rows == read_lists(undisturbed)
        assert not [path for path in memory.find("/flr/out") if path.endswith(".tmp")]
        memory.rm(parts[2])
        assert write_lists(model, ["memory://flr/in"], "memory://flr/out", SETTINGS).progress.now == 8
    finally:
        memory.rm("/flr", recursive=True)


def test_threads_are_given_back(undisturbed, model, source, tmp_path):
    before = torch.get_num_threads()
    write_lists(model, [source], str(tmp_path / "out"), BatchSettings(**OPTIONS, threads=before + 1))
    assert torch.get_num_threads() == before
