"""Token tables of which an adapter trains some rows: PEFT's values, without PEFT's copies of the table."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import flr
from flr.data.trie import CatalogueTrie
from flr.model import head
from flr.model.catalogue_loss import CatalogueLoss
from flr.model.head import HeadRows, head_logprob
from flr.model.token_table import embedding_width, table_of
from flr.train.lora import LoraSettings, add_lora

pytest.importorskip("peft")
from peft.tuners.trainable_tokens import TrainableTokensLayer

ROWS, WIDTH, THOUGHT = 90, 32, 89
TOKENS = [5, 6, 7, 40, 41, THOUGHT]
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "scaled": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, pad_token_id=0)),
}
TRIE = CatalogueTrie.from_sequences([5, 40, 5, 41, 6, 40, 7, 30], [0, 2, 4, 6, 8])  # 30 is the base model's own
IDS = torch.tensor([[1, 5, 40, 3, THOUGHT, 5, 41], [2, 6, 40, 6, THOUGHT, 7, 30]])


def adapted(kind, tokens=TOKENS):
    torch.manual_seed(0)
    model = flr.patch_model(KINDS[kind](), config=flr.FLRConfig(num_factors=2, thought_token_id=THOUGHT))
    whole = add_lora(model, LoraSettings(rank=2, alpha=4.0, targets=("q_proj",)), tokens)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "trainable_tokens_delta" in name or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return whole.eval()


def as_peft(model):
    """The same weights, computed by PEFT."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = TrainableTokensLayer
    return other


def labels_of(loss):
    labels = torch.where(torch.arange(IDS.shape[1]) > 4, IDS, -100)
    return labels if loss is None else loss.target_nodes(labels)


def step(model, loss):
    given = {} if loss is None else {"catalogue_loss": loss}
    value = model(input_ids=IDS, labels=labels_of(loss), **given).loss
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class TableSized(TorchDispatchMode):
    """Operations whose result has as many numbers as the table, and the table's rows or columns."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            views = ("aten.t.", "aten.detach", "aten.alias", "aten.view")
            if isinstance(x, torch.Tensor) and sorted(x.shape) == [WIDTH, ROWS] and not str(func).startswith(views):
                self.found.append(str(func))
        return made


@pytest.mark.parametrize("normalisation", ["vocabulary", "catalogue"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_peft(kind, normalisation):
    loss = None if normalisation == "vocabulary" else CatalogueLoss(TRIE)
    model = adapted(kind)
    theirs, expected = step(as_peft(model), loss)
    mine, got = step(model, loss)
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)
    assert got.keys() == expected.keys()
    assert sum("trainable_tokens_delta" in name for name in got) == (2 if kind == "untied" else 1)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalisation", ["vocabulary", "catalogue"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_makes_nothing_of_the_tables_size(kind, normalisation):
    loss = None if normalisation == "vocabulary" else CatalogueLoss(TRIE)
    model = adapted(kind)
    with TableSized() as theirs:
        step(as_peft(model), loss)
    with TableSized() as mine:
        step(model, loss)
    assert theirs.found  # or the mode sees nothing
    assert not mine.found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_under_autocast_and_without_the_adapter(kind):
    model = adapted(kind)
    other = as_peft(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=2e-2, atol=2e-2)
        with model.disable_adapter(), other.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=0, atol=0)


def test_a_step_may_follow_an_evaluation():
    model = adapted("untied")
    with torch.inference_mode():
        model(IDS)
    for loss in (None, CatalogueLoss(TRIE)):
        value, gradients = step(model, loss)
        assert value.isfinite()
        assert gradients


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_answers_alike(kind):
    model = adapted(kind)
    with torch.inference_mode():
        before = model(IDS).logits
        after = model.merge_and_unload(safe_merge=True)(IDS).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_logprobs_of_rows_at_the_end_are_made_in_two_parts(kind, monkeypatch):
    lm = adapted(kind, range(80, ROWS)).get_base_model()
    head_of, hidden = lm.get_output_embeddings(), torch.randn(5, WIDTH, requires_grad=True)
    target = torch.tensor([3, 80, 40, THOUGHT, 79])
    delta = head_of.token_adapter.trainable_tokens_delta["default"]
    expected = head_of(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    gradients = torch.autograd.grad(expected.exp().sum(), (hidden, delta))
    monkeypatch.setattr(head, "row_losses", None)  # all logits at once
    got = head_logprob(lm, hidden, target)
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(torch.autograd.grad(got.exp().sum(), (hidden, delta)), gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head_logprob(lm, hidden, target), expected, rtol=0, atol=3e-2)
    with pytest.raises(IndexError, match="target: expected 0 to"):
        head_logprob(lm, hidden, target + 5)


def test_logprobs_of_rows_between_others_are_made_by_the_head():
    lm = adapted("untied").get_base_model()
    hidden, target = torch.randn(3, WIDTH), torch.tensor([3, 5, THOUGHT])
    expected = lm.get_output_embeddings()(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(head_logprob(lm, hidden, target), expected)


def test_rows_of_the_head_are_read_one_by_one():
    model = adapted("untied")
    lm = model.get_base_model()
    hidden = torch.randn(2, WIDTH)
    logits = lm.get_output_embeddings()(hidden)
    rows = HeadRows.of(lm, hidden, logits)
    assert rows is not None
    row, token = torch.tensor([0, 1, 1]), torch.tensor([5, 30, THOUGHT])
    torch.testing.assert_close(rows(hidden, row, token), logits[row, token])
    assert table_of(lm.get_output_embeddings()).rows(token).shape == (3, WIDTH)
    assert embedding_width(lm) == WIDTH


def test_another_adapter_on_the_same_tables_is_read_with_its_own_rows():
    model = adapted("untied")
    lora = copy.deepcopy(model.peft_config["default"])
    lora.trainable_token_indices = {"embed_tokens": [8, 9], "lm_head": [8, 9]}
    model.add_adapter("second", lora)
    for name in ("second", "default"):
        model.set_adapter(name)
        with torch.inference_mode():
            torch.testing.assert_close(model(IDS).logits, as_peft(model)(IDS).logits, rtol=1e-5, atol=1e-5)


def test_an_embedding_that_peft_must_compute_is_left_to_it():
    table = adapted("untied").get_input_embeddings()
    table.token_adapter.base_layer.max_norm = 0.1
    with torch.no_grad():
        mine, theirs = table(IDS), as_peft(table)(IDS)
    assert mine.norm(dim=-1).max() < 0.11  # those of trained rows, too
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
