"""Generated parts of a page, which stand between ``<!-- room:name -->`` and ``<!-- /room -->``, and cells of them."""

import re


def filled(text: str, mark: str, made: str) -> str:
    """``text`` with what stands between the marks of ``mark`` ("room:name") replaced; ValueError where none are."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark.partition(':')[0]} -->"
    found, count = re.subn(f"({begin}).*?({end})", lambda match: f"{match[1]}\n{made}\n\n{match[2]}", text, flags=re.S)
    if not count:
        raise ValueError(f"text: expected {begin.strip()} and {end}, got neither")
    return found


def with_interval(mean: float, low: float, high: float, sign: str = "", digits: int = 4) -> str:
    """A mean and its interval in a cell; ``sign`` "+" of a difference."""
    mid, lower, upper = (f"{x:{sign}.{digits}f}" for x in (mean, low, high))
    return f"{mid} ({lower} to {upper})"
