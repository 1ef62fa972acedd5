"""Patched models saved and loaded, and checkpoints of LatentR3."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import flr
from flr.model.patch import reasoner_parameters
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import HIDDEN, VOCAB, patched_model, tiny_model


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
    with pytest.raises(ValueError, match=r"expected weights that fit the reasoner(.|\n)*gate"):
        flr.from_pretrained(tmp_path / "ours")


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
