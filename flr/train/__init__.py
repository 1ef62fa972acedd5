"""Training: supervised fine-tuning of a patched model on interactions."""

from .features import init_item_embeddings, item_features
from .sft import SFTConfig, SFTTrainer, last_complete_checkpoint

__all__ = ["SFTConfig", "SFTTrainer", "init_item_embeddings", "item_features", "last_complete_checkpoint"]
