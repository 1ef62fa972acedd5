"""Factorized Latent Reasoning for LLM-based sequential recommendation.

model = flr.patch_model(model, tokenizer, flr.FLRConfig(num_factors=4))
"""

from flr_kernels import __version__ as __version__

from .config import FLRConfig
from .model.checkpoint import from_pretrained, load_latentr3
from .model.patch import is_patched, patch_model, reasoner_parameters, unpatch_model
from .model.reasoner import FactorizedReasoner, ReasonerOutput
from .model.vocabulary import add_thought_token
from .recommend.recommender import Recommender
from .recommend.results import Recommendation

__all__ = [
    "FLRConfig",
    "FactorizedReasoner",
    "ReasonerOutput",
    "Recommendation",
    "Recommender",
    "add_thought_token",
    "from_pretrained",
    "is_patched",
    "load_latentr3",
    "patch_model",
    "reasoner_parameters",
    "unpatch_model",
]
