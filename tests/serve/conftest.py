"""What the tests of the server have in common."""

from __future__ import annotations

import pytest

from tests.helpers.models import build_recommender


@pytest.fixture(scope="module")
def recommender():
    """A recommender over semantic IDs."""
    return build_recommender("sid")


@pytest.fixture
def tokens(monkeypatch):
    """The server asks for tokens; the headers of a user and of an administrator."""
    from tests.helpers.serving import ADMIN, TOKEN  # skips where the server's packages are missing

    monkeypatch.setenv("FLR_SERVE_TOKEN", TOKEN)
    monkeypatch.setenv("FLR_SERVE_ADMIN_TOKEN", ADMIN)
    return {"authorization": f"Bearer {TOKEN}"}, {"authorization": f"Bearer {ADMIN}"}
