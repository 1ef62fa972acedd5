"""The short form of the chaos run: two kills each."""

import pytest

from tests.chaos.training import COMMANDS, Chaos


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_training_ends_as_if_undisturbed(tmp_path, command):
    chaos = Chaos(command, tmp_path, seed=1)
    counts = chaos.run(2)
    assert chaos.faults == []
    assert counts["runs ended"] == counts["bit-equal"] >= 1
    assert chaos.kills() == 2
