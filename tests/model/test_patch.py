"""Patching, unpatching, saving, generating, LatentR3 checkpoints, PEFT, Trainer."""

import copy
import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Trainer, TrainingArguments

import flr
from flr.patch import reasoner_parameters
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import FAMILIES, HIDDEN, THOUGHT, VOCAB, patched_model, tiny_model


def padded_prompts():
    prompts = [[5, 6, 7, 8, THOUGHT], [9, THOUGHT], [11, 12, 13, THOUGHT]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return prompts, {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_a_fresh_patch_starts_small_and_sums_exactly():
    plain = tiny_model()
    model = flr.patch_model(copy.deepcopy(plain), config=flr.FLRConfig(thought_token_id=THOUGHT)).eval()
    ids = torch.randint(3, 60, (4, 20))
    embedding_rms = model.get_input_embeddings().weight.square().mean().sqrt()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        out = model.flr(hidden)
        assert 0.003 < out.thought.square().mean().sqrt() / embedding_rms < 0.03
        torch.testing.assert_close(out.contributions.sum(1), out.thought)
        assert all(0 <= value <= 1 for value in out.losses.values())
        torch.testing.assert_close(out.attention.sum(-1), torch.ones(4, 2, 4))
        # with its thought token a fresh model is the unpatched one with one more token
        ids = torch.cat([ids, torch.full((4, 1), THOUGHT)], 1)
        ours, theirs = model(input_ids=ids).logits[:, -1], plain.eval()(input_ids=ids).logits[:, -1]
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert (ours - theirs).abs().max() > 0


def test_parameter_count_is_about_four_d_squared_whatever_k():
    for factors in (1, 2, 4, 8):
        model = patched_model(num_factors=factors).eval()
        count = sum(p.numel() for p in reasoner_parameters(model))
        assert 4 * HIDDEN**2 <= count <= 4 * HIDDEN**2 + (factors + 2) * HIDDEN


def test_regularisers_at_their_corners():
    one = patched_model(num_factors=1, sparsity_target="gate").eval()
    hidden = torch.randn(3, 6, HIDDEN)
    losses = {k: v.detach() for k, v in one.flr(hidden).losses.items()}
    assert [float(losses[k]) for k in ("orthogonality", "diversity", "sparsity")] == [0, 0, 0]
    many = patched_model(sparsity_target="attention").eval()
    single = torch.zeros(3, 6, dtype=torch.bool)
    single[:, 2] = True
    out = many.flr(hidden, single)
    assert float(out.losses["sparsity"].detach()) == 0  # one valid token
    torch.testing.assert_close(out.losses["diversity"], torch.ones(()))  # every factor looks at it
    nothing = many.flr(hidden, torch.zeros(3, 6, dtype=torch.bool))
    assert float(nothing.thought.detach().abs().max()) == 0
    with torch.no_grad():
        even = patched_model().eval()
        even.flr.gate.zero_()
        even.flr.gate_factor.zero_()
        torch.testing.assert_close(even.flr(hidden).losses["sparsity"], torch.ones(()))
        even.flr.output.copy_(even.flr.output[:1].expand_as(even.flr.output))
        even.flr.value.copy_(even.flr.value[:1].expand_as(even.flr.value))
        even.flr.key.zero_()
        assert even.flr(hidden).losses["orthogonality"] > 0.99  # same contribution from every factor


def test_dropout_acts_on_the_thought_in_training_only():
    model = patched_model(dropout=0.5).eval()
    inputs = supervised_batch("left")
    a, b = model(**inputs).loss, model(**inputs).loss
    assert torch.equal(a, b)
    model.train()
    assert not torch.equal(model(**inputs).loss, model(**inputs).loss)


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


@pytest.mark.parametrize("variant", ["flr", "latentr3", "anchor", "none"])
def test_save_and_load(tmp_path, variant):
    model = patched_model("qwen2", variant=variant, num_thoughts=2).eval()
    inputs = supervised_batch("right", 0 if variant == "none" else 2)
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    loaded = flr.from_pretrained(tmp_path)
    assert loaded._flr_patch.config == model._flr_patch.config
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
    half = flr.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in reasoner_parameters(half)} <= {torch.float32}


def test_loading_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(OSError, match=r"directory: expected a folder with config\.json"):
        flr.from_pretrained(tmp_path / "nothing")
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="key 'flr'"):
        flr.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"attention\.query"):
        flr.load_latentr3(tmp_path / "plain")
    patched_model().eval().save_pretrained(tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    del weights["flr.gate"]
    save_file(weights, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit(.|\n)*gate"):
        flr.from_pretrained(tmp_path / "ours")


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
        model(input_ids=torch.tensor([[7, THOUGHT]]), past_key_values=first.past_key_values)


def test_latentr3_checkpoint(tmp_path):
    """A Qwen2 state dict plus attention.{query,key,value}; its formula written out for one user at a time."""
    backbone = tiny_model("qwen2", tie_word_embeddings=False)
    size, thought = HIDDEN, VOCAB - 1
    layers = {name: torch.nn.Linear(size, size) for name in ("query", "key", "value")}
    extra = {f"attention.{n}.{p}": v for n, layer in layers.items() for p, v in layer.state_dict().items()}
    backbone.save_pretrained(tmp_path)
    save_file({**load_file(tmp_path / "model.safetensors"), **extra}, tmp_path / "model.safetensors", {"format": "pt"})
    model = flr.load_latentr3(tmp_path)

    def rotate(x):  # [n, D]: complex numbers (x_i, x_{i + D/2}) turned by position × 1000^(-2i/D)
        half = size // 2
        z = torch.complex(x[:, :half].double(), x[:, half:].double())
        angle = torch.arange(len(x))[:, None] * 1000 ** (-2 * torch.arange(half).double() / size)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], 1).float()

    for prompt in ([7, 8, 9, 10, 11], [12]):
        ids = torch.tensor([[*prompt, thought, 20]])
        with torch.no_grad():
            hidden = backbone.eval().model(input_ids=ids[:, : len(prompt)]).last_hidden_state[0]
            query, key = rotate(layers["query"](hidden)), rotate(layers["key"](hidden))
            weights = torch.softmax(query[-1] @ key.T / math.sqrt(size), -1)
            expected = weights @ layers["value"](hidden)
            padded = torch.nn.functional.pad(ids, (3, 0))
            out = model(input_ids=padded, attention_mask=(padded != 0).long())
        torch.testing.assert_close(out.flr.thought[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.flr.attention[0, 0, 0, 3:], weights, rtol=1e-4, atol=1e-6)
        embeds = backbone.get_input_embeddings()(ids)
        embeds[0, len(prompt)] = expected
        torch.testing.assert_close(out.logits[0, 3:], backbone(inputs_embeds=embeds).logits[0], rtol=1e-4, atol=1e-4)


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
        (lambda: flr.patch_model(tiny_model()), "tokenizer: expected a tokenizer or config.thought_token_id"),
        (
            lambda: flr.patch_model(tiny_model().model, config=flr.FLRConfig(thought_token_id=1)),
            "decoder-only",
        ),
        (lambda: flr.unpatch_model(tiny_model()), "expected a patched model"),
        (lambda: flr.patch_model(patched_model().eval()), "expected an unpatched model"),
        (lambda: flr.FLRConfig(variant="cot"), "variant: expected one of flr, latentr3, anchor, none"),
        (lambda: flr.FLRConfig(num_factors=17), "num_factors: expected 1 to 16, got 17"),
        (lambda: flr.FLRConfig(dropout=1.0), "dropout"),
        (lambda: flr.FLRConfig.from_dict({"k": 4}), "unknown option k"),
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
        def forward(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            out.logits = out.logits.sin()
            return out

    model.__class__ = Odd
    with pytest.raises(ValueError, match="this architecture is not supported"):
        flr.patch_model(model, config=flr.FLRConfig(thought_token_id=THOUGHT))
    assert not flr.is_patched(model)
    assert not hasattr(model, "flr")
