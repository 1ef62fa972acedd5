"""Mixed factors equal K separate forwards: loss, every gradient, logits; and what has no answer is refused."""

import pytest
import torch

import flr
from flr.data.trie import CatalogueTrie
from flr.model.catalogue_loss import CatalogueLoss
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import FAMILIES, THOUGHT, patched_model, tiny_model
from tests.helpers.naive_mixture import naive_logprobs, naive_loss, rows_of

# as in test_group_forward: RMSNorm rounds to float32, LayerNorm does not
FLOAT64 = {"llama": 1e-6, "mistral": 1e-6, "phi": 1e-12, "gpt2": 1e-12}
LAYOUTS = ("left", "right", "columns")


def mixture(family="phi", dtype=torch.float64, **config):
    options = {"orthogonality_weight": 0.3, "diversity_weight": 0.2, "sparsity_weight": 0.1, **config}
    model = patched_model(family, dtype, aggregation="mixture", **options)
    if config.get("variant") == "offsets":
        with torch.no_grad():
            model.flr.gate.normal_(std=0.3)
            model.flr.gate_factor.normal_()
            model.flr.rescale(50)
    return model


def rows(layout="left", **changes):
    batch = supervised_batch(layout, rows_without=0)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return {**batch, **changes}


def assert_equal(model, batch, relative):
    loss, expected = model(**batch).loss, naive_loss(model, batch)
    assert (loss - expected).abs() <= relative * expected.abs()
    assert_same_gradients(gradients_of(model, loss), gradients_of(model, expected), 10 * relative)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FLOAT64)
def test_float64(family, layout):
    assert_equal(mixture(family), rows(layout), FLOAT64[family])


def test_dropout_acts_on_the_thoughts_in_training_only():
    model, batch = mixture(dropout=0.5).eval(), rows()
    loss = model(**batch).loss
    assert torch.equal(loss, model(**batch).loss)
    model.train()
    assert not torch.equal(model(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family):
    assert_equal(mixture(family, torch.float32), rows("columns"), 2e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"anchor": "last"},
        {"anchor": "none"},
        {"num_factors": 1},
        {"num_factors": 7, "num_refinements": 3},
        {"gate_temperature": 0.3, "sparsity_target": "both"},
        {"variant": "offsets"},
        {"variant": "offsets", "anchor": "last", "num_factors": 6},
    ],
    ids=str,
)
def test_configurations(config):
    assert_equal(mixture(**config), rows("columns"), 1e-12)


def test_narrowed_history():
    batch = rows("left")
    narrowed = {**batch, "reasoner_mask": (batch["input_ids"] % 2 == 0) & batch["attention_mask"].bool()}
    model = mixture()
    assert_equal(model, narrowed, 1e-12)
    assert model(**narrowed).loss != model(**batch).loss


def test_the_factors_matter():
    """Else equality would show nothing: every factor's own prediction differs from the mixture's."""
    model, batch = mixture(), rows()
    with torch.no_grad():
        mixed, out = model(**batch).loss, model(**batch).flr
        anchors = model.get_input_embeddings()(torch.tensor(THOUGHT))
        alone = [model(**batch, thoughts=(anchors + f)[:, None]).loss for f in out.steps[0].factors.unbind(1)]
    assert min((x - mixed).abs() for x in alone) > 1e-2
    assert (out.gates.amax(-1) - out.gates.amin(-1)).min() > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(attention):
    model = mixture("llama", torch.float32)
    model.set_attn_implementation(attention)
    assert_equal(model, rows("right"), 2e-5)


def test_members_that_cannot_be_packed(monkeypatch):
    from flr.model import packed_members

    model, batch = mixture(), rows("columns")
    monkeypatch.setattr(packed_members, "obstacle", lambda _: "of this test")
    assert_equal(model, batch, 1e-12)
    monkeypatch.setattr(packed_members, "shares_prompt", lambda _: False)
    assert_equal(model, batch, 1e-12)


def test_gradient_checkpointing_changes_nothing():
    model, batch = mixture("llama", torch.float64), rows("columns")
    expected = gradients_of(model, model(**batch).loss)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_gradients(gradients_of(model, model(**batch).loss), expected, 1e-6)


def test_any_split_of_a_batch_gives_the_same_sum():
    model, batch = mixture(), rows("columns")
    items = (batch["labels"] != -100).sum()
    whole = gradients_of(model, model(**batch, num_items_in_batch=items).loss)
    parts = [{k: v[i:j] for k, v in batch.items()} for i, j in ((0, 1), (1, 4))]
    split = gradients_of(model, sum(model(**part, num_items_in_batch=items).loss for part in parts))
    assert_same_gradients(split, whole, 1e-12)


def test_inserted_thoughts_and_known_columns():
    model, batch = mixture().eval(), rows("left")
    expected = model(**batch)
    known = model(**batch, thought_start=int((batch["input_ids"][0] == THOUGHT).nonzero()))
    torch.testing.assert_close(known.loss, expected.loss)
    kept = batch["input_ids"] != THOUGHT
    bare = {name: x[kept].view(len(x), -1) for name, x in batch.items()}
    bare["position_ids"] = (bare["attention_mask"].cumsum(1) - 1).clamp_min(0)
    inserted = model(**bare)
    torch.testing.assert_close(inserted.loss, expected.loss)
    targets = bare["labels"][0] != -100
    torch.testing.assert_close(
        inserted.logits[0, targets.roll(-1)], expected.logits[0, (batch["labels"][0] != -100).roll(-1)]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_log_probabilities_of_the_mixture(layout):
    model, batch = mixture(), rows(layout)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    for row, ids in enumerate(rows_of(batch, "input_ids")):
        own = logits[row][batch["attention_mask"][row].bool()]
        column = int((ids == THOUGHT).nonzero())
        torch.testing.assert_close(own[column:], naive_logprobs(model, ids))
        plain = model(ids[None, :column], insert_thought=False).logits[0].log_softmax(-1)
        torch.testing.assert_close(own[:column], plain)
    last = model(**{k: v for k, v in batch.items() if k != "labels"}, logits_to_keep=2).logits
    torch.testing.assert_close(last, logits[:, -2:])


def test_catalogue_normalisation():
    """Over siblings: item (5, 7), (5, 8) or (6,), whose probabilities add up to 1."""
    trie = CatalogueTrie.from_sequences([5, 7, 5, 8, 6], [0, 2, 4, 5])
    loss, model = CatalogueLoss(trie), mixture(orthogonality_weight=0, diversity_weight=0, sparsity_weight=0)
    prompt, total = [11, 12, 13, THOUGHT], 0.0
    for item in ((5, 7), (5, 8), (6,)):
        ids = torch.tensor([[*prompt, *item]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        nodes = loss.target_nodes(labels)
        total += (-model(ids, labels=nodes, catalogue_loss=loss, num_items_in_batch=1).loss.detach()).exp().item()
    assert abs(total - 1) < 1e-12


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_follows_the_mixture(beams):
    model = mixture("llama", torch.float32)
    prompts = {"input_ids": torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])}
    prompts["attention_mask"] = (prompts["input_ids"] != 0).long()
    found = model.generate(**prompts, max_new_tokens=3, do_sample=False, num_beams=beams, eos_token_id=None)
    if beams > 1:
        return
    for row, tokens in enumerate(found):
        ids = torch.cat([prompts["input_ids"][row][prompts["attention_mask"][row].bool()], torch.tensor([THOUGHT])])
        for token in tokens[5:]:
            logprobs = naive_logprobs(model, ids)[-1]
            logprobs[THOUGHT] = -torch.inf
            assert int(logprobs.argmax()) == int(token)
            ids = torch.cat([ids, token[None]])


def test_refused():
    model, batch = mixture("llama", torch.float32), rows("left")
    prompt = {k: v[:, :-3] for k, v in batch.items() if k != "labels"}
    for name, value in (
        ("use_cache", True),
        ("output_hidden_states", True),
        ("label_smoothing", 0.1),
        ("token_type_ids", torch.zeros_like(prompt["input_ids"])),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            model(**prompt, **{name: value})
    with pytest.raises(ValueError, match="position_ids: expected to count by one"):
        model(**{**batch, "position_ids": batch["position_ids"] * 2})
    with pytest.raises(ValueError, match="input_ids: expected one thought token in every row"):
        model(**supervised_batch("left", rows_without=1))
    with pytest.raises(ValueError, match="labels: expected -100 up to the thought"):
        model(**{**batch, "labels": torch.where(batch["attention_mask"] > 0, batch["input_ids"], -100)})
    gap = batch["attention_mask"].clone()
    gap[:, -3] = 0
    with pytest.raises(ValueError, match="attention_mask: expected no gap"):
        model(**{**batch, "attention_mask": gap})
    with pytest.raises(ValueError, match="input_ids: expected a token before the thought"):
        model(torch.tensor([[THOUGHT, 5]]))
    forward = type(model).forward.__get__(model)
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as fused losses do
    with pytest.raises(ValueError, match="aggregation: expected thought"):
        model(**batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "anchor"}, "aggregation: expected thought for variant anchor"),
        ({"variant": "none"}, "aggregation: expected thought for variant none"),
        ({"variant": "latentr3"}, "aggregation: expected thought for variant latentr3"),
        ({"num_thoughts": 2}, "num_thoughts: expected 1 with aggregation mixture, got 2"),
        ({"aggregation": "sum"}, "aggregation: expected one of thought, mixture, got 'sum'"),
        ({"variant": "offsets", "sparsity_target": "attention"}, "sparsity_target: expected gate"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        flr.FLRConfig(**{"aggregation": "mixture", **options})


def test_saved(tmp_path):
    model = mixture("llama", torch.float32, variant="offsets", num_factors=3)
    model.save_pretrained(tmp_path)
    again = flr.from_pretrained(str(tmp_path))
    batch = rows("left")
    assert again._flr_patch.config == model._flr_patch.config
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss)


def test_offsets_are_the_same_for_every_user_and_start_small():
    model = flr.patch_model(tiny_model(), variant="offsets", thought_token_id=THOUGHT, init_scale=0.3, num_factors=3)
    out = model(**rows("left")).flr
    assert torch.equal(out.steps[0].factors[0], out.steps[0].factors[1])
    assert out.attention.shape[:3] == (4, 1, 3)
    assert not out.attention.any()
    size = out.thought.square().mean().sqrt() / model.config.flr["input_scale"]
    torch.testing.assert_close(size, torch.tensor(0.3), rtol=1e-4, atol=0)
