"""The reasoner: its size, its start, its regularisers, its dropout."""

import copy

import pytest
import torch

import flr
import flr.model.reasoner
import flr_kernels
from flr.model.patch import reasoner_parameters
from flr.model.variants import build_reasoner
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import HIDDEN, THOUGHT, patched_model, tiny_model


def test_a_fresh_patch_starts_small_and_sums_exactly():
    plain = tiny_model()
    model = flr.patch_model(copy.deepcopy(plain), config=flr.FLRConfig(thought_token_id=THOUGHT)).eval()
    ids = torch.randint(3, 60, (4, 20))
    embedding_rms = model.get_input_embeddings().weight.square().mean().sqrt()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        out = model.flr(hidden)
        assert 0.003 < out.thought.square().mean().sqrt() / embedding_rms < 0.03
        torch.testing.assert_close(out.contributions.sum(1), out.thought)
        assert all(0 <= value <= 1 for value in out.losses.values())
        torch.testing.assert_close(out.attention.sum(-1), torch.ones(4, 2, 4))
        # with its thought token a fresh model is the unpatched one with one more token
        ids = torch.cat([ids, torch.full((4, 1), THOUGHT)], 1)
        ours, theirs = model(input_ids=ids).logits[:, -1], plain.eval()(input_ids=ids).logits[:, -1]
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert (ours - theirs).abs().max() > 0


@pytest.mark.parametrize("variant", ["flr", "latentr3"])
def test_attention_is_finite_where_padding_would_score_far_above_the_rest(variant):
    """A masked column whose score lies more than 88 above the valid ones: its exponential is infinite in float32."""
    model = patched_model(variant=variant).eval()
    hidden = torch.randn(2, 5, HIDDEN)
    hidden[:, 0] *= 1e4
    mask = torch.tensor([[False, True, True, True, True]]).expand(2, -1)
    out = model.flr(hidden, mask)
    assert (out.scores[..., 0] - out.scores[..., 1:].amax(-1)).max() > 200
    assert (out.attention[..., 0] == 0).all()
    torch.testing.assert_close(out.attention.sum(-1), torch.ones_like(out.attention[..., 0]))
    nothing = model.flr(hidden, torch.zeros(2, 5, dtype=torch.bool)).attention
    assert (nothing == 0).all()


def test_parameter_count_is_about_four_d_squared_whatever_k():
    for factors in (1, 2, 4, 8):
        model = patched_model(num_factors=factors).eval()
        count = sum(p.numel() for p in reasoner_parameters(model))
        assert 4 * HIDDEN**2 <= count <= 4 * HIDDEN**2 + (factors + 2) * HIDDEN


def test_regularisers_at_their_corners():
    one = patched_model(num_factors=1, sparsity_target="gate").eval()
    hidden = torch.randn(3, 6, HIDDEN)
    losses = {k: v.detach() for k, v in one.flr(hidden).losses.items()}
    assert [float(losses[k]) for k in ("orthogonality", "diversity", "sparsity")] == [0, 0, 0]
    many = patched_model(sparsity_target="attention").eval()
    single = torch.zeros(3, 6, dtype=torch.bool)
    single[:, 2] = True
    out = many.flr(hidden, single)
    assert float(out.losses["sparsity"].detach()) == 0  # one valid token
    torch.testing.assert_close(out.losses["diversity"], torch.ones(()))  # every factor looks at it
    nothing = many.flr(hidden, torch.zeros(3, 6, dtype=torch.bool))
    assert float(nothing.thought.detach().abs().max()) == 0
    with torch.no_grad():
        even = patched_model().eval()
        even.flr.gate.zero_()
        even.flr.gate_factor.zero_()
        torch.testing.assert_close(even.flr(hidden).losses["sparsity"], torch.ones(()))
        even.flr.output.copy_(even.flr.output[:1].expand_as(even.flr.output))
        even.flr.value.copy_(even.flr.value[:1].expand_as(even.flr.value))
        even.flr.key.zero_()
        assert even.flr(hidden).losses["orthogonality"] > 0.99  # same contribution from every factor


def test_dropout_acts_on_the_thought_in_training_only():
    model = patched_model(dropout=0.5).eval()
    inputs = supervised_batch("left")
    a, b = model(**inputs).loss, model(**inputs).loss
    assert torch.equal(a, b)
    model.train()
    assert not torch.equal(model(**inputs).loss, model(**inputs).loss)


def test_kernels_get_contiguous_rows_whatever_layout_a_product_has(monkeypatch):
    reasoner, einsum, seen = patched_model().flr, torch.einsum, []

    def another_layout(*arguments):
        out = einsum(*arguments)
        return out.transpose(1, 2).contiguous().transpose(1, 2) if out.dim() == 3 else out

    for name, which in (("factor_attention", 1), ("factor_aggregate", 0)):
        original = getattr(flr.model.reasoner, name)

        def noting(*arguments, original=original, which=which, **options):
            seen.append(arguments[which].stride(-1))
            return original(*arguments, **options)

        monkeypatch.setattr(flr.model.reasoner, name, noting)
    h = torch.randn(2, 5, HIDDEN)
    expected = reasoner(h).thought
    monkeypatch.setattr(torch, "einsum", another_layout)
    torch.testing.assert_close(reasoner(h).thought, expected)
    assert set(seen) == {1}


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("gain", [0.1, 1.0, 4.0])
def test_what_rounding_to_16_bits_may_do_to_attention(dtype, epsilon, gain):
    """The bound that :func:`flr.model.reasoner._autocast` states, and that it is not far from what happens."""
    torch.manual_seed(0)
    h, u = torch.randn(6, 80, 48, dtype=torch.float64), gain * torch.randn(6, 3, 48, dtype=torch.float64) / 48**0.5
    exact = flr_kernels.factor_attention(h, u)
    rounded = flr_kernels.factor_attention(h.to(dtype).double(), u.to(dtype).double())
    moved = (2 * epsilon + epsilon**2) * (u.abs() @ h.abs().transpose(1, 2)).amax(-1)  # [B, K]
    weights = (u @ h.transpose(1, 2) - exact.lse[..., None]).exp()
    bound = ((2 * moved).exp() * (1 + epsilon) - 1)[..., None] * (weights @ h.abs())
    shares = (rounded.lse - exact.lse).abs() / moved, (rounded.context - exact.context).abs() / bound
    for share in shares:
        assert 1e-3 < float(share.max()) <= 1.0


@pytest.mark.gpu
def test_on_the_device_autocast_reaches_the_tensor_cores(monkeypatch):
    """Float32 weights under bfloat16 autocast, the usual ``--bf16``."""
    seen = []

    def spy(h, *args, **kwargs):
        seen.append(h.dtype)
        return attend(h, *args, **kwargs)

    attend = flr.model.reasoner.factor_attention
    monkeypatch.setattr(flr.model.reasoner, "factor_attention", spy)
    torch.manual_seed(0)
    module = flr.model.reasoner.FactorizedReasoner(256, flr.FLRConfig(num_factors=4, num_refinements=1)).cuda()
    h = torch.randn(4, 200, 256, device="cuda", requires_grad=True)

    def run(enabled):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            thought = module(h).thought
        return thought.detach().float(), torch.autograd.grad(thought.float().square().sum(), h)[0]

    for found, exact in zip(run(True), run(False), strict=True):
        assert found.dtype == torch.float32
        assert float((found - exact).norm()) < 2e-2 * float(exact.norm())
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("variant", ["flr", "offsets"])
def test_one_program_after_the_other_for_models_of_other_scales_and_sizes(variant):
    """What differs between two models is a symbol to Dynamo, whose guards of a product did not hold."""
    torch._dynamo.reset()
    for size, scale in ((32, 0.0199), (32, 0.0598734), (32, 0.3053546), (48, 0.0221531)):
        config = flr.FLRConfig(variant=variant, num_factors=2, input_scale=scale)
        made = build_reasoner(size, config)
        hidden = torch.randn(2, 3, size)
        thought = torch.compile(made, backend="eager", fullgraph=True)(hidden).thought
        torch.testing.assert_close(thought, made(hidden).thought)
    torch._dynamo.reset()
