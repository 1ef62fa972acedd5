"""Whole-catalogue evaluation: ranks, metrics with intervals, baselines."""

from .groups import by_trait
from .rank import Method, Scorer, evaluate, evaluate_scorer, padded_rows
from .result import EvalResult, Level

__all__ = ["EvalResult", "Level", "Method", "Scorer", "by_trait", "evaluate", "evaluate_scorer", "padded_rows"]
