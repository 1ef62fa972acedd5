"""Log-probabilities and rows of a model's own head: every kind of head, autocast, sharded weights."""

import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

import flr.decode.prompts
import flr.decode.scoring
import flr.model.forward
import flr_kernels
from flr.decode import CatalogueTrie, beam_search, score_all_items
from flr.model.head import head_logprob, is_plain
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.inputs import states_and_targets, toy_inputs
from tests.helpers.models import FAMILIES, VOCAB, tiny_model, toy_model
from tests.helpers.processes import in_processes


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "scaled"])
def test_equals_log_softmax_of_the_models_logits(family, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(flr.model.head, "MAX_LOSS_LOGITS", 4 * VOCAB)
        monkeypatch.setattr(sys.modules["flr_kernels.ops.token_logprob.reference"], "CHUNK", 2 * VOCAB)
    model = tiny_model("llama" if family == "scaled" else family).double()
    if family == "scaled":
        model.config.logits_scaling = 3.0  # as Granite's
    head = model.get_output_embeddings()
    assert is_plain(model, head) == (family not in ("gemma2", "phi", "scaled"))  # softcap, bias, scale
    hidden, target = states_and_targets()
    expected = flr.model.head.head(model, hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    weights = [p for p in head.parameters() if p.requires_grad]
    actual = head_logprob(model, hidden, target)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn(9, dtype=torch.float64)
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
    hidden, target = states_and_targets(dtype=torch.float32)
    head_logprob(model, hidden, target)
    assert seen == [(9,)]
    with pytest.raises(ValueError, match="weight: expected D of hidden"):
        head_logprob(model, hidden[:, 1:], target)
    assert "forward" not in vars(head)


def test_under_autocast_products_run_in_its_dtype():
    model = tiny_model("llama")
    hidden, target = states_and_targets(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = head_logprob(model, hidden, target)
        logits = flr.model.head.head(model, hidden)
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
    hidden, target = states_and_targets(seed=rank)
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
            hidden, target = states_and_targets(seed)
            expected = flr.model.head.head(model, hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
            torch.testing.assert_close(logp, expected)
            dh, dw = torch.autograd.grad(expected.sum(), (hidden, weight))
            torch.testing.assert_close(d_hidden, dh)
            gradient += dw
        if name != "tensor":
            gradient /= 2  # FSDP2 takes the mean
        for rank in ranks:
            torch.testing.assert_close(rank[name][1], gradient)


@pytest.mark.parametrize("cost", [0, 1e9])  # a dot product for each, one matrix product
@pytest.mark.parametrize("family", ["Llama", "Phi", "Gemma2", "Cohere", "Granite", "Bloom"])
def test_rows_of_the_lm_head_equal_its_product(monkeypatch, family, cost):
    monkeypatch.setattr(flr.model.head, "_GATHER_COST", {"cpu": cost})
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    extra = {
        "Cohere": {"logit_scale": 0.3},
        "Granite": {"logits_scaling": 3.0},
        "Gemma2": {"final_logit_softcapping": 2.0},
    }
    if family != "Bloom":
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**sizes, **extra.get(family, {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_()  # the bias too
        states, _, rows, *_ = flr.decode.prompts.prefill(model, toy_inputs(), 1, want_hidden=True)
        expected = flr.decode.prompts.prefill(model, toy_inputs(), 1).states
    assert states.shape == (3, 32)
    row, token = torch.cartesian_prod(torch.arange(3), torch.arange(VOCAB)).T
    with torch.no_grad():
        torch.testing.assert_close(rows(states, row, token).view(3, -1), expected, atol=1e-5, rtol=1e-5)


def test_an_lm_head_that_is_no_plain_matrix_gives_all_logits(caplog):
    flr.model.backbone.warn_once.cache_clear()
    model, plain = toy_model("llama"), toy_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    trie, inputs = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 40))), toy_inputs()
    for search in (beam_search, lambda *a: (score_all_items(*a[:3], a[-1]),)):
        for ours, theirs in zip(*(search(m, inputs, trie, 5, 5, "catalogue") for m in (model, plain)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert [r.message for r in caplog.records if "lm_head" in r.message] == [
        "logits of the whole vocabulary are computed: the lm_head's rows cannot be used one by one"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_the_lm_head_are_used_under_the_autocast_of_a_training(dtype, caplog):
    """Accelerate computes the logits in half precision and returns them in float32."""
    from accelerate.utils import convert_outputs_to_fp32

    flr.model.backbone.warn_once.cache_clear()
    model, plain = toy_model("llama"), toy_model("llama")
    with torch.no_grad():
        for head in (model.lm_head, plain.lm_head):
            head.weight.copy_(0.1 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(model.forward))
    trie, inputs = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 40))), toy_inputs()
    with torch.no_grad():
        assert model(**inputs).logits.dtype == torch.float32
    ours, theirs = (score_all_items(m, inputs, trie, "catalogue") for m in (model, plain))
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.02)
    assert "lm_head" not in caplog.text
    hooked = model.lm_head.register_forward_hook(lambda _, inputs, out: out + 0.05 * out.abs().amax())
    score_all_items(model, inputs, trie, "catalogue")  # its logits are not those of the rows
    hooked.remove()
    assert "the lm_head's rows cannot be used one by one" in caplog.text
