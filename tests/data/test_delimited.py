"""Tables of text: the quick way and the careful way give the same rows."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flr.data import delimited, sources
from flr.data.delimited import Dialect, read_rows, sniff
from flr.data.sources import SourceFile


def rows_of(path, dialect=None, wanted=("a", "c")):
    file = SourceFile(path)
    found, malformed = [], []
    for lines, columns, bad in read_rows(file, dialect or sniff(file), wanted):
        found += zip(lines.tolist(), *(column.to_pylist() for column in columns), strict=True)
        malformed += bad
    return found, malformed


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("delimiter", delimited.DELIMITERS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_delimiters_ends_and_marks(tmp_path, delimiter, end, mark):
    lines = [delimiter.join(row) for row in (["a", "b", "c"], ["1", "2", "é"], ["4", "", "6"])]
    file = write(tmp_path / "log.csv", mark + end.join(lines))
    assert sniff(SourceFile(file)).delimiter == delimiter
    assert rows_of(file) == ([(2, "1", "é"), (3, "4", "6")], [])


CELLS = st.text(st.sampled_from('ab ,:"é\r\n'), max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(CELLS, min_size=2, max_size=4), max_size=8), st.integers(4, 40))
def test_what_csv_writes_is_read(tmp_path_factory, rows, block):
    """What the csv module writes is read as it was, in blocks of any size; rows of other lengths are malformed."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([["a", "b", "c"], *rows])
    file = write(tmp_path_factory.mktemp("csv") / "log.csv", text.getvalue())
    old = sources.MAX_LINE
    sources.MAX_LINE = max(block, 60)
    try:
        found, malformed = rows_of(file)
    finally:
        sources.MAX_LINE = old
    assert [row[1:] for row in found] == [(row[0], row[2]) for row in rows if len(row) == 3]
    assert len(malformed) == sum(len(row) != 3 for row in rows)


PLAIN = st.text(st.sampled_from("ab,é \r"), max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(PLAIN, max_size=8), st.sampled_from([",", "::"]))
def test_quick_and_careful_reading_agree(lines, delimiter):
    block = "\n".join(lines).replace(",", delimiter).encode()
    dialect = Dialect(delimiter, ("a", "b", "c"), quoted=False, header=False)
    quick = delimited._quick(5, block, dialect, [0, 2]) if block else None
    slow = delimited._slow(5, block, dialect, [0, 2])
    if quick is not None:
        assert not slow.malformed
        assert np.array_equal(quick.lines, slow.lines)
        assert [column.to_pylist() for column in quick.columns] == [column.to_pylist() for column in slow.columns]


def test_the_quick_way_is_taken_where_it_can_be():
    dialect = Dialect("::", ("a", "b"), quoted=False, header=False)
    assert delimited._quick(1, b"1::2\r\n3::4\r\n", dialect, [1]).columns[0].to_pylist() == ["2", "4"]
    for block in (b"1::2\n\n3::4", b"1::2::3\n", b"2::\xff\n", b"1:::2\n", b"1\r::2\n"):
        assert delimited._quick(1, block, dialect, [1]) is None


def test_malformed_rows_have_lines(tmp_path):
    text = 'a,b,c\n\n1,2,3\n4,5\n"6, six",7,"8 ""8"""\n9,"lost quote,1\n2,3,4\n'
    found, malformed = rows_of(write(tmp_path / "log.csv", text))
    assert found == [(3, "1", "3"), (5, "6, six", '8 "8"')]
    assert [(bad.line, bad.rows) for bad in malformed] == [(4, 1), (6, 2)]
    assert malformed[0].reason == "expected 3 cells, got 2 cells"
    with pytest.raises(ValueError, match=r"log.csv: expected one column 'd', got \['a', 'b', 'c'\]"):
        rows_of(tmp_path / "log.csv", wanted=["d"])
    with pytest.raises(ValueError, match="expected a header, got an empty file"):
        rows_of(write(tmp_path / "empty.csv", "\n\n"))


def test_long_lines_and_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 16)
    for long in ("x" * 200, "x,y,z" + "x" * 12, '"' + "x" * 100):
        file = write(tmp_path / "log.csv", f"a,b,c\n1,2,3\n{long}\n4,5,6\n7,8,9")
        found, malformed = rows_of(file)
        assert found[0] == (2, "1", "3")
        if '"' not in long:
            assert [row[1:] for row in found if not row[1].startswith("x")] == [("1", "3"), ("4", "6"), ("7", "9")]
        assert sum(bad.rows for bad in malformed) + len(found) == 4


def test_encodings(tmp_path):
    file = write(tmp_path / "u.item", "1|Amélie|x\n".encode("latin-1") + "2|Ünder|y\n".encode("latin-1"))
    latin = Dialect("|", ("a", "b", "c"), quoted=False, header=False, latin=True)
    assert [row[1:] for row in rows_of(file, latin, ["a", "b"])[0]] == [("1", "Amélie"), ("2", "Ünder")]
    utf8 = Dialect("|", ("a", "b", "c"), quoted=False, header=False)
    assert rows_of(file, utf8, ["b"])[0][0] == (1, "Am\ufffdlie")
    write(file, "1|Amélie|x\n")
    assert rows_of(file, latin, ["b"])[0] == [(1, "Amélie")]
