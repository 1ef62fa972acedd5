"""Which attention a backbone may be loaded with on this machine."""

from __future__ import annotations

from transformers import utils

#: What an implementation needs beside torch, and transformers' name for whether it is there.
_PACKAGES = {
    "flash_attention_2": ("flash-attn", "is_flash_attn_2_available"),
    "flash_attention_3": ("flash-attn 3", "is_flash_attn_3_available"),
    "flash_attention_4": ("flash-attn 4", "is_flash_attn_4_available"),
}


def check_attention(name: object) -> None:
    """ValueError where ``attn_implementation`` names a flash attention that is not installed or has no GPU here.

    Transformers would fetch a kernel from the Hub instead where it can.
    """
    if isinstance(name, str) and name in _PACKAGES:
        package, available = _PACKAGES[name]
        if not getattr(utils, available, lambda: False)():
            wanted = f"the package {package} and a GPU that it supports, for {name}"
            raise ValueError(f"attn_implementation: expected {wanted}, got none")
