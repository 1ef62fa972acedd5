"""A short form of ``python -m tests.chaos.server``."""

import pytest

pytest.importorskip("uvicorn")
from tests.chaos import server


@pytest.mark.slow
def test_five_seconds():
    figures = server.run(5, slow=400)
    assert not figures["failures"], figures
    assert figures["statuses"][200] > 20, figures
    assert set(figures["generations"]) == {1, 2}, figures
    assert figures["slow_connections_opened"] >= 400
    assert figures["log_bytes"] < 1 << 20
