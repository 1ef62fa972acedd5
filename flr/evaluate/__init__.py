"""Whole-catalogue evaluation: ranks, metrics with intervals, baselines."""

from .rank import evaluate, evaluate_scorer, padded_rows
from .result import EvalResult

__all__ = ["EvalResult", "evaluate", "evaluate_scorer", "padded_rows"]
