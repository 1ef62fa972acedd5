"""Latent GRPO gives the same loss, gradients and weights however a global batch is split over processes (gloo, CPU)."""

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed.fsdp import fully_shard

from flr.data import InteractionDataset
from flr.model.backbone import causal_lm
from flr.train import LatentGRPOTrainer
from flr.train.lora import LoraSettings, add_lora, own_tokens
from tests.helpers.catalogues import DATA
from tests.helpers.comparisons import assert_same_gradients
from tests.helpers.models import trainable
from tests.helpers.processes import in_processes
from tests.helpers.training import grpo_trainer

pytest.importorskip("peft")
RUNS = {
    "thoughts, grpo": {"policy": "thoughts", "kl_weight": 0.1, "num_iterations": 2},
    "tokens, latentr3": {"policy": "tokens", "advantage": "latentr3", "advantage_from_clean": False},
    "hybrid": {
        "likelihood_weight": 0.3,
        "likelihood_adaptive": True,
        "kl_weight": 0.1,
        "kl_target": 0.01,
        "reward": "log_likelihood=1,ndcg@10=1",
        "noise_target": 0.5,
        "reward_beams": 8,
    },
    "backbone": {"policy": "tokens", "train_backbone": True, "gradient_accumulation_steps": 2},
    "adapters": {"policy": "tokens", "train_backbone": True, "adapters": True, "advantage": "latentr3"},
}
#: How eight users are split over processes when nothing is even.
SPLITS = {1: [8], 2: [5, 3], 4: [1, 4, 1, 2]}
STEPS = 3
#: FSDP2 crashes in the backward on CPU processes of torch 2.11.
SHARDS = Version(torch.__version__) >= Version("2.13")


def make(folder, users: int, adapters: bool = False, **options) -> LatentGRPOTrainer:
    """A trainer in double precision: reductions in another order would show in single."""
    model, processor = trainable("sid")
    if adapters:
        torch.manual_seed(0)  # PEFT draws one factor of every adapter, and the other is zero
        model = add_lora(model, LoraSettings(2, 4.0), own_tokens(processor))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    own = {"max_steps": STEPS, "seed": 1, "logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    own |= {"per_device_train_batch_size": users, "ddp_backend": "gloo" if dist.is_initialized() else None}
    return grpo_trainer(folder, model=model.double(), processor=processor, **{**own, **options})


def gradients(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = grad.detach().clone()
    return found


def uneven(folder, rank: int, world: int, shard: bool = False) -> dict:
    """Losses and gradients of one uneven global batch, by run."""
    found = {}
    start = sum(SPLITS[world][:rank])
    rows = InteractionDataset(DATA.train)
    for name, options in RUNS.items():
        train = make(folder, 1, **{**options, "gradient_accumulation_steps": 1, "num_iterations": 1})
        with torch.no_grad():  # ratios stay 1, but the KL and its gradient do not stay 0
            train.reference.output.mul_(0.9)
        model = train.model
        if shard:
            lm = causal_lm(model)
            for part in (*lm.model.layers, lm.flr):
                fully_shard(part)
            model = fully_shard(model)
        elif world > 1:
            model = torch.nn.parallel.DistributedDataParallel(model)
        batch = train._batch([rows[(0, i)] for i in range(start, start + SPLITS[world][rank])])
        loss = train.compute_loss(model, batch, num_items_in_batch=torch.tensor(8))
        loss.backward()
        loss = loss.detach() / world
        if world > 1:
            dist.all_reduce(loss)
        found[name] = {"loss": loss, **gradients(model)}
    return found


def trained(folder, world: int) -> dict:
    """Weights and log of three steps on sixteen users each, by run."""
    found = {}
    for name, options in RUNS.items():
        users = 16 // world // options.get("gradient_accumulation_steps", 1)
        train = make(folder, users, **options)
        train.train()
        lines = [x for x in train.state.log_history if "kl" in x]
        keys = ("loss", "reward", "reward_std", "kl", "clip_fraction", "thought_norm", "advantage_min", "advantage_max")
        log = torch.tensor([[line.get(key, 0.0) for key in keys] for line in lines])
        assert log.shape == (STEPS, len(keys))
        found[name] = {"log": log, **{n: p.detach().clone() for n, p in train.model.named_parameters()}}
    return found


def _runs(rank: int, world: int, path: str) -> dict:
    """What every process finds: see the test below."""
    folder = f"{path}/out-{rank}"
    found = {"uneven": uneven(folder, rank, world), "trained": trained(folder, world)}
    if world == 2 and SHARDS:
        found["sharded"] = uneven(folder, rank, world, shard=True)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    folder = str(tmp_path_factory.mktemp("alone"))
    found = {"uneven": uneven(folder, 0, 1), "trained": trained(folder, 1)}
    adapters = {name: float(x.norm()) for name, x in found["uneven"]["adapters"].items() if "lora_" in name}
    assert len(adapters) > 10
    assert min(adapters.values()) > 0
    return found


def compare(name: str, actual: dict, expected: dict, relative: float) -> None:
    actual, expected = dict(actual), dict(expected)
    for scalar in ("loss", "log"):
        if scalar in expected:
            torch.testing.assert_close(
                actual.pop(scalar), expected.pop(scalar), rtol=1e-6, atol=1e-6, msg=lambda m: f"{name}: {m}"
            )
    assert_same_gradients(actual, expected, relative)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes(world, alone, tmp_path):
    for rank, found in enumerate(in_processes(_runs, world, tmp_path, world, str(tmp_path))):
        for kind, runs in found.items():
            for name, values in runs.items():
                expected = alone["uneven" if kind == "sharded" else kind][name]
                compare(f"{kind}, {name}, rank {rank}", values, expected, 1e-6)


def test_the_comparison_can_fail(alone):
    moved = {name: value * 1.001 for name, value in alone["uneven"]["backbone"].items()}
    with pytest.raises(AssertionError):
        compare("moved", moved, alone["uneven"]["backbone"], 1e-6)
