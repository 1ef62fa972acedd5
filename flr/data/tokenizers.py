"""Tokenizers made from a catalogue alone, offline, for models that are trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .catalogue import Catalogue
from .codecs import CODEC_NAMES, item_tokens, sid_tokens
from .prompt import PromptTemplate

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
_BYTES = 256


def build_tokenizer(
    catalogue: Catalogue, codec: str = "id", *, vocab_size: int = 8192, texts: Iterable[str] | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer with pad, bos and eos for ``codec``, made from ``catalogue`` alone.

    "id" and "sid" give a word-level tokenizer that holds exactly the items' or codes' tokens (it knows no other text).
    "title" trains a byte-level BPE on the titles and on ``texts``; it encodes any text. The same catalogue gives the
    same tokenizer.

    Args:
        catalogue: at least one item.
        codec: "title", "sid" or "id".
        vocab_size: upper bound for "title", at least 259 (256 bytes and three special tokens); unused otherwise.
        texts: the prompt template's text for "title", None for the default template; counted once for every 100 titles,
            so that its words become single tokens.

    Example:
        >>> tokenizer = build_tokenizer(Catalogue(["x", "y"], ["Blue Train", "Giant Steps"]), "id")
        >>> tokenizer.convert_ids_to_tokens([0, 1, 2, 4, 5])
        ['<|pad|>', '<|bos|>', '<|eos|>', '<|item_0|>', '<|item_1|>']
    """
    if len(catalogue) == 0:
        raise ValueError("catalogue: expected at least one item, got none")
    special = {"pad_token": PAD_TOKEN, "bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN}
    if codec in ("id", "sid"):
        special["unk_token"] = UNK_TOKEN
        words = item_tokens(len(catalogue)) if codec == "id" else sid_tokens(catalogue)
        vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*special.values(), *words]))}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif codec == "title":
        if vocab_size < _BYTES + len(special):
            raise ValueError(f"vocab_size: expected at least {_BYTES + len(special)}, got {vocab_size}")
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special.values()),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        prompt = list(PromptTemplate.default(codec).parts if texts is None else texts)
        backend.train_from_iterator([*catalogue.titles, *prompt * (1 + len(catalogue) // 100)], trainer)
    else:
        raise ValueError(f"codec: expected one of {CODEC_NAMES}, got {codec!r}")
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
