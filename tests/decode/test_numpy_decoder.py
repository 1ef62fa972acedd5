"""The reference decoder gives the lists of beam search, from nothing but the trie's file and the model's logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flr.decode import CatalogueTrie, beam_search
from flr.decode import numpy_decoder as module
from flr.decode.numpy_decoder import decode, load_trie
from tests.helpers.models import build_recommender


@pytest.fixture(scope="module", params=["id", "sid", "title"])
def recommender(request):
    return build_recommender(request.param)


def logits_behind(model, prompt, path):
    """The model's, after one prompt and a hypothesis, read in one piece; factors attend to the history's items."""
    ids = torch.cat([prompt["input_ids"], torch.tensor([path]).long()], 1)
    mask = torch.nn.functional.pad(prompt["reasoner_mask"], (0, len(path)))
    with torch.no_grad():
        return model(input_ids=ids, reasoner_mask=mask).logits[0, -1].numpy()


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize(("num_beams", "k"), [(2, 5), (4, 3), (40, 40)])
@pytest.mark.parametrize("share", [None, 0.4, "one"])
def test_lists_are_those_of_beam_search(recommender, scoring, num_beams, k, share, tmp_path):
    trie, model = recommender.trie, recommender.model
    trie.save(tmp_path / "trie.safetensors")
    arrays = load_trie(tmp_path / "trie.safetensors")
    rng = np.random.default_rng(num_beams)
    allowed = None if share is None else rng.random(trie.num_items) < (0 if share == "one" else share)
    if share == "one":
        allowed[7] = True
    histories = [[3, 7, 9], [1] * 6]
    inputs = recommender.processor([np.array(history) for history in histories])
    mask = None if allowed is None else torch.from_numpy(allowed)
    expected = beam_search(model, inputs, trie, num_beams, k, scoring, mask)
    found_any = 0
    for row, history in enumerate(histories):
        prompt = recommender.processor([np.array(history)])

        def next_logits(paths, prompt=prompt):
            return np.stack([logits_behind(model, prompt, path) for path in paths])

        items, scores = decode(arrays, next_logits, num_beams, k, scoring, allowed)
        known = [item for item in expected.items[row].tolist() if item >= 0]
        assert items == known
        np.testing.assert_allclose(scores, expected.scores[row, : len(items)].numpy(), atol=5e-5)
        found_any += len(items)
    assert found_any


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_logits_that_are_not_finite_are_refused(recommender, value, scoring, tmp_path):
    recommender.trie.save(tmp_path / "trie.safetensors")
    arrays, size = load_trie(tmp_path / "trie.safetensors"), recommender.trie.max_token + 1
    with pytest.raises(FloatingPointError, match="the model's logits are NaN or infinite"):
        decode(arrays, lambda paths: np.full((len(paths), size), value), scoring=scoring)


def test_ties_and_hypotheses_that_overtake(tmp_path):
    """Smaller tokens stay where beams are few, smaller items come first, and a best item ends no search of two."""
    trie = CatalogueTrie.from_sequences([14, 9, 12, 9, 13, 9, 10, 9, 11, 9], range(0, 11, 2))
    trie.save(tmp_path / "trie.safetensors")
    arrays = load_trie(tmp_path / "trie.safetensors")
    assert decode(arrays, lambda paths: np.zeros((len(paths), 15)), 2, 2)[0] == [3, 4]
    assert decode(arrays, lambda paths: np.zeros((len(paths), 15)), 5, 5)[0] == [0, 1, 2, 3, 4]
    CatalogueTrie.from_sequences([5, 6, 7, 8, 7, 9], [0, 1, 2, 4, 6]).save(tmp_path / "trie.safetensors")
    after = {(): {5: 5.0, 6: 1.0, 7: 4.0}, (7,): {8: 9.0, 9: 1.0}}

    def next_logits(paths):
        return np.array([[after[tuple(path)].get(token, 0.0) for token in range(10)] for path in paths])

    assert decode(load_trie(tmp_path / "trie.safetensors"), next_logits, 3, 2)[0] == [0, 2]


def test_another_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"children": np.zeros(1)}, tmp_path / "x.safetensors", metadata={"format": "other"})
    with pytest.raises(ValueError, match=r"x.safetensors: expected format 'flr-catalogue-trie-1', got .*other"):
        load_trie(tmp_path / "x.safetensors")


def test_it_stands_alone(tmp_path):
    """A copy of the file runs where neither torch nor this package can be imported."""
    source = Path(module.__file__).read_text()
    (tmp_path / "copied.py").write_text(source)
    block = "import sys; sys.modules['torch'] = sys.modules['flr'] = None; import copied, doctest; "
    done = subprocess.run([sys.executable, "-c", block + "sys.exit(doctest.testmod(copied)[0])"], cwd=tmp_path)
    assert done.returncode == 0
    assert len(source.splitlines()) <= 100
