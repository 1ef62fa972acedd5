"""A batch without thought tokens gets them, and the caller's columns, masks, positions and cache stay the caller's."""

import logging

import pytest
import torch

import flr
from flr.model import backbone
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import FAMILIES, HIDDEN, THOUGHT, VOCAB, patched_model, tiny_model, wake

LAYOUTS = ("left", "right", "columns")


def one_line(family="llama", **options):
    """A model as ``flr.patch_model(model)`` leaves it, with a thought that matters."""
    model = flr.patch_model(tiny_model(family), **options)
    if model.config.flr["variant"] == "flr":
        wake(model)
    return model


def by_hand(model, inputs):
    """The same batch with the thought tokens in it, and for each of the caller's columns where it went.

    Written row by row on purpose: nothing of this is shared with what it checks.
    """
    config = model._flr_patch.config
    count, longer, went = config.num_thoughts, [], []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        real = mask.nonzero()[:, 0].tolist()
        labelled = [j for j in real[1:] if labels[j] != -100]
        place = labelled[0] if labelled else real[-1] + 1
        thought = torch.full((count,), config.thought_token_id)
        longer.append(
            (
                torch.cat([ids[:place], thought, ids[place:]]),
                torch.cat([mask[:place], torch.ones_like(thought), mask[place:]]),
                torch.cat([labels[:place], torch.full_like(thought, -100), labels[place:]]),
            )
        )
        went.append([j if j < place - 1 else j + count for j in range(len(ids))])
    ids, mask, labels = (torch.stack(column) for column in zip(*longer, strict=True))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, torch.tensor(went)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inserted_thoughts_equal_those_brought_by_hand(family, layout):
    model = one_line(family, num_thoughts=2)
    inputs = supervised_batch(layout, rows_without=4)
    inputs["labels"][3] = -100  # a row that is all prompt
    longer, went = by_hand(model, inputs)
    expected = model(**longer, skip_logits=False)
    out = model(**inputs)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    rows = torch.arange(4)[:, None]
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[seen], expected.logits[rows, went][seen], rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients_of(model, out.loss), gradients_of(model, expected.loss), 1e-5)
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert states.shape == (*seen.shape, HIDDEN)
    # and it is not the loss of the model without a thought
    assert (model(**inputs, insert_thought=False).loss - out.loss).abs() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_and_positions_of_the_callers_own(layout):
    model = one_line("gpt2", num_thoughts=2).eval()
    inputs = supervised_batch(layout, rows_without=4)
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    torch.testing.assert_close(model(inputs_embeds=embeds, **rest).loss, expected.loss)
    columns = torch.arange(inputs["input_ids"].shape[1]).expand(inputs["input_ids"].shape)
    torch.testing.assert_close(model(**inputs, position_ids=columns).logits, expected.logits)
    moved = model(**inputs, position_ids=columns + 3).logits
    assert (moved - expected.logits).abs().max() > 1e-3


def own_loop(model, ids, mask, steps, positions, cache_length=False, masked=True):
    """Logits of the loop that users write: a prefill, then one token at a time; they count their own tokens."""
    last = mask.sum(1) - 1 if not mask[:, -1].all() else torch.full((len(ids),), ids.shape[1] - 1)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, **({"position_ids": place} if positions else {}))
    logits = [out.logits[torch.arange(len(ids)), last]]
    for _ in range(steps - 1):
        chosen = logits[-1].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        given = {"position_ids": mask.cumsum(1)[:, -1:] - 1} if positions else {}
        if cache_length:
            given["position_ids"] = torch.full((len(ids), 1), out.past_key_values.get_seq_length())
        out = model(
            input_ids=chosen[:, None],
            attention_mask=mask if masked and not cache_length else None,
            past_key_values=out.past_key_values,
            **given,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize(
    ("family", "side"),  # a sliding window counts padding too: gemma2 on the right differs without us
    [(f, s) for f in ("llama", "gpt2", "gemma2") for s in ("left", "right", "none") if (f, s) != ("gemma2", "right")],
)
def test_a_loop_of_ones_own_equals_one_row_at_a_time(family, side):
    model = one_line(family, num_thoughts=2).eval()
    lengths = [6, 6, 6] if side == "none" else [6, 3, 5]
    prompts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    pads = [(6 - n, 0) if side == "left" else (0, 6 - n) for n in lengths]
    ids = torch.stack([torch.nn.functional.pad(p, pad) for p, pad in zip(prompts, pads, strict=True)])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), x) for p, x in zip(prompts, pads, strict=True)])
    with torch.no_grad():
        together = own_loop(model, ids, mask, 4, positions=True)
        for row, prompt in zip(together, prompts, strict=True):
            one = torch.ones_like(prompt)[None]
            greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
            given = model.generate(prompt[None], **greedy, output_logits=True, return_dict_in_generate=True)
            expected = torch.cat(given.logits)
            assert row.argmax(-1).tolist() == given.sequences[0, len(prompt) :].tolist()
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
            for positions, options in ((False, {}), (False, {"cache_length": True}), (True, {"masked": False})):
                alone = own_loop(model, prompt[None], one, 4, positions, **options)[0]
                torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_with_a_thought_and_one_with_insertion_off_are_left_alone():
    model = one_line().eval()
    token = model._flr_patch.config.thought_token_id
    assert token == VOCAB
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 1
    ids = torch.tensor([[5, 6, 7, token], [5, 6, 7, 8]])
    out = model(input_ids=ids)
    assert out.flr.has_thought.tolist() == [True, False]
    off = flr.patch_model(tiny_model(), insert_thought=False).eval()
    plain = tiny_model().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(off(input_ids=ids).logits[..., :VOCAB], plain(input_ids=ids).logits)
    assert off(input_ids=ids, insert_thought=True).flr is not None
    assert model(input_ids=ids, insert_thought=False).logits.shape == (1, 4, VOCAB + 1)


def test_what_cannot_be_done_right_is_refused():
    model = one_line()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    labels = torch.tensor([[-100, -100, 7, -100, 9, 10]])
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    cases = {
        "packed": {"labels": labels, "position_ids": packed},
        "cu_seq_lens_q": {"labels": labels, "cu_seq_lens_q": torch.tensor([0, 3, 6])},
        "attention_mask": {"labels": labels, "attention_mask": torch.ones(1, 1, 6, 6)},
        "labels: expected": {},
        "shift_labels": {"shift_labels": labels},
        "token_type_ids": {"labels": labels, "token_type_ids": torch.zeros_like(ids)},
        "position_ids": {"labels": labels, "position_ids": packed.expand(3, 1, 6)},
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, **given)
    padded = torch.tensor([[1, 1, 0, 1, 2, 3]])  # what generate gives to padding
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    model(input_ids=ids, labels=torch.tensor([[-100] * 5 + [3]]), position_ids=padded, attention_mask=mask)


def test_a_batch_that_leaves_no_position_for_the_thought_is_refused():
    full = torch.randint(3, VOCAB, (1, 128))  # as many as the models have positions
    model = one_line("gpt2").eval()
    with pytest.raises(ValueError, match="expected at most 127 tokens, since the model has 128 positions"):
        model(input_ids=full)
    assert model(input_ids=full[:, :127]).logits.shape[1] == 127
    assert one_line("llama").eval()(input_ids=full).logits.shape[1] == 128  # rotary positions go on


def test_labels_on_the_prompt_and_a_frozen_reasoner_are_said_once(caplog):
    ids = torch.tensor([[5, 6, 7, 8]])
    backbone.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="flr"):
        model = one_line()
        model(input_ids=ids, labels=ids)
        model(input_ids=ids, labels=ids)
        assert caplog.text.count("sees one token of the prompt") == 1
        model = one_line()
        model.flr.requires_grad_(False)
        model(input_ids=ids, labels=torch.tensor([[-100, -100, 7, 8]]))
    assert caplog.text.count("sees one token of the prompt") == 1
    assert caplog.text.count("the reasoner is frozen") == 1


def test_the_control_variants_are_inserted_too():
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, -100, 8]])
    model = one_line(variant="anchor")
    expected = model(
        input_ids=torch.tensor([[5, 6, 7, VOCAB, 8]]), labels=torch.tensor([[-100, -100, -100, -100, 8]])
    ).loss
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, expected)
    none = flr.patch_model(tiny_model(), variant="none")
    torch.testing.assert_close(none(input_ids=ids, labels=labels).loss, tiny_model()(input_ids=ids, labels=labels).loss)


def test_checkpointing_and_a_given_thought_start():
    model = patched_model()
    inputs = supervised_batch("columns", rows_without=4)
    expected = model(**inputs).loss
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(model.train()(**inputs).loss, expected, rtol=1e-5, atol=0)
    assert THOUGHT not in inputs["input_ids"]
