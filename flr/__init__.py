"""Factorized Latent Reasoning for LLM-based sequential recommendation.

model = flr.patch_model(model)

Importing the package is quick: torch and transformers are imported at the first use of a name that needs them.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .lazy import attach, when_imported

if TYPE_CHECKING:
    from .config import FLRConfig
    from .model.backbone import is_patched
    from .model.checkpoint import from_pretrained, load_latentr3
    from .model.patch import patch_model, reasoner_parameters, unpatch_model
    from .model.reasoner import FactorizedReasoner, ReasonerOutput
    from .model.vocabulary import add_thought_token
    from .recommend.recommender import Recommender
    from .recommend.results import Recommendation
else:  # hidden from type checkers, to whom a __getattr__ says that any name is there
    __getattr__, __dir__ = attach(
        __name__,
        {
            "config": ["FLRConfig"],
            "model.checkpoint": ["from_pretrained", "load_latentr3"],
            "model.backbone": ["is_patched"],
            "model.patch": ["patch_model", "reasoner_parameters", "unpatch_model"],
            "model.reasoner": ["FactorizedReasoner", "ReasonerOutput"],
            "model.vocabulary": ["add_thought_token"],
            "recommend.recommender": ["Recommender"],
            "recommend.results": ["Recommendation"],
        },
        ["config", "data", "decode", "evaluate", "explain", "model", "recommend", "report", "serve", "train"],
    )

try:
    __version__ = version("flr")  # pyproject.toml is the one place that says it
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "unknown"


def _register_config(module: Any) -> None:
    from .model.auto import register_config

    register_config(module)


def _register_model(module: Any) -> None:
    from .model.auto import register_model

    register_model(module)


# Both name our model type in transformers' Auto classes, whichever of the two packages is imported first.
when_imported("transformers.models.auto.configuration_auto", _register_config)
when_imported("transformers.models.auto.modeling_auto", _register_model)

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
