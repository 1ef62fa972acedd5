"""Python's garbage collector in a process of tests."""

import gc


def set_apart() -> None:
    """No later collection looks at what is there now: imports and collected tests, mostly.

    Every training ends with a collection, which takes longer than most tests' training where it looks at all of them.
    """
    gc.collect()
    gc.freeze()
