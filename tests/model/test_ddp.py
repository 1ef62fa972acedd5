"""Two gloo processes under DDP give the loss and the gradients of one process on the joined batch."""

import os

import families
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flr


def _model():
    model = families.tiny_model("qwen2").train()
    config = flr.FLRConfig(thought_token_id=families.THOUGHT, sparsity_weight=0.5, diversity_weight=0.5, num_thoughts=2)
    flr.patch_model(model, config=config)
    families.wake(model)
    return model


def _worker(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    wrapped = torch.nn.parallel.DistributedDataParallel(_model())
    inputs = families.batch("columns", 2)
    items = (inputs["labels"] != -100).sum()
    mine = {k: v[[0, 1] if rank == 0 else [2, 3]] for k, v in inputs.items()}
    # as Trainer does: the sum over all processes as divisor, times their number, because DDP averages
    loss = wrapped(**mine, num_items_in_batch=items).loss * 2
    loss.backward()
    dist.all_reduce(loss.detach())
    gradients = {n: p.grad for n, p in wrapped.module.named_parameters()}
    torch.save({"loss": loss.detach() / 2, **gradients}, f"{path}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # freeing DDP beside gloo's threads hangs now and then; nothing is left to do


@pytest.mark.timeout(120)
def test_two_processes_equal_one(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    model = _model()
    inputs = families.batch("columns", 2)
    loss = model(**inputs, num_items_in_batch=(inputs["labels"] != -100).sum()).loss
    expected = families.gradients(model, loss)
    for rank in ranks:
        torch.testing.assert_close(rank.pop("loss"), loss.detach(), rtol=1e-5, atol=0)
        families.assert_same_gradients(rank, expected, 1e-5)
