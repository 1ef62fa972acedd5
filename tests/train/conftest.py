"""What tests of several files look at and none changes."""

import pytest

from flr.cli import main
from tests.helpers.updates import SFT, SMALL, split


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A model by codec beside its data, old and new; that of titles has a control, of ids a thought without factors."""
    folder = tmp_path_factory.mktemp("models")
    for name, dataset in zip(("old", "new"), split(), strict=True):
        dataset.save(folder / name)
    for codec, variant in (("id", "anchor"), ("sid", "flr"), ("title", "none")):
        more = ["--codec", codec, "--variant", variant, "--num_factors", "2", "--anchor", "last", "--vocab_size", "300"]
        where = ["--data", str(folder / "old"), "--output_dir", str(folder / codec)]
        assert main(["sft", *where, *SFT, *SMALL, *more]) == 0
    return folder
