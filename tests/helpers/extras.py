"""Packages as if they were not installed, and packages that do not go together."""

from __future__ import annotations

import sys

import pytest
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let imports of ``package`` fail, although it may have been imported before."""
    loaded = [name for name in sys.modules if name.startswith(f"{package}.")]
    for name in (package, *loaded):
        monkeypatch.setitem(sys.modules, name, None)


def needs_adapters_of_transformers() -> None:
    """Skip where transformers itself holds none with the PEFT that is installed: 5.24 wants 0.22, not out then."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))
