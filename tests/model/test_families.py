"""A dozen families that cover the mechanisms equal the two-pass computation; the sweep over all is scripts/families."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import flr
from flr.model import base, verify
from flr.model.verify import Traits, difference, traits_of
from scripts.families.check import Fault, Naive, check_family, check_loss, compare, padded, patched, sequences
from scripts.families.page import write_page
from scripts.families.tiny import THOUGHT, families, tiny_model
from tests.helpers.models import patched_model, tiny_config
from tests.helpers.models import tiny_model as tiny_llama

#: family: the traits that it lacks. Together: rotary, learned and ALiBi positions, sliding windows, hybrids with good
#: and bad caches, state spaces, experts, tied weights, transformed and capped heads, embeddings beyond the first.
QUICK = {
    "bert": {"linear_head"},
    "bloom": {"packing"},
    "bart": {"left_padding", "packing"},
    "gemma3n_text": {"embeds"},
    "gemma3_text": set(),
    "gpt2": set(),
    "granitemoehybrid": {"gradients", "plain_cache", "packing"},
    "jamba": {"pieces", "gradients", "plain_cache", "packing"},
    "mamba": {"pieces", "gradients", "steps", "plain_cache", "packing"},
    "minicpm3": {"linear_head"},
    "mixtral": set(),
    "recurrent_gemma": {"pieces", "gradients", "steps", "left_padding", "plain_cache", "packing"},
}


#: Families that do not run, unpatched, before this version of transformers: the loss of no experts, tiny rotary tables.
WORKS_SINCE = {"granitemoehybrid": "5.20", "cohere_compass_text": "5.21"}


def skip_broken(family):
    if Version(transformers.__version__) < Version(WORKS_SINCE.get(family, "0")):
        pytest.skip(f"{family} does not run in transformers {transformers.__version__}")


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
def test_equals_two_passes(family):
    skip_broken(family)
    outcome = check_family(family)
    assert set(outcome["fallbacks"]) == QUICK[family]
    assert outcome["experts"] == (family in ("mixtral", "jamba", "granitemoehybrid"))
    assert outcome["omitted"] == []


@pytest.mark.parametrize(("family", "trait"), [("jamba", "pieces"), ("granitemoehybrid", "gradients")])
def test_the_comparison_finds_what_a_trait_is_for(family, trait):
    model = patched(family, thoughts=2)
    every = Traits()
    model._flr_patch.traits = every
    with pytest.raises((Fault, RuntimeError)):
        check_loss(model, 2, ("right",))
    assert not getattr(verify.probe(model), trait)


def test_fallbacks_are_said_once(caplog):
    flr.model.backbone.warn_once.cache_clear()
    for _ in range(2):
        patched("jamba", thoughts=1)
    said = [r.message for r in caplog.records if "the prompt is encoded once more for every thought" in r.message]
    assert len(said) == 2  # one for pieces, one for their gradients
    assert all(message.startswith("JambaForCausalLM: ") for message in said)


def test_what_cannot_have_a_thought_is_refused_and_left_alone():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bidirectional = transformers.BertLMHeadModel(transformers.BertConfig(**sizes))
    camembert = tiny_model("camembert")
    for model, reason in ((bidirectional, "is_decoder=True"), (camembert, "positions that count from 0")):
        before = set(model.__dict__)
        with pytest.raises(ValueError, match=rf"^model: expected .*{reason}"):
            flr.patch_model(model, config=flr.FLRConfig(thought_token_id=THOUGHT))
        assert set(model.__dict__) == before
    broken = tiny_llama()
    nn.init.constant_(broken.lm_head.weight, 1.0)
    nn.init.constant_(broken.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="expected finite states"):
        flr.patch_model(broken, config=flr.FLRConfig(thought_token_id=THOUGHT))


def test_unpatched_models_are_tried_once_when_they_decode(monkeypatch):
    model, calls = tiny_model("jamba").eval(), []
    found = verify.probe
    monkeypatch.setattr(verify, "probe", lambda lm, *rest: calls.append(lm) or found(lm, *rest))
    assert traits_of(model) is traits_of(model)
    assert len(calls) == 1
    assert not traits_of(model).pieces


def test_training_without_a_cache_of_the_models_own_falls_back():
    """Some base models return no cache while they train."""
    skip_broken("cohere_compass_text")
    model = patched("cohere_compass_text", thoughts=2)
    assert model._flr_patch.traits == Traits()
    check_loss(model, 2, ("right",))


def test_embeddings_are_left_as_they_are():
    """CTRL multiplies the embeddings that it is given in place."""
    model = patched("ctrl", thoughts=1)
    embeds = torch.randn(1, 4, 32)
    kept = embeds.clone()
    base.run_base(model, embeds)
    assert torch.equal(embeds, kept)


@pytest.mark.parametrize("asked", ["config", "argument"])
def test_the_routers_loss_is_part_of_the_loss(asked):
    model = patched("mixtral", thoughts=1)
    rows, _ = sequences(1)
    ids, mask = padded(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    quiet = model(input_ids=ids, attention_mask=mask, labels=labels)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5
    options = {"output_router_logits": True} if asked == "argument" else {}
    model.config.output_router_logits = asked == "config"
    out = model(input_ids=ids, attention_mask=mask, labels=labels, **options)
    assert out.aux_loss > 1
    compare("loss", out.loss - quiet.loss, 0.5 * out.aux_loss, 1e-4)
    assert [x.shape for x in out.router_logits] == [(ids.numel(), 4)] * 2
    model.config.output_router_logits = True
    assert model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=False).aux_loss is None


def test_arguments_of_the_original_forward():
    model = patched_model().eval()
    ids = torch.tensor([[5, 6, 7, THOUGHT, 8, 9]])
    whole = model(input_ids=ids)
    loss, logits = model(input_ids=ids, labels=ids, return_dict=False)
    torch.testing.assert_close(logits, whole.logits)
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.lm_head(states[-1]), whole.logits)
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    with pytest.raises(ValueError, match=r"^output_attentions: expected False"):
        model(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"^pixel_values: expected nothing but text"):
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 4, 4))


def test_token_types_are_cut_and_shifted_with_the_tokens():
    model = patched("bert", thoughts=1).eval()
    naive = Naive(model)
    rows = [row[:start] for row, start in zip(*sequences(1), strict=True)]
    ids, mask = padded(rows, "right")
    plain = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits
    typed = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.ones_like(ids)).logits
    assert (plain - typed).abs().max() > 1e-3
    compare("logits", plain[0][mask[0] != 0], naive.row(rows[0])[0])


def test_a_compiled_wrapper_is_refused():
    with pytest.raises(ValueError, match=r"^model: expected a transformers PreTrainedModel, got OptimizedModule"):
        flr.patch_model(torch.compile(tiny_llama(), backend="eager"), config=flr.FLRConfig(thought_token_id=THOUGHT))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["after", "in place, before", "in place, after"])
@torch.no_grad()
def test_compiled_models_give_the_same(when):
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=1).eval()
    ids = torch.tensor([[5, 6, 7, THOUGHT], [9, 10, 11, THOUGHT]])
    if when == "in place, before":
        model.compile(backend="eager")
        model(input_ids=ids)  # compiled without a thought
    flr.patch_model(model, config=flr.FLRConfig(thought_token_id=THOUGHT, init_scale=1.0))
    expected = model.forward(input_ids=ids).logits
    assert difference(model(input_ids=ids.masked_fill(ids == THOUGHT, 7), insert_thought=False).logits, expected) > 1e-3
    if when == "in place, after":
        model.compile(backend="eager")
    compiled = torch.compile(model, backend="eager") if when == "after" else model
    compare("logits", compiled(input_ids=ids).logits, expected)
    torch._dynamo.reset()


@torch.no_grad()
def test_generation_without_a_cache_and_in_chunks():
    model = patched_model().eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, THOUGHT]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=False, **options), model.generate(ids, **options))
    with pytest.raises(ValueError, match=r"^(input_ids|prefill_chunk_size): expected"):
        model.generate(ids, prefill_chunk_size=4, **options)


class _Logits(nn.Module):
    """Logits of prompts whose thought stands in one column."""

    def __init__(self, model, start):
        super().__init__()
        self.model, self.start = model, start

    def forward(self, input_ids, attention_mask):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, thought_start=self.start, use_cache=False)
        return out.logits


@pytest.mark.parametrize("thoughts", [1, 2])
def test_export_with_the_thought_in_a_fixed_column(thoughts):
    model = patched_model(num_thoughts=thoughts).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    ids = torch.cat([ids, torch.full((3, thoughts), THOUGHT), ids[:, :2]], 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(_Logits(model, 4), (ids, mask), dynamic_shapes=(rows, rows))
        for given in (slice(0, 3), slice(1, 3)):
            found = program.module()(ids[given], mask[given])
            here = mask[given].bool()  # what stands at padding depends on the mask's form, which a compiler fixes
            expected = model(input_ids=ids[given], attention_mask=mask[given]).logits
            torch.testing.assert_close(found[here], expected[here])
        moved = ids.roll(1, 1)
        expected = model(input_ids=moved, attention_mask=mask).logits
        assert not torch.allclose(program.module()(moved, mask)[1:], expected[1:])


def test_the_page_says_what_the_outcomes_say(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.families.page.PAGE", tmp_path / "families.md")
    found = {
        "a": {"class": "A", "outcome": "equal", "fallbacks": [], "experts": True, "reason": "", "seconds": 30},
        "b": {"class": "B", "outcome": "refused", "reason": "model: expected causal attention", "seconds": 30},
        "c": {"class": "C", "outcome": "not built", "reason": "ImportError: timm", "seconds": 60},
    }
    write_page(found, "5.0")
    text = (tmp_path / "families.md").read_text()
    assert "equal to the two-pass computation on 1 of the 2 causal-LM families" in text
    assert "| a | A | equal, auxiliary loss too |  |" in text
    assert "The sweep took 2 minutes" in text


def test_the_committed_outcomes_have_no_fault():
    from scripts.families.__main__ import RESULTS

    kept = json.loads(RESULTS.read_text())
    assert [name for name, row in kept["families"].items() if row["outcome"] == "FAULT"] == []
    if kept["transformers"] == transformers.__version__:
        assert sorted(kept["families"]) == families()


def test_half_precision_probes_do_not_raise_false_alarms():
    model = tiny_config("llama")
    model = transformers.LlamaForCausalLM(model).to(torch.bfloat16)
    assert verify.probe(model) == Traits()
