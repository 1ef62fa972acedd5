"""Times as text: numbers, ISO 8601, and ``Wed Jul 02 12:10:24 -0700 2014``; bounds on the times of a log."""

from __future__ import annotations

import datetime
import math
import numbers
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .events import LATEST, UNITS, InteractionLog
from .report import ReadReport

Bound = str | float | datetime.date | np.datetime64
_EXACT = 2.0**53  # a float is a whole number exactly up to here
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
_INTEGER = "^-?[0-9]{1,19}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_ASCTIME = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) (\d{2}) (\d{2}:\d{2}:\d{2}) ([+-]\d{2})(\d{2}) (\d{4})", re.ASCII)


@lru_cache(maxsize=1 << 16)
def moment(text: str) -> int | None:
    """Microseconds since 1970 of a date or a time, which is UTC where it has no zone; None for anything else.

    >>> moment("1970-01-02"), moment("1970-01-01 01:00:00+01:00"), moment("Thu Jan 01 00:00:01 +0000 1970")
    (86400000000, 0, 1000000)
    """
    asctime = _ASCTIME.fullmatch(text)
    if asctime:
        month, day, clock, hours, minutes, year = asctime.groups()
        if month not in _MONTHS:
            return None
        text = f"{year}-{_MONTHS.index(month) + 1:02}-{day} {clock}{hours}:{minutes}"
    try:
        value = datetime.datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith("Z") else text)
        value = value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)
        return (value - _EPOCH) // datetime.timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None


class Clock:
    """Reads a column of times, block by block; its first time decides whether they are numbers or dates.

    Args:
        per_second: how many units of a number are a second, None where that is not known. Where it is known, times lie
            between 1970 and 2100.
    """

    def __init__(self, per_second: int | None = None) -> None:
        self._per_second = per_second
        self._dates: bool | None = None

    @property
    def per_second(self) -> int | None:
        """Units of a second, None where they are not known."""
        return 10**6 if self._dates else self._per_second

    @property
    def expected(self) -> str:
        """What a time is expected to be, in words."""
        if self._dates is None:
            return "a number or a date"
        return "a date" if self._dates else "a number" if self._per_second is None else "a time before 2100"

    def read(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Times int64 or float64 [n] of ``texts``, and which are none, bool [n] (their value says nothing)."""
        texts = pc.if_else(pc.equal(texts, ""), None, texts)
        if self._dates is None:
            self._dates = _are_dates(texts)
        values = _dates(texts) if self._dates else _numbers(texts)
        bad = pc.is_null(values).to_numpy(zero_copy_only=False)
        filled = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
        if not self._dates and self._per_second is not None:
            bad = bad | ~((filled >= 0) & (filled < LATEST * self._per_second))
        return np.where(bad, filled.dtype.type(0), filled), bad


def _are_dates(texts: pa.Array) -> bool | None:
    for text in texts.drop_null().to_pylist():
        if re.fullmatch(_NUMBER.strip("^$"), text):
            return False
        if moment(text) is not None:
            return True
    return None


def _numbers(texts: pa.Array) -> pa.Array:
    """int64 where all are whole, else float64; null for what is no number, or one that the type does not hold.

    Of fractions beside whole numbers of 2^53 and more the fewer are null: no type holds both.
    """
    whole = pc.match_substring_regex(texts, _INTEGER)
    if pc.all(whole).as_py() is not False:
        with suppress(pa.ArrowInvalid):  # 2^63 and more
            return texts.cast(pa.int64())
    texts = pc.if_else(pc.match_substring_regex(texts, _NUMBER), texts, None)
    floats = texts.cast(pa.float64())
    size = pc.abs(floats)
    whole = pc.and_(whole, pc.less(size, 2.0**63))
    floats = pc.if_else(pc.less(size, _EXACT), floats, None)
    fractions = pc.fill_null(pc.not_equal(floats, pc.floor(floats)), False)
    huge = pc.and_(whole, pc.greater_equal(size, _EXACT))
    if (pc.sum(fractions).as_py() or 0) > (pc.sum(huge).as_py() or 0):
        return floats
    integers = pc.if_else(whole, texts, None).cast(pa.int64())
    return pc.coalesce(integers, pc.if_else(fractions, None, floats).cast(pa.int64()))


def _dates(texts: pa.Array) -> pa.Array:
    """Microseconds since 1970, int64; null for what is no date."""
    try:
        return texts.cast(pa.timestamp("us")).cast(pa.int64())
    except pa.ArrowInvalid:  # zones, other forms, or no dates
        listed = texts.to_pylist()
        return pa.array([None if text is None else moment(text) for text in listed], pa.int64())


def check_bounds(since: Bound | None, until: Bound | None) -> None:
    """ValueError for a bound that is neither a date nor a number."""
    for name, value in (("since", since), ("until", until)):
        if value is not None:
            _parsed(name, value)


def seconds_of(name: str, value: Bound) -> float:
    """Seconds since 1970 of an ISO date or a number of them; ValueError for anything else.

    >>> seconds_of("since", "2001-09-09"), seconds_of("since", "1000000000")
    (999993600.0, 1000000000.0)
    """
    number, is_date = _parsed(name, value)
    if not is_date:
        _check_number(name, value)
    return number


def within(log: InteractionLog, since: Bound | None, until: Bound | None, report: ReadReport) -> InteractionLog:
    """The events of since <= time < until; ``report`` notes how many others there are, and a unit that was guessed.

    Args:
        log: the events.
        since, until: ISO dates, as text or objects (UTC where they have no zone); numbers are seconds since 1970, or in
            the log's own unit where that is neither known nor shown by the size of the times. None for no bound.
        report: gets the note.

    Raises:
        ValueError: a log without times; a bound that is neither; a date for times whose unit does not show; a number
            of seconds past 2100.

    Example:
        >>> log = InteractionLog(["a"], ["x"], np.zeros(2, int), np.zeros(2, int), np.array([10**9, 10**9 + 86400]))
        >>> len(within(log, "2001-09-09T12:00", None, ReadReport()))
        1
    """
    if since is None and until is None:
        return log
    if log.times is None:
        name, value = ("since", since) if since is not None else ("until", until)
        raise ValueError(f"{name}: expected none for a log without times ({report.source}), got {value!r}")
    keep = np.ones(len(log), bool)
    if since is not None:
        keep &= log.times >= _bound(log, "since", since)
    if until is not None:
        keep &= log.times < _bound(log, "until", until)
    outside = f"{int((~keep).sum())} events outside since={since!r}, until={until!r}"
    report.notes.append(outside + _taken(log))
    return log.select(keep)


def _parsed(name: str, value: Bound) -> tuple[float, bool]:
    """Seconds of a date and True, or a number and False."""
    text: Any = value
    if isinstance(value, datetime.date):  # a datetime is one too
        text = value.isoformat()
    elif isinstance(value, np.datetime64):
        text = str(value.astype("datetime64[us]"))
    if isinstance(text, str) and not re.fullmatch(_NUMBER.strip("^$"), text):
        micros = moment(text)
        if micros is not None:
            return micros / 10**6, True
    elif isinstance(text, (str, numbers.Real)) and not isinstance(text, bool) and math.isfinite(number := _float(text)):
        return number, False
    raise ValueError(f"{name}: expected an ISO date or seconds since 1970, got {value!r:.80}")


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def _check_number(name: str, value: Bound) -> None:
    if isinstance(value, str) and len(value) <= 8:  # 2015, 20150101
        raise ValueError(f"{name}: expected an ISO date (2015-01-01) or seconds since 1970, got {value!r}")


def _bound(log: InteractionLog, name: str, value: Bound) -> float:
    """A bound in the unit of the log's times."""
    number, is_date = _parsed(name, value)
    unit = log.unit
    if unit is None and is_date:
        assert log.times is not None
        wanted = f"{name}: expected times in s, ms, µs or ns since 1970 for a date"
        got = f"got times from {log.times.min():g} to {log.times.max():g}"
        raise ValueError(f"{wanted}, {got}; give a number of their unit")
    if unit is not None and not is_date:
        _check_number(name, value)
        if number >= LATEST:  # one in the log's own unit would leave out all events or none
            wanted = f"seconds since 1970 for times in {UNITS[unit]}"
            raise ValueError(f"{name}: expected {wanted}, got {value!r}, which lies past 2100")
    return number * (unit or 1)


def _taken(log: InteractionLog) -> str:
    """Which unit of the times was taken, where it was not known beforehand."""
    if log.per_second is not None:
        return ""
    unit = log.unit
    return " (numbers in the log's own unit)" if unit is None else f" (times in {UNITS[unit]}, by their size)"
