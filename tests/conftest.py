"""What holds for every test: no downloads, one seed, and long tests first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.helpers.garbage import set_apart

if TYPE_CHECKING:
    from tests.helpers.ray_cluster import TwoNodes

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[TwoNodes]:
    """One Ray cluster for all tests: starting it takes longer than most of them."""
    from tests.helpers.ray_cluster import two_nodes

    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def cluster(ray_nodes: TwoNodes) -> TwoNodes:
    """The cluster with both of its nodes."""
    ray_nodes.restore()
    return ray_nodes


@pytest.fixture
def inductor(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled programs of this run alone, in one folder: Inductor compiles its headers once for all tests."""
    from torch._inductor import config

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(base / "inductor"))
    # a test compiles what it is about, to scalar programs, which take three quarters of the time
    with config.patch({"fx_graph_cache": False, "cpp.simdlen": 1}):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those marked slow begin, so that no worker is waited for at the end; a real model is not loaded unasked.

    Those marked gpu are skipped where there are fewer devices than the mark says, or none.
    """
    if "reallm" not in config.getoption("-m"):
        real = [item for item in items if item.get_closest_marker("reallm")]
        items[:] = [item for item in items if item not in real]
        config.hook.pytest_deselected(items=real)
    devices = torch.cuda.device_count()
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark and devices < (needed := mark.args[0] if mark.args else 1):
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device{'s' * (needed > 1)}"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    set_apart()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, a worker gets neighbours, which share fixtures; one that has nothing left takes from another."""
    if config.getoption("dist") != "load":  # another distribution was asked for
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
