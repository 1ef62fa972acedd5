"""``flr sids``: semantic IDs for the items of a prepared folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flr.config import COUNT, SEED, Numbers, check_numbers, option

from . import voice
from .parsing import REVISION, emit, parse
from .weights import device_named

ABOUT = (
    "Make semantic IDs for the items of a prepared folder: flr sids --data … --embed MODEL|tfidf|cooccurrence|FILE.npy"
)


@dataclass
class SidsOptions:
    """Where the codes come from, and how they are made."""

    data: str | None = option(None, "Folder that flr prepare wrote; the codes are written into it.")
    embed: str | None = option(
        None,
        "What items are embedded by: tfidf or cooccurrence (of the training rows), FILE.npy (float [items, E] in "
        "catalogue order), or a language model, causal or of sentence-transformers: a folder or an id on the Hub.",
    )
    revision: str | None = option(None, REVISION)
    text_fields: list[str] = option(
        [], "Text attributes of the catalogue to read beside the title. Default: brand, genre, category, … if there."
    )
    embed_size: int = option(256, "tfidf, cooccurrence: columns of the truncated SVD.")
    embed_batch_size: int = option(32, "Language model: texts at a time.")
    embed_max_tokens: int = option(256, "Language model: tokens of a text; longer ones are cut.")
    method: str = option("rq-kmeans", "rq-kmeans (residual k-means) or rq-vae (a residual-quantised autoencoder).")
    levels: int = option(3, "Codes of an item, 1 to 26.")
    codes: int = option(256, "Different codes of a level.")
    balance: float = option(1.25, "Most items of a code, in mean loads; 0 for no bound.")
    iterations: int = option(16, "rq-kmeans: iterations of a level.")
    epochs: int = option(100, "rq-vae: passes over the items.")
    latent_size: int = option(32, "rq-vae: size of the latent.")
    seed: int = option(0, "Of everything that is drawn.")
    device: str = option("auto", "Where to compute: auto, cpu, cuda.")
    overwrite: bool = option(False, "Replace semantic IDs that the folder has.")
    update: bool = option(False, "Encode new items with the codebooks that are there; the codes of the others stay.")
    codebooks: str | None = option(None, "update: the folder sids/ of an earlier prepared folder. Default: of --data.")
    codes_from: str | None = option(
        None, "Take codes from a file instead: .index.json, or integers [levels, items] as .npy or .safetensors."
    )

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "embed_size": COUNT,
        "embed_batch_size": COUNT,
        "embed_max_tokens": COUNT,
        "levels": Numbers(1, 26, whole=True),
        "codes": Numbers(2, whole=True),
        "balance": Numbers(1, also=(0,)),
        "iterations": COUNT,
        "epochs": COUNT,
        "latent_size": COUNT,
        "seed": SEED,
    }

    def __post_init__(self) -> None:
        check_numbers(self, self.numbers)


def main(argv: list[str]) -> int:
    options, rest = parse("sids", ABOUT, (SidsOptions,), argv)
    if options.data is None:
        raise ValueError("data: expected a folder that flr prepare wrote, got none")
    if options.codes_from and (options.embed or options.update):
        raise ValueError("codes_from: expected neither embed nor update beside it, got both")
    if options.codebooks and not options.update:
        raise ValueError(f"codebooks: expected update true beside it, got {options.codebooks}")
    about = _work(options)
    voice.result(summary(about))
    emit({"output": options.data, **about}, rest.json)
    return 0


def _work(options: SidsOptions) -> dict[str, Any]:
    from flr.sids import import_codes, make_codes, update_codes

    assert options.data is not None
    if options.codes_from:
        return import_codes(options.data, options.codes_from, overwrite=options.overwrite)
    shared: dict[str, Any] = {
        "device": device_named(options.device),
        "overwrite": options.overwrite,
        "revision": options.revision,
        "batch_size": options.embed_batch_size,
        "progress": voice.shows_progress(),
    }
    if options.update:
        return update_codes(options.data, codebooks=options.codebooks, source=options.embed, **shared)
    if options.embed is None:
        raise ValueError("embed: expected a language model, tfidf, cooccurrence or FILE.npy, got none")
    names = ("method", "levels", "codes", "balance", "iterations", "epochs", "latent_size", "seed")
    shared |= {
        "size": options.embed_size,
        "max_tokens": options.embed_max_tokens,
        "fields": options.text_fields or None,
    }
    return make_codes(options.data, options.embed, **shared, **{name: getattr(options, name) for name in names})


def summary(about: dict[str, Any]) -> str:
    """What was made, in words."""
    report = about["report"]
    lines = [
        f"{report['items']} items, {report['distinct']} IDs; {report['share_sharing']:.2%} of the items share theirs, "
        f"at most {report['largest_group']} one ID"
    ]
    if report.get("unknown_items"):
        lines.append(f"{report['unknown_items']} items of which the source knows nothing have one embedding in common")
    if "new_items" in report:
        lines.append(f"{report['new_items']} new items")
    errors = report.get("relative_error") or [None] * len(report["levels"])
    for number, (level, error) in enumerate(zip(report["levels"], errors, strict=True), 1):
        share = f" ({level['used_share']:.0%})" if "used_share" in level else ""
        left = "" if error is None else f", relative error {error:.3f}"
        lines.append(
            f"level {number}: {level['used']} codes used{share}, perplexity {level['perplexity']:.1f}, the fullest "
            f"holds {level['largest_load']:.2f} mean loads{left}"
        )
    return "\n".join(lines)
