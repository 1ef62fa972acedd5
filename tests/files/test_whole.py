"""Atomic files and folders, and what is read with checks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flr.data import RecProcessor, build_tokenizer, load_dataset
from flr.files import atomic_file, atomic_folder, read_json, read_parquet, whole, write_parquet
from tests.helpers.catalogues import small_dataset


def test_atomic_writes_leave_the_old_and_no_litter(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(context, write):
        with context as temporary:
            write(temporary)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(atomic_file(tmp_path / "file"), lambda file: file.write_text("half"))
    assert (tmp_path / "file").read_text() == "old"
    small_dataset().save(tmp_path / "set")
    with pytest.raises(RuntimeError):
        fail(atomic_folder(tmp_path / "set"), lambda folder: (folder / "items.parquet").write_text("half"))
    assert load_dataset(tmp_path / "set").name == "small"
    assert sorted(os.listdir(tmp_path)) == ["file", "set"]
    with pytest.raises(ValueError, match="got the file"), atomic_folder(tmp_path / "file"):
        pass


KILLED = """
import os, signal, sys
from flr.files import atomic_file, atomic_folder
from pathlib import Path
path, kind, moment = sys.argv[1:]
replace = os.replace
def dying(source, target):
    replace(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "aside":  # the old folder has been moved away, the new one has not come
    os.replace = dying
with (atomic_file if kind == "file" else atomic_folder)(path) as temporary:
    (temporary if kind == "file" else temporary / "new").write_text("half")
    if moment == "write":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(path, kind, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind, moment])
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, kind):
    path, other = tmp_path / "set", tmp_path / f".set.more.{'x' * 8}.tmp"
    other.write_text("of another path")
    killed(path, kind, "write")
    assert len(list(tmp_path.iterdir())) == 2
    with (atomic_file if kind == "file" else atomic_folder)(path) as temporary:
        (temporary if kind == "file" else temporary / "new").write_text("whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == [other.name, "set"]


def test_the_old_folder_comes_back_where_the_new_one_never_came(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    (path / "old").write_text("precious")
    killed(path, "folder", "aside")
    assert not path.exists()

    def fail():
        with atomic_folder(path):
            assert (path / "old").read_text() == "precious"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_an_old_folder_that_cannot_be_put_back_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "set"
    path.mkdir()
    (path / "old").write_text("precious")
    killed(path, "folder", "aside")

    def full(source, target):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"), atomic_folder(path):
        pass
    monkeypatch.undo()
    with atomic_folder(path) as temporary:
        assert (path / "old").read_text() == "precious"
        (temporary / "new").write_text("new")
    assert os.listdir(tmp_path) == ["set"]


def test_a_living_writer_keeps_its_files(tmp_path):
    path = tmp_path / "set"
    with atomic_folder(path) as first, atomic_file(tmp_path / "file") as one:
        (first / "one").write_text("1")
        with atomic_folder(path) as second, atomic_file(tmp_path / "file") as two:
            assert first.is_dir()
            assert one.exists()
            (second / "two").write_text("2")
            two.write_text("2")
        one.write_text("1")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "set"]
    assert [file.name for file in path.iterdir()] == ["one"]  # the last to finish


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_writer_removes_before_it_is_locked_is_made_again(tmp_path, monkeypatch, kind):
    name = "mkstemp" if kind == "file" else "mkdtemp"
    make, made = getattr(tempfile, name), []

    def overtaken(**kwargs):
        made.append(make(**kwargs))
        if len(made) == 1:
            whole._remove_abandoned(tmp_path / "set")
        return made[-1]

    monkeypatch.setattr(tempfile, name, overtaken)
    with (atomic_file if kind == "file" else atomic_folder)(tmp_path / "set") as temporary:
        (temporary if kind == "file" else temporary / "new").write_text("whole")
    assert len(made) == 2
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize(
    ("old", "at", "gone"),
    [(False, 1, False), (True, 1, False), (True, 2, False), (True, 1, True)],
    ids=["new", "before the old is moved", "after the old is moved", "while the other has moved it"],
)
def test_of_two_writers_that_end_at_once_the_folder_is_that_of_one(tmp_path, monkeypatch, old, at, gone):
    path = tmp_path / "set"
    if old:
        path.mkdir()
        (path / "old").write_text("old")
    replace, count = os.replace, 0

    def meanwhile():
        if gone:
            shutil.rmtree(path)
        else:
            with atomic_folder(path) as other:
                (other / "other").write_text("other")

    def overtaken(source, target):
        nonlocal count
        count += 1
        if count == at:
            monkeypatch.setattr(os, "replace", replace)
            meanwhile()
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    with atomic_folder(path) as temporary:
        (temporary / "mine").write_text("mine")
    assert [file.name for file in path.iterdir()] == ["mine"]
    assert os.listdir(tmp_path) == ["set"]


def test_a_killed_save_of_a_processor_leaves_nothing(tmp_path):
    left = tmp_path / f".tokenizer.{'a' * 8}.tmp"
    left.mkdir()
    (left / "tokenizer.json").write_text("half")
    catalogue = small_dataset().catalogue
    RecProcessor(build_tokenizer(catalogue, "id"), catalogue).save_pretrained(tmp_path)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("read", [read_json, lambda path: read_parquet(path, {})], ids=["json", "parquet"])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, got in (("pipe", "a pipe"), ("zero", "a pipe, a device"), (".", "a folder"), ("nothing", "none")):
        with pytest.raises(ValueError, match=f"path: expected a (JSON|Parquet) file at .*, got {got}"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' + b"9" * 100_000 + b"}", "expected JSON, got Exceeds the limit"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "expected JSON, got .*recursion"),
        (b'{"a": "\xff"}', "expected JSON, got .*utf-8"),
        ('{"a": 1}'.encode("utf-16"), "expected JSON, got .*utf-8"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "expected at most 900 bytes, got more"),
    ],
)
def test_json_is_bounded_and_named(tmp_path, content, message):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    limit = 900 if "900" in message else 1 << 28
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file, limit)
    assert str(file) in str(caught.value)


def test_parquet_is_checked(tmp_path, monkeypatch):
    file = tmp_path / "some.parquet"
    write_parquet(file, pa.table({"a": [1, 2, 3] * 1000, "b": list("xyz") * 1000}))
    whole = file.read_bytes()
    assert read_parquet(file, {"a": pa.types.is_integer}).num_rows == 3000
    metadata = pq.read_metadata(file).row_group(0)
    chunks = [metadata.column(i) for i in range(2)]
    for place in [chunk.dictionary_page_offset + chunk.total_compressed_size - 3 for chunk in chunks]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"some\.parquet: expected a Parquet file, got"):
            read_parquet(file, {})
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"a": bad}), file)
    with pytest.raises(ValueError, match=r"some\.parquet: expected a Parquet file, got .*UTF8"):
        read_parquet(file, {})
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), file)
    with pytest.raises(ValueError, match="expected one column 'a', got"):
        read_parquet(file, {"a": pa.types.is_integer})
    file.write_bytes(whole)
    monkeypatch.setattr("flr.files.whole._MAX_ROWS", 2999)
    with pytest.raises(ValueError, match=r"expected at most 2999 rows and .* got 3000 and"):
        read_parquet(file, {})
