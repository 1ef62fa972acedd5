"""The tables of docs/kernels.md are those of the committed results, and these are of the variants that there are."""

import json
from collections import Counter

import pytest

from flr_kernels.backends import triton_config
from scripts import kernel_resources, kernel_variants


@pytest.mark.parametrize("script", [kernel_resources, kernel_variants])
def test_tables_are_those_of_the_results(script):
    text = script.PAGE.read_text()
    assert script.page(text) == text, f"stale: {script.__doc__}"


@pytest.mark.skipif(triton_config.interpreted(), reason="the interpreter compiles nothing")
def test_variants_of_the_results_are_those_of_today():
    pytest.importorskip("triton")
    from flr_kernels import inspect

    today = Counter(
        (inspect._name(launch.kernel), label, arch)
        for launch, label in inspect.variants().items()
        for arch in triton_config.ARCHES
        if inspect._chosen_on(arch, label)
    )
    for version, rows in json.loads(kernel_resources.RESULT.read_text()).items():
        assert Counter((kernel, label, arch) for kernel, label, arch, *_ in rows) == today, (
            f"stale for Triton {version}: {kernel_resources.__doc__}"
        )


def test_a_stack_is_named():
    row = dict.fromkeys(kernel_resources.FIELDS, 2048) | {"kernel": "a", "label": "b", "arch": 90, "stack": 8}
    said = kernel_resources.in_all("3.7.1", [row, {**row, "stack": 0}])
    assert "compiles 2, with at most 2048 registers and 2 KB; a stack is in 1 of them, a (b, sm_90: 8 bytes)." in said
    assert kernel_resources.in_all("3.7.1", [{**row, "stack": 0}]).endswith("none has a stack.")
