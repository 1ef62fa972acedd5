"""Seals, moves that show no mixture, and the lock of a folder."""

import signal

import pytest

from flr.files import check_seal, exclusive_folder, move_files, seal_folder
from tests.helpers.kills import in_child, kill_at, killed_inside


def sealed(folder):
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_bytes(b"content")
    (folder / "deep" / "b").write_bytes(b"more")
    seal_folder(folder)
    return folder


def test_a_sealed_folder_is_as_it_was(tmp_path):
    assert sorted(check_seal(sealed(tmp_path / "set"))) == ["a", "deep/b"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a").write_bytes(b"kontent"), "a: expected the content that was saved"),
        (lambda f: (f / "deep" / "b").write_bytes(b"mor"), "b: expected 4 bytes, got 3"),
        (lambda f: (f / "a").unlink(), "a: expected a file, got none"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json, got none"),
        (lambda f: (f / "manifest.json").write_text('{"files": {'), "manifest.json: expected JSON"),
        (lambda f: (f / "manifest.json").write_text('{"files": 3}'), "manifest.json: expected an object of files"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"../x": {}}}'), "expected names inside the folder"),
    ],
)
def test_damage_of_a_sealed_folder_is_named(tmp_path, damage, message):
    damage(sealed(tmp_path / "set"))
    with pytest.raises(ValueError, match=message):
        check_seal(tmp_path / "set")


def test_files_move_so_that_a_kill_shows_no_mixture(tmp_path):
    """Killed before any operation: the marks and what they vouch for are all old, all new, or not all there."""
    statuses, outcomes, number = [], set(), 0
    while not statuses or statuses[-1] != 0:
        number += 1
        folder = tmp_path / str(number)
        for name, text in (("target", "old"), ("source", "new")):
            (folder / name).mkdir(parents=True)
            for file in ("config", "marker", "weights", f"{text}-vocabulary"):
                (folder / name / file).write_text(text)
        (folder / "target" / "notes").write_text("mine")

        def move(folder=folder, number=number):
            kill_at(number, folder)
            move_files(folder / "source", folder / "target", ("config", "marker"), ["*-vocabulary"])

        statuses.append(in_child(move))
        found = {path.name: path.read_text() for path in (folder / "target").iterdir()}
        assert found.pop("notes") == "mine"
        if {"config", "marker"} <= set(found):
            assert len(set(found.values())) == 1, found
            assert {n for n in found if n.endswith("vocabulary")} == {f"{found['weights']}-vocabulary"}
            outcomes.add(found["weights"])
    assert set(statuses[:-1]) == {-signal.SIGKILL}
    assert len(statuses) > 6
    assert outcomes == {"old", "new"}


def test_a_folder_has_one_process_inside(tmp_path):
    def hold(stay):
        with exclusive_folder(tmp_path):
            stay()

    def meanwhile(child):
        with pytest.raises(ValueError, match=f"no other run writes to, got .*, which process {child} on"):
            exclusive_folder(tmp_path).__enter__()

    assert killed_inside(hold, meanwhile) == -signal.SIGKILL
    with exclusive_folder(tmp_path):  # a dead process holds nothing
        with exclusive_folder(tmp_path):
            pass
        assert in_child(lambda: exclusive_folder(tmp_path).__enter__()) == 70  # the inner block did not unlock it
    assert in_child(lambda: exclusive_folder(tmp_path).__enter__()) == 0
