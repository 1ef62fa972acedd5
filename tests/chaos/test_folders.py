"""The short form of ``python -m tests.chaos.folders``."""

from tests.chaos.folders import FORMS, run


def test_damaged_folders_are_refused_by_name_or_answer():
    outcomes, wrong = run(48)
    assert wrong == []
    assert set(outcomes) == set(FORMS)
    assert all(counts["refused"] for counts in outcomes.values())
