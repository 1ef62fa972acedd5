"""Factorized Latent Reasoning for LLM-based sequential recommendation.

model = flr.patch_model(model, tokenizer, flr.FLRConfig(num_factors=4))
"""

from flr_kernels import __version__ as __version__

from .config import FLRConfig
from .model.auto import register as _register
from .model.checkpoint import from_pretrained, load_latentr3
from .model.patch import is_patched, patch_model, reasoner_parameters, unpatch_model
from .model.reasoner import FactorizedReasoner, ReasonerOutput
from .recommend.recommender import Recommender
from .recommend.results import Recommendation

_register()

__all__ = [
    "FLRConfig",
    "FactorizedReasoner",
    "ReasonerOutput",
    "Recommendation",
    "Recommender",
    "from_pretrained",
    "is_patched",
    "load_latentr3",
    "patch_model",
    "reasoner_parameters",
    "unpatch_model",
]
