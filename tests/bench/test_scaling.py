"""Growth laws and extrapolated memory."""

import pytest

from bench import scaling


def test_growth_laws_are_those_of_the_larger_sizes():
    sizes = [2**i for i in range(10)]
    law = scaling.fit(sizes, [100 + 0.01 * x**2 for x in sizes])
    assert law.points == 5
    assert 0.5 < law.exponent < 2  # the constant still counts
    law = scaling.fit(sizes, [0.5 * x**1.5 * (1.1 if i % 2 else 1 / 1.1) for i, x in enumerate(sizes)])
    assert law.exponent == pytest.approx(1.5, abs=0.08)
    assert 1.05 < law.residual < 1.15
    assert scaling.fit([1, 2], [1, 2]) is None


def test_memory_is_extrapolated_as_a_sum_of_buffers():
    sizes = [2**i for i in range(4, 10)]
    law = scaling.fit_buffers(sizes, [50 + 3 * x + 0.01 * x**2 for x in sizes])
    assert (law.a, law.b, law.c) == pytest.approx((50, 3, 0.01), rel=1e-6)
    assert law.trusted == pytest.approx(1.0)
    assert law.largest(50 + 3 * 5000 + 0.01 * 5000**2, 512) == pytest.approx(5000)
    assert law.largest(1e12, 512) is None  # too far away
    assert law.reaches(50 + 3 * 5000 + 0.01 * 5000**2) == pytest.approx(5000)
    cubic = scaling.fit_buffers(sizes, [x**3 for x in sizes])
    assert cubic.trusted > 1.3  # a law that does not fit says so
    assert cubic.largest(1e9, 512) is None
    assert scaling.fit_buffers(sizes, [7.0] * 6).reaches(1e9) == float("inf")
    assert scaling.fit_buffers(sizes, [7.0] * 6).reaches(5) == 0
