"""Whole-catalogue evaluation: ranks, metrics with intervals, baselines."""

from .rank import EvalResult, evaluate, evaluate_scorer, padded_rows

__all__ = ["EvalResult", "evaluate", "evaluate_scorer", "padded_rows"]
