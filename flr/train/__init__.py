"""Training: supervised fine-tuning of a patched model on interactions."""

from .features import init_item_embeddings, item_features
from .neighbours import item_neighbours, with_catalogue_rows
from .sft import SFTConfig, SFTTrainer, last_complete_checkpoint

__all__ = [
    "SFTConfig",
    "SFTTrainer",
    "init_item_embeddings",
    "item_features",
    "item_neighbours",
    "last_complete_checkpoint",
    "with_catalogue_rows",
]
