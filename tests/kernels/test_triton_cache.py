"""What ``scripts/triton_cache.py`` compiles without a device is what launches on one look up."""

import shutil
from functools import partial

import pytest
import torch

from scripts import triton_cache
from tests.helpers.no_device import NEEDS_NO_DEVICE

pytestmark = NEEDS_NO_DEVICE


def normalised(*sizes):
    """Calls of one kernel, whose vocabularies are multiples of 16 or not."""
    from flr_kernels import log_normaliser

    return lambda: (partial(log_normaliser, torch.zeros(2, size)) for size in sizes)


def both():
    from flr_kernels import factor_aggregate

    yield from normalised(320)()
    yield partial(factor_aggregate, torch.zeros(2, 4, 64), torch.zeros(2, 4))


def test_a_filled_folder_has_what_launches_look_up(tmp_path):
    folder = tmp_path / "filled"
    assert triton_cache.fill(folder, both, launchers=False) == 2
    assert triton_cache.missing(folder, both) == 0
    assert triton_cache.missing(folder, normalised(640, 96)) == 0  # other sizes of the same specialisation
    assert triton_cache.missing(folder, normalised(320, 321)) == 1
    assert triton_cache.missing(tmp_path / "empty", both) == 2
    kernel = next(folder.glob("*/*.cubin")).parent
    shutil.rmtree(kernel)
    assert triton_cache.missing(folder, both) == 1


def test_a_carried_folder_is_put_in_place(tmp_path):
    triton_cache.fill(tmp_path / "here", both, launchers=False)
    there = (tmp_path / "here").rename(tmp_path / "there")
    assert triton_cache.missing(there, both) == 2  # files are named by the place where they lay
    assert triton_cache.place(there) == 2
    assert triton_cache.missing(there, both) == 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_drivers_module_is_compiled_without_a_driver(tmp_path):
    from triton.backends.nvidia import driver

    triton_cache.fill(tmp_path, normalised(320))
    assert len(list(tmp_path.glob("*/cuda_utils*.so"))) == 1
    assert len(list(tmp_path.glob("*/__triton_launcher*.so"))) == hasattr(driver, "make_launcher")
    assert "instance" not in vars(driver.CudaUtils)


def test_the_covered_calls_are_those_of_the_inspection():
    kernels = {run.func.__module__.rsplit(".", 2)[-2] for run in triton_cache.calls()}
    search = {"trie_step", "trie_advance", "trie_collect"}
    assert kernels == {"factor_attention", "factor_aggregate", "log_normaliser", "token_logprob"} | search
