"""Training of a patched model on interactions: supervised, then latent GRPO."""

from .features import init_item_embeddings, item_features
from .grpo import LatentGRPOConfig, LatentGRPOTrainer
from .neighbours import item_neighbours, with_catalogue_rows
from .sft import SFTConfig, SFTTrainer, last_complete_checkpoint
from .surrogate import RewardInputs, Rewards

__all__ = [
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "RewardInputs",
    "Rewards",
    "SFTConfig",
    "SFTTrainer",
    "init_item_embeddings",
    "item_features",
    "item_neighbours",
    "last_complete_checkpoint",
    "with_catalogue_rows",
]
