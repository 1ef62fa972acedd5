"""What is trained is float32, what is not is held as it came, and bfloat16 computes where it can."""

from types import SimpleNamespace

import pytest
import torch

import flr
from flr.train.lora import LoraSettings, add_lora
from flr.train.precision import choose_autocast, dtype_to_load, raise_trained, trained_parameters
from tests.helpers.models import THOUGHT, tiny_model


@pytest.mark.parametrize(
    ("dtype", "trained", "gpu", "expected"),
    [
        ("auto", True, True, "float32"),
        ("auto", True, False, "float32"),
        ("auto", False, True, "auto"),
        ("auto", False, False, "float32"),
        ("bfloat16", False, False, "bfloat16"),
        ("float16", False, True, "float16"),
        ("float32", False, True, "float32"),
    ],
)
def test_what_weights_are_loaded_in(dtype, trained, gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert dtype_to_load(dtype, trained) == expected
    if (dtype, trained) == ("auto", False):
        assert dtype_to_load(dtype, trained, use_cpu=True) == "float32"


def test_trained_weights_are_not_half_in_silence(caplog):
    with pytest.raises(
        ValueError, match=r"dtype: expected float32 or bfloat16 for weights that are trained .*'float16'"
    ):
        dtype_to_load("float16", trained=True)
    with pytest.raises(ValueError, match="dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"):
        dtype_to_load("int8", trained=False)
    assert dtype_to_load("bfloat16", trained=True) == "bfloat16"
    assert "rounded away" in caplog.text


def test_only_what_is_trained_is_raised():
    model = tiny_model().to(torch.bfloat16).requires_grad_(False)
    model.lm_head.half().requires_grad_(True)
    value = model.lm_head.weight.clone()
    raise_trained(model)
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, value.float())
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "gpu", "expected"),
    [
        ({}, True, True),
        ({}, False, None),
        ({"bf16": False}, True, False),
        ({"fp16": True}, True, None),
        ({"use_cpu": True}, True, None),
    ],
)
def test_bfloat16_is_the_default_where_a_gpu_has_it(given, gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu)
    args = SimpleNamespace(
        **{"bf16": None, "fp16": False, "use_cpu": False, "deepspeed": None, "mixed_precision": "no", **given}
    )
    choose_autocast(args)
    assert args.bf16 == expected
    assert args.mixed_precision == ("bf16" if expected else "no")


def test_what_is_trained_is_said():
    model = flr.patch_model(
        tiny_model().to(torch.bfloat16), config=flr.FLRConfig(num_factors=2, thought_token_id=THOUGHT)
    )
    reasoner = sum(p.numel() for p in model.flr.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert trained_parameters(model) == (
        f"training {whole:,} of {whole:,} parameters (100.00 %): backbone {whole - reasoner:,} in bfloat16, "
        f"reasoner {reasoner:,} in float32"
    )
    text = trained_parameters(add_lora(model, LoraSettings(2, 4, targets=("q_proj",)), [5, THOUGHT]))
    # two layers, two thin matrices each: 32 · 2 and 2 · 32; two rows of 32 in either table
    assert "rows of tokens 128 in float32" in text
    assert "adapters 256 in float32" in text
    assert f"reasoner {reasoner:,} in float32" in text
    assert "backbone" not in text
