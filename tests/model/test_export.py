"""The exported program gives what the model gives, for any batch and length, without this package."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

import flr
from flr.cli import main
from flr.decode import beam_search
from flr.decode.numpy_decoder import decode, load_trie
from flr.model.backbone import cache_argument, cache_of
from flr.model.export import INPUTS, OUTPUTS, export_prompt
from tests.helpers.models import THOUGHT, build_recommender, patched_model, tiny_model

#: 0 and 1 are sizes that a trace treats apart; the others are not those of the trace.
SIZES = [(1, 1), (1, 7), (4, 1), (3, 11), (7, 29)]
CASES = {
    "two thoughts": ("llama", {"num_thoughts": 2, "num_refinements": 2, "anchor": "last"}),
    "learned positions": ("gpt2", {"anchor": "none"}),
    "rotary factor": ("qwen2", {"variant": "latentr3"}),
    "window": ("mistral", {"variant": "offsets"}),
}


def patched(family, options):
    if family != "mistral":
        return patched_model(family, **options).eval()
    model = tiny_model(family, sliding_window=32)  # so that 29 tokens and a thought are all that it sees
    return flr.patch_model(model, config=flr.FLRConfig(thought_token_id=THOUGHT, **options)).eval()


def prompts(batch, length, seed):
    """Ids, mask and the tokens that factors see; rows of even number are padded, a row has nothing to attend to."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (batch, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[::2, : length // 2] = 0
    narrowed = mask.bool() & (torch.rand(batch, length, generator=draw) < 0.6)
    narrowed[0] = False
    return ids, mask, narrowed


@torch.no_grad()
def expected(model, ids, mask, narrowed):
    """Of the model's own forward: the thoughts without their anchor, logits, keys and values."""
    behind = (0, model._flr_patch.config.num_thoughts)
    longer = pad(mask, behind, value=1)
    out = model(
        input_ids=pad(ids, behind, value=THOUGHT),
        attention_mask=longer,
        reasoner_mask=pad(narrowed, behind, value=False),
        position_ids=(longer.cumsum(1) - 1).clamp_min(0),
        use_cache=True,
    )
    layers = cache_of(out).layers
    thoughts = torch.stack([step.thought for step in out.flr.steps], 1)
    return thoughts, out.logits[:, -1], [x.keys for x in layers], [x.values for x in layers], longer


@pytest.mark.parametrize("name", CASES)
def test_any_batch_and_length(name):
    family, options = CASES[name]
    model = patched(family, options)
    run = export_prompt(model).module()
    for seed, (batch, length) in enumerate(SIZES):
        inputs = prompts(batch, length, seed)
        thoughts, logits, keys, values, mask = expected(model, *inputs)
        with torch.no_grad():
            got = run(*inputs)
        assert tuple(got) == OUTPUTS
        assert logits.abs().max() > 0.1
        torch.testing.assert_close(got["logits"], logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.get_output_embeddings()(got["hidden"]), logits, atol=1e-5, rtol=0)
        if options.get("anchor") == "none":
            torch.testing.assert_close(got["thoughts"], thoughts, atol=1e-5, rtol=0)
        seen = mask[:, None, :, None].bool()  # what stands on padding is nobody's
        for ours, theirs in zip([*got["keys"], *got["values"]], [*keys, *values], strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours * seen, theirs * seen, atol=1e-5, rtol=0)


def test_it_runs_where_neither_this_package_nor_transformers_is(tmp_path):
    """From files alone; a prompt that is too long is refused there."""
    model = patched_model("llama").eval()
    program = export_prompt(model, max_length=20)
    torch.export.save(program, tmp_path / "prompt.pt2")
    inputs = prompts(3, 17, 0)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys
for name in ("flr", "flr_kernels", "transformers"):
    sys.modules[name] = None
import torch
run = torch.export.load("prompt.pt2").module()
ids, mask, narrowed = torch.load("inputs.pt")
with torch.no_grad():
    torch.save(run(ids, mask, narrowed), "outputs.pt")
try:
    run(*(torch.cat([x, x], 1) for x in (ids, mask, narrowed)))
except AssertionError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "input_ids.size()[1] <= 20" in done.stdout
    got = torch.load(tmp_path / "outputs.pt")
    _, logits, keys, _, _ = expected(model, *inputs)
    torch.testing.assert_close(got["logits"], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(got["keys"][1][1], keys[1][1], atol=1e-5, rtol=0)  # a row without padding


def test_our_lists_from_the_files_and_a_plain_model(tmp_path, capsys):
    """``flr export``, the decoder in NumPy, and transformers' own model behind the exported keys and values."""
    recommender = build_recommender("sid", num_thoughts=2)
    model, processor = recommender.model, recommender.processor
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert (
        main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--json", "--device", "cpu"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"output": str(tmp_path / "out"), **json.loads((tmp_path / "out" / "export.json").read_text())}
    assert (facts["inputs"], facts["num_thoughts"], facts["items"]) == (list(INPUTS), 2, 40)
    assert facts["max_length"] == 126  # the model has 128 positions
    run = torch.export.load(tmp_path / "out" / "prompt.pt2").module()
    trie = load_trie(tmp_path / "out" / "trie.safetensors")
    plain = transformers.LlamaForCausalLM(model.config).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("flr.")})
    for history in ([3, 7, 9], [1] * 6):
        inputs = processor([np.array(history)])
        ours = beam_search(model, inputs, recommender.trie, 20, 10)
        ids = inputs["input_ids"][:, : -facts["num_thoughts"]]
        assert not (ids == facts["thought_token_id"]).any()
        with torch.no_grad():
            made = run(ids, torch.ones_like(ids), inputs["reasoner_mask"][:, : ids.shape[1]])

        def next_logits(paths, made=made):
            if paths == [[]]:
                return made["logits"].numpy()
            rows, cache = len(paths), DynamicCache()
            for layer, pair in enumerate(zip(made["keys"], made["values"], strict=True)):
                cache.update(*(x.expand(rows, -1, -1, -1) for x in pair), layer)
            with torch.no_grad():
                return plain(torch.tensor(paths), **cache_argument(plain, cache)).logits[:, -1].numpy()

        items, scores = decode(trie, next_logits, 20, 10)
        assert items == ours.items[0].tolist()
        np.testing.assert_allclose(scores, ours.scores[0].numpy(), atol=5e-5)


@pytest.mark.parametrize(
    ("options", "length", "told"),
    [
        (
            {},
            128,
            "max_length: expected more than 5 and at most 127, since the model has 128 positions, 1 for",
        ),
        ({}, 5, "max_length: expected more than 5 and at most 127.*got 5"),
        ({"variant": "none"}, None, "model: expected one with a thought, got LlamaForCausalLM without"),
        ({"aggregation": "mixture"}, None, "model: expected factors that add up to one thought, got aggregation 'mix"),
    ],
)
def test_what_is_refused(options, length, told):
    with pytest.raises(ValueError, match=told):
        export_prompt(patched_model("llama", **options).eval(), length)


def test_models_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model: expected one with a thought, got LlamaForCausalLM without"):
        export_prompt(tiny_model())
    window = flr.patch_model(tiny_model("mistral"), config=flr.FLRConfig(thought_token_id=THOUGHT))  # of 6
    with pytest.raises(ValueError, match="has 4 tokens before its layers' window moves, 1 for thoughts, got 3"):
        export_prompt(window)
    peft = pytest.importorskip("peft")
    model = patched_model("llama")
    adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["flr"]))
    with pytest.raises(ValueError, match=r"model: expected a whole model \(flr merge makes one\), got an adapter"):
        export_prompt(adapter)


def test_what_torch_cannot_trace_is_one_sentence(monkeypatch):
    model = patched_model("llama").eval()
    forward = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: forward(x * float(x.sum() > 0)))
    with pytest.raises(ValueError, match=r"model: expected one that torch\.export takes, got LlamaForCausalLM: "):
        export_prompt(model)
