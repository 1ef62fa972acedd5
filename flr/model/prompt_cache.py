"""What a frozen backbone makes of a prompt, kept from epoch to epoch: last hidden states, keys and values.

Where only the reasoner is trained, a prompt's states are the same in every epoch, and reading the prompt is most of a
step. They are kept by the prompt's tokens, in memory or in a file, until a bound is reached; what does not fit then is
computed every time, since replacing old prompts by new ones would lose all of them in every pass over the rows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .backbone import attention_types, backbone_trains, causal_lm, takes_positions, warn_once
from .base import run_base
from .verify import traits_of

#: Where states are kept.
PLACES = ("none", "memory", "disk")


def cache_obstacle(model: Any) -> str | None:
    """Why the states of a model's prompts cannot be kept, or None."""
    lm = causal_lm(model)
    config, traits = lm.config.get_text_config(decoder=True), traits_of(lm)
    if backbone_trains(lm):
        return "the backbone, adapters or token tables are trained, so that a prompt's states change"
    if not (traits.embeds and traits.pieces and traits.gradients and traits.left_padding and traits.plain_cache):
        return f"{type(lm).__name__} keeps more of a prompt than its keys and values, or takes no padding"
    if odd := attention_types(config) - {"full_attention"}:
        return f"it has layers of type {', '.join(sorted(odd))}"
    if not takes_positions(lm):
        return f"{type(lm).__name__} derives positions from the attention mask"
    own = {id(module) for module in lm.flr.modules()} if hasattr(lm, "flr") else set()
    dropped = any(isinstance(m, nn.Dropout) and m.p > 0 and id(m) not in own for m in lm.modules())
    if dropped or getattr(config, "attention_dropout", 0) > 0:
        return "the backbone has dropout"
    return None


class PromptCache:
    """Hidden states, keys and values of prompts, by their tokens.

    Args:
        model: patched, its backbone frozen, without dropout, with full attention in every layer.
        gigabytes: bound of what is kept, in 10^9 bytes. A prompt of n tokens takes, for every token, the last hidden
            state and every layer's key and value: 48 kB in float32 for a model of 30 layers with 3 heads of 64.
        folder: where a file without a name, which ends with the process, holds the states; None for memory.

    Attributes:
        found, asked: prompts that were there, and all that were asked for.
        bytes: what is kept.

    Raises:
        ValueError: the states of this model's prompts change or are not all that it keeps (the message says which);
            ``gigabytes`` is not positive.

    Example:
        >>> import flr
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                    num_attention_heads=4, num_key_value_heads=2)
        >>> model = flr.patch_model(LlamaForCausalLM(tiny).requires_grad_(False))
        >>> ids = torch.tensor([[5, 6, 7, 50, 8]])
        >>> with PromptCache(model, 0.1).used() as kept:
        ...     losses = [model(input_ids=ids, labels=ids.where(ids == 8, -100)).loss for _ in range(3)]
        >>> kept.found, kept.asked, kept.bytes  # 3 tokens: 32 states, 2 layers with 2 heads of 8 keys and values
        (2, 3, 1152)
    """

    def __init__(self, model: Any, gigabytes: float, folder: str | Path | None = None) -> None:
        if not gigabytes > 0 or not math.isfinite(gigabytes):
            raise ValueError(f"prompt_cache_gb: expected a positive number, got {gigabytes}")
        if (reason := cache_obstacle(model)) is not None:
            raise ValueError(f"prompt_cache: expected none for this model, got another: {reason}")
        self.model, self.limit = causal_lm(model), int(gigabytes * 1e9)
        self.found = self.asked = self.bytes = 0
        self._full = False
        self._rows: dict[bytes, Any] = {}  # digest of the tokens → tensors, or where they lie in the file
        self._file: Any = None
        if folder is not None:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".prompt-cache-")  # noqa: SIM115 - used() closes it
        self._made([torch.zeros(1, dtype=torch.int64)], self.model.get_input_embeddings().weight.device)  # or refuses

    @contextlib.contextmanager
    def used(self) -> Iterator[PromptCache]:
        """Training forwards of the model take prompts from here inside, and everything is dropped afterwards."""
        patch = self.model._flr_patch
        patch.prompt_cache = self
        try:
            yield self
        finally:
            patch.prompt_cache = None
            self._rows.clear()
            if self._file is not None:
                self._file.close()

    def figures(self) -> dict[str, float]:
        """The share of prompts that were found, in [0, 1], and what is kept in 10^9 bytes; for logs."""
        return {"prompt_cache_found": self.found / max(self.asked, 1), "prompt_cache_gb": self.bytes / 1e9}

    def states(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, DynamicCache] | None:
        """Last hidden states [B, L, D] of prompts, and their keys and values.

        Args:
            ids: int64 [B, L]. mask: int64 [B, L], 0 on padding, which must be on the left; None for no padding.
            positions: int64 [1 or B, L] that count tokens; None for those of columns without padding.

        Returns:
            None where padding or positions are other than that. States of padding are 0.
        """
        counts = _left_padded(ids, mask, positions)
        if counts is None:
            warn_once("prompt_cache: prompts are padded on the right or have positions of their own: none is kept")
            return None
        tokens = ids.cpu()
        rows = [tokens[n, tokens.shape[1] - count :] for n, count in enumerate(counts)]
        keys = [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in rows]
        self.asked += len(keys)
        self.found += sum(key in self._rows for key in keys)
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._rows}
        made = self._made(list(missing.values()), ids.device)
        fresh = dict(zip(missing, made, strict=True))
        for key, parts in fresh.items():
            self._keep(key, parts)
        batch = [fresh[key] if key in fresh else self._kept(key) for key in keys]
        return _batched(batch, ids.shape[1], ids.device)

    def _made(self, rows: Sequence[Tensor], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Hidden states [n, D], keys and values [2·layers, H, n, d] of prompts that are not here.

        On a CPU they are read one at a time: what is computed depends on the prompt alone then, to the last bit, and
        a run that was killed and begins with an empty cache ends at the same weights.
        """
        single = device.type == "cpu"
        groups = [[row] for row in rows] if single else [list(rows)] if rows else []
        made: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            width = max(len(row) for row in group)
            ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in group]).to(device)
            counts = torch.tensor([len(row) for row in group], device=device)
            mask = (torch.arange(width, device=device) >= width - counts[:, None]).long()
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            with torch.no_grad():
                out, cache = run_base(
                    self.model,
                    self.model.get_input_embeddings()(ids),
                    cache=DynamicCache(),
                    use_cache=True,
                    attention_mask=mask,
                    position_ids=positions,
                )
            layers: Any = cache.layers
            if len(shapes := {tuple(x.shape) for layer in layers for x in (layer.keys, layer.values)}) != 1:
                raise ValueError(f"prompt_cache: expected keys and values of one shape in every layer, got {shapes}")
            both = torch.stack([x for layer in layers for x in (layer.keys, layer.values)])  # [2·layers, R, H, L, d]
            for n, row in enumerate(group):
                begin = width - len(row)
                made.append((out.last_hidden_state[n, begin:], both[:, n, :, begin:]))
        return made

    def _keep(self, key: bytes, parts: tuple[Tensor, Tensor]) -> None:
        size = sum(x.numel() * x.element_size() for x in parts)
        if self._full or self.bytes + size > self.limit:
            if not self._full:
                warn_once(f"prompt_cache: full at {self.bytes / 1e9:.2f} GB; other prompts are read in every epoch")
            self._full = True
            return
        held = [x.to("cpu", copy=True).contiguous() for x in parts]
        if self._file is None:
            self._rows[key] = held
        else:
            try:
                written = _write(self._file.fileno(), held, self.bytes)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise OSError(error.errno, f"prompt_cache: expected to write states, got {error}") from error
                self._full = True
                warn_once(f"prompt_cache: no space is left at {self.bytes / 1e9:.2f} GB; no more prompts are kept")
                return
            self._rows[key] = written
        self.bytes += size

    def _kept(self, key: bytes) -> Sequence[Tensor]:
        entry = self._rows[key]
        return entry if self._file is None else _read(self._file.fileno(), entry)


def _left_padded(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[int] | None:
    """Tokens of every row; None where rows are not padded on the left alone, or positions do not count them."""
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.dim() != 2 or bool((mask.diff(dim=1) < 0).any() or (mask[:, -1] == 0).any()):
        return None
    counted = (mask.cumsum(1) - 1).clamp_min(0)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    if bool(((positions != counted) & mask.bool()).any()):
        return None
    return mask.sum(1).tolist()


def _batched(rows: Sequence[Sequence[Tensor]], width: int, device: torch.device) -> tuple[Tensor, DynamicCache]:
    """Rows of states as one batch that is padded on the left with zeros."""
    hidden, both = rows[0]
    states = hidden.new_zeros(len(rows), width, hidden.shape[-1], device=device)
    kinds, heads, _, size = both.shape
    pairs = both.new_zeros(kinds, len(rows), heads, width, size, device=device)
    for n, (hidden, both) in enumerate(rows):
        begin = width - len(hidden)
        states[n, begin:] = hidden.to(device, non_blocking=True)
        pairs[:, n, :, begin:] = both.to(device, non_blocking=True)
    cache = DynamicCache()
    for layer in range(kinds // 2):
        cache.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
    return states, cache


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = x.flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _write(file: int, parts: Sequence[Tensor], offset: int) -> list[tuple[int, torch.Size, torch.dtype]]:
    places = []
    for x in parts:
        view = _bytes(x)
        done = 0
        while done < len(view):
            done += os.pwrite(file, view[done:], offset + done)
        places.append((offset, x.shape, x.dtype))
        offset += len(view)
    return places


def _read(file: int, places: Sequence[tuple[int, torch.Size, torch.dtype]]) -> list[Tensor]:
    parts = []
    for offset, shape, dtype in places:
        x = torch.empty(shape, dtype=dtype)
        view = _bytes(x)
        done = 0
        while done < len(view):
            got = os.preadv(file, [view[done:]], offset + done)
            if got == 0:
                raise OSError(f"prompt_cache: expected {len(view)} bytes of a prompt's states, got {done}")
            done += got
        parts.append(x)
    return parts
