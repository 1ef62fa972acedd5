"""Decoding: from a prompt to items of a catalogue, and to nothing else."""

from flr.data.trie import CatalogueTrie

from .beam import beam_search
from .exhaustive import rank_one_token, score_all_items
from .filters import ItemFilter, item_filter
from .scoring import Scoring
from .search import BeamResult

__all__ = [
    "BeamResult",
    "CatalogueTrie",
    "ItemFilter",
    "Scoring",
    "beam_search",
    "item_filter",
    "rank_one_token",
    "score_all_items",
]
