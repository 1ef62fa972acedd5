"""The short form of ``python -m tests.chaos.data``."""

from tests.chaos.data import run
from tests.chaos.mutate_data import FORMS


def test_damaged_files_are_refused_by_name_or_read_as_they_were():
    outcomes, wrong = run(64)
    assert wrong == []
    assert set().union(*outcomes.values()) == set(FORMS)
    assert outcomes["equal"]
    assert outcomes["refused"]
