"""Texts to embeddings with a language model: a causal LM's mean hidden state, or a sentence-transformers model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from flr.data.saved_tokenizer import load_tokenizer
from flr.files import sha256
from flr.model.backbone import position_rows
from flr.model.folder import local_folder

logger = logging.getLogger("flr")
_MODULES = "modules.json"  # what makes a folder one of sentence-transformers
_WEIGHTS = ("*.safetensors", "tokenizer.json", "config.json", _MODULES)


def embed_texts(
    texts: list[str], name: str, revision: str | None, batch_size: int, max_tokens: int, device: str, progress: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Float32 [n, E] of texts, none empty, and what tells the model from others."""
    folder = local_folder(name, **({} if revision is None else {"revision": revision}))
    about = {"name": str(name), "max_tokens": max_tokens, "sha256": _digest(folder)}
    if (folder / _MODULES).is_file():
        values = _sentences(texts, name, folder, revision, batch_size, max_tokens, device, progress)
        return values, {"kind": "sentence-transformers", **about}
    return _mean_states(texts, folder, batch_size, max_tokens, device, progress), {"kind": "lm", **about}


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    return {path.name: sha256(path) for path in files}


@torch.inference_mode()
def _mean_states(
    texts: list[str], folder: Path, batch_size: int, max_tokens: int, device: str, progress: bool
) -> np.ndarray:
    """The mean over a text's tokens of the last hidden states, padding left out; long texts together."""
    from transformers import AutoModel

    tokenizer = load_tokenizer(folder)
    model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, dtype="auto")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"embed: expected a causal LM, got {folder}, an encoder-decoder ({model.config.model_type})")
    model = model.to(device).eval()
    tokens = tokenizer(texts, add_special_tokens=True)["input_ids"]
    rows = position_rows(model)
    if rows is not None and rows < min(max_tokens, max(map(len, tokens))):
        logger.warning(f"{folder}: texts are cut to its {rows} positions, and not to embed_max_tokens ({max_tokens})")
        max_tokens = rows
    tokens = [ids[:max_tokens] for ids in tokens]
    empty = next((text for text, ids in zip(texts, tokens, strict=True) if not ids), None)
    if empty is not None:
        raise ValueError(f"embed: expected a tokenizer that gives tokens for every text, got none for {empty!r:.80}")
    order = sorted(
        range(len(texts)), key=lambda index: -len(tokens[index])
    )  # the largest batch shows at once if it fits
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    values: np.ndarray | None = None
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    for batch in track(batches, "embedding texts", console=console, transient=True, disable=hidden):
        longest = len(tokens[batch[0]])
        ids, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
        for row, index in enumerate(batch):  # behind the text: a causal LM's tokens do not see what follows
            ids[row, : len(tokens[index])] = torch.tensor(tokens[index])
            mask[row, : len(tokens[index])] = 1
        ids, mask = ids.to(device), mask.to(device)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mean = torch.where(mask[..., None] > 0, states, 0).sum(1) / mask.sum(1, keepdim=True)
        values = np.zeros((len(texts), mean.shape[1]), np.float32) if values is None else values
        values[batch] = mean.cpu().numpy()
    assert values is not None
    return values


def _sentences(
    texts: list[str],
    name: str,
    folder: Path,
    revision: str | None,
    batch_size: int,
    max_tokens: int,
    device: str,
    progress: bool,
) -> np.ndarray:
    _check_modules(folder / _MODULES)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(name),
        device=device,
        revision=revision,
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True},
    )
    model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)
    found = model.encode(texts, batch_size=batch_size, show_progress_bar=progress, convert_to_numpy=True)
    return np.asarray(found, np.float32)


def _check_modules(path: Path) -> None:
    """ValueError where modules.json names a class that is not of sentence-transformers: it would be imported."""
    with open(path, "rb") as stream:
        content = stream.read(1 << 20)
    try:
        listed = json.loads(content)
        types = [module["type"] for module in listed]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a list of modules with types, got {error!s:.200}") from None
    odd = [t for t in types if not (isinstance(t, str) and t.startswith("sentence_transformers."))]
    if odd:
        raise ValueError(f"{path}: expected modules of sentence_transformers, got {odd[0]!r:.100}")
