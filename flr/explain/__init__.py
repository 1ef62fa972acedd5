"""What factors did: attention on history items, Shapley values of recommendations, agreement with known interests."""

from .attention import item_attention
from .interest import FactorInterest, agreement, assign_factors, factor_interest

__all__ = ["FactorInterest", "agreement", "assign_factors", "factor_interest", "item_attention"]
