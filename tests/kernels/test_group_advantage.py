"""Advantages over a batch that several processes hold between them; precision against exact sums."""

import math

import pytest
import torch
import torch.distributed as dist

from flr_kernels import group_advantage
from tests.helpers.processes import in_processes

pytestmark = pytest.mark.usefixtures("cpu_backend")
USERS, GROUP = 13, 3
#: How many users each process holds.
SPLITS = {1: [[13]], 2: [[6, 7], [13, 0], [0, 13]], 4: [[4, 3, 3, 3], [0, 5, 0, 8], [0, 0, 0, 13]]}


def _rewards(dtype):
    """-1e3 ± 1e-3: the spread is a millionth of the values."""
    generator = torch.Generator().manual_seed(1)
    return (-1e3 + 1e-3 * torch.randn(USERS * GROUP, generator=generator, dtype=torch.float64)).to(dtype)


def _exact(rewards):
    """ "latentr3" by correctly rounded sums."""
    values = rewards.double().tolist()
    baseline = math.fsum(values[::GROUP]) / USERS
    # differences of nearby numbers are exact, so only the baseline's rounding (1e-13) is left
    norm = math.sqrt(math.fsum((v - baseline) ** 2 for v in values))
    return torch.tensor([(v - baseline) / (norm + 1e-4) for v in values], dtype=torch.float64).view(USERS, GROUP)


def _advantages(rank: int) -> dict[str, list[torch.Tensor]]:
    """Advantages of this process's share, by the number of processes that take part."""
    found = {}
    for world, splits in SPLITS.items():
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        results = []
        for split in splits:
            start = sum(split[:rank])
            for dtype in (torch.float32, torch.float64):
                mine = _rewards(dtype)[start * GROUP : (start + split[rank]) * GROUP]
                out = group_advantage(mine, None, GROUP, "latentr3", "given", process_group=group)
                results.append(out.advantages)
                logp = (-torch.rand(split[rank] * GROUP, 5, dtype=dtype)).requires_grad_()
                out = group_advantage(logp, None, GROUP, "latentr3", process_group=group)
                expected = torch.autograd.grad(group_advantage(logp, None, GROUP).rewards.sum(), logp)[0]
                assert torch.equal(torch.autograd.grad(out.rewards.sum(), logp)[0], expected)
                assert not out.advantages.requires_grad
        found[str(world)] = results
    return found


@pytest.mark.timeout(120)
def test_any_number_of_processes_and_any_split_give_the_same_advantages(tmp_path):
    found = in_processes(_advantages, max(SPLITS), tmp_path)
    for world, splits in SPLITS.items():
        ranks = [found[rank][str(world)] for rank in range(world)]
        assert len(ranks[0]) == 2 * len(splits)
        for index, parts in enumerate(zip(*ranks, strict=True)):
            dtype = (torch.float32, torch.float64)[index % 2]
            rewards = _rewards(dtype)
            alone = group_advantage(rewards, None, GROUP, "latentr3", "given").advantages
            together = torch.cat(parts)
            assert together.dtype == dtype
            # max|R| / spread = 1e6: 2⁻⁵⁰ times that in float64, one rounding in float32
            bound = {torch.float32: 2**-23, torch.float64: 1e-9}[dtype]
            torch.testing.assert_close(together, alone, rtol=bound, atol=bound)
            torch.testing.assert_close(together.double(), _exact(rewards), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_kinds_lose_nothing_to_a_large_mean(kind, dtype):
    rewards = _rewards(dtype).view(USERS, GROUP)
    values = rewards.double() + 1e3  # exact
    centred = values - values.mean(1, keepdim=True)
    scale = {"grpo": 1 / (values.std(1, keepdim=True) + 1e-4), "dr_grpo": 1, "rloo": GROUP / (GROUP - 1)}[kind]
    out = group_advantage(rewards.flatten(), None, GROUP, kind, "given")
    torch.testing.assert_close(out.advantages.double(), centred * scale, rtol=2**-23, atol=1e-12)
    torch.testing.assert_close(
        out.mean.double() + 1e3, values.mean(1), rtol=0, atol=1e3 * 2 ** -(24 if dtype == torch.float32 else 51)
    )
    torch.testing.assert_close(out.std.double(), values.std(1), rtol=2**-23, atol=1e-12)


def test_equal_rewards_give_exactly_zero():
    for kind in ("grpo", "dr_grpo", "rloo", "latentr3"):
        out = group_advantage(torch.full((21,), -0.1, dtype=torch.float64), None, 7, kind, "given", eps=1e-12)
        assert out.advantages.eq(0).all()
        assert out.std.eq(0).all()


def test_nan_stays_in_its_group_and_masked_tokens_have_no_effect():
    logp = -torch.rand(6, 4)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, -1] = False
    clean = group_advantage(logp, mask, 2)
    logp[:, -1] = math.nan
    for a, b in zip(group_advantage(logp, mask, 2), clean, strict=True):
        assert torch.equal(a, b)
    logp[3, 0] = math.nan
    out = group_advantage(logp, mask, 2)
    assert out.rewards.isnan().nonzero().tolist() == [[1, 1]]
    assert out.advantages.isnan().any(1).tolist() == [False, True, False]
    assert group_advantage(logp, mask, 2, "latentr3").advantages.isnan().all()


def test_elements_may_lie_apart_in_memory():
    generator = torch.Generator().manual_seed(0)
    logp, mask = -torch.rand(6, 5, generator=generator), torch.rand(6, 5, generator=generator) < 0.6

    def laid(x):
        wide = torch.stack([x, x], -1).flatten(1)  # every element twice
        return [
            x.T.contiguous().T,
            wide[:, ::2],
            torch.cat([x, x], 1)[:, :5],
            x[:1].expand(6, 5),
            x[:, :1].expand(6, 5),
        ]

    for values, kept in [*((x, mask) for x in laid(logp)), *((logp, x) for x in laid(mask))]:
        found = group_advantage(values, kept, 3, "rloo")
        wanted = group_advantage(values.contiguous(), kept.contiguous(), 3, "rloo")
        assert all(map(torch.equal, found, wanted))
    rewards = torch.stack([logp[:, 0], logp[:, 1]], 1)[:, 0]
    found, wanted = (group_advantage(x, None, 3, reward="given") for x in (rewards, rewards.contiguous()))
    assert all(map(torch.equal, found, wanted))


def test_the_process_group_is_checked():
    with pytest.raises(ValueError, match="process_group: expected a torch"):
        group_advantage(-torch.rand(2, 3), None, 2, "latentr3", process_group="world")
