"""Training of a patched model on interactions: supervised, then latent GRPO."""

from .arguments import LatentGRPOConfig, SFTConfig
from .features import init_item_embeddings, item_features
from .grpo import LatentGRPOTrainer
from .neighbours import item_neighbours, with_catalogue_rows
from .rewards import RewardInputs, Rewards
from .run_folder import last_complete_checkpoint
from .sft import SFTTrainer

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
