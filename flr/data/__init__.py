"""Data for sequential recommendation: catalogues, interaction logs, item codecs, prompts and training batches.

    dataset = load_dataset("folder")                        # docs/data.md has every form
    tokenizer = build_tokenizer(dataset.catalogue, "id")    # or any fast Hugging Face tokenizer
    processor = RecProcessor(tokenizer, dataset.catalogue, codec="id")
    batch = SFTCollator(processor)([dataset.train[0], dataset.train[1]])

An item is an index 0..C-1 into the :class:`Catalogue`; ids are strings. Errors are ValueErrors that name the argument,
what was expected and what was given.
"""

from .augment import CATALOGUE_USER, Augment, Neighbours
from .catalogue import Catalogue
from .codecs import ItemCodec, build_codec
from .codes import read_codes
from .collator import InteractionDataset, SFTCollator, expand_prefixes
from .csr import CSR
from .groups import InterestGroups, interest_groups
from .interactions import Interaction, Interactions, RecDataset
from .item_knn import KNN_NAME, NeighbourTable
from .linear_items import MOST_LINEAR_ITEMS, fit_linear
from .planted import planted_dataset
from .processor import RecProcessor
from .prompt import HistoryViews, PromptTemplate
from .readers import FORMATS, load_dataset
from .report import BadRow, ReadReport
from .sampler import EpochSampler, LengthGroupedSampler
from .splits import hold_back
from .teacher import Teacher
from .tokenizers import build_tokenizer

__all__ = [
    "CATALOGUE_USER",
    "CSR",
    "FORMATS",
    "KNN_NAME",
    "MOST_LINEAR_ITEMS",
    "Augment",
    "BadRow",
    "Catalogue",
    "EpochSampler",
    "HistoryViews",
    "Interaction",
    "InteractionDataset",
    "Interactions",
    "InterestGroups",
    "ItemCodec",
    "LengthGroupedSampler",
    "NeighbourTable",
    "Neighbours",
    "PromptTemplate",
    "ReadReport",
    "RecDataset",
    "RecProcessor",
    "SFTCollator",
    "Teacher",
    "build_codec",
    "build_tokenizer",
    "expand_prefixes",
    "fit_linear",
    "hold_back",
    "interest_groups",
    "load_dataset",
    "planted_dataset",
    "read_codes",
]
