"""Two gloo processes under DDP give the loss and the gradients of one process on the joined batch."""

import pytest
import torch
import torch.distributed as dist

from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import patched_model
from tests.helpers.processes import in_processes


def _model():
    return patched_model("qwen2", sparsity_weight=0.5, diversity_weight=0.5, num_thoughts=2).train()


def _step(rank: int) -> dict[str, torch.Tensor]:
    """Loss and gradients of this process's half of a batch."""
    wrapped = torch.nn.parallel.DistributedDataParallel(_model())
    inputs = supervised_batch("columns", 2)
    items = (inputs["labels"] != -100).sum()
    mine = {k: v[[0, 1] if rank == 0 else [2, 3]] for k, v in inputs.items()}
    # as Trainer does: the sum over all processes as divisor, times their number, because DDP averages
    loss = wrapped(**mine, num_items_in_batch=items).loss * 2
    loss.backward()
    dist.all_reduce(loss.detach())
    gradients = {n: p.grad for n, p in wrapped.module.named_parameters()}
    return {"loss": loss.detach() / 2, **gradients}


@pytest.mark.timeout(120)
def test_two_processes_equal_one(tmp_path):
    ranks = in_processes(_step, 2, tmp_path)
    model = _model()
    inputs = supervised_batch("columns", 2)
    loss = model(**inputs, num_items_in_batch=(inputs["labels"] != -100).sum()).loss
    expected = gradients_of(model, loss)
    for rank in ranks:
        torch.testing.assert_close(rank.pop("loss"), loss.detach(), rtol=1e-5, atol=0)
        assert_same_gradients(rank, expected, 1e-5)
