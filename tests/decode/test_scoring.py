"""What searches and exhaustive scoring share: normalisers in blocks, places, vocabularies."""

from __future__ import annotations

import pytest
import torch

import flr.decode.scoring
from flr.decode import CatalogueTrie
from flr.decode.scoring import check_vocabulary, log_normaliser, rank_by_scores, rank_in_list


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("cells", [1, 2 * 30, 1 << 20])
def test_a_normaliser_is_that_of_its_row_whatever_the_dtype_and_the_blocks(dtype, cells, monkeypatch):
    monkeypatch.setattr(flr.decode.scoring, "CACHED_CELLS", cells)
    logits = (8 * torch.randn(3, 2, 30, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = log_normaliser(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits.double().logsumexp(-1).float(), atol=1e-5, rtol=1e-5)


def test_ties_count_against_a_target_and_0_is_no_place():
    scores = torch.tensor([[0.5, 2.0, 0.5, -1.0], [3.0, 1.0, 2.0, 0.0]])
    assert rank_by_scores(scores, torch.tensor([0, 1])).tolist() == [3, 3]
    lists = torch.tensor([[7, 3, 5], [1, 2, -1]])
    assert rank_in_list(lists, torch.tensor([7, 9])).tolist() == [1, 0]
    assert rank_in_list(lists, torch.tensor([5, 2])).tolist() == [3, 2]


def test_the_first_token_behind_a_vocabulary_is_refused():
    trie = CatalogueTrie.from_sequences([5, 60], [0, 1, 2])
    check_vocabulary(trie, 61)
    with pytest.raises(ValueError, match="trie: expected tokens below the model's vocabulary of 60, got 60"):
        check_vocabulary(trie, 60)
