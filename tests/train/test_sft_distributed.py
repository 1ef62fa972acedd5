"""Supervised steps with adapters on shards of the weights (FSDP2; gloo, CPU) are those of one process.

On CPU processes accelerate does DDP where FSDP2 is asked for, so ``--fsdp`` is refused there, and ``fully_shard`` is
called here as accelerate calls it on GPUs: layer by layer, then the whole.
"""

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed.fsdp import fully_shard

from flr.data import InteractionDataset
from flr.model.backbone import causal_lm
from flr.train.lora import LoraSettings, add_lora, own_tokens
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable
from tests.helpers.processes import in_processes
from tests.helpers.training import sft_trainer

STEPS, ROWS = 3, 8


def adapters(rank: int, world: int, path: str) -> dict[str, torch.Tensor]:
    """Losses and trained weights of three steps of SGD on eight rows each, over ``world`` processes."""
    pytest.importorskip("peft")
    model, processor = trainable("sid")
    model = add_lora(model, LoraSettings(2, 4.0), own_tokens(processor))
    with torch.no_grad():  # at zero the adapters would not reach the first step
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    trainer = sft_trainer(f"{path}/out-{rank}", model, processor, ddp_backend="gloo" if world > 1 else None)
    if world > 1:
        lm = causal_lm(model)
        for part in (*lm.model.layers, lm.flr):
            fully_shard(part)
        fully_shard(model)
        assert any(hasattr(p, "device_mesh") for p in model.parameters())
    # not Adam, to which gradients of another size are the same
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    rows = InteractionDataset(DATA.train)
    found = {}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(STEPS):
        batch = [rows[(0, ROWS * step + i)] for i in range(rank, ROWS, world)]
        inputs = trainer._prepare_inputs(trainer._batch(batch))
        labels = sum(int((trainer._batch([rows[(0, ROWS * step + i)]])["labels"] != -100).sum()) for i in range(ROWS))
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach() / world  # each is a share of the sum, times the processes
        if world > 1:
            dist.all_reduce(whole)
        found[f"loss {step}"] = whole
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = value.detach().clone()
            if world == 1:
                assert (value - before[name]).abs().max() > 1e-4, name
    return found


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="FSDP2 crashes on CPU processes of torch 2.11")
def test_adapters_on_sharded_weights_are_those_of_one_process(tmp_path):
    one = adapters(0, 1, str(tmp_path))
    assert sum("lora_" in name or ".flr." in name or "delta" in name for name in one) > 10
    for found in in_processes(adapters, 2, tmp_path, 2, str(tmp_path)):
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
