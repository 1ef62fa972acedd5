"""Patching, unpatching, generating, PEFT, Trainer."""

import copy
import logging
import math

import pytest
import torch
from transformers import GenerationConfig, Trainer, TrainingArguments

import flr
from flr.model.backbone import cache_argument, cache_of
from tests.helpers.extras import needs_adapters_of_transformers
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import FAMILIES, THOUGHT, VOCAB, patched_model, tiny_model


def padded_prompts():
    prompts = [[5, 6, 7, 8, THOUGHT], [9, THOUGHT], [11, 12, 13, THOUGHT]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return prompts, {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_leaves_everything_as_it_was(family):
    model = tiny_model(family).eval()
    inputs = supervised_batch("right", rows_without=4)
    before = model(**inputs)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes, forward = set(model.__dict__), model.forward
    config, generation = copy.deepcopy(model.config.to_dict()), model.generation_config
    class_forward = type(model).forward
    # the thought token does not fit: the embedding grows, and shrinks again
    flr.patch_model(model, config=flr.FLRConfig(thought_token_id=VOCAB + 3))
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 4
    assert flr.is_patched(model)
    assert type(model).forward is class_forward
    assert flr.unpatch_model(model) is model
    assert not flr.is_patched(model)
    assert model.forward == forward
    assert set(model.__dict__) == attributes
    assert model.config.to_dict() == config
    assert model.generation_config is generation
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    after = model(**inputs)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)


def test_two_models_are_patched_independently():
    a, b = tiny_model(), tiny_model()
    flr.patch_model(a, config=flr.FLRConfig(thought_token_id=THOUGHT))
    assert not flr.is_patched(b)
    assert not hasattr(b, "flr")
    copied = copy.deepcopy(a)
    assert copied.forward.__self__ is copied
    with torch.no_grad():
        copied.flr.output.zero_()
    assert a.flr.output.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_in_a_padded_batch(family):
    """Token by token with a cache = the whole sequence encoded anew for every token, one user at a time."""
    model = patched_model(family, num_refinements=2).eval()
    prompts, inputs = padded_prompts()
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for row, prompt in zip(generated, prompts, strict=True):
        sequence = list(prompt)
        for _ in range(5):
            logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1]
            logits[THOUGHT] = -math.inf
            sequence.append(int(logits.argmax()))
        assert row[-5:].tolist() == sequence[-5:]


def test_beam_search_and_sampling():
    model = patched_model(num_thoughts=1).eval()
    prompts, inputs = padded_prompts()
    options = {"max_new_tokens": 4, "eos_token_id": None, "output_scores": True, "return_dict_in_generate": True}
    together = model.generate(**inputs, num_beams=4, num_return_sequences=4, **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), num_beams=4, num_return_sequences=4, **options)
        torch.testing.assert_close(alone.sequences_scores, together.sequences_scores[4 * i : 4 * i + 4])
        best = alone.sequences[0]
        full = model(input_ids=best[None]).logits[0].log_softmax(-1)
        score = sum(full[len(prompt) - 1 + j, best[len(prompt) + j]] for j in range(4))
        # transformers divides by length, and its own suppression of the thought token does not renormalise
        torch.testing.assert_close(alone.sequences_scores[0], score / 4, rtol=1e-4, atol=1e-4)
    sampled = model.generate(**inputs, do_sample=True, max_new_tokens=30, eos_token_id=None)
    assert not (sampled[:, inputs["input_ids"].shape[1] :] == THOUGHT).any()


def test_shipped_sampling_options_never_change_a_ranking(caplog):
    model = tiny_model()
    shipped = GenerationConfig(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, bos_token_id=1)
    model.generation_config = shipped
    with caplog.at_level(logging.WARNING, logger="flr"):
        flr.patch_model(model, config=flr.FLRConfig(thought_token_id=THOUGHT))
    assert "repetition_penalty" in caplog.text
    model.eval()
    reference = patched_model().eval()
    reference.load_state_dict(model.state_dict())
    _, inputs = padded_prompts()
    options = {"num_beams": 3, "max_new_tokens": 4}
    assert torch.equal(model.generate(**inputs, **options), reference.generate(**inputs, **options))
    assert model.generation_config.bos_token_id == 1
    assert flr.unpatch_model(model).generation_config is shipped


def test_a_thought_token_after_the_prefill_is_refused():
    model = patched_model().eval()
    first = model(input_ids=torch.tensor([[5, 6, THOUGHT]]), use_cache=True)
    with pytest.raises(ValueError, match="no thought token after the prefill"):
        model(input_ids=torch.tensor([[7, THOUGHT]]), **cache_argument(model, cache_of(first)))


def test_lora_on_the_backbone_trains_the_reasoner_and_survives_saving(tmp_path):
    peft = pytest.importorskip("peft")
    model = patched_model("qwen2").eval()
    inputs = supervised_batch("left")
    expected = model(**inputs).loss.detach()
    lora = peft.LoraConfig(target_modules="all-linear", modules_to_save=["flr"], r=4, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    torch.testing.assert_close(wrapped.eval()(**inputs).loss, expected)
    wrapped.train()(**inputs).loss.backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(".flr." in n and n.endswith("output") for n in trained)
    assert any("lora_B" in n for n in trained)
    assert all(".flr." in n or "lora_" in n for n in trained)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(patched_model("qwen2").eval(), tmp_path)
    torch.testing.assert_close(loaded.eval()(**inputs).loss, wrapped.eval()(**inputs).loss)
    assert not torch.allclose(loaded(**inputs).loss, expected)
    with pytest.raises(ValueError, match="patch the base model first"):
        flr.patch_model(wrapped, config=flr.FLRConfig(thought_token_id=THOUGHT))


class _Rows(torch.utils.data.Dataset):
    def __init__(self, count=8):
        batches = [supervised_batch("left", seed=i, rows_without=0) for i in range(count // 4)]
        width = max(b["input_ids"].shape[1] for b in batches)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        self.rows = [
            {k: torch.nn.functional.pad(v[i], (width - v.shape[1], 0), value=fill[k]) for k, v in b.items()}
            for b in batches
            for i in range(4)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_a_model_that_has_adapters_is_refused_and_one_that_had_some_is_not(way):
    """PEFT would save the adapters without the reasoner, and a trained thought would be gone."""
    peft = pytest.importorskip("peft")
    model, lora = tiny_model(), peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    if way == "add_adapter":
        needs_adapters_of_transformers()
    adapted = peft.get_peft_model(model, lora) if way == "get_peft_model" else model.add_adapter(lora)
    with pytest.raises(ValueError, match="expected one without adapters, with which PEFT saves no reasoner"):
        flr.patch_model(model)
    assert not flr.is_patched(model)
    if adapted is not None:
        assert flr.is_patched(flr.patch_model(adapted.merge_and_unload()))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_as_it_is(tmp_path, accumulation):
    """One SGD step of transformers' Trainer = one step by hand on the whole batch, however it is accumulated."""
    model, by_hand = patched_model().eval().train(), patched_model().eval().train()
    rows = _Rows()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8 // accumulation, max_steps=1, learning_rate=0.1,
        gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="constant", report_to=[],
        max_grad_norm=0.0, use_cpu=True, disable_tqdm=True, weight_decay=0.0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    batch = {k: torch.stack([r[k] for r in rows.rows]) for k in rows[0]}
    by_hand(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss.backward()
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.1 * b.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert trainer.evaluate(rows)["eval_loss"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flr.patch_model(torch.nn.Linear(2, 2)), "model: expected a transformers PreTrainedModel"),
        (lambda: flr.patch_model(tiny_model(), factors=3), "options: expected fields of FLRConfig, got factors"),
        (
            lambda: flr.patch_model(tiny_model().model, config=flr.FLRConfig(thought_token_id=1)),
            "decoder-only",
        ),
        (lambda: flr.unpatch_model(tiny_model()), "expected a patched model"),
        (lambda: flr.patch_model(patched_model().eval()), "expected an unpatched model"),
        (lambda: flr.FLRConfig(variant="cot"), "variant: expected one of flr, offsets, latentr3, anchor, none"),
        (lambda: flr.FLRConfig(num_factors=17), "num_factors: expected 1 to 16, got 17"),
        (lambda: flr.FLRConfig(dropout=1.0), "dropout"),
        (lambda: flr.FLRConfig.from_dict({"k": 4}), "expected options of FLRConfig, got k"),
        (lambda: patched_model().eval().flr(torch.zeros(1, 2, 3)), "hidden_states: expected"),
        (lambda: patched_model().eval().flr(torch.zeros(1, 2, 32), torch.ones(1, 3)), "mask: expected shape"),
        (
            lambda: patched_model().eval()(
                input_ids=torch.tensor([[5, THOUGHT]]), reasoner_mask=torch.ones(1, 3).bool()
            ),
            "reasoner_mask: expected shape",
        ),
        (
            lambda: patched_model().eval()(input_ids=torch.tensor([[5, THOUGHT]]), output_attentions=True),
            "output_attentions",
        ),
    ],
)
def test_errors_name_argument_expected_and_actual(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_whose_logits_do_not_compose_is_refused_and_left_alone():
    model = tiny_model()
    original = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):  # more than states go into the logits
            kwargs["use_cache"] = kwargs.get("input_ids") is not None
            out = original(self, *args, **kwargs)
            out.logits = out.logits + int(kwargs["use_cache"])
            return out

    model.__class__ = Odd
    with pytest.raises(ValueError, match="this architecture is not supported"):
        flr.patch_model(model, config=flr.FLRConfig(thought_token_id=THOUGHT))
    assert not flr.is_patched(model)
    assert not hasattr(model, "flr")
