"""Plans of the Triton host code, on a driver without a device: short launches are Triton's own, and cost little."""

import logging
import sys
from functools import partial
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flr_kernels import factor_aggregate, factor_attention, log_normaliser, trie_advance, trie_collect, trie_step
from flr_kernels.backends import triton_config
from tests.helpers.no_device import NEEDS_NO_DEVICE
from tests.helpers.trie_levels import advance_call, advance_case, collect_call, collect_case
from tests.helpers.trie_steps import call, case

pytestmark = NEEDS_NO_DEVICE


@pytest.fixture
def device(monkeypatch):
    """Launches on CPU tensors are recorded by the driver that it returns; nothing has been compiled or planned."""
    from flr_kernels.backends import triton_plan
    from tests.helpers.triton_driver import recording

    monkeypatch.setattr(triton_config, "check_device", lambda _: None)
    monkeypatch.setenv("FLR_BACKEND", "triton")
    monkeypatch.setattr(triton_plan._Shortcut, "compiled", {})
    monkeypatch.setattr(triton_plan._Shortcut, "_closed", False)
    triton_plan.forget()
    with recording() as driver:
        yield driver


def attention_inputs(batch, length, size=64, factors=4, dtype=torch.bfloat16):
    return torch.randn(batch, length, size, dtype=dtype), torch.randn(batch, factors, size, dtype=dtype)


def both_ways(h, u, mask=None):
    """A forward and a backward of factor_attention: the tensors of the first, and what the second has besides."""
    h, u = h.detach().requires_grad_(), u.detach().requires_grad_()
    out = factor_attention(h, u, mask)
    gradients = [torch.ones_like(x) for x in out]
    return [h, u, *([] if mask is None else [mask]), *out], [*gradients, *torch.autograd.grad(out, (h, u), gradients)]


def calls():
    """Functions without arguments that call an op, and return as :func:`both_ways` does, by name."""
    h, u = attention_inputs(2, 100)
    mask = torch.ones(2, 103, dtype=torch.bool)
    wide = torch.randn(2, 100, 131, dtype=torch.bfloat16)
    f, logits = torch.randn(3, 4, 64), torch.randn(3, 4)
    vocabulary = torch.randn(3, 50257, dtype=torch.bfloat16)
    return {
        "whole": partial(both_ways, h[:, :9], u, mask[:, :9]),
        "split": partial(both_ways, h, u, mask[:, :100]),
        "no mask": partial(both_ways, h, u),
        "one token": partial(both_ways, h[:, :1], u),
        "a history that begins anywhere": partial(both_ways, wide[..., 3:67], u),
        "a mask that begins anywhere": partial(both_ways, h, u, mask[:, 3:]),
        "float32": partial(both_ways, *attention_inputs(2, 40, dtype=torch.float32)),
        "aggregate": lambda: ([f, logits, *factor_aggregate(f, logits)], []),
        "normaliser": lambda: ([vocabulary], [log_normaliser(vocabulary)]),
        "unaligned normaliser": lambda: ([vocabulary[:, 1:]], [log_normaliser(vocabulary[:, 1:])]),
    }


def named(launches, of_forward, of_backward):
    """The launches with addresses replaced by what lies there; working memory by distances in its block."""
    backward = next((index for index, x in enumerate(launches) if x.kernel.startswith("delta")), len(launches))
    found = []
    for block, tensors in ((launches[:backward], of_forward), (launches[backward:], of_forward + of_backward)):
        known = {x.data_ptr(): f"tensor {index}" for index, x in enumerate(tensors)}
        others = {a for x in block for a in x.arguments if isinstance(a, int) and a >= 1 << 32} - set(known)
        names = known | {a: f"working {a - min(others)}" for a in others}
        found += [(x.kernel, x.programs, [names.get(a, a) for a in x.arguments]) for x in block]
    return found


@pytest.mark.parametrize("name", calls())
def test_short_launches_are_those_of_triton(device, name, monkeypatch):
    from flr_kernels.backends import triton_plan

    run = calls()[name]
    runs = []
    for attempt in ("by triton", "compiled", "short"):
        monkeypatch.setattr(triton_plan._Shortcut, "_closed", attempt == "by triton")
        device.launches.clear()
        tensors = run()
        runs.append(named(device.launches, *tensors))
        assert runs[0]
    assert runs[1] == runs[0]
    assert runs[2] == runs[0]
    assert not triton_plan._Shortcut._closed


def test_what_triton_compiles_apart_is_kept_apart(device, monkeypatch):
    from flr_kernels.backends import triton_plan

    u = torch.randn(2, 4, 64, dtype=torch.bfloat16)
    wide = [torch.randn(2, 100, columns, dtype=torch.bfloat16) for columns in (80, 84)]
    mask = torch.ones(2, 117, dtype=torch.bool)
    calls = [
        (history[:, :length, at : at + 64], u, mask[:, first : first + length])
        for history, at, length, first in product(wide, (0, 8, 1), (100, 1), (0, 1))
    ]
    kernels = []
    for own in (True, False, False):
        monkeypatch.setattr(triton_plan._Shortcut, "_closed", own)
        device.launches.clear()
        for given in calls:
            factor_attention(*given)
        kernels.append([x.kernel for x in device.launches])
    assert len(set(kernels[0])) >= 4
    assert kernels[1] == kernels[0]
    assert kernels[2] == kernels[0]


def forbid_binder(monkeypatch):
    import triton

    def run(*_, **__):
        raise AssertionError("a launch through Triton's binder")

    monkeypatch.setattr(triton.JITFunction, "run", run)


def test_what_ran_once_needs_no_binder_again(device, monkeypatch):
    h, u = attention_inputs(2, 100)
    both_ways(h, u)
    forbid_binder(monkeypatch)
    both_ways(h, u)
    both_ways(*attention_inputs(3, 90))  # other sizes of the same specialisations
    with pytest.raises(AssertionError, match="binder"):
        both_ways(*attention_inputs(3, 90, size=72))


def test_trie_steps_need_no_binder_again(device, monkeypatch):
    given = call(case(3, 2, 20, 3, 1, 5, "prefix"), num_unfinished=3, num_all=4)
    trie_step(**given)
    launches = len(device.launches)
    forbid_binder(monkeypatch)
    trie_step(**given)
    assert len(device.launches) == 2 * launches


@pytest.mark.parametrize(
    ("widths", "items", "spread", "rounds"),
    [((3, 4), 20, 5, 0), ((0, 4), 20, 5, 0), ((3, 0), 20, 5, 0), ((0, 0), 20, 5, 0), ((100, 3), 2000, 5000, 1)],
)
def test_both_selections_of_a_trie_step_are_one_launch_a_stage(device, widths, items, spread, rounds):
    """Candidates, rounds of reduction where a user has more than 512 keys, and the choice, whatever is selected."""
    given = case(3, 2, items, 3, 0, spread, "prefix")
    given = call(given, num_unfinished=widths[0], num_all=widths[1], norm=given["logits"].logsumexp(-1))
    assert given["widest"] > 1024 or not rounds  # 256 of 512 stay
    trie_step(**given)
    names = [x.kernel.split()[0] for x in device.launches]
    assert names == ["candidates_kernel", *["reduce_kernel"] * rounds, "finish_kernel"]
    assert device.launches[-1].programs == 2 * max(1, sum(width > 0 for width in widths))


@pytest.mark.parametrize("ways", [False, True])
def test_what_lies_between_two_steps_is_a_launch_on_either_side(device, ways, monkeypatch):
    advanced = advance_call(advance_case(3, 2, 20, 3, 1, 5, "prefix", ways=ways))
    with monkeypatch.context() as patch:
        patch.setenv("FLR_BACKEND", "reference")
        collected = collect_call(collect_case(3, 2, 20, 3, 1, 5, "prefix", unique=ways))
    for _ in range(2):
        device.launches.clear()
        trie_advance(**advanced)
        trie_collect(**collected)
        assert [x.kernel.split()[0] for x in device.launches] == ["advance_kernel", "collect_kernel"]
        forbid_binder(monkeypatch)


def test_a_failure_leads_to_tritons_own_way_and_is_logged_once(device, monkeypatch, caplog):
    from flr_kernels.backends import triton_plan

    h, u = attention_inputs(2, 100)
    factor_attention(h, u)
    wanted = [x.kernel for x in device.launches]

    def broken(*_):
        raise TypeError("other arguments")

    compiled = triton_plan._Shortcut.compiled
    monkeypatch.setattr(
        triton_plan._Shortcut, "compiled", {key: (broken, *rest) for key, (_, *rest) in compiled.items()}
    )
    with caplog.at_level(logging.WARNING, "flr_kernels"):
        for _ in range(2):
            device.launches.clear()
            factor_attention(h, u)
            assert [x.kernel for x in device.launches] == wanted
    assert [r.message.startswith("triton") and "other arguments" in r.message for r in caplog.records] == [True]


def test_profilers_hear_of_every_launch(device, monkeypatch):
    from triton import knobs

    h, u = attention_inputs(2, 100)
    for _ in range(2):
        factor_attention(h, u)
    heard = []
    hook = knobs.runtime.launch_enter_hook
    if hook is None:  # Triton 3.4
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", heard.append)
    else:
        monkeypatch.setattr(hook, "calls", [heard.append])
    factor_attention(h, u)
    assert [x.data["name"] for x in heard] == ["forward_kernel", "combine_kernel"]


class Allocations(TorchDispatchMode):
    """Counts the operators that make tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "empty" in str(func)
        return func(*args, **kwargs or {})


def test_a_run_allocates_its_results_and_one_block(device):
    from flr_kernels.ops.factor_attention import triton_host

    h, u = attention_inputs(2, 100)
    whole = [x[:, :9] if x is h else x for x in (h, u)]
    for inputs, blocks in ((whole, 0), ((h, u), 1)):
        saved = triton_host.forward(*inputs, None)
        for run, results in (
            (partial(triton_host.forward, *inputs, None), 4 + blocks),
            (partial(triton_host.backward, *inputs, None, saved, saved, True), 2 + 1),
        ):
            run()
            with Allocations() as made:
                run()
            assert made.count == results


def python_calls(function):
    """Python functions that run during a call of ``function``, those of the driver without a device left out."""
    count = 0

    def profile(frame, event, _):
        nonlocal count
        count += event == "call" and not frame.f_code.co_filename.endswith("triton_driver.py")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("needs_grad", "most"), [(False, 50), (True, 55)])
def test_a_call_runs_few_python_functions(device, needs_grad, most):
    """A shared machine's clock measures its neighbours; 40 were left, and several hundred before there were plans."""
    h, u = attention_inputs(2, 100)
    mask = torch.ones(2, 100, dtype=torch.bool)
    h.requires_grad_(needs_grad)
    for _ in range(2):
        factor_attention(h, u, mask)
    assert len(device.launches) == 4
    assert 20 < python_calls(lambda: factor_attention(h, u, mask)) <= most
    assert len(device.launches) == 6
