"""`flr_kernels.token_logprob`: in blocks, and with the optional backend."""

import sys
from types import SimpleNamespace

import pytest
import torch

import flr_kernels
from flr_kernels import reference
from tests.helpers.inputs import states_and_targets
from tests.helpers.models import HIDDEN, VOCAB

REFERENCE = sys.modules["flr_kernels.ops.token_logprob.reference"]


@pytest.mark.parametrize("kept", [76, 77], ids=["recomputed", "kept"])
@pytest.mark.parametrize("chunk", [1, 25, 1 << 24])
def test_token_logprob_in_chunks_equals_its_definition(chunk, kept, monkeypatch):
    monkeypatch.setattr(REFERENCE, "CHUNK", chunk)
    monkeypatch.setattr(REFERENCE, "KEPT", kept)  # 7 rows of 11 logits
    torch.manual_seed(0)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (7,))
    ours = flr_kernels.token_logprob(hidden, weight, target)
    plain = reference.token_logprob(hidden, weight, target)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(7, dtype=torch.float64)
    actual = torch.autograd.grad(ours, (hidden, weight), grad, retain_graph=True)
    again = torch.autograd.grad(ours, (hidden, weight), grad)
    assert all(map(torch.equal, actual, again))
    expected = torch.autograd.grad(plain, (hidden, weight), grad)
    torch.testing.assert_close(actual, expected)
    frozen = flr_kernels.token_logprob(hidden, weight.detach(), target)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden, grad)[0], expected[0])
    assert flr_kernels.token_logprob(hidden[:0], weight, target[:0]).shape == (0,)
    assert len(REFERENCE.row_blocks(hidden, weight)) == {1: 7, 25: 4}.get(chunk, 1)  # of 11 logits a row


def test_the_weights_gradient_is_summed_in_float32(monkeypatch):
    """A row a block: 400 equal terms, of which bfloat16 would lose what is less than a 256th of their sum."""
    monkeypatch.setattr(REFERENCE, "CHUNK", 1)
    monkeypatch.setattr(REFERENCE, "KEPT", 0)
    hidden, weight = torch.ones(400, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    logp = flr_kernels.token_logprob(hidden, weight.requires_grad_(), torch.zeros(400, dtype=torch.int64))
    assert torch.autograd.grad(logp.sum(), weight)[0].flatten().tolist() == [200, -200]


def test_the_backward_computes_logits_again_only_where_they_are_many(monkeypatch):
    recomputed = []
    chunked = REFERENCE.chunked_backward
    operation = flr_kernels.dispatch.OPS["token_logprob"]
    monkeypatch.setitem(operation.backward, "reference", lambda *args: recomputed.append(1) or chunked(*args))
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4)
    for kept, times in ((77, 0), (76, 1)):
        monkeypatch.setattr(REFERENCE, "KEPT", kept)
        flr_kernels.token_logprob(hidden, weight, torch.arange(7)).sum().backward()
        assert len(recomputed) == times


@pytest.mark.parametrize("kept", [76, 77], ids=["recomputed", "kept"])
def test_twice_differentiated_is_refused_and_create_graph_gives_the_gradient(kept, monkeypatch):
    monkeypatch.setattr(REFERENCE, "KEPT", kept)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    total = flr_kernels.token_logprob(hidden, weight, torch.arange(7)).sum()
    plain = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    found = torch.autograd.grad(total, (hidden, weight), create_graph=True)
    torch.testing.assert_close(found, plain)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (total + found[0].square().sum()).backward()


def test_the_optional_backend(monkeypatch):
    """Its wiring, with a stand-in for the library; the library itself needs a GPU (docs/gpu-todo.md)."""
    module = sys.modules["flr_kernels.ops.token_logprob.op"]
    hidden, target = states_and_targets(dtype=torch.bfloat16)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setenv("FLR_BACKEND", "token_logprob=cce")
    with pytest.raises(flr_kernels.BackendUnavailable, match=r"pip install 'flr\[cce\]'"):
        flr_kernels.token_logprob(hidden, weight, target)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(flr_kernels.BackendUnavailable, match="needs a CUDA device"):
        flr_kernels.token_logprob(hidden, weight, target)
    calls = []

    def stand_in(e, c, targets, *, reduction, impl):
        calls.append((reduction, impl))
        return torch.nn.functional.cross_entropy((e @ c.T).float(), targets, reduction=reduction)

    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=stand_in))
    monkeypatch.setitem(flr_kernels.dispatch.OPS["token_logprob"].check, "cce", lambda *_: None)
    logp = flr_kernels.token_logprob(hidden, weight, target)
    expected = flr_kernels.reference.token_logprob(hidden, weight, target)
    torch.testing.assert_close(logp, expected)
    assert calls == [("none", "cce_exact")]
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), (hidden, weight)), wanted)
    compiled = torch.ops.flr.token_logprob(hidden, weight, target)  # what a compiled graph holds
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), (hidden, weight)), wanted)
    frozen = torch.ops.flr.token_logprob(hidden, weight.detach(), target)
    torch.testing.assert_close(torch.autograd.grad(frozen.sum(), hidden)[0], wanted[0])
