"""Processor and collator against a plain per-row construction; padding, bounds, saving."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flr.data import (
    CSR,
    Catalogue,
    Interaction,
    Interactions,
    PromptTemplate,
    RecProcessor,
    SFTCollator,
    build_tokenizer,
)
from tests.helpers.catalogues import DATA

TITLES = ["Kind of Blue", "Blue Train", "Blue Train", "A Love Supreme", "", "Ü & <b>", "Giant Steps", "Time Out"]
SIDS = [(f"<a_{n % 2}>", f"<b_{n % 3}>", f"<c_{n % 2}>") for n in range(8)]
CATALOGUE = Catalogue([f"id{n}" for n in range(8)], TITLES, SIDS)
HISTORIES = st.lists(st.lists(st.integers(0, 7), max_size=6), min_size=1, max_size=5)


def make(codec="title", **options) -> RecProcessor:
    template = options.get("template")
    texts = list(template.parts) if template else None
    return RecProcessor(build_tokenizer(CATALOGUE, codec, vocab_size=320, texts=texts), CATALOGUE, codec, **options)


PROCESSORS = {
    "title": make("title"),
    "title-separated": make(
        "title", template=PromptTemplate("Heard: {history}. Next:", separator=" ; "), num_thoughts=2, max_history=3
    ),
    "title-bounded": make(
        "title", template=PromptTemplate("{history}!", separator=", ", bos=False), max_prompt_tokens=24
    ),
    "sid": make("sid", max_history=4),
    "id": make("id", num_thoughts=0),
    "id-three-thoughts": make("id", num_thoughts=3, max_history=2, max_prompt_tokens=6),
}


def plain_prompt(processor: RecProcessor, history: list[int]) -> tuple[list[int], list[int]]:
    """Tokens of one prompt and the history entry of each, by the words of the documentation."""
    tokenizer, template = processor.tokenizer, processor.template
    before, after = template.parts
    head = [tokenizer.bos_token_id] * template.bos + (tokenizer(before).input_ids if before else [])
    tail = (tokenizer(after).input_ids if after else []) + [processor.thought_token_id] * processor.num_thoughts
    separator = tokenizer(template.separator).input_ids if template.separator else []
    first = max(0, len(history) - processor.max_history)
    while True:
        body, entries = [], []
        for entry in range(first, len(history)):
            gap = separator if entry > first else []
            item = processor.item_codec.encode(history[entry])
            body += gap + item
            entries += [-1] * len(gap) + [entry] * len(item)
        tokens = head + body + tail
        if processor.max_prompt_tokens is None or len(tokens) <= processor.max_prompt_tokens:
            return tokens, [-1] * len(head) + entries + [-1] * len(tail)
        first += 1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PROCESSORS)), HISTORIES)
def test_batch_equals_plain_prompts(name, histories):
    processor = PROCESSORS[name]
    batch = processor(histories)
    prompts = [plain_prompt(processor, history) for history in histories]
    width = max(len(tokens) for tokens, _ in prompts)
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "position_ids": torch.int64,
        "item_positions": torch.int64,
        "reasoner_mask": torch.bool,
    }
    for row, (tokens, entries) in enumerate(prompts):
        pad = width - len(tokens)
        assert batch["input_ids"][row].tolist() == [processor.pad_token_id] * pad + tokens
        assert batch["attention_mask"][row].tolist() == [0] * pad + [1] * len(tokens)
        assert batch["position_ids"][row].tolist() == [0] * pad + list(range(len(tokens)))
        assert batch["item_positions"][row].tolist() == [-1] * pad + entries
        assert batch["reasoner_mask"][row].tolist() == [False] * pad + [entry >= 0 for entry in entries]
    if processor.num_thoughts:
        assert (batch["input_ids"][:, -processor.num_thoughts :] == processor.thought_token_id).all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(PROCESSORS)), HISTORIES, st.data())
def test_collated_rows_are_prompt_then_target(name, histories, data):
    processor = PROCESSORS[name]
    targets = data.draw(st.lists(st.integers(0, 7), min_size=len(histories), max_size=len(histories)))
    rows = [
        Interaction("u", np.array(history, np.int32), target)
        for history, target in zip(histories, targets, strict=True)
    ]
    batch = SFTCollator(processor)(rows)
    prompt = processor(histories)
    width = prompt["input_ids"].shape[1]
    for key, value in prompt.items():
        assert torch.equal(batch[key][:, :width], value), key
    longest = max(len(processor.item_codec.encode(target)) for target in targets)
    assert batch["input_ids"].shape == batch["labels"].shape == (len(rows), width + longest)
    assert (batch["labels"][:, :width] == -100).all()
    for row, target in enumerate(targets):
        tokens = processor.item_codec.encode(target)
        pad = longest - len(tokens)
        last = int(prompt["position_ids"][row, -1])
        assert batch["input_ids"][row, width:].tolist() == tokens + [processor.pad_token_id] * pad
        assert batch["labels"][row, width:].tolist() == tokens + [-100] * pad
        assert batch["attention_mask"][row, width:].tolist() == [1] * len(tokens) + [0] * pad
        assert batch["position_ids"][row, width:].tolist() == [last + 1 + n for n in range(len(tokens))] + [0] * pad
        assert (batch["item_positions"][row, width:] == -1).all()
        assert not batch["reasoner_mask"][row, width:].any()


def test_rows_do_not_depend_on_the_batch():
    processor = PROCESSORS["title"]
    histories = [[0, 1, 2, 3, 4, 5, 6], [], [7], [5, 5]]
    together = processor(histories)
    for row, history in enumerate(histories):
        alone = processor([history])
        width = alone["input_ids"].shape[1]
        for key, value in alone.items():
            assert torch.equal(together[key][row, -width:], value[0]), key


def test_forms_of_histories():
    processor = PROCESSORS["sid"]
    lists = [[1, 2], [3]]
    rows = Interactions(["u", "v"], lists, [0, 0])
    for same in ([np.array(history) for history in lists], CSR.from_rows(lists), rows, [tuple(h) for h in lists]):
        for key, value in processor(lists).items():
            assert torch.equal(processor(same)[key], value)


def test_item_positions_count_from_the_history_as_given():
    processor = make("id", max_history=3)
    assert processor([[0, 1, 2, 3, 4]])["item_positions"].tolist() == [[-1, 2, 3, 4, -1]]


def test_default_templates():
    assert PROCESSORS["id"].template == PromptTemplate()
    text = PROCESSORS["title"].tokenizer.decode(PROCESSORS["title"]([[0]])["input_ids"][0])
    assert text == (
        "<|bos|>A customer has chosen these items, from the earliest to the latest:\nKind of Blue<|item_end|>\n"
        "The item chosen next is:\n<|thought|>"
    )
    for bad in ("no place", "{history}{history}"):
        with pytest.raises(ValueError, match="placeholder"):
            PromptTemplate(bad)


def test_tokenizer_without_pad_and_bos_uses_eos():
    backend = Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    processor = RecProcessor(tokenizer, CATALOGUE)
    assert tokenizer.pad_token_id is None
    batch = processor([[], [3]])
    assert batch["input_ids"][0, :2].tolist() == [0, 0]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    with pytest.raises(ValueError, match="the prompt of an empty history has a token"):
        RecProcessor(bare, CATALOGUE)


def test_thought_token_need_not_be_last_and_is_kept():
    tokenizer = build_tokenizer(CATALOGUE, "title", vocab_size=320)
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens(["<later>"])
    processor = RecProcessor(tokenizer, CATALOGUE, "title", thought_token="<think>")
    assert processor.thought_token_id == tokenizer.convert_tokens_to_ids("<think>") < len(tokenizer) - 1
    none = make("id", num_thoughts=0)
    assert none.thought_token_id is None
    assert "<|thought|>" not in none.tokenizer.get_vocab()


@pytest.mark.parametrize("name", sorted(PROCESSORS))
@pytest.mark.parametrize("model", [None, "Qwen2Config", "LlamaConfig", "GPT2Config"])
def test_save_and_load(tmp_path, name, model):
    """Also beside a model's config.json, by which AutoTokenizer would rebuild the tokenizer as that model's own."""
    processor = PROCESSORS[name]
    if model:
        getattr(transformers, model)().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = RecProcessor.from_pretrained(tmp_path)
    histories = [[0, 1, 2, 3, 4, 5], [], [7]]
    for key, value in processor(histories).items():
        assert torch.equal(loaded(histories)[key], value)
    assert loaded.catalogue == processor.catalogue
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.codec == processor.codec
    for attribute in ("template", "max_history", "num_thoughts", "thought_token_id", "max_prompt_tokens"):
        assert getattr(loaded, attribute) == getattr(processor, attribute)
    loaded.save_pretrained(tmp_path)  # over itself
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert not list(tmp_path.glob("*.p*k*l*"))


def test_loading_refuses_files_that_do_not_belong_together(tmp_path):
    PROCESSORS["title"].save_pretrained(tmp_path)
    Catalogue(["x"], ["Other"]).save(tmp_path / "catalogue.parquet")
    with pytest.raises(ValueError, match="expected tokenizer and catalogue of this"):
        RecProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a JSON file"):
        RecProcessor.from_pretrained(tmp_path / "nowhere")


def test_prompts_keep_to_the_positions_of_a_model(tmp_path, caplog):
    processor, free = make("title"), make("title")
    longest = int(processor.item_codec.lengths.max())
    fixed = free([[]])["input_ids"].shape[1]
    processor.fit_positions(None)
    assert processor.prompt_limit is None
    processor.fit_positions(fixed + 3 * longest)
    assert processor.prompt_limit == fixed + 2 * longest
    histories = [[0, 1, 2, 3, 4, 5, 6], [7], [], [3, 3, 3]]
    with caplog.at_level("WARNING", logger="flr"):
        batch, whole = processor(histories), free(histories)
        processor(histories)
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # said once
    lost = [sum(p not in b.tolist() for p in range(len(h)))
            for h, b in zip(histories, batch["item_positions"], strict=True)]  # fmt: skip
    assert lost[0] > 0
    assert lost[1:3] == [0, 0]
    assert f"{sum(lost)} of 11 items are left out" in caplog.text
    assert processor.items_left_out == 2 * sum(lost)
    for row, history in enumerate(histories):  # exactly the latest items that fit
        alone = free([history[lost[row] :]])["input_ids"]
        assert alone.shape[1] <= processor.prompt_limit
        assert batch["input_ids"][row, -alone.shape[1] :].tolist() == alone[0].tolist()
        if lost[row]:
            assert free([history[lost[row] - 1 :]])["input_ids"].shape[1] > processor.prompt_limit
    assert batch["input_ids"].shape[1] < whole["input_ids"].shape[1]
    processor.save_pretrained(tmp_path)
    loaded = RecProcessor.from_pretrained(tmp_path)
    assert (loaded.max_positions, loaded.max_prompt_tokens) == (fixed + 3 * longest, None)
    assert torch.equal(loaded(histories)["input_ids"], batch["input_ids"])
    loaded.fit_positions(fixed + 9 * longest)  # the smallest that was ever given holds
    assert loaded.prompt_limit == processor.prompt_limit
    with pytest.raises(ValueError, match=rf"max_prompt_tokens: expected at most {fixed + 2 * longest} .* got 999"):
        loaded.bound_prompts(999)
    wanted = make("title", max_prompt_tokens=999)
    with pytest.raises(ValueError, match="max_prompt_tokens: expected at most"):
        wanted.fit_positions(fixed + 3 * longest)
    assert wanted.max_positions is None
    with pytest.raises(ValueError, match=rf"positions of the model: expected at least {fixed + longest} \({fixed} for"):
        free.fit_positions(fixed + longest - 1)
    free.fit_positions(fixed + longest)  # room for the text and the next item, and for no history
    assert free(histories)["item_positions"].max() == -1


@pytest.mark.parametrize("name", ["title", "sid", "id"])
def test_another_order_of_the_catalogue_is_refused(tmp_path, name):
    """It has the same size, tokens and vocabulary, and would give every item another's name."""
    PROCESSORS[name].save_pretrained(tmp_path)
    order = [1, 0, *range(2, 8)]
    ids, titles, sids = ([values[i] for i in order] for values in (CATALOGUE.item_ids, TITLES, SIDS))
    Catalogue(ids, titles, sids).save(tmp_path / "catalogue.parquet")
    with pytest.raises(ValueError, match=r"expected the catalogue of this processor_config\.json, got another one"):
        RecProcessor.from_pretrained(tmp_path)


def swapped(vocabulary):
    """A vocabulary in which two items' tokens have each other's id."""
    one, two = (next(t for t in vocabulary if str(n) in t and len(t) > 3) for n in (0, 1))
    return {**vocabulary, one: vocabulary[two], two: vocabulary[one]}


@pytest.mark.parametrize("name", ["id", "sid"])
def test_another_tokenizer_is_refused(tmp_path, name):
    PROCESSORS[name].save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = swapped(content["model"]["vocab"])
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected the vocabulary of this processor_config\.json, got another one"):
        RecProcessor.from_pretrained(tmp_path)


def test_a_folder_without_digests_loads(tmp_path):
    """As version 0.1 wrote it."""
    PROCESSORS["id"].save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in ("digests", "max_positions")}))
    assert RecProcessor.from_pretrained(tmp_path).digests() == config["digests"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": None}, "name: expected one of"),
        (
            {"template": {"text": "x" * 70000 + "{history}"}},
            "text: expected text of at most 65536 characters, got 70009",
        ),
        ({"template": {"text": "{history}", "bos": "no"}}, "bos: expected True or False, got 'no'"),
        ({"template": {"colour": 1}}, "expected the settings of a processor, got TypeError"),
        ({"max_history": 1e300}, "max_history: expected a whole number"),
        ({"max_history": 10**30}, "max_history: expected at most 2147483647, got 1000"),
        ({"max_history": True}, "max_history: expected a whole number"),
        ({"num_thoughts": 10**9}, "num_thoughts: expected at most 1024, got 1000000000"),
        ({"max_positions": "64"}, "max_positions: expected a whole number"),
        ({"max_prompt_tokens": []}, "max_prompt_tokens: expected a whole number"),
        ({"views": {"weight": "0.5"}}, "weight: expected a number in 0..1, got '0.5'"),
        ({"thought_token": 3}, "thought_token: expected text, got 3"),
        ({"scoring": "best"}, "scoring: expected"),
        ({"version": 2}, "expected version 1, got 2"),
        ({"digests": [1]}, "expected the catalogue of this"),
    ],
)
def test_damaged_settings_name_the_file(tmp_path, change, message):
    PROCESSORS["id"].save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        RecProcessor.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_errors():
    processor = PROCESSORS["title"]
    with pytest.raises(ValueError, match="histories: expected at least one"):
        processor([])
    with pytest.raises(ValueError, match=r"histories: expected item indices in 0\.\.7, got 8\.\.8"):
        processor([[8]])
    with pytest.raises(ValueError, match=r"histories: expected item indices in 0\.\.7, got -1"):
        processor([[-1, 3]])
    with pytest.raises(ValueError, match=r"rows\[0\]: expected integers"):
        processor([["Blue Train"]])
    with pytest.raises(ValueError, match="max_history: expected at least 1, got 0"):
        make("id", max_history=0)
    with pytest.raises(ValueError, match="num_thoughts: expected at least 0, got -1"):
        make("id", num_thoughts=-1)
    with pytest.raises(ValueError, match=r"max_prompt_tokens: expected at least 3 .* got 2"):
        make("id", max_prompt_tokens=2)
    with pytest.raises(ValueError, match="template: expected text that the tokenizer can express, got 'Next'"):
        make("id", template=PromptTemplate("{history}Next"))
    collator = SFTCollator(processor)
    with pytest.raises(ValueError, match="rows: expected at least one"):
        collator([])
    with pytest.raises(ValueError, match=r"rows: expected targets in 0\.\.7, got 9\.\.9"):
        collator([Interaction("u", np.array([1]), 9)])


@pytest.mark.parametrize("codec", ["title", "sid", "id"])
@pytest.mark.parametrize("bound", [None, 26])
def test_lengths_are_those_of_the_prompts(codec, bound):
    catalogue = DATA.catalogue
    tokenizer = build_tokenizer(catalogue, codec, vocab_size=400)
    template = PromptTemplate("{history} so", separator=", ") if codec == "title" else None
    processor = RecProcessor(tokenizer, catalogue, codec, template, 4, num_thoughts=2, max_prompt_tokens=bound)
    histories = CSR.from_rows([[], [1], [3, 3, 5], *([row.history for row in DATA.train])])
    expected = processor.prompts(histories).tokens.lengths
    assert processor.prompt_lengths(histories).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 3
    assert processor.prompt_lengths(CSR.from_rows([])).tolist() == []
