"""An evaluation gives the same for any number of processes, which share its rows."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import flr.evaluate.parts
from flr.cli import main
from flr.data import HistoryViews
from flr.evaluate import EvalResult, Share, evaluate
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable
from tests.helpers.processes import in_processes

ROWS = DATA.train.select(np.arange(37))


def results(share: Share, folder=None, rows=ROWS) -> list[EvalResult]:
    """By one step for all items, by beam search, and by a mixture of views."""
    found = []
    for codec, views in (("id", None), ("sid", None), ("sid", HistoryViews(0.5))):
        model, processor = trainable(codec, views=views, num_factors=2)
        where = None if folder is None else f"{folder}/{codec}-{views is not None}"
        options = {"batch_size": 4, "progress": False, "samples": 50, "output_dir": where}
        found.append(evaluate(model.eval(), processor, rows, share=share, **options))
    return found


def plain(found: list[EvalResult]) -> list[dict[str, torch.Tensor]]:
    arrays = [{**x.ranks, "items": x.items, "scores": x.scores, "targets": x.targets} for x in found]
    return [{name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in some.items()} for some in arrays]


def ranked(rank: int, folder: str) -> list[list[dict[str, torch.Tensor]]]:
    flr.evaluate.parts._PART_ROWS = 8  # several parts a process
    share = Share.own()
    assert share.rank == rank
    return [plain(results(share, folder)), plain(results(share, rows=ROWS.select([3])))]  # fewer rows than processes


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes(world, tmp_path):
    out = tmp_path / "out"
    expected = [plain(results(Share())), plain(results(Share(), rows=ROWS.select([3])))]
    for found in in_processes(ranked, world, tmp_path, str(out)):
        for some, wanted in zip(found, expected, strict=True):
            for one, other in zip(some, wanted, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)
    for name, result in zip(("id-False", "sid-False", "sid-True"), results(Share()), strict=True):
        saved = EvalResult.load(out / name)
        assert saved.metrics == result.metrics
        assert not (out / name / "parts").exists()


def test_the_command_under_torchrun_speaks_once(tmp_path, capsys):
    model, processor = trainable("sid", num_factors=2)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    DATA.save(tmp_path / "data")
    where = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--split", "train", "--json"]
    assert main(["evaluate", *where]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "flr.cli", "evaluate", *where]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    alone, shared = (json.loads(text) for text in (capsys.readouterr().out, done.stdout))  # one result, nothing beside
    for values in (*alone.values(), *shared.values()):
        values["settings"].pop("seconds")
    assert alone == shared
