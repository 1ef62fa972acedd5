"""Tokenizers, generated data and batches are the same in every process."""

import os
import subprocess
import sys

PROBE = """
import hashlib, sys
import numpy as np, torch
from flr.data import *
dataset = planted_dataset(60, 80, seed=3)
digest = hashlib.sha256()
for codec in ("title", "sid", "id"):
    processor = RecProcessor(build_tokenizer(dataset.catalogue, codec, vocab_size=400), dataset.catalogue, codec)
    collator = SFTCollator(processor, Augment(prefix=.3, suffix=.3, drop_item=.3, shuffle=.5), seed=5)
    rows = InteractionDataset(expand_prefixes(dataset.train, max_history=6))
    sampler = EpochSampler(len(rows), seed=1)
    sampler.set_epoch(4)
    batch = collator([rows[index] for index in list(sampler)[:32]])
    for name in sorted(batch):
        digest.update(name.encode() + batch[name].numpy().tobytes())
    digest.update(processor.item_codec.tokens.tobytes())
print(digest.hexdigest())
"""


def test_same_result_in_every_process(capsys):
    """Hash randomisation, thread counts and the process play no part in tokenizers, planted data or batches."""
    exec(PROBE, {})
    here = capsys.readouterr().out
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "3"}
    there = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    assert len(here) == 65
    assert here == there.stdout
