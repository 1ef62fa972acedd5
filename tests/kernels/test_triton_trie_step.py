"""The Triton kernels of `flr_kernels.trie_step` against its definition: under the interpreter on the CPU, or on a GPU.

Collected as its neighbours are; `test_triton_backend.py` runs all of them under the interpreter.
"""

import pytest
import torch

import flr.decode.beam
import flr_kernels
from flr.decode import CatalogueTrie, beam_search
from flr_kernels import reference
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import toy_model
from tests.helpers.trie_steps import call, case
from tests.helpers.triton import DEVICE, MARKS, apart

pytestmark = MARKS


def expected(arguments, unfinished, all_, unique):
    order = ("logits", "score", "node", "norm", "children", "tokens", "leaf_begin", "leaf_end", "listed", "offset")
    values = [arguments.get(name) for name in order]
    values[0] = values[0].float()
    rest = arguments["entries"], unfinished, all_, arguments["widest"], unique, arguments["filter"]
    return reference.trie_step(*values, *rest)


@pytest.mark.parametrize(
    ("users", "items", "beams", "depth", "spread", "unfinished", "all_", "kind", "scoring"),
    [
        (2, 20, 3, 1, 5, 3, 4, "none", "full"),
        (2, 20, 3, 1, 5, 3, 4, "prefix", "full"),
        (2, 20, 3, 1, 5, 3, 4, "only", "full"),
        (2, 20, 3, 1, 5, 3, 4, "exclude", "full"),
        (2, 12, 20, 2, 3, 2, 3, "none", "catalogue"),
        (2, 12, 4, 1, 3, 2, 3, "prefix", "catalogue"),
        (2, 12, 4, 1, 3, 2, 3, "only", "catalogue"),
        (2, 12, 4, 1, 3, 2, 3, "exclude", "catalogue"),
        (1, 40, 1, 0, 50, 3, 16, "none", "catalogue"),  # several blocks of children, more wanted than one block gives
        (1, 9, 1, 0, 12, 0, 3, "none", "full"),
        (2, 30, 5, 1, 4, 6, 0, "none", "full"),
        (1, 90, 20, 1, 30, 4, 2, "none", "full"),  # hypotheses in two blocks, keys reduced in rounds
        (3, 60, 6, 1, 30, 1, 14, "none", "full"),  # selections of very different widths share the rounds
        (3, 60, 6, 1, 30, 14, 1, "none", "full"),
        (2, 20, 3, 1, 5, 0, 0, "none", "full"),
    ],
)
def test_equals_the_definition(users, items, beams, depth, spread, unfinished, all_, kind, scoring):
    arguments = case(items + beams, users, items, beams, depth, spread, kind)
    unique = scoring == "catalogue"
    norm = None if unique else arguments["logits"].to(DEVICE).logsumexp(-1)
    arguments = call(arguments, DEVICE, norm=norm)
    widths = {"num_unfinished": unfinished, "num_all": all_}
    found = flr_kernels.trie_step(**arguments, **widths, unique=unique)
    wanted = expected(arguments, unfinished, all_, unique)
    for got, want in zip((*found.unfinished, *found.all), wanted[:8], strict=True):
        if got.dtype == torch.float32:
            torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
        elif unique and got is not found.unfinished.node:  # a normaliser that differs in its last bit changes keys
            continue
        else:
            assert torch.equal(got, want)
    assert torch.equal(found.invalid, wanted[8])
    if DEVICE == "cuda":
        again = flr_kernels.trie_step(**arguments, **widths, unique=unique)
        assert all(
            torch.equal(a, b)
            for a, b in zip((*found.unfinished, *found.all), (*again.unfinished, *again.all), strict=True)
        )


@pytest.mark.parametrize("kind", ["prefix", "only"])
def test_elements_may_lie_apart_in_memory(kind):
    given = call(case(23, 2, 20, 3, 1, 5, kind), DEVICE) | {"num_unfinished": 3, "num_all": 4, "unique": True}
    wanted = flr_kernels.trie_step(**given)
    found = flr_kernels.trie_step(**given | {k: apart(x) for k, x in given.items() if k != "logits"})
    assert all(map(torch.equal, (*found.unfinished, *found.all), (*wanted.unfinished, *wanted.all)))


def test_ties_and_broken_logits():
    arguments = call(case(5, 2, 14, 1, 0, 20), DEVICE)
    arguments["score"][:] = 0.0
    arguments["logits"][0] = 0.0
    arguments["logits"][1] = torch.nan
    found = flr_kernels.trie_step(**arguments, num_unfinished=3, num_all=8)
    wanted = expected(arguments, 3, 8, False)
    assert torch.equal(found.all.node[0], wanted[5][0])
    assert found.invalid.tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype):
    arguments = case(6, 2, 20, 2, 1, 5)
    arguments["logits"] = arguments["logits"].to(dtype)
    norm = arguments["logits"].float().logsumexp(-1).to(DEVICE)
    arguments = call(arguments, DEVICE, norm=norm)
    found = flr_kernels.trie_step(**arguments, num_unfinished=4, num_all=4)
    assert torch.equal(found.all.score, expected(arguments, 4, 4, False)[4])


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_beam_search(scoring, monkeypatch):
    model, inputs = toy_model("llama").to(DEVICE), toy_inputs((4, 6))
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 12, 3, 3)))
    exclude = torch.tensor([[2, -1], [5, 7]])
    found = beam_search(model, inputs, trie, 3, 4, scoring, exclude=exclude)
    monkeypatch.setenv("FLR_BACKEND", "reference")
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: False)
    expected = beam_search(model, inputs, trie, 3, 4, scoring, exclude=exclude)
    assert torch.equal(found.items, expected.items)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_too_wide_a_selection_is_refused():
    with pytest.raises(ValueError, match="at most 256, got 300"):
        flr_kernels.trie_step(**call(case(7, 1, 9, 1, 0, 12), DEVICE), num_unfinished=0, num_all=300)
