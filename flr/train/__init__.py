"""Training of a patched model on interactions: supervised, then latent GRPO."""

from typing import TYPE_CHECKING

from flr.lazy import attach

if TYPE_CHECKING:
    from .arguments import LatentGRPOConfig, SFTConfig, UpdateConfig
    from .factor_start import init_factors
    from .features import init_grown_tokens, init_item_embeddings, init_new_tokens, item_features
    from .grpo import LatentGRPOTrainer
    from .neighbours import item_neighbours, with_catalogue_rows
    from .rewards import RewardInputs, Rewards
    from .run_folder import last_complete_checkpoint
    from .sft import SFTTrainer
    from .updates import update
else:  # flr sft --help reads the arguments alone
    __getattr__, __dir__ = attach(
        __name__,
        {
            "arguments": ["LatentGRPOConfig", "SFTConfig", "UpdateConfig"],
            "features": ["init_grown_tokens", "init_item_embeddings", "init_new_tokens", "item_features"],
            "grpo": ["LatentGRPOTrainer"],
            "factor_start": ["init_factors"],
            "neighbours": ["item_neighbours", "with_catalogue_rows"],
            "rewards": ["RewardInputs", "Rewards"],
            "run_folder": ["last_complete_checkpoint"],
            "sft": ["SFTTrainer"],
            "updates": ["update"],
        },
    )

__all__ = [
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "RewardInputs",
    "Rewards",
    "SFTConfig",
    "SFTTrainer",
    "UpdateConfig",
    "init_factors",
    "init_grown_tokens",
    "init_item_embeddings",
    "init_new_tokens",
    "item_features",
    "item_neighbours",
    "last_complete_checkpoint",
    "update",
    "with_catalogue_rows",
]
