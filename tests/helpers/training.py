"""Trainers on the items of ``DATA``, without files, reports or evaluation unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flr.data import Augment, Interactions, RecProcessor
from flr.train import LatentGRPOConfig, LatentGRPOTrainer, Rewards, SFTConfig, SFTTrainer
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable

_QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "disable_tqdm": True,
    "num_train_epochs": 1,
}


def sft_trainer(
    folder: Path,
    model: Any,
    processor: RecProcessor,
    augment: Augment | None = None,
    train: Interactions | None = None,
    **options: Any,
) -> SFTTrainer:
    """Supervised training of a model that ``trainable`` made."""
    args = SFTConfig(**{"output_dir": str(folder), **_QUIET, "per_device_train_batch_size": 32, **options})
    return SFTTrainer(model, args, processor, DATA.train if train is None else train, DATA.valid, augment)


def grpo_config(folder: Path | str, **options: Any) -> LatentGRPOConfig:
    """Groups of four for sixteen users a step, at a constant learning rate."""
    defaults = {"per_device_train_batch_size": 16, "group_size": 4, "lr_scheduler_type": "constant", "seed": 3}
    return LatentGRPOConfig(**{"output_dir": str(folder), **_QUIET, **defaults, **options})


def grpo_trainer(
    folder: Path | str,
    codec: str = "id",
    rewards: Rewards | None = None,
    model: Any = None,
    processor: RecProcessor | None = None,
    **options: Any,
) -> LatentGRPOTrainer:
    """Latent GRPO of a given model, or of one that ``trainable`` makes for the codec."""
    if model is None:
        model, processor = trainable(codec)
    return LatentGRPOTrainer(model, grpo_config(folder, **options), processor, DATA.train, DATA.valid, rewards=rewards)
