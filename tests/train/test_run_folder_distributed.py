"""Two processes share a run's folder: one of them saves, and both begin at the same place or are refused together."""

import pytest
import torch
from packaging.version import Version

from flr.train.run_folder import newest_whole
from tests.helpers.models import trainable
from tests.helpers.processes import in_processes
from tests.helpers.training import sft_trainer


def runs(rank: int, folder: str) -> dict[str, torch.Tensor]:
    def job(place: str, **options):
        steps = {
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "ddp_backend": "gloo",
        }
        return sft_trainer(f"{folder}/{place}", *trainable(), **{**steps, **options})

    whole = job("whole")
    whole.train()
    assert whole.args.world_size == 2
    again = job("whole")
    again.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-2")
    with pytest.raises(ValueError, match="output_dir: expected the run that"):
        job("whole", seed=5).train(resume_from_checkpoint=True)
    same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    return {
        "steps": torch.tensor(again.state.global_step),
        "same": torch.tensor(same),
    }


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.11 loads nothing to cpu:0")
def test_processes_begin_together(tmp_path):
    for found in in_processes(runs, 2, tmp_path, str(tmp_path)):
        assert {name: int(value) for name, value in found.items()} == {"steps": 4, "same": 1}
    newest, faults = newest_whole(tmp_path / "whole")
    assert (newest, faults) == (tmp_path / "whole" / "checkpoint-4", [])
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {path.name for path in newest.iterdir()}
