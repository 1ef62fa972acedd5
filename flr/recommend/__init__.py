"""Recommendations: from names to queries, from queries to answers and their explanation."""

from .recommender import Recommender
from .results import Explanation, HistoryItem, Recommendation

__all__ = ["Explanation", "HistoryItem", "Recommendation", "Recommender"]
