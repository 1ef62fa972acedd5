"""Folders that released versions saved are loaded, and give the answers that were given then.

``tests/fixtures/make_saved.py`` says how they were made.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import flr
from flr.data import RecProcessor
from flr.data.token_store import STORE_NAME

FOLDERS = sorted((Path(__file__).parents[1] / "fixtures").glob("saved-*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def saved(request):
    """A saved folder, and what it answered."""
    return request.param, json.loads((request.param / "expected.json").read_text())


def test_recommendations_are_those_of_then(saved):
    folder, expected = saved
    recommender = flr.Recommender.from_pretrained(folder, device="cpu")
    answers = recommender.recommend(expected["histories"], k=len(expected["recommendations"][0]), shares=True)
    for found, then in zip(answers, expected["recommendations"], strict=True):
        assert [r.item_id for r in found] == [r["item_id"] for r in then]
        for ours, theirs in zip(found, then, strict=True):
            assert (ours.title, ours.index) == (theirs["title"], theirs["index"])
            for name in ("score", "base_score", "contributions"):
                np.testing.assert_allclose(getattr(ours, name), theirs[name], rtol=0, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(ours.factor_shares, theirs["factor_shares"], rtol=0, atol=1e-5)


def test_log_probabilities_are_those_of_then(saved):
    folder, expected = saved
    model, processor = flr.from_pretrained(folder), RecProcessor.from_pretrained(folder)
    catalogue = processor.catalogue
    inputs = processor([[catalogue.index(item) for item in history] for history in expected["histories"]])
    del inputs["item_positions"]
    (token,) = processor.item_codec.encode(catalogue.index(expected["target"]))
    with torch.no_grad():
        logprobs = model(**inputs).logits[:, -1].log_softmax(-1)[:, token]
    torch.testing.assert_close(logprobs, torch.tensor(expected["target_logprobs"]), rtol=0, atol=1e-5)


def test_saving_again_writes_the_same_files(saved, tmp_path):
    folder, expected = saved
    recommender = flr.Recommender.from_pretrained(folder, device="cpu")
    recommender.model.save_pretrained(tmp_path)
    recommender.processor.save_pretrained(tmp_path)
    written = {*expected["files"], STORE_NAME}  # absent from folders of before it was there
    assert {path.name for path in tmp_path.iterdir()} == written
    again = flr.Recommender.from_pretrained(tmp_path, device="cpu")
    for name, value in recommender.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
