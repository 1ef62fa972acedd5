"""The reasoner: its size, its start, its regularisers, its dropout."""

import copy
import math

import pytest
import torch

import flr
import flr.model.reasoner
import flr_kernels
from flr.model.patch import reasoner_parameters
from flr.model.variants import OffsetReasoner, build_reasoner
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import HIDDEN, THOUGHT, patched_model, tiny_model


def unit(x, eps):
    return x / (x.square().mean() + eps**2).sqrt()


def pairs_mean(matrix):
    count = len(matrix)
    return sum(matrix[j, k] for j in range(count) for k in range(count) if j != k) / (count * (count - 1))


def spread(p, count):
    """Entropy by the largest that ``count`` outcomes have."""
    return -(p * p.clamp_min(1e-300).log()).sum() / math.log(count)


def factors_by_definition(r, h, seen, query):
    """The thought, gates, attention and regularisers of one user: h [L, D], the columns seen, the query's column."""
    config, eps = r.config, r.EPS * r.unit
    z, gates, attention, losses = h[query], [], [], []
    for _ in range(config.num_refinements):
        f, alphas = [], []
        for k in range(config.num_factors):
            q = r.query[k] @ z + r.factor_query[k]
            scores = torch.stack([q @ (r.key[k] @ h[column]) for column in seen]) / len(q) ** 0.5
            alphas.append(scores.softmax(0))
            f.append(r.output[k] @ (r.value[k] @ sum(a * h[column] for a, column in zip(alphas[k], seen, strict=True))))
        logits = torch.stack([r.gate[k] @ z + r.gate_factor @ unit(f[k], eps) for k in range(config.num_factors)])
        g = (logits / config.gate_temperature).softmax(0)
        thought = sum(x * y for x, y in zip(g, f, strict=True))
        z = unit(z + thought, r.EPS)
        norms, alpha = torch.stack([x / (x.square().sum() + len(x) * eps**2).sqrt() for x in f]), torch.stack(alphas)
        lengths = alpha.norm(dim=1)
        of_gates = spread(g, config.num_factors)
        of_attention = sum(spread(x, len(seen)) for x in alpha) / config.num_factors
        sparsity = {"gate": of_gates, "attention": of_attention, "both": (of_gates + of_attention) / 2}
        alike = pairs_mean((norms @ norms.T).square()), pairs_mean(alpha @ alpha.T / lengths[:, None] / lengths)
        losses.append(torch.stack([*alike, sparsity[config.sparsity_target]]))
        gates.append(g)
        attention.append(alpha)
    return thought, torch.stack(gates), torch.stack(attention), torch.stack(losses).mean(0)


@pytest.mark.parametrize("sparsity_target", ["gate", "attention", "both"])
def test_factors_are_those_of_the_definition(sparsity_target):
    """Written out token by token and factor by factor; the query's column need not be one that is seen."""
    torch.manual_seed(0)
    config = flr.FLRConfig(
        num_factors=3, num_refinements=2, gate_temperature=0.4, sparsity_target=sparsity_target, input_scale=0.7
    )
    reasoner = flr.model.reasoner.FactorizedReasoner(16, config).double()
    with torch.no_grad():
        for p in reasoner.parameters():
            p.add_(0.3 * torch.randn_like(p))
        reasoner.output.mul_(1e-4)  # so that ε is felt
        reasoner.gate_factor.mul_(3)
    h = torch.randn(2, 6, 16, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False, True, False], [True] * 6])
    out = reasoner(h, mask, torch.tensor([5, 4]))
    for user, query in enumerate((5, 4)):
        seen = mask[user].nonzero()[:, 0].tolist()
        thought, gates, attention, losses = factors_by_definition(reasoner, h[user], seen, query)
        torch.testing.assert_close(out.thought[user], thought)
        torch.testing.assert_close(out.gates[user], gates)
        torch.testing.assert_close(out.log_gates[user], gates[-1].log())
        torch.testing.assert_close(out.attention[user][..., seen], attention)
        own = torch.stack([out.user_losses[name][user] for name in ("orthogonality", "diversity", "sparsity")])
        torch.testing.assert_close(own, losses)
    last_seen = reasoner(h[:1], mask[:1]).thought  # by default the query is the last column that is seen
    torch.testing.assert_close(last_seen[0], factors_by_definition(reasoner, h[0], [1, 2, 4], 4)[0])


def test_offsets_are_gated_as_factors_are():
    torch.manual_seed(0)
    config = flr.FLRConfig(variant="offsets", num_factors=3, gate_temperature=0.4, num_refinements=1)
    reasoner = OffsetReasoner(16, config).double()
    with torch.no_grad():
        for p in reasoner.parameters():
            p.add_(torch.randn_like(p))
    h = torch.randn(2, 5, 16, dtype=torch.float64)
    out = reasoner(h)
    for user in range(2):
        logits = [
            g @ h[user, -1] + reasoner.gate_factor @ unit(f, 1e-4)
            for g, f in zip(reasoner.gate, reasoner.offset, strict=True)
        ]
        gates = (torch.stack(logits) / 0.4).softmax(0)
        torch.testing.assert_close(out.gates[user, 0], gates)
        torch.testing.assert_close(out.log_gates[user], gates.log())
        torch.testing.assert_close(out.thought[user], gates @ reasoner.offset)


@pytest.mark.parametrize("sparsity_target", ["gate", "attention", "both"])
def test_latentr3_is_one_attention_with_rotary_positions(sparsity_target):
    """Pairs (i, i + D/2) as complex numbers that turn with the absolute position, base 1000."""
    torch.manual_seed(0)
    config = flr.FLRConfig(variant="latentr3", sparsity_target=sparsity_target)
    reasoner = build_reasoner(16, config).double()
    h = 2 * torch.randn(2, 6, 16, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, False, False], [True] * 6])
    out = reasoner(h, mask, 5)

    def turned(x, position):
        angle = position * 1000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
        return torch.complex(x[:8], x[8:]) * torch.polar(torch.ones(8, dtype=torch.float64), angle)

    for user in range(2):
        seen = mask[user].nonzero()[:, 0].tolist()
        query = turned(reasoner.query(h[user, 5]), 5)
        scores = [(query.conj() * turned(reasoner.key(h[user, column]), column)).real.sum() / 4 for column in seen]
        alpha = torch.stack(scores).softmax(0)
        torch.testing.assert_close(out.attention[user, 0, 0][seen], alpha)
        thought = sum(a * reasoner.value(h[user, column]) for a, column in zip(alpha, seen, strict=True))
        torch.testing.assert_close(out.thought[user], thought)
        share = {"gate": 0.0, "attention": 1.0, "both": 0.5}[sparsity_target]
        torch.testing.assert_close(out.user_losses["sparsity"][user], share * spread(alpha, len(seen)))
    nothing = reasoner(h, torch.zeros_like(mask), 5)
    assert not nothing.thought.any()


@pytest.mark.parametrize("variant", ["flr", "offsets", "latentr3"])
def test_a_scale_of_the_thought_is_one_of_its_parameters(variant):
    torch.manual_seed(0)
    reasoner, h = build_reasoner(16, flr.FLRConfig(variant=variant)), torch.randn(2, 5, 16)
    if variant == "flr":
        reasoner.config.num_refinements = 1
    expected = 3 * reasoner(h).thought
    reasoner.rescale(3.0)
    torch.testing.assert_close(reasoner(h).thought, expected)


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
