"""What the tests of decoding have in common."""

from __future__ import annotations

import pytest

from tests.helpers.models import toy_model


@pytest.fixture(scope="module")
def model():
    """A Llama that tells users apart."""
    return toy_model("llama")
