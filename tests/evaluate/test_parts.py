"""Parts of an evaluation: what is read again is what would be ranked again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flr.evaluate.parts import Ranked, in_parts, remove_parts
from flr.evaluate.ranks import Share


class _Ended(Exception):
    """A process that ends before the others' results come, with its own."""


class _Alone(Share):
    def gathered(self, own: Any) -> list[Any]:
        raise _Ended(own)


def _by_row(rows: np.ndarray) -> Ranked:
    return Ranked(rows, rows, rows[:, None], rows[:, None].astype(np.float32))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_of_another_batch_size_is_not_read_as_this_one(rank, tmp_path):
    """Of two processes the first has batches 0, 2, 4, …: other rows, though as many from the same place on."""
    order, share, done = np.arange(4096), _Alone(rank, 2), []
    for batch_size in (64, 32, 32):
        with pytest.raises(_Ended) as ended:
            in_parts(_by_row, order, batch_size, tmp_path, done.append, share)
        found = np.concatenate([part.by_item for part in ended.value.args[0]])
        batches = np.split(order, range(batch_size, len(order), batch_size))
        assert found.tolist() == np.concatenate(batches[rank::2]).tolist()
    assert done[-2:] == [1024, 1024], "read again, since they are of the same rows"


def test_parts_alone_are_removed(tmp_path):
    for name in ("0123456789abcdef01234567", "mine"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / "parts" / name / "file").write_text("precious")
    remove_parts(tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["mine"]
    (tmp_path / "parts/mine/file").unlink()
    (tmp_path / "parts/mine").rmdir()
    remove_parts(tmp_path / "parts")
    remove_parts(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
