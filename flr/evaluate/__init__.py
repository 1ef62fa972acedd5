"""Whole-catalogue evaluation: ranks, metrics with intervals, baselines."""

from .rank import Method, Scorer, evaluate, evaluate_scorer, padded_rows
from .result import EvalResult, Level

__all__ = ["EvalResult", "Level", "Method", "Scorer", "evaluate", "evaluate_scorer", "padded_rows"]
