"""The two ways to an operator, the registered one and the short one of plain calls, and when which is taken."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flr_kernels
from flr_kernels import dispatch
from tests.kernels.test_arguments import arguments

NAMES = ("factor_attention", "factor_aggregate", "log_normaliser", "token_logprob", "group_advantage", "trie_step")


def call(name, **changed):
    given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments(name).items()}
    generator = torch.Generator().manual_seed(0)
    for k, v in given.items():
        if isinstance(v, torch.Tensor) and v.dtype == torch.float32 and k != "score":
            given[k] = -torch.rand(v.shape, generator=generator)
    return given | changed


def leaves(x):
    return [x] if isinstance(x, torch.Tensor) else [leaf for part in x for leaf in leaves(part)]


@pytest.fixture
def ways(monkeypatch):
    """Names of the operators that ran the registered way, and a list whose one entry asks for that way."""
    taken, forced, patched = [], [False], set()
    watched, original = dispatch._watched, dispatch.Operator.__call__

    def call(self, *args):
        if self not in patched:
            patched.add(self)
            registered = self._registered

            def note(*args):
                taken.append(self.name)
                return registered(*args)

            for attribute in ("_registered", "_record"):
                if getattr(self, attribute) is registered:
                    monkeypatch.setattr(self, attribute, note)
        return original(self, *args)

    monkeypatch.setattr(dispatch.Operator, "__call__", call)
    monkeypatch.setattr(dispatch, "_watched", lambda: forced[0] or watched())
    return taken, forced


class Mode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_give_the_same_to_the_bit(name, ways):
    taken, forced = ways
    results = []
    for forced[0] in (False, True):
        taken.clear()
        given = call(name)
        wanted = [
            x.requires_grad_()
            for k, x in given.items()
            if isinstance(x, torch.Tensor) and k in ("h", "u", "f", "gate_logits", "hidden", "weight", "token_logprobs")
        ]
        if name == "token_logprob":  # its third way keeps logits; a graph of two operators is compared here
            out = leaves(flr_kernels.ops.token_logprob.op._forward(*given.values()))
        else:
            out = leaves(getattr(flr_kernels, name)(**given))
        differentiable = [x for x in out if x.requires_grad]
        assert bool(differentiable) == bool(wanted)
        gradients = []
        if wanted:
            total = sum(x.sum() for x in differentiable)
            gradients = torch.autograd.grad(total, wanted)
        assert bool(taken) == forced[0]
        results.append([*out, *gradients])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


class FunctionMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def test_the_registered_operator_runs_where_operators_are_watched(ways):
    taken, _ = ways
    given = call("factor_attention")

    def run(**changed):
        taken.clear()
        out = flr_kernels.factor_attention(**given | changed)
        return out, list(taken)

    assert run()[1] == []
    assert run(h=torch.nn.Parameter(given["h"]))[1] == []
    with torch.inference_mode():
        out, way = run()
        assert way == []
        assert out.context.is_inference()
    with Mode() as mode:
        assert run()[1] == ["factor_attention"]
    assert "flr.factor_attention.default" in mode.seen
    with FunctionMode() as functions:
        assert run()[1] == ["factor_attention"]
    assert "flr.factor_attention.default" in functions.seen
    with torch.profiler.profile() as profiled:
        run()
    assert "flr::factor_attention" in {e.key for e in profiled.key_averages()}
    with forward_ad.dual_level():
        assert run()[1] == ["factor_attention"]
    meta = {k: v.to("meta") for k, v in given.items()}
    assert run(**meta)[0].context.is_meta
    with pytest.raises(RuntimeError, match="functorch"):  # torch.library's own word
        torch.func.grad(lambda h: run(h=h)[0].context.sum())(given["h"])
    assert taken[0] == "factor_attention"

    class Subclass(torch.Tensor):
        pass

    assert run(h=given["h"].as_subclass(Subclass))[1] == ["factor_attention"]


def test_compiled_graphs_hold_the_operator():
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(lambda **x: flr_kernels.factor_attention(**x), backend=backend, fullgraph=True)(
        **call("factor_attention")
    )
    assert "flr.factor_attention.default" in seen


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["factor_attention", "factor_aggregate", "token_logprob", "group_advantage"])
def test_autocast_is_off_inside(name, learned):
    given = call(name)
    for x in given.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_(learned)
    expected = leaves(getattr(flr_kernels, name)(**given))
    with torch.autocast("cpu", torch.bfloat16):
        found = leaves(getattr(flr_kernels, name)(**given))
        assert torch.is_autocast_enabled("cpu")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["factor_attention", "factor_aggregate", "token_logprob", "group_advantage"])
def test_autocast_is_off_inside_a_backward(name):
    found = []
    for enabled in (False, True):
        given = call(name)
        wanted = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        out = sum(x.sum() for x in leaves(getattr(flr_kernels, name)(**given)) if x.requires_grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, wanted))
    assert all(map(torch.equal, *found))


def test_results_can_be_changed_in_place_and_twice_differentiated_is_refused():
    given = call("factor_attention")
    h = given["h"].requires_grad_()
    out = flr_kernels.factor_attention(**given)
    (out.context * 2).sum().backward(retain_graph=True)
    with torch.no_grad():
        flr_kernels.factor_attention(**given).context.add_(1)
    (dh,) = torch.autograd.grad(out.context.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dh.sum().backward()


@pytest.mark.parametrize("name", ["factor_attention", "factor_aggregate", "token_logprob", "group_advantage"])
def test_forward_derivatives_are_refused(name):
    given = call(name)
    first, primal = next((k, x) for k, x in given.items() if isinstance(x, torch.Tensor))
    function = getattr(flr_kernels, name)
    with forward_ad.dual_level():
        function(**given)
        torch.func.vmap(lambda x: leaves(function(**given | {first: x}))[0])(torch.stack([primal, primal]))
        with pytest.raises(NotImplementedError, match=f"{name}: expected tensors without tangents"):
            function(**given | {first: forward_ad.make_dual(primal, torch.ones_like(primal))})
    with pytest.raises(NotImplementedError, match=f"{name}: expected tensors without tangents"):
        torch.func.jvp(lambda x: leaves(function(**given | {first: x}))[0], (primal,), (torch.ones_like(primal),))
    stacked = torch.stack([primal, primal])
    with pytest.raises(NotImplementedError, match=f"{name}: expected tensors without tangents"):
        torch.func.jvp(
            torch.func.vmap(lambda x: leaves(function(**given | {first: x}))[0]),
            (stacked,),
            (torch.ones_like(stacked),),
        )


@pytest.mark.parametrize("name", ["log_normaliser", "group_advantage", "factor_aggregate"])
def test_a_view_that_negates_lazily_is_read_with_its_sign(name):
    given = call(name)
    first, x = next((k, x) for k, x in given.items() if isinstance(x, torch.Tensor))
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    function = getattr(flr_kernels, name)
    for a, b in zip(leaves(function(**given | {first: lazy})), leaves(function(**given)), strict=True):
        assert torch.equal(a, b)


class Told(TorchDispatchMode):
    """Compares results of our operators with what compiled graphs are told of them."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.namespace == "flr":
            self.seen.add(str(func))
            fakes = FakeTensorMode()
            with fakes:
                told = func(*(fakes.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
            for a, b in zip(leaves(out), leaves(told), strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), func
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_results_lie_in_memory_as_compiled_graphs_are_told(name, dtype):
    arrays = {k: x for k, x in call(name).items() if isinstance(x, torch.Tensor)}
    floats = [k for k, x in arrays.items() if x.is_floating_point() and k != "score"]
    tensors = [k for k, x in arrays.items() if x.dim() > 1]
    for turned in ([], *([k] for k in tensors), tensors):
        given = call(name)
        given |= {k: given[k].to(dtype) for k in floats}
        for k in turned:  # the first dimension's elements beside each other
            given[k] = given[k].movedim(0, -1).contiguous().movedim(-1, 0)
        wanted = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        with Told() as told:
            if name == "token_logprob":  # not the way that keeps logits
                out = [flr_kernels.ops.token_logprob.op._forward(*given.values())]
            else:
                out = leaves(getattr(flr_kernels, name)(**given))
            if name not in ("log_normaliser", "trie_step"):
                torch.autograd.grad(sum(x.sum() for x in out if x.requires_grad), wanted)
        assert len(told.seen) == (1 if name in ("log_normaliser", "trie_step") else 2)


def test_the_choice_of_backend_is_read_at_every_call(monkeypatch):
    given = call("group_advantage")
    flr_kernels.group_advantage(**given)
    for asked, error in (("cuda", "backend 'cuda'"), ("triton", "asks for 'triton'")):
        monkeypatch.setenv("FLR_BACKEND", asked)
        with pytest.raises(flr_kernels.BackendUnavailable, match=error):
            flr_kernels.group_advantage(**given)
    monkeypatch.delenv("FLR_BACKEND")
    flr_kernels.group_advantage(**given)


def test_a_reason_is_logged_once_whatever_the_strides(caplog):
    dispatch._SAID.clear()
    for length in (5, 6, 7):
        flr_kernels.log_normaliser(torch.randn(3, length).T)
    assert sum("log_normaliser: using the PyTorch reference" in record.message for record in caplog.records) == 1


def test_auto_leaves_what_does_not_suit_a_backend_to_the_next(monkeypatch):
    made = dispatch.Op("made")
    for backend in ("reference", "triton"):
        made.register(backend, lambda x: x)
    made.register("cuda", lambda x: x, suits=lambda x: x.shape[0] >= 4)
    monkeypatch.setitem(dispatch.OPS, "made", made)

    class OnCuda:
        is_cuda = True

        def __init__(self, users):
            self.shape = (users, 4096, 64)

    monkeypatch.delenv("FLR_BACKEND", raising=False)
    assert dispatch.select("made", OnCuda(4)) == "cuda"
    assert dispatch.select("made", OnCuda(1)) == "triton"
    monkeypatch.setenv("FLR_BACKEND", "cuda")
    assert dispatch.select("made", OnCuda(1)) == "cuda"  # asked for by name
    monkeypatch.delenv("FLR_BACKEND")

    def refuses(x):
        raise ValueError("not this one")

    made.check["triton"] = refuses
    assert dispatch.select("made", OnCuda(1)) == "cuda"  # before the reference
