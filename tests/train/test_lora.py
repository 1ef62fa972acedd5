"""Adapters: what is trained beside them, what is saved, and that a run with them continues like any other."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import flr
from flr.data.codecs import END_TOKEN
from flr.model.backbone import causal_lm
from flr.train.lora import LoraSettings, add_lora, own_tokens, quantisation
from tests.helpers.models import THOUGHT, patched_model, tiny_model, trainable
from tests.helpers.processes import in_processes
from tests.helpers.training import sft_trainer

pytest.importorskip("peft")
SETTINGS = LoraSettings(rank=2, alpha=4.0)


def adapted(codec="id", folder=None, dtype=torch.float32, rank=2):
    """An adapter on a model whose base lies in ``folder``, so that it can be loaded again."""
    model, processor = trainable(codec)
    if folder is not None:
        model.to(dtype)
        model.flr.float()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model = flr.from_pretrained(folder)  # its buffers were not rounded
    base = None if folder is None else str(folder)
    return add_lora(model, LoraSettings(rank, alpha=4.0), own_tokens(processor), base), processor


@pytest.mark.parametrize("codec", ["id", "sid", "title"])
def test_own_tokens_are_those_that_stand_for_items(codec):
    _, processor = trainable(codec)
    own = own_tokens(processor)
    names = processor.tokenizer.convert_ids_to_tokens(own)
    assert own == sorted(set(own))
    assert processor.thought_token_id in own
    items = set(np.unique(processor.item_codec.tokens).tolist())
    if codec == "title":
        assert END_TOKEN in names
        assert all(name.startswith("<|") for name in names)
        assert not items <= set(own)  # words are not
    else:
        assert set(own) == items | {processor.thought_token_id}


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match=r"lora_targets: expected all-linear, or of down_proj, .*, got 'q_prj'"):
        add_lora(patched_model(), LoraSettings(2, 4, targets=("q_proj", "q_prj")), [])
    with pytest.raises(ValueError, match=r"lora_targets: expected all-linear, or of .*, got 'lm_head'"):
        add_lora(patched_model(), LoraSettings(2, 4, targets=("lm_head",)), [])
    with pytest.raises(ValueError, match="model: expected a patched model without adapters"):
        add_lora(tiny_model(), SETTINGS, [])
    with pytest.raises(ValueError, match="lora_rank: expected an lm_head without a bias"):
        add_lora(patched_model("phi"), SETTINGS, [THOUGHT])


def test_bitsandbytes_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ValueError, match=r"load_in_4bit: expected the package bitsandbytes, .*'flr\[qlora\]'"):
        quantisation()
    with pytest.raises(ValueError, match=r"lora_rank: expected the package peft"):
        add_lora(patched_model(), SETTINGS, [])


@pytest.mark.parametrize("codec", ["id", "title"])
def test_adapters_reasoner_and_own_rows_are_trained_and_nothing_else(tmp_path, codec):
    model, processor = adapted(codec)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = sft_trainer(tmp_path, model, processor, max_steps=3, learning_rate=1e-2, embedding_learning_rate=5e-2)
    trainer.train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert all("lora_" in name or ".flr.modules_to_save." in name or "_tokens_delta" in name for name in changed)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(trainer.optimizer.state) == len(trained)  # frozen weights have none
    tables = {id(p) for name, p in model.named_parameters() if "_tokens_delta" in name}
    groups = [g for g in trainer.optimizer.param_groups if tables.intersection(map(id, g["params"]))]
    assert [group["initial_lr"] for group in groups] == [5e-2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapters_folder_is_small_and_whole(tmp_path, dtype):
    model, processor = adapted("id", tmp_path / "base", dtype)
    trainer = sft_trainer(tmp_path / "run", model, processor, max_steps=3, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}  # whatever the base model has
    rows = [value for name, value in saved.items() if "embed_tokens" in name]
    assert [len(value) for value in rows] == [len(own_tokens(processor))]  # not the whole table beside them
    loaded = flr.from_pretrained(tmp_path / "run")
    inputs = {"input_ids": torch.tensor([processor.item_codec.tokens[:5].tolist()])}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_an_adapter_continues_to_the_weights_of_a_run_that_was_not_cut(tmp_path):
    def run(name, rank=2):
        model, processor = adapted("id", tmp_path / "base", rank=rank)
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        return sft_trainer(tmp_path / name, model, processor, **steps)

    whole = run("whole")
    whole.train()
    again = run("whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = (dict(t.model.named_parameters()) for t in (whole, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = run("whole", rank=3)
    with pytest.raises(ValueError, match="output_dir: expected the run that"):  # adapters count in what a run is
        other.train(resume_from_checkpoint=True)


def test_rows_that_an_adapter_lacks_are_refused(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    size = base.config.vocab_size
    base.resize_token_embeddings(size + 3, mean_resizing=False)
    model = flr.patch_model(base, config=flr.FLRConfig(num_factors=2, thought_token_id=size + 2))
    for rows, missing in (([size, size + 1, size + 2], None), ([size, size + 2], size + 1)):
        wrapped = add_lora(model, LoraSettings(2, 4, targets=("q_proj",)), rows, str(tmp_path / "base"))
        wrapped.save_pretrained(tmp_path / "adapter")
        wrapped.config.save_pretrained(tmp_path / "adapter")
        if missing is None:
            assert causal_lm(flr.from_pretrained(tmp_path / "adapter")).config.vocab_size == size + 3
        else:
            with pytest.raises(
                ValueError, match=f"expected embeddings of the 2 tokens .*none for 1 of them, e.g. {missing}"
            ):
                flr.from_pretrained(tmp_path / "adapter")
        model = wrapped.unload()


def test_a_backbone_in_four_bits_is_trained_beside(tmp_path):
    """Sizes of a layer are multiples of the 64 weights that share a scale."""
    pytest.importorskip("bitsandbytes")
    base = tiny_model(hidden_size=128, intermediate_size=128, head_dim=32)
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base", quantization_config=quantisation(use_cpu=True))
    flr.patch_model(model, config=flr.FLRConfig(num_factors=2, thought_token_id=THOUGHT))
    model = add_lora(model, SETTINGS, [5, THOUGHT], str(tmp_path / "base"))
    packed = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer").weight
    assert packed.dtype == torch.uint8
    before = packed.clone()
    inputs = torch.tensor([[3, 4, 5, THOUGHT, 6]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
    assert torch.equal(packed, before)
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(bool(p.any()) for p in moved)
    model.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    loaded = flr.from_pretrained(tmp_path / "adapter")  # on the base model as it was saved
    q_proj = loaded.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    assert q_proj.weight.dtype == torch.float32
    assert torch.isfinite(loaded(input_ids=inputs).logits).all()


def _trained_adapters(rank: int, world: int, path: str) -> dict[str, torch.Tensor]:
    """What is trained, after three steps of sixteen rows over ``world`` processes."""
    torch.manual_seed(0)  # PEFT draws one factor of every adapter
    model, processor = adapted("sid")
    options = {"learning_rate": 1e-2, "max_steps": 3, "ddp_backend": "gloo" if dist.is_initialized() else None}
    trainer = sft_trainer(f"{path}/out-{rank}", model, processor, per_device_train_batch_size=16 // world, **options)
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_two_processes_train_the_adapters_of_one(tmp_path):
    one = _trained_adapters(0, 1, str(tmp_path))
    two = in_processes(_trained_adapters, 2, tmp_path, 2, str(tmp_path))
    moved = {name for name, value in one.items() if "lora_B" in name and value.abs().max() > 1e-3}
    assert moved
    for name, value in one.items():
        torch.testing.assert_close(two[0][name], two[1][name], rtol=0, atol=0)
        torch.testing.assert_close(two[0][name], value, rtol=1e-3, atol=2e-5)
