"""Files, folders and archives."""

import gzip
import io
import zipfile

import pytest

from flr.data import sources
from flr.data.sources import Source, SourceFile, line_blocks


def test_a_file_a_folder_and_an_archive(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three\n"))
    (tmp_path / "sub").mkdir()
    folder = Source(tmp_path)
    assert [file.name for file in folder.files] == ["a.txt", "b.txt.gz"]
    assert folder.find("*.csv", "b.*").beginning(10) == b"three\n"
    assert folder.find("*.txt*", without=["b*"]).name == "a.txt"
    assert folder.find("*.csv") is None
    with pytest.raises(ValueError, match=r"expected one file \*.txt\*, got \['a.txt', 'b.txt.gz'\]; name it"):
        folder.find("*.txt*")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert Source(tmp_path).find("a.txt*").name == "a.txt"  # the same file, packed too
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("__MACOSX/._a.txt", b"x")
        archive.write(tmp_path / "a.txt", "inner/a.txt")
        archive.write(tmp_path / "b.txt.gz", "inner/b.txt.gz")
    packed = Source(tmp_path / "all.zip")
    assert [file.name for file in packed.files] == ["a.txt", "b.txt.gz"]
    assert [list(line_blocks(file)) for file in packed.files] == [[(1, b"one\n"), (2, b"two")], [(1, b"three\n")]]
    alone = Source(tmp_path / "a.txt")
    assert (alone.is_file, alone.name, str(alone.files[0])) == (True, "a", str(tmp_path / "a.txt"))


def test_damaged_and_encrypted_archives(tmp_path):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ratings.dat", b"1::2::3::4\n" * 1000)
    content = bytearray(whole.getvalue())
    content[60:70] = bytes(10)
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.zip:ratings.dat: expected a whole zip file, got"):
        list(line_blocks(Source(tmp_path / "bad.zip").files[0]))
    locked = bytearray(whole.getvalue())
    place = locked.rindex(b"PK\x01\x02")
    locked[place + 8] |= 1  # the flag of an encrypted member
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(ValueError, match=r"locked.zip: expected an archive without a password, got an encrypted one"):
        Source(tmp_path / "locked.zip")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x\n" * 10000)[:-20])
    with pytest.raises(ValueError, match=r"cut.gz: expected a whole gzip file, got"):
        list(line_blocks(SourceFile(tmp_path / "cut.gz")))


def test_what_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    monkeypatch.setattr(sources, "MAX_LINE", 1 << 10)
    monkeypatch.setattr(sources, "_MAX_BYTES", 1 << 16)
    with pytest.raises(ValueError, match=r"bomb.gz: expected at most 65536 bytes unpacked, got more"):
        list(line_blocks(SourceFile(tmp_path / "bomb.gz")))


def test_blocks_are_whole_lines(tmp_path, monkeypatch):
    lines = [b"\xef\xbb\xbfab\n", b"c\n", b"\n", b"x" * 40 + b"\n", b"d\r\n", b"efg"]
    (tmp_path / "log").write_bytes(b"".join(lines))
    for size in range(1, 60):
        monkeypatch.setattr(sources, "MAX_LINE", max(size, 3))
        seen = list(line_blocks(SourceFile(tmp_path / "log")))
        number = 1
        for start, block in seen:
            assert start == number
            number += 1 if block is None else block.count(b"\n")
        short = b"".join(block or b"" for _, block in seen)
        assert short in (b"ab\nc\n\nd\r\nefg", b"ab\nc\n\n" + b"x" * 40 + b"\nd\r\nefg")
