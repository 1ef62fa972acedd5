"""The published files in ../shared/data (or $FLR_DATA): counts of its README, every codec, whole batches."""

import os
from pathlib import Path

import numpy as np
import pytest

from flr.data import (
    Augment,
    InteractionDataset,
    RecProcessor,
    SFTCollator,
    build_tokenizer,
    expand_prefixes,
    load_dataset,
)
from flr.data.codecs import find_prefix
from flr.data.csr import CSR

FOLDER = Path(os.environ.get("FLR_DATA") or Path(__file__).parents[3] / "shared" / "data")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no data in {FOLDER}")

COUNTS = {
    "amazon-cds": (5841, 5377, 10696, 6156, 6157),
    "amazon-office": (3459, 3443, 9484, 4866, 4866),
}


@pytest.fixture(scope="module", params=sorted(COUNTS))
def dataset(request):
    return load_dataset(FOLDER / request.param)


def test_counts(dataset):
    catalogue = dataset.catalogue
    parts = tuple(len(part) for part in (dataset.train, dataset.valid, dataset.test))
    assert (len(catalogue), len(set(catalogue.titles)), *parts) == COUNTS[dataset.name]
    assert dataset.report.rows_bad == 0
    assert not any("another title" in note for note in dataset.report.notes)
    for part in (dataset.train, dataset.valid, dataset.test):
        assert part.histories.lengths.min() >= 1
        assert part.histories.lengths.max() <= 10
    if dataset.name == "amazon-cds":
        assert dataset.train.timestamps.max() <= dataset.test.timestamps.min()
    else:
        assert len(set(catalogue.sids)) == 3444
        assert len({code for sid in catalogue.sids for code in sid}) == 600


def test_save_and_load(dataset, tmp_path):
    dataset.save(tmp_path / "set")
    loaded = load_dataset(tmp_path / "set")
    assert loaded.catalogue == dataset.catalogue
    assert (loaded.train, loaded.valid, loaded.test) == (dataset.train, dataset.valid, dataset.test)
    assert loaded.report == dataset.report


@pytest.mark.parametrize(
    ("dataset", "name"),  # amazon-cds has no semantic IDs
    [(data, name) for data in COUNTS for name in ("title", "sid", "id") if (data, name) != ("amazon-cds", "sid")],
    indirect=["dataset"],
)
def test_codecs_and_batches(dataset, name, tmp_path):
    processor = RecProcessor(build_tokenizer(dataset.catalogue, name), dataset.catalogue, name)
    codec = processor.item_codec
    assert find_prefix(CSR(codec.tokens, codec.offsets)) is None
    for item in range(0, len(codec), 7):
        assert codec.decode(codec.encode(item)) == item
    if name == "title":
        for item in range(0, len(codec), 7):
            assert (
                processor.tokenizer.decode(codec.encode(item), skip_special_tokens=True)
                == dataset.catalogue.titles[item]
            )
    rows = InteractionDataset(dataset.test)
    batch = SFTCollator(processor)([rows[index] for index in range(256)])
    labels = batch["labels"].numpy()
    for index in range(256):
        assert codec.decode(labels[index][labels[index] >= 0]) == rows[index].target
        entries = batch["item_positions"][index].numpy()
        for entry, item in enumerate(rows[index].history.tolist()):
            assert codec.decode(batch["input_ids"][index].numpy()[entries == entry]) == item
    processor.save_pretrained(tmp_path)
    loaded = RecProcessor.from_pretrained(tmp_path)
    assert np.array_equal(loaded.item_codec.tokens, codec.tokens)


def test_expanded_and_augmented_rows_stay_in_the_log(dataset):
    """Whatever is changed, items come from the row and a target is the row's or an item of its history."""
    rows = expand_prefixes(dataset.valid)
    assert rows.select(range(len(dataset.valid))) == dataset.valid
    keys = {(row.user, row.target, row.history.tobytes()) for row in rows}
    originals = {(row.user, row.target, row.history.tobytes()) for row in dataset.valid}
    assert len(keys) == len(rows) - (len(dataset.valid) - len(originals))
    changed = Augment(prefix=0.5, suffix=0.5, drop_item=0.3, shuffle=0.5)
    sample = [InteractionDataset(rows)[index] for index in range(0, len(rows), 9)]
    histories, targets = changed(sample, seed=3)
    assert histories.lengths.min() >= 1
    for index, row in enumerate(sample):
        assert set(histories.row(index).tolist()) <= set(row.history.tolist())
        assert targets[index] == row.target or targets[index] in row.history
