"""What factors did: attention on items, Shapley values, agreement with known interests, which of them are needed."""

from .attention import item_attention, item_scores
from .interest import FactorInterest, agreement, assign_by_score, assign_factors, factor_interest
from .likes import factor_likes
from .needed import FactorsNeeded, factor_stability, factors_needed

__all__ = [
    "FactorInterest",
    "FactorsNeeded",
    "agreement",
    "assign_by_score",
    "assign_factors",
    "factor_interest",
    "factor_likes",
    "factor_stability",
    "factors_needed",
    "item_attention",
    "item_scores",
]
