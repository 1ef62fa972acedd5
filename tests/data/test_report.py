"""What a reader reports."""

import pytest

from flr.data import ReadReport


def test_report_counts_and_refuses():
    report = ReadReport("log", rows_read=1000)
    for line in range(8):
        report.add_bad("log.csv", line, "x" * 500)
    assert report.rows_bad == 8
    assert len(report.examples) == 5
    assert len(report.examples[0].reason) < 250
    report.check(0.01)
    with pytest.raises(ValueError, match=r"expected malformed rows up to max_bad_share 0\.001, got 8 of 1000"):
        report.check(0.001)
    with pytest.raises(ValueError, match=r"max_bad_share: expected 0\.\.1, got 2"):
        report.check(2)
    with pytest.raises(ValueError, match=r"max_bad_share: expected 0\.\.1, got '0.01'"):
        report.check("0.01")
    assert ReadReport.from_dict(report.to_dict()) == report
