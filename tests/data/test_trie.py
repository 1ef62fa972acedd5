"""The trie against a dictionary of prefixes, its filters against counting, its file, and what it refuses."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flr.decode import CatalogueTrie, item_filter
from tests.helpers.catalogues import codec_of, random_catalogue


def leaves_below(trie: CatalogueTrie, node: int) -> list[int]:
    return sorted(trie.items[int(trie.leaf_begin[node]) : int(trie.leaf_end[node])].tolist())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bodies=st.lists(st.lists(st.integers(10, 13), max_size=6).map(tuple), min_size=1, max_size=30, unique=True),
    large=st.booleans(),
)
def test_equals_a_dictionary_of_prefixes(bodies, large):
    offset = 2**30 if large else 0
    sequences = [(*(t + offset for t in b), 9) for b in bodies]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    prefixes = {s[:n] for s in sequences for n in range(len(s) + 1)}
    assert trie.num_nodes == len(prefixes)
    assert trie.num_edges == len(prefixes) - 1
    assert trie.num_items == len(sequences)
    assert trie.depth == max(map(len, sequences))
    for prefix in prefixes:
        node = trie.walk(prefix)
        assert trie.allowed_tokens(prefix) == sorted(
            {p[-1] for p in prefixes if len(p) == len(prefix) + 1 and p[:-1] == prefix}
        )
        assert leaves_below(trie, node) == sorted(i for i, s in enumerate(sequences) if s[: len(prefix)] == prefix)
        assert trie.item_at(node) == (sequences.index(prefix) if prefix in sequences else -1)
    for level in range(trie.depth + 1):
        at = [p for p in prefixes if len(p) == level]
        assert trie.level_start[level + 1] - trie.level_start[level] == len(at)
        assert trie.num_leaves[level] == sum(p in sequences for p in at)
        assert trie.num_internal[level] == len(at) - trie.num_leaves[level]
        assert trie.max_fanout[level] == max(len(trie.allowed_tokens(p)) for p in at)
    assert trie.lengths.tolist() == [len(sequences[i]) for i in trie.items.tolist()]
    assert trie.items[trie.leaf_of_item].tolist() == list(range(len(sequences)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_filters_count_and_find(data):
    sequences = random_catalogue(data.draw(st.integers(0, 5)))
    trie, count = CatalogueTrie.from_codec(codec_of(sequences)), len(sequences)
    allowed = torch.tensor([data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in range(2)])
    exclude = torch.tensor([data.draw(st.lists(st.integers(-1, count - 1), min_size=9, max_size=9)) for _ in range(2)])
    hit, hit_first = ((x[:, :, None] == torch.arange(count)).any(1) for x in (exclude, exclude[:, :4]))
    begin, end = torch.tril_indices(count + 1, count + 1).flip(0).expand(2, 2, -1).unbind(1)
    begin, end = begin[:, None], end[:, None]  # [B, 1, n]
    categories = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count)))
    wanted = torch.tensor([data.draw(st.integers(0, 7)) for _ in range(2)])
    fits = (categories & wanted[:, None]) != 0
    for kind, truth in [
        ({}, torch.ones(2, count, dtype=torch.bool)),
        ({"only": exclude}, hit),
        ({"only": exclude[:, :0]}, torch.zeros(2, count, dtype=torch.bool)),
        ({"only": exclude, "allowed": allowed}, hit & allowed),
        ({"only": exclude, "allowed": allowed[0], "exclude": exclude[:, :4]}, hit & allowed[0] & ~hit_first),
        ({"categories": categories, "wanted": wanted}, fits),
        ({"categories": categories, "wanted": 5}, ((categories & 5) != 0).expand(2, -1)),
        ({"categories": categories, "wanted": wanted, "allowed": allowed[0]}, fits & allowed[0]),
        ({"categories": categories, "wanted": 5, "allowed": allowed}, ((categories & 5) != 0) & allowed),
        ({"categories": categories, "wanted": wanted, "exclude": exclude}, fits & ~hit),
        ({"categories": categories, "wanted": wanted, "only": exclude}, fits & hit),
        ({"allowed": allowed}, allowed),
        ({"allowed": allowed[0]}, allowed[:1].expand(2, -1)),
        ({"exclude": exclude}, ~hit),
        ({"exclude": exclude[:, :0]}, torch.ones(2, count, dtype=torch.bool)),
        ({"allowed": allowed, "exclude": exclude}, allowed & ~hit),
        ({"allowed": allowed[1], "exclude": exclude}, allowed[1] & ~hit),
    ]:
        leaf = truth[:, trie.items.long()]
        before = torch.nn.functional.pad(leaf.cumsum(1), (1, 0))
        place = torch.arange(count)
        for users in ([0, 1], [1], [1, 0]):
            items, rows = item_filter(trie, 2, **kind), torch.tensor(users)
            if users != [0, 1]:
                items = items.select(rows)
            number, first, last = (
                f.squeeze(1)
                for f in (items.count(begin[rows], end[rows]), items.first(begin[rows]), items.last(end[rows]))
            )
            for at, user in enumerate(users):
                b, e = begin[user, 0], end[user, 0]
                assert torch.equal(number[at], before[user, e] - before[user, b])
                after = torch.where(leaf[user] & (place >= b[:, None]), place, count).amin(1)
                up_to = torch.where(leaf[user] & (place < e[:, None]), place, -1).amax(1)
                assert torch.equal(first[at], after)
                assert torch.equal(last[at], up_to)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_updated_equals_built_anew(data):
    size = data.draw(st.integers(1, 30))
    sequences = random_catalogue(data.draw(st.integers(0, 9)), size + data.draw(st.integers(0, 20)), 5, 5)
    old, new = sequences[:size], sequences[size:]
    remove = data.draw(st.lists(st.integers(0, size - 1), max_size=size - (0 if new else 1), unique=True))
    trie = CatalogueTrie.from_codec(codec_of(old))
    before = trie.sequences()
    assert before[0].tolist() == codec_of(old).tokens.tolist()
    assert before[1].tolist() == codec_of(old).offsets.tolist()
    updated = trie.updated(*codec_of(new), remove)
    expected = CatalogueTrie.from_codec(codec_of([s for i, s in enumerate(old) if i not in remove] + new))
    for name in ("children", "tokens", "leaf_begin", "leaf_end", "items", "lengths"):
        assert torch.equal(getattr(updated, name), getattr(expected, name)), name
    assert updated.level_start == expected.level_start
    assert all(np.array_equal(a, b) for a, b in zip(trie.sequences(), before, strict=True)), "the old one serves on"


def test_update_refuses_what_a_build_refuses():
    trie = CatalogueTrie.from_codec(codec_of([(1, 2), (3,)]))
    with pytest.raises(ValueError, match="item 2 that begins item 0"):
        trie.updated([1], [0, 1])
    assert trie.updated([1], [0, 1], remove=[0]).num_items == 2
    with pytest.raises(ValueError, match=r"remove: expected item indices in 0\.\.1, got 2\.\.2"):
        trie.updated(remove=[2])
    with pytest.raises(ValueError, match="at least one item"):
        trie.updated(remove=[0, 1])
    with pytest.raises(ValueError, match="tokens: expected integers"):
        trie.updated([0.5], [0, 1])
    with pytest.raises(ValueError, match="offsets: expected to rise"):
        trie.updated([4, 5], [0, 1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 30), data=st.data())
def test_ancestors_and_joins(seed, data):
    sequences = random_catalogue(seed, data.draw(st.integers(1, 25)), 5, data.draw(st.integers(1, 4)) + 1)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    by_leaf = [sequences[i] for i in trie.items.tolist()]
    for leaf, s in enumerate(by_leaf):
        depth = torch.arange(len(s) + 1)
        assert trie.ancestor(torch.full_like(depth, leaf), depth).tolist() == [
            trie.walk(s[:n]) for n in range(len(s) + 1)
        ]
    first, last = torch.tril_indices(len(by_leaf), len(by_leaf)).flip(0)
    shared = [
        next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
        for a, b in ((by_leaf[i], by_leaf[j]) for i, j in zip(first.tolist(), last.tolist(), strict=True))
    ]
    assert trie.common_depth(first, last, torch.zeros_like(first)).tolist() == shared


def test_refuses():
    with pytest.raises(ValueError, match="item 1 that begins item 0"):
        CatalogueTrie.from_codec(codec_of([(1, 2), (1,)]))
    with pytest.raises(ValueError, match=r"item [02] that begins item [02]"):
        CatalogueTrie.from_codec(codec_of([(1, 2), (3,), (1, 2)]))
    with pytest.raises(ValueError, match="got none for item 1"):
        CatalogueTrie.from_codec(codec_of([(1, 2), ()]))
    with pytest.raises(ValueError, match="at least one item"):
        CatalogueTrie.from_sequences([], [0])
    with pytest.raises(ValueError, match="offsets: expected to rise"):
        CatalogueTrie.from_sequences([1, 2], [0, 1])
    with pytest.raises(ValueError, match=r"tokens: expected ids in \[0"):
        CatalogueTrie.from_sequences([-1], [0, 1])
    with pytest.raises(ValueError, match="tokens: expected integers"):
        CatalogueTrie.from_sequences([0.5], [0, 1])
    trie = CatalogueTrie.from_codec(codec_of([(1, 2), (1, 3)]))
    for impossible in ([2], [1, 4], [1, 2, 9], [0], [-1]):
        with pytest.raises(ValueError, match="expected the beginning of an item"):
            trie.walk(impossible)


def test_saved_and_loaded_are_equal(tmp_path):
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(0, 40)))
    path = tmp_path / "new folder" / "trie.safetensors"
    trie.save(path)
    again = CatalogueTrie.load(path)
    assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(again).items()} == {
        k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(trie).items()
    }
    assert [p.name for p in path.parent.iterdir()] == ["trie.safetensors"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="expected a catalogue trie"):
        CatalogueTrie.load(path)


def test_a_million_items_in_seconds_without_padding():
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 256, (1_010_000, 4), dtype=np.int32), axis=0)
    rng.shuffle(codes)
    start = time.perf_counter()
    trie = CatalogueTrie.from_sequences(codes.ravel(), np.arange(0, codes.size + 1, 4))
    seconds = time.perf_counter() - start
    assert trie.num_items == len(codes) > 1_000_000
    memory = sum(x.nbytes for x in vars(trie).values() if isinstance(x, torch.Tensor))
    assert memory < 50e6
    assert seconds < 20, seconds  # about 1 on an idle core
    start = time.perf_counter()
    other = trie.updated([255, 256], [0, 2], remove=[7])
    assert time.perf_counter() - start < 20
    assert other.item_at(other.walk([255, 256])) == len(codes) - 1
    for item in (0, 12345, len(codes) - 1):
        assert trie.item_at(trie.walk(codes[item])) == item
        assert other.item_at(other.walk(codes[item])) == item - (item > 7)


def test_a_moved_trie_keeps_no_tensor_of_the_old_device():
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(0, 30)))
    trie.columns()  # these three make what is made at first use
    trie.ancestor(torch.tensor([0]), trie.leaf_of_item[:1].clamp_max(1))
    before = {id(x) for x in _tensors(trie)}
    moved = trie.to("meta")
    assert {x.device.type for x in _tensors(moved)} == {"meta"}
    assert moved.leaf_of_item.device.type == "meta"
    assert {id(x) for x in _tensors(trie)} == before


def _tensors(trie: CatalogueTrie) -> list[torch.Tensor]:
    values = [v if isinstance(v, tuple) else (v,) for v in vars(trie).values()]
    return [x for value in values for x in value if isinstance(x, torch.Tensor)]


def test_a_damaged_file_is_refused_by_name(tmp_path):
    """Also one whose arrays look sound, and one of the first version, which had no digest."""
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(0)))
    file = tmp_path / "trie.safetensors"
    trie.save(file)
    whole = file.read_bytes()
    assert torch.equal(CatalogueTrie.load(file).items, trie.items)
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"trie\.safetensors: expected the arrays that were saved"):
            CatalogueTrie.load(file)
    for content in (b"", whole[:-3], b"9" * 100, whole[:8] + b"[" * (start - 8) + whole[start:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"trie\.safetensors: expected a catalogue trie, got"):
            CatalogueTrie.load(file)
    file.write_bytes(whole)
    arrays = load_file(file)
    save_file(arrays, file, metadata={"format": "flr-catalogue-trie-1"})
    assert torch.equal(CatalogueTrie.load(file).children, trie.children)
    arrays["items"][0] = arrays["items"][1]
    save_file(arrays, file, metadata={"format": "flr-catalogue-trie-1"})
    with pytest.raises(ValueError, match=r"trie\.safetensors: expected a whole trie"):
        CatalogueTrie.load(file)
