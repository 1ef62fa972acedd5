"""The key that makes a ranking total."""

import torch

from flr_kernels.order import order_key


def test_it_sorts_by_score_and_then_by_the_smaller_number():
    most = 2**32 - 1
    scores = torch.tensor([-torch.inf, -3e38, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.5, 3e38, torch.inf])
    ties = torch.tensor([most, most - 1, 2**31, 40_000, 1, 0])
    score, tie = scores.repeat_interleave(len(ties)), ties.repeat(len(scores))
    key = order_key(score, tie).tolist()
    wanted = [(value, -place) for value, place in zip(score.tolist(), tie.tolist(), strict=True)]
    order = sorted(range(len(key)), key=lambda n: wanted[n])
    assert [key[n] for n in order] == sorted(key)
    assert len(set(key)) == len(set(wanted))  # 0 and -0 are one score
