"""Times as text, and bounds on the times of a log."""

import datetime

import numpy as np
import pyarrow as pa
import pytest

from flr.data.events import InteractionLog
from flr.data.report import ReadReport
from flr.data.times import Clock, check_bounds, within


def read(texts, per_second=None):
    clock = Clock(per_second)
    values, bad = clock.read(pa.array(texts, pa.string()))
    return [None if lost else value for value, lost in zip(values.tolist(), bad.tolist(), strict=True)], clock


@pytest.mark.parametrize(
    ("texts", "expected", "per_second"),
    [
        (["1500000000", "-3", None, ""], [1500000000, -3, None, None], None),
        (["1700000000000000000", "1700000000000000001"], [1700000000000000000, 1700000000000000001], None),
        (["1700000000000000001", "NA", "9" * 40, "1.5"], [1700000000000000001, None, None, None], None),
        (["1700000000000000001", "1.5", "2.5"], [None, 1.5, 2.5], None),
        (["1.5", "3e2", "+4", ".5", "9"], [1.5, 300.0, 4.0, 0.5, 9.0], None),
        (["5", "soon", "0x10", "1_000", "nan", "inf", "1e300", "9" * 40, "١٢"], [5.0, *[None] * 8], None),
        (["", "soon", "2018-01-04", "5"], [None, None, 1515024000000000, None], 10**6),
        (["2018-07-07 22:09:11", "2018-07-07T22:09:11.25"], [1531001351000000, 1531001351250000], 10**6),
        (["2018-07-07T22:09:11Z", "2018-07-08 00:09:11+02:00"], [1531001351000000] * 2, 10**6),
        (["Wed Jul 02 12:10:24 -0700 2014", "Wed Jul 99 12:10:24 -0700 2014"], [1404328224000000, None], 10**6),
        (["Wed Xyz 02 12:10:24 -0700 2014", "2014-13-01"], [None, None], None),
        ([None, ""], [None, None], None),
    ],
)
def test_clock(texts, expected, per_second):
    values, clock = read(texts)
    assert values == expected
    assert clock.per_second == per_second


def test_clock_of_a_known_unit():
    assert read(["0", "4102444799", "4102444800", "-1"], 1)[0] == [0, 4102444799, None, None]
    assert read(["4102444799999", "4102444800000"], 1000)[0] == [4102444799999, None]
    clock = Clock(1)
    clock.read(pa.array(["5"]))
    assert clock.read(pa.array(["2018-01-04"]))[1].tolist() == [True]  # one form a column
    assert clock.expected == "a time before 2100"


def test_a_cell_that_is_no_number_leaves_large_numbers_as_they_are():
    values, clock = read(["1700000000000000001", "NA", "3.0"])
    assert values == [1700000000000000001, None, 3]
    assert clock.expected == "a number"


def log(times, per_second=None):
    zeros = np.zeros(len(times), np.int64)
    return InteractionLog(["a"], ["x"], zeros, zeros, np.array(times), per_second)


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_bounds_find_the_unit_of_times(unit):
    times = [unit * second for second in (1_400_000_000, 1_420_070_399, 1_420_070_400, 1_500_000_000)]
    report = ReadReport("log")
    kept = within(log(times), "2015-01-01", None, report)
    assert kept.times.tolist() == times[2:]
    name = {1: "s", 10**3: "ms", 10**6: "µs", 10**9: "ns"}[unit]
    assert report.notes == [f"2 events outside since='2015-01-01', until=None (times in {name}, by their size)"]
    assert within(log(times), None, "2015-01-01", report).times.tolist() == times[:2]
    assert within(log(times, unit), "1420070400", "2015-01-02T00:00:00+00:00", report).times.tolist() == [times[2]]
    assert within(log(times, unit), 1420070400.0, None, report).times.tolist() == times[2:]
    assert within(log(times), 1_420_070_399, "1420070400", report).times.tolist() == [times[1]]
    for day in (datetime.date(2015, 1, 1), datetime.datetime(2015, 1, 1), np.datetime64("2015-01-01T00:00:00.000")):
        assert within(log(times), day, None, report).times.tolist() == times[2:]
    if unit > 1:
        with pytest.raises(
            ValueError, match=rf"^until: expected seconds since 1970 for times in {name}, got {times[2]}"
        ):
            within(log(times), None, times[2], report)  # in the log's own unit it would leave nothing out


def test_a_number_is_in_the_unit_of_times_that_show_none():
    report = ReadReport("log")
    assert within(log([3, 17, 20]), 17, 20.0, report).times.tolist() == [17]
    assert report.notes == ["2 events outside since=17, until=20.0 (numbers in the log's own unit)"]


def test_bad_bounds():
    report = ReadReport("log.csv")
    for value in ("yesterday", "2015-13-01", True, float("nan"), "nan", [1], 10**400, np.datetime64("NaT")):
        with pytest.raises(ValueError, match="since: expected an ISO date or seconds since 1970, got"):
            check_bounds(value, None)
    with pytest.raises(
        ValueError, match=r"until: expected an ISO date \(2015-01-01\) or seconds since 1970, got '2015'"
    ):
        within(log([10**9], 1), None, "2015", report)
    with pytest.raises(ValueError, match=r"since: expected times in s, ms, .* got times from 3 to 17; give a number"):
        within(log([3, 17]), "2015-01-01", None, report)
    with pytest.raises(ValueError, match=r"until: expected none for a log without times \(log.csv\), got '2015-01-01'"):
        within(InteractionLog(["a"], ["x"], np.zeros(1, int), np.zeros(1, int), None), None, "2015-01-01", report)
