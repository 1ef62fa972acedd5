"""``flr sids``: semantic IDs for the items of a prepared folder."""

from __future__ import annotations

import dataclasses
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


#: Options that mean something for a source of embeddings, by the parameter of ``embed_items`` that each one is.
_SOURCES: dict[str, dict[str, str]] = {
    "tfidf": {"embed_size": "size", "text_fields": "fields"},
    "cooccurrence": {"embed_size": "size"},
    "a .npy file": {},
    "a language model": {
        "embed_batch_size": "batch_size",
        "embed_max_tokens": "max_tokens",
        "revision": "revision",
        "text_fields": "fields",
    },
}
_STORED = ("embed_max_tokens", "text_fields")  # of a language model: an update takes those of the codebooks
_METHODS = {"rq-kmeans": ("iterations",), "rq-vae": ("epochs", "latent_size")}
_CODES = ("method", "levels", "codes", "balance", "seed")
_ALWAYS = ("data", "embed", "overwrite", "update", "codebooks", "codes_from")  # or refused by a message of their own


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
    embed_size: int | None = option(None, "tfidf, cooccurrence: columns of the truncated SVD. Default: 256.")
    embed_batch_size: int | None = option(None, "Language model: texts at a time. Default: 32.")
    embed_max_tokens: int | None = option(
        None, "Language model: tokens of a text; longer ones are cut. Default: 256, or as many as the model takes."
    )
    method: str | None = option(
        None, "rq-kmeans (residual k-means) or rq-vae (a residual-quantised autoencoder). Default: rq-kmeans."
    )
    levels: int | None = option(None, "Codes of an item, 1 to 26. Default: 3.")
    codes: int | None = option(None, "Different codes of a level. Default: 256.")
    balance: float | None = option(None, "Most items of a code, in mean loads; 0 for no bound. Default: 1.25.")
    iterations: int | None = option(None, "rq-kmeans: iterations of a level. Default: 16.")
    epochs: int | None = option(None, "rq-vae: passes over the items. Default: 100.")
    latent_size: int | None = option(None, "rq-vae: size of the latent. Default: 32.")
    seed: int | None = option(None, "Of everything that is drawn. Default: 0.")
    device: str | None = option(None, "Where to compute: auto, cpu, cuda. Default: auto.")
    overwrite: bool = option(False, "Replace semantic IDs that the folder has.")
    update: bool = option(False, "Encode new items with the codebooks that are there; the codes of the others stay.")
    codebooks: str | None = option(None, "update: the folder sids/ of an earlier prepared folder. Default: of --data.")
    codes_from: str | None = option(
        None, "Take codes from a file instead: .index.json, or integers [levels, items] as .npy or .safetensors."
    )

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "embed_size": COUNT.or_none,
        "embed_batch_size": COUNT.or_none,
        "embed_max_tokens": COUNT.or_none,
        "levels": Numbers(1, 26, whole=True).or_none,
        "codes": Numbers(2, whole=True).or_none,
        "balance": Numbers(1, also=(0, None)),
        "iterations": COUNT.or_none,
        "epochs": COUNT.or_none,
        "latent_size": COUNT.or_none,
        "seed": SEED.or_none,
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
    if options.embed is None and not (options.codes_from or options.update):
        raise ValueError("embed: expected a language model, tfidf, cooccurrence or FILE.npy, got none")
    about = _work(options)
    voice.result(summary(about))
    emit({"output": options.data, **about}, rest.json)
    return 0


def _taken(options: SidsOptions) -> dict[str, str]:
    """The options that mean something for what is to be done, each by the parameter that it is.

    Raises:
        ValueError: another option is given.
    """
    source = options.embed if options.embed in _SOURCES else "a language model"
    if options.embed is not None and options.embed.endswith(".npy"):
        source = "a .npy file"
    takes, beside = dict(_SOURCES[source]), f"embed {source}"
    if options.codes_from:
        takes, beside = {}, "codes_from"
    elif options.update:
        takes = {name: parameter for name, parameter in takes.items() if name not in _STORED}
        takes |= {"device": "device"} if source == "a language model" else {}
        beside = f"update true and {beside}"
    else:
        method = options.method or "rq-kmeans"
        names = (*_CODES, *_METHODS.get(method, ()), "device")
        takes, beside = takes | {name: name for name in names}, f"{beside} and method {method}"
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in (*takes, *_ALWAYS) and value not in (None, []):
            raise ValueError(f"{field.name}: expected none beside {beside}, got {value!r}")
    return takes


def _work(options: SidsOptions) -> dict[str, Any]:
    takes = _taken(options)
    from flr.sids import import_codes, make_codes, update_codes

    assert options.data is not None
    if options.codes_from:
        return import_codes(options.data, options.codes_from, overwrite=options.overwrite)
    given: dict[str, Any] = {
        parameter: getattr(options, name)
        for name, parameter in takes.items()
        if getattr(options, name) not in (None, [])
    }
    given |= {"device": device_named(options.device or "auto"), "progress": voice.shows_progress()}
    given |= {"overwrite": options.overwrite}
    if options.update:
        return update_codes(options.data, codebooks=options.codebooks, source=options.embed, **given)
    return make_codes(options.data, str(options.embed), **given)


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
