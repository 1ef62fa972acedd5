"""``generate`` of a model that was patched by one line: the caller never sees the thought."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextStreamer
from transformers.generation import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import flr
from flr.data import Catalogue, build_tokenizer
from tests.helpers.models import VOCAB, patched_model, tiny_model, wake

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
OPTIONS = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5}


def left_padded():
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture
def model():
    model = flr.patch_model(tiny_model(), num_thoughts=2)
    wake(model)
    with torch.no_grad():
        model.flr.rescale(3)
    return model.eval()


def with_thoughts(inputs, count=2):
    """The prompts with thought tokens behind them, by hand."""
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, count), value=VOCAB)
    return {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, count), value=1)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3, "use_cache": False},
        {"repetition_penalty": 1.3, "min_new_tokens": 2},
    ],
    ids=str,
)
def test_equal_to_prompts_with_thoughts_by_hand(model, options):
    inputs = left_padded()
    width = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, **OPTIONS, **options)
    expected = model.generate(**with_thoughts(inputs), **OPTIONS, **options)
    assert torch.equal(out[:, :width], inputs["input_ids"].repeat_interleave(len(out) // 3, 0))
    assert torch.equal(out[:, width:], expected[:, width + 2 :])
    plain = model.generate(**inputs, **OPTIONS, **options, insert_thought=False)
    assert not torch.equal(out, plain)


def test_without_a_cache_the_same_as_with_one(model):
    inputs = left_padded()
    assert torch.equal(model.generate(**inputs, **OPTIONS), model.generate(**inputs, **OPTIONS, use_cache=False))


def test_embeddings_as_prompts(model):
    inputs = left_padded()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    expected = model.generate(**inputs, **OPTIONS)
    new = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **OPTIONS)
    assert torch.equal(new, expected[:, inputs["input_ids"].shape[1] :])
    both = model.generate(**inputs, inputs_embeds=embeds, **OPTIONS)
    assert torch.equal(both, expected)
    one = model.generate(inputs_embeds=embeds[:1], **OPTIONS)
    assert torch.equal(one, model.generate(inputs["input_ids"][:1], **OPTIONS)[:, 4:])
    with pytest.raises(ValueError, match="use_cache: expected True"):
        model.generate(inputs_embeds=embeds, **OPTIONS, use_cache=False)
    mixture = flr.patch_model(tiny_model(), aggregation="mixture")
    with pytest.raises(ValueError, match="inputs_embeds: expected input_ids with aggregation mixture"):
        mixture.generate(inputs_embeds=embeds, **OPTIONS)


def test_lengths_count_the_callers_tokens(model):
    inputs = left_padded()
    options = {"do_sample": False, "eos_token_id": None}
    assert model.generate(**inputs, max_length=9, **options).shape[1] == 9
    assert model.generate(**inputs, generation_config=GenerationConfig(max_length=8, **options)).shape[1] == 8
    assert model.generate(**inputs, **options).shape[1] == 4 + 20  # the default of transformers: 20 new tokens
    model.generation_config.max_length = 7
    assert model.generate(**inputs, **options).shape[1] == 7
    everything = [t for t in range(VOCAB) if t != 5]  # nearly whatever comes ends it, but not before the least length
    assert model.generate(inputs["input_ids"][:1], max_length=20, min_length=8, eos_token_id=everything).shape[1] == 9


class Seen(LogitsProcessor):
    def __init__(self):
        self.tokens = []

    def __call__(self, input_ids, scores):
        self.tokens.append(input_ids.clone())
        return scores


class Stop(StoppingCriteria):
    def __init__(self):
        self.tokens = []

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] >= 7)


class Tokenizer:
    """As much of one as a streamer needs."""

    def decode(self, ids, **kwargs):
        return " ".join(map(str, torch.as_tensor(ids).reshape(-1).tolist())) + "\n"  # one token or several


def test_observers_see_the_callers_tokens_only(model, capsys):
    inputs = {k: v[:1] for k, v in left_padded().items()}
    processor, stop, asked = Seen(), Stop(), []

    def allowed(row, tokens):
        asked.append(tokens.clone())
        return list(range(VOCAB))

    out = model.generate(
        **inputs,
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        logits_processor=[processor],
        stopping_criteria=[stop],
        prefix_allowed_tokens_fn=allowed,
        streamer=TextStreamer(Tokenizer()),
    )
    assert out.shape[1] == 7
    for tokens in (*processor.tokens, *stop.tokens, *(row[None] for row in asked)):
        assert torch.equal(tokens, out[:, : tokens.shape[1]])
    assert [t.shape[1] for t in processor.tokens] == [4, 5, 6]
    assert capsys.readouterr().out.split() == [str(t) for t in out[0].tolist()]


def forbidden(last, first):
    return {"bad_words_ids": [[last, first]]}, [NoBadWordsLogitsProcessor([[last, first]])]


def biased(last, first):
    return {"sequence_bias": {(last, first): -50.0}}, [SequenceBiasLogitsProcessor({(last, first): -50.0})]


def not_again(last, first):
    return {"no_repeat_ngram_size": 2}, [NoRepeatNGramLogitsProcessor(2)]


@pytest.mark.parametrize("make", [forbidden, biased, not_again])
def test_options_that_read_tokens_see_the_last_of_the_prompt_before_the_answer(model, make):
    """As the same processors of the caller's own do: no thought stands between prompt and answer for them."""
    ids = left_padded()["input_ids"][:1]
    for _ in range(20):  # until the prompt begins with what would follow its end
        pair = torch.stack([ids[0, -1], model.generate(ids, **OPTIONS)[0, ids.shape[1]]])
        if torch.equal(ids[0, :2], pair):
            break
        ids = torch.cat([pair[None], ids[:, -2:]], 1)
    options, processors = make(*pair.tolist())
    plain, out = model.generate(ids, **OPTIONS), model.generate(ids, **OPTIONS, **options)
    assert out[0, 4] != plain[0, 4]
    assert torch.equal(out, model.generate(ids, **OPTIONS, logits_processor=processors))


def test_a_stop_string_may_begin_in_the_prompt():
    tokenizer = build_tokenizer(Catalogue(["x", "y"], ["Blue cups", "Green plates"]), "title")
    model = flr.patch_model(tiny_model(vocab_size=len(tokenizer)), tokenizer).eval()
    prompt = torch.tensor([tokenizer("Blue plates", add_special_tokens=False)["input_ids"]])
    length = prompt.shape[1]
    words = [i for token, i in tokenizer.get_vocab().items() if token.isalpha() and token.isascii()]
    options = {**OPTIONS, "suppress_tokens": [i for i in range(len(tokenizer)) if i not in words]}
    text = tokenizer.decode(model.generate(prompt, **options)[0, length - 1 : length + 1])
    stopped = model.generate(prompt, **options, stop_strings=[text], tokenizer=tokenizer)
    assert stopped.shape == (1, length + 1)


def test_guidance_begins_at_the_last_token_of_the_prompt(model):
    ids = left_padded()["input_ids"][:1]
    out = model.generate(ids, **OPTIONS, guidance_scale=3.0)
    guided = UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, model, unconditional_ids=ids[:, -1:])
    assert torch.equal(out, model.generate(ids, **OPTIONS, logits_processor=[guided]))
    assert not torch.equal(out, model.generate(ids, **OPTIONS))


def test_guidance_without_a_cache_is_refused(model):
    with pytest.raises(ValueError, match="guidance_scale: expected 1 without a cache"):
        model.generate(left_padded()["input_ids"], **OPTIONS, guidance_scale=3.0, use_cache=False)


def test_a_dictionary_of_results_and_its_cache(model):
    inputs = {k: v[:1] for k, v in left_padded().items()}
    options = {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(**inputs, **OPTIONS, **options)
    longer = model.generate(**inputs, **{**OPTIONS, "max_new_tokens": 6})
    assert out.sequences.shape[1] == 9
    assert len(out.scores) == 5
    mask = torch.ones_like(out.sequences)
    following = model(out.sequences[:, -1:], attention_mask=mask, past_key_values=out.past_key_values)
    assert following.logits[0, -1].argmax() == longer[0, -1]


def test_what_would_leave_the_thought_out_is_refused(model):
    inputs = left_padded()
    first = model(**inputs, use_cache=True)
    cases = {
        "prefill_chunk_size": {"prefill_chunk_size": 2},
        "assistant_model": {"assistant_model": tiny_model()},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
        "past_key_values": {"past_key_values": first.past_key_values},
        "position_ids": {"position_ids": torch.zeros_like(inputs["input_ids"])},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **OPTIONS, **options)
        if message != "position_ids":  # with thoughts of the caller's own as well
            with pytest.raises(ValueError, match=message):
                model.generate(**with_thoughts(inputs), **OPTIONS, **options)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_static_cache_holds_prompt_and_thoughts_in_its_window_or_is_refused(family):
    model = flr.patch_model(tiny_model(family), num_thoughts=2, init_scale=1.0).eval()
    inputs = left_padded()  # four tokens and two thoughts, as many as the window
    static = model.generate(**inputs, **OPTIONS, cache_implementation="static")
    assert torch.equal(static, model.generate(**inputs, **OPTIONS))
    longer = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], 1)
    with pytest.raises(ValueError, match=r"cache_implementation: expected a dynamic cache .* of 7 tokens"):
        model.generate(longer, **OPTIONS, cache_implementation="static")
    assert model.generate(longer, **OPTIONS, cache_implementation="static", use_cache=False).shape == (3, 10)


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="generate_batch: expected generate for a model with a thought"):
        model.generate_batch(inputs=[[5, 6]], generation_config=GenerationConfig(max_new_tokens=1))
    plain = flr.patch_model(tiny_model(), variant="none")
    assert plain.init_continuous_batching(GenerationConfig(max_new_tokens=1, eos_token_id=2)) is not None


def test_peft_and_the_pipeline_go_through_it():
    peft = pytest.importorskip("peft")
    model = patched_model("qwen2").eval()
    inputs = left_padded()
    expected = model.generate(**inputs, **OPTIONS)
    lora = peft.LoraConfig(target_modules="all-linear", modules_to_save=["flr"], r=4, task_type="CAUSAL_LM")
    assert torch.equal(peft.get_peft_model(model, lora).eval().generate(**inputs, **OPTIONS), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_padding_behind_a_prompt_is_refused(model, masked):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = {"attention_mask": (ids != 0).long()} if masked else {}
    with pytest.raises(ValueError, match=r"attention_mask: expected padding on the left .* right of row 1"):
        model.generate(ids, **mask, **OPTIONS)
    model.generate(ids, **mask, **OPTIONS, insert_thought=False)  # as it was


@pytest.mark.parametrize("where", ["keyword", "config"])
def test_tokens_that_the_caller_suppresses_leave_the_thought_suppressed(model, where):
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB] = 50 * model.get_output_embeddings().weight[7]
    given = {"suppress_tokens": [7]}
    given = given if where == "keyword" else {"generation_config": GenerationConfig(**given)}
    out = model.generate(**left_padded(), max_new_tokens=20, do_sample=True, eos_token_id=None, **given)
    assert not torch.isin(out[:, 4:], torch.tensor([7, VOCAB])).any()
