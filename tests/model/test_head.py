"""token_logprob through a model's own head: every kind of head, autocast, sharded weights; the optional backend."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import flr.forward
import flr_kernels
from flr.head import _is_plain, head_logprob
from tests.helpers.models import FAMILIES, HIDDEN, VOCAB, tiny_model
from tests.helpers.processes import in_processes

ROWS = 9


def rows(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), torch.randint(0, VOCAB, (ROWS,), generator=generator)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "scaled"])
def test_equals_log_softmax_of_the_models_logits(family, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(flr.forward, "MAX_LOSS_LOGITS", 4 * VOCAB)
        monkeypatch.setattr(sys.modules["flr_kernels.token_logprob"], "CHUNK", 2 * VOCAB)
    model = tiny_model("llama" if family == "scaled" else family).double()
    if family == "scaled":
        model.config.logits_scaling = 3.0  # as Granite's
    head = model.get_output_embeddings()
    assert _is_plain(model, head) == (family not in ("gemma2", "phi", "scaled"))  # softcap, bias, scale
    hidden, target = rows()
    expected = flr.forward.head(model, hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    weights = [p for p in head.parameters() if p.requires_grad]
    actual = head_logprob(model, hidden, target)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn(ROWS, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [hidden, *weights], grad)
    for a, b in zip(torch.autograd.grad(actual, [hidden, *weights], grad), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert "forward" not in vars(head)
    with torch.no_grad():
        torch.testing.assert_close(head_logprob(model, hidden, target), expected)
    head.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(head_logprob(model, hidden, target), hidden, grad)[0], wanted[0])


def test_hooks_of_the_head_run_and_an_error_restores_it():
    model = tiny_model("llama")
    head = model.get_output_embeddings()
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    hidden, target = rows(dtype=torch.float32)
    head_logprob(model, hidden, target)
    assert seen == [(ROWS,)]
    with pytest.raises(ValueError, match="weight: expected D of hidden"):
        head_logprob(model, hidden[:, 1:], target)
    assert "forward" not in vars(head)


def test_under_autocast_products_run_in_its_dtype():
    model = tiny_model("llama")
    hidden, target = rows(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = head_logprob(model, hidden, target)
        logits = flr.forward.head(model, hidden)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0])
    gradient = torch.autograd.grad(actual.sum(), model.get_output_embeddings().weight)[0]
    assert gradient.dtype == torch.float32


class Step(nn.Module):
    """What a trainer wraps: the head's part of a step."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, hidden, target):
        return head_logprob(self.model, hidden, target)


def _sharded(rank: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Log-probabilities and gradients of this process's rows through weights that are sharded in several ways."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,))
    hidden, target = rows(seed=rank)
    weight = tiny_model("llama").double().get_output_embeddings().weight.detach()
    sharded = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))  # 61 rows: uneven
    logp = flr_kernels.token_logprob(hidden, sharded, target)
    logp.sum().backward()
    assert sharded.grad.placements == (Shard(0),)
    out = {"tensor": (logp.detach(), sharded.grad.full_tensor(), hidden.grad)}
    # the lm_head a unit of its own; one unit with all the rest; a head that goes the other way
    for name, family in (("own", "llama"), ("root", "llama"), ("bias", "phi")):
        step = Step(tiny_model(family).double())
        if name == "own":
            fully_shard(step.model.get_output_embeddings())
        fully_shard(step)
        hidden.grad = None
        logp = step(hidden, target)
        logp.sum().backward()
        weight = step.model.get_output_embeddings().weight
        assert isinstance(weight, DTensor)
        assert isinstance(weight.grad, DTensor)
        out[name] = (logp.detach(), weight.grad.full_tensor(), hidden.grad)
    return out


@pytest.mark.timeout(120)
def test_sharded_weights_give_the_values_and_gradients_of_whole_ones(tmp_path):
    ranks = in_processes(_sharded, 2, tmp_path)
    assert set(ranks[0]) == {"tensor", "own", "root", "bias"}
    for name in ranks[0]:
        model = tiny_model("phi" if name == "bias" else "llama").double()
        weight = model.get_output_embeddings().weight
        gradient = torch.zeros_like(weight)
        for seed, (logp, _, d_hidden) in enumerate(rank[name] for rank in ranks):
            hidden, target = rows(seed)
            expected = flr.forward.head(model, hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
            torch.testing.assert_close(logp, expected)
            dh, dw = torch.autograd.grad(expected.sum(), (hidden, weight))
            torch.testing.assert_close(d_hidden, dh)
            gradient += dw
        if name != "tensor":
            gradient /= 2  # FSDP2 takes the mean
        for rank in ranks:
            torch.testing.assert_close(rank[name][1], gradient)


def test_the_optional_backend(monkeypatch):
    """Its wiring, with a stand-in for the library; the library itself needs a GPU (docs/gpu-todo.md)."""
    module = sys.modules["flr_kernels.token_logprob"]
    hidden, target = rows(dtype=torch.bfloat16)
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
