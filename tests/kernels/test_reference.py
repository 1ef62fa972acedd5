"""The ops against autograd through their plain definitions, in float64; registration; errors."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import flr_kernels
from flr_kernels import dispatch, reference

B, L, D, K = 3, 7, 5, 4


def attention_inputs(factors=K, length=L, dtype=torch.float64, mask="mixed"):
    torch.manual_seed(factors * 100 + length)
    h = torch.randn(B, length, D, dtype=dtype, requires_grad=True)
    u = torch.randn(B, factors, D, dtype=dtype, requires_grad=True)
    if mask is None:
        return h, u, None
    valid = torch.rand(B, length) < 0.6
    valid[0] = True
    valid[1] = False  # a user without a valid token
    valid[2] = False
    valid[2, length // 2] = True  # one token
    return h, u, valid


@pytest.mark.parametrize("mask", [None, "mixed"])
@pytest.mark.parametrize(("factors", "length"), [(1, 1), (1, 7), (4, 7), (3, 2)])
def test_factor_attention_matches_autograd_of_its_definition(factors, length, mask):
    h, u, valid = attention_inputs(factors, length, mask=mask)
    ours = flr_kernels.factor_attention(h, u, valid)
    plain = reference.factor_attention(h, u, valid)
    grads = [torch.randn_like(t) for t in plain]
    if valid is not None:
        grads[1][1] = 0  # lse is -inf there
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(plain, (h, u), grads)
    actual = torch.autograd.grad(ours, (h, u), grads)
    for a, b in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_factor_attention_gradcheck():
    h, u, _ = attention_inputs(3, 5, mask=None)
    assert gradcheck(lambda h, u: flr_kernels.factor_attention(h, u), (h, u))


def test_factor_attention_definition_by_hand():
    h, u, valid = attention_inputs()
    out = flr_kernels.factor_attention(h, u, valid)
    for b in range(B):
        rows = h[b][valid[b]]
        if len(rows) == 0:
            assert out.context[b].abs().max() == 0
            assert out.entropy[b].abs().max() == 0
            assert torch.isneginf(out.lse[b]).all()
            continue
        alpha = torch.softmax(u[b] @ rows.T, -1)
        torch.testing.assert_close(out.context[b], alpha @ rows)
        torch.testing.assert_close(out.overlap[b], alpha @ alpha.T)
        torch.testing.assert_close(out.entropy[b], torch.distributions.Categorical(alpha).entropy())


def test_factor_attention_extreme_logits_stay_finite():
    h, u, valid = attention_inputs(dtype=torch.float32)
    out = flr_kernels.factor_attention(h, u * 1e4, valid)
    total = out.context.sum() + out.overlap.sum() + out.entropy.sum() + out.lse[[0, 2]].sum()
    for grad in torch.autograd.grad(total, (h, u)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e8, -1e8, -1e12])
def test_weights_of_equal_scores_sum_to_one_however_large_they_are(size, masked):
    h, u = torch.full((1, 4 if masked else 3, 2), size, requires_grad=True), torch.ones(1, 2, 2)
    out = flr_kernels.factor_attention(h, u, torch.tensor([[True, False, True, True]]) if masked else None)
    torch.testing.assert_close(out.context, h[:, :2], rtol=1e-6, atol=0)
    torch.testing.assert_close(out.overlap, torch.full((1, 2, 2), 1 / 3), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.entropy, torch.full((1, 2), math.log(3)), rtol=1e-6, atol=0)
    (dh,) = torch.autograd.grad(out.overlap.sum() + out.entropy.sum(), h)  # which equal scores leave at an extremum
    torch.testing.assert_close(dh, torch.zeros_like(dh), rtol=0, atol=1e-5)


def test_what_masked_tokens_hold_is_without_effect():
    found = []
    for held in (0.0, math.nan, math.inf):
        h, u, valid = attention_inputs()
        h = h.detach().masked_fill(~valid[..., None], held).requires_grad_()
        out = flr_kernels.factor_attention(h, u, valid)
        total = out.context.square().sum() + out.overlap.sum() + out.entropy.sum() + out.lse[[0, 2]].sum()
        found.append([*out, *torch.autograd.grad(total, (h, u))])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_no_history_gradient_when_none_is_needed():
    h, u, valid = attention_inputs()
    out = flr_kernels.factor_attention(h.detach(), u, valid)
    (du,) = torch.autograd.grad(out.context.sum(), u)
    expected = torch.autograd.grad(flr_kernels.factor_attention(h, u, valid).context.sum(), u)[0]
    torch.testing.assert_close(du, expected)


@pytest.mark.parametrize("factors", [1, 2, 5])
def test_factor_aggregate_gradcheck_and_definition(factors):
    torch.manual_seed(factors)
    f = torch.randn(B, factors, D, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(B, factors, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda f, g: flr_kernels.factor_aggregate(f, g, 1e-3), (f, logits))
    out = flr_kernels.factor_aggregate(f, logits)
    pairs = [(j, k) for j in range(factors) for k in range(factors) if j != k]
    cosine = torch.nn.functional.cosine_similarity
    expected = sum(cosine(f[:, j], f[:, k]) ** 2 for j, k in pairs) / max(len(pairs), 1)
    torch.testing.assert_close(out.orthogonality, expected + torch.zeros(B, dtype=f.dtype), rtol=1e-6, atol=1e-9)
    assert (out.orthogonality >= 0).all()
    assert (out.gate_entropy <= math.log(factors) + 1e-12).all()


def test_gates_are_made_in_the_precision_of_the_result():
    f, logits = torch.randn(2, 3, 4), torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    out, wanted = flr_kernels.factor_aggregate(f, logits), flr_kernels.factor_aggregate(f, logits.float())
    assert all(map(torch.equal, out, wanted))
    assert torch.autograd.grad(out.thought.sum(), logits)[0].dtype == torch.bfloat16


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_means_of_many_tokens_are_taken_in_float64(dtype):
    logp = -torch.rand(4, 3001).to(dtype)
    mask = torch.rand(4, 3001) < 0.9
    for kept in (None, mask):
        rewards = flr_kernels.group_advantage(logp, kept, 2, "dr_grpo", "log_likelihood").rewards
        rows = logp.double() if kept is None else logp.double().masked_fill(~mask, torch.nan)
        torch.testing.assert_close(rewards, rows.nanmean(1).float().view(2, 2), rtol=1.2e-7, atol=0)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("reward", ["neg_perplexity", "log_likelihood", "given"])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "latentr3"])
def test_group_advantage_by_hand(kind, reward, group):
    torch.manual_seed(0)
    length = 3
    logp = -torch.rand(2 * group, length, dtype=torch.float64) * 3
    mask = torch.rand(2 * group, length) < 0.7
    mask[:, 0] = True
    if reward == "given":
        out = flr_kernels.group_advantage(logp[:, 0], None, group, kind, reward, 0.01)
        rewards = logp[:, 0]
    else:
        out = flr_kernels.group_advantage(logp, mask, group, kind, reward, 0.01)
        rewards = torch.stack([row[m].mean() for row, m in zip(logp, mask, strict=True)])
        rewards = -torch.exp(-rewards) if reward == "neg_perplexity" else rewards
    rewards = rewards.view(2, group)
    torch.testing.assert_close(out.rewards, rewards)
    for b in range(2):
        for i in range(group):
            others = [rewards[b, j] for j in range(group) if j != i]
            expected = {
                "grpo": (rewards[b, i] - rewards[b].mean()) / (rewards[b].std() + 0.01),
                "dr_grpo": rewards[b, i] - rewards[b].mean(),
                "rloo": rewards[b, i] - sum(others) / len(others),
                "latentr3": (rewards[b, i] - rewards[:, 0].mean()) / ((rewards - rewards[:, 0].mean()).norm() + 0.01),
            }[kind]
            torch.testing.assert_close(out.advantages[b, i], expected)


@pytest.mark.parametrize("reward", ["neg_perplexity", "log_likelihood"])
def test_group_advantage_rewards_pass_gradients_and_advantages_do_not(reward):
    logp = (-torch.rand(4, 3, dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[True, True, False]] * 4)
    assert gradcheck(lambda x: flr_kernels.group_advantage(x, mask, 2, reward=reward).rewards, (logp,))
    assert not flr_kernels.group_advantage(logp, mask, 2).advantages.requires_grad


@pytest.mark.usefixtures("cpu_backend")
def test_rewards_that_were_cut_have_no_gradient():
    for reward in ("neg_perplexity", "log_likelihood"):
        logp = torch.tensor([[-50.0, -20.0], [-1.0, -2.0]], requires_grad=True)
        out = flr_kernels.group_advantage(logp, None, 2, reward=reward)
        (grad,) = torch.autograd.grad(out.rewards.sum(), logp)
        assert (grad[0] == 0).all()
        assert (grad[1] != 0).all()
    given = torch.tensor([1e14, -1e14, 3.0, 4.0], requires_grad=True)
    rewards = flr_kernels.group_advantage(given, None, 2, reward="given").rewards
    torch.testing.assert_close(rewards, torch.tensor([[math.exp(30), -math.exp(30)], [3, 4]]), rtol=1e-7, atol=0)
    (grad,) = torch.autograd.grad(rewards.sum(), given)
    assert grad.tolist() == [0, 0, 1, 1]


def test_a_gate_of_zero_leaves_gradients_finite():
    f, logits = torch.randn(1, 3, 4, requires_grad=True), torch.tensor([[0.0, -math.inf, -200.0]], requires_grad=True)
    out = flr_kernels.factor_aggregate(f, logits)
    assert out.gates.tolist() == [[1, 0, 0]]
    assert out.gate_entropy.tolist() == [0]
    for grad in torch.autograd.grad(out.thought.sum() + out.gate_entropy.sum(), (f, logits)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "latentr3"])
def test_degenerate_groups_are_finite(kind):
    for logp in (torch.zeros(4, 2), torch.full((4, 2), -math.inf), torch.tensor([[0.0, 0.0], [-math.inf, 0.0]] * 2)):
        for group in (1, 2, 4):
            out = flr_kernels.group_advantage(logp, None, group, kind)
            assert torch.isfinite(out.rewards).all()
            assert torch.isfinite(out.advantages).all()
    equal = flr_kernels.group_advantage(torch.full((4, 2), -1.0), None, 4, kind)
    assert equal.advantages.abs().max() == 0


def test_opcheck_and_fullgraph_compile():
    h, u, valid = attention_inputs(dtype=torch.float32)
    with torch.no_grad():
        f = torch.randn(B, K, D)
        gates = torch.randn(B, K)
    ops = torch.ops.flr
    torch.library.opcheck(ops.factor_attention.default, (h, u, valid))
    torch.library.opcheck(ops.factor_attention.default, (h, u, None))
    torch.library.opcheck(ops.factor_aggregate.default, (f.requires_grad_(), gates.requires_grad_(), 1e-6))
    logp = (-torch.rand(4, 3)).requires_grad_()
    torch.library.opcheck(ops.group_advantage.default, (logp, None, 2, "grpo", "neg_perplexity", 1e-4))
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    torch.library.opcheck(ops.token_logprob.default, (hidden, weight, torch.tensor([0, 3, 8, 1])))

    def step(h, u):
        out = flr_kernels.factor_attention(h, u, valid)
        return flr_kernels.factor_aggregate(out.context, out.entropy).thought

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, u), step(h, u))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(h, u).sum(), (h, u)), torch.autograd.grad(step(h, u).sum(), (h, u))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: flr_kernels.factor_attention(torch.zeros(2, 3), torch.zeros(2, 1, 3)),
            r"h: expected shape \[B, L, D\]",
        ),
        (
            lambda: flr_kernels.factor_attention(torch.zeros(2, 3, 4), torch.zeros(2, 1, 5)),
            r"u: expected \(B, D\) of h",
        ),
        (
            lambda: flr_kernels.factor_attention(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4).double()),
            "u: expected dtype",
        ),
        (lambda: flr_kernels.factor_attention(torch.zeros(2, 0, 4), torch.zeros(2, 1, 4)), "h: expected at least one"),
        (
            lambda: flr_kernels.factor_attention(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4), torch.ones(2, 3)),
            "mask: expected dtype torch.bool",
        ),
        (
            lambda: flr_kernels.factor_attention(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4), torch.ones(2, 1).bool()),
            r"mask: expected \(B, L\) of h",
        ),
        (lambda: flr_kernels.factor_aggregate(torch.zeros(2, 3, 4), torch.zeros(2, 4)), "gate_logits: expected"),
        (lambda: flr_kernels.factor_aggregate(torch.zeros(2, 3, 4), torch.zeros(2, 3), eps=0), "eps: expected"),
        (lambda: flr_kernels.group_advantage(torch.zeros(5, 3), None, 2), "group_size: expected a positive divisor"),
        (lambda: flr_kernels.group_advantage(torch.zeros(4, 3), None, 2, "ppo"), "kind: expected one of"),
        (lambda: flr_kernels.token_logprob(torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2).long()), "weight: exp"),
    ],
)
def test_errors_name_argument_expected_and_actual(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_backend_selection(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setenv("FLR_BACKEND", "cuda")
    with pytest.raises(flr_kernels.BackendUnavailable, match="asks for 'cuda'"):
        dispatch.select("token_logprob", x)
    monkeypatch.setenv("FLR_BACKEND", "cuda,token_logprob=reference")
    assert dispatch.select("token_logprob", x) == "reference"
    for wrong in ("fast", "no_such_op=reference"):
        monkeypatch.setenv("FLR_BACKEND", wrong)
        with pytest.raises(ValueError, match="FLR_BACKEND"):
            dispatch.select("token_logprob", x)
