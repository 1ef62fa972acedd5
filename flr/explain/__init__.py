"""What factors did: attention on history items, Shapley values of recommendations, agreement with known interests."""

from .attention import item_attention
from .interest import FactorInterest, agreement, assign_factors, factor_interest
from .likes import factor_likes

__all__ = ["FactorInterest", "agreement", "assign_factors", "factor_interest", "factor_likes", "item_attention"]
