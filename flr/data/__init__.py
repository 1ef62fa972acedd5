"""Data for sequential recommendation: catalogues, interaction logs, item codecs, prompts and training batches.

    dataset = load_dataset("folder")                        # prepared folder, published CSV form, RecBole atomic, Parquet
    tokenizer = build_tokenizer(dataset.catalogue, "id")    # or any fast Hugging Face tokenizer
    processor = RecProcessor(tokenizer, dataset.catalogue, codec="id")
    batch = SFTCollator(processor)([dataset.train[0], dataset.train[1]])

An item is an index 0..C-1 into the :class:`Catalogue`; ids are strings. Errors are ValueErrors that name the argument, what
was expected and what was given.
"""

from flr.data.amazon import prepare_amazon
from flr.data.augment import CATALOGUE_USER, Augment, Neighbours
from flr.data.catalogue import Catalogue
from flr.data.codecs import ItemCodec, build_codec
from flr.data.collator import EpochSampler, InteractionDataset, SFTCollator, expand_prefixes
from flr.data.interactions import CSR, Interaction, Interactions, RecDataset
from flr.data.planted import planted_dataset
from flr.data.processor import HistoryViews, PromptTemplate, RecProcessor
from flr.data.readers import load_dataset
from flr.data.report import BadRow, ReadReport
from flr.data.tokenizers import build_tokenizer

__all__ = [
    "CATALOGUE_USER",
    "CSR",
    "Augment",
    "BadRow",
    "Catalogue",
    "EpochSampler",
    "HistoryViews",
    "Interaction",
    "InteractionDataset",
    "Interactions",
    "ItemCodec",
    "Neighbours",
    "PromptTemplate",
    "ReadReport",
    "RecDataset",
    "RecProcessor",
    "SFTCollator",
    "build_codec",
    "build_tokenizer",
    "expand_prefixes",
    "load_dataset",
    "planted_dataset",
    "prepare_amazon",
]
