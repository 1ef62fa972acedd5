"""Recommendations: from names to queries, from queries to answers and their explanation."""

from .histories import UserHistories
from .recommender import Recommender
from .results import Explanation, HistoryItem, Recommendation, Recommendations

__all__ = ["Explanation", "HistoryItem", "Recommendation", "Recommendations", "Recommender", "UserHistories"]
