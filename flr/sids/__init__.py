"""Semantic IDs: embeddings of items, codes made from them, and both in a prepared folder.

    embedded = embed_items(dataset, "cooccurrence")        # or "tfidf", a language model, FILE.npy
    books = fit_codes(embedded.values, levels=3, codes=256)
    codes = books.encode(embedded.values)                   # int64 [C, 3]; later items by the same call

``flr sids`` does all of it on a folder (:mod:`flr.sids.folder`).
"""

from typing import TYPE_CHECKING

from flr.lazy import attach

if TYPE_CHECKING:
    from .codebooks import Codebooks, code_names, code_report
    from .embed import Embedded, embed_items, item_texts
    from .folder import import_codes, make_codes, update_codes
    from .quantize import fit_codes
else:  # flr sids --help needs none of them
    __getattr__, __dir__ = attach(
        __name__,
        {
            "codebooks": ["Codebooks", "code_names", "code_report"],
            "embed": ["Embedded", "embed_items", "item_texts"],
            "folder": ["import_codes", "make_codes", "update_codes"],
            "quantize": ["fit_codes"],
        },
    )

__all__ = [
    "Codebooks",
    "Embedded",
    "code_names",
    "code_report",
    "embed_items",
    "fit_codes",
    "import_codes",
    "item_texts",
    "make_codes",
    "update_codes",
]
