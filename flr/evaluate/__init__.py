"""Whole-catalogue evaluation: ranks, metrics with intervals, baselines."""

from .groups import by_trait
from .neighbours import NeighbourFit, fit_neighbours, fit_tables, fit_views
from .rank import Method, Scorer, evaluate, evaluate_scorer, padded_rows
from .ranks import Share, launched
from .result import EvalResult, Level
from .robustness import robustness

__all__ = [
    "EvalResult",
    "Level",
    "Method",
    "NeighbourFit",
    "Scorer",
    "Share",
    "by_trait",
    "evaluate",
    "evaluate_scorer",
    "fit_neighbours",
    "fit_tables",
    "fit_views",
    "launched",
    "padded_rows",
    "robustness",
]
