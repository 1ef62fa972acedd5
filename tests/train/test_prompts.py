"""``--prompt_cache`` in both trainers: the same weights, every prompt read once a run, and resumed to the bit."""

import pytest
import torch

from flr.train import SFTConfig
from tests.helpers.models import trainable
from tests.helpers.training import grpo_trainer, sft_trainer


def reasoner_alone():
    model, processor = trainable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("flr."))
    return model, processor


def trained(kind, folder, **options):
    model, processor = reasoner_alone()
    if kind == "sft":
        trainer = sft_trainer(folder, model, processor, num_train_epochs=3, learning_rate=1e-2, **options)
    else:
        trainer = grpo_trainer(
            folder, model=model, processor=processor, num_train_epochs=3, learning_rate=1e-3, **options
        )
    metrics = trainer.train().metrics
    return {name: p.detach().clone() for name, p in model.flr.named_parameters()}, metrics


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_training_ends_at_the_same_weights(tmp_path, kind):
    before = dict(reasoner_alone()[0].flr.named_parameters())
    plain, metrics = trained(kind, tmp_path / "plain")
    assert "prompt_cache_found" not in metrics
    runs = [trained(kind, tmp_path / place, prompt_cache=place) for place in ("memory", "disk")]
    for weights, metrics in runs:
        for name, value in weights.items():  # Adam takes rounding's sign where a gradient is none
            assert (value - plain[name]).norm() <= 1e-2 * (plain[name] - before[name]).norm()
        assert metrics["prompt_cache_found"] >= 2 / 3
        assert metrics["prompt_cache_gb"] > 0
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in plain)
    assert not [x for x in (tmp_path / "disk").rglob("*") if "prompt-cache" in x.name]


def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path):
    whole, _ = trained("sft", tmp_path / "whole", prompt_cache="memory", save_strategy="epoch")
    folder = tmp_path / "whole"
    (checkpoint, *_) = sorted(folder.glob("checkpoint-*"), key=lambda x: int(x.name.split("-")[1]))
    model, processor = reasoner_alone()
    again = sft_trainer(
        folder, model, processor, num_train_epochs=3, learning_rate=1e-2, prompt_cache="memory", save_strategy="epoch"
    )
    again.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(p, whole[name]) for name, p in model.flr.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_cache": "gpu"}, "prompt_cache: expected one of none, memory, disk, got 'gpu'"),
        ({"prompt_cache": "disk", "prompt_cache_gb": 0}, "prompt_cache_gb: expected a positive number, got 0"),
        ({"prompt_cache": "memory", "embedding_dropout": 0.1}, "prompt_cache: expected none with embedding_dropout"),
        ({"prompt_cache": "memory", "neftune_noise_alpha": 5.0}, "prompt_cache: expected none with neftune"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_a_backbone_that_trains_is_refused(tmp_path):
    model, processor = trainable()
    with pytest.raises(ValueError, match="prompt_cache: expected none for this model"):
        sft_trainer(tmp_path, model, processor, prompt_cache="memory").train()
