"""Training steps as CUDA graphs: what is captured, compared, replayed; on a device, that training comes out equal."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from flr.config import IGNORE
from flr.data import Augment, Teacher
from flr.train import step_graphs
from flr.train.grpo import by_graphs
from flr.train.step_graphs import StepGraphs, padded
from tests.helpers.catalogues import DATA
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import group_case
from tests.helpers.models import trainable
from tests.helpers.training import grpo_trainer, sft_trainer


@pytest.fixture
def replays(monkeypatch):
    """Captures that run the same Python again in place of a graph; the list has one entry a replay."""
    done = []

    def record(function, pool):
        function()

        def replay():
            done.append(function.__name__)
            function()

        return replay

    monkeypatch.setattr(step_graphs, "_record", record)
    monkeypatch.setattr(step_graphs, "_new_pool", lambda: None)
    return done


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3), torch.nn.Parameter(torch.ones(2))


def of(module, scale=1.0):
    def call(tensors):
        y = module(tensors["x"]).sin() * scale
        return y.sum(1), None, y.detach().mean()

    return call


def test_replays_give_the_results_and_gradients_of_each_call(replays):
    module, unused = layer()
    both = torch.nn.ModuleDict({"used": module, "unused": torch.nn.ParameterList([unused])})
    graphs = StepGraphs()
    for step in range(5):
        x = torch.randn(6, 4)
        weight = torch.randn(6)
        found, nothing, mean = graphs(of(module), {"x": x}, both, "key")
        assert nothing is None
        assert not mean.requires_grad
        (found * weight).sum().backward()
        grads = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        expected, _, _ = of(module)({"x": x})
        (expected * weight).sum().backward()
        torch.testing.assert_close(found, expected)
        for grad, p in zip(grads, module.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad)
        module.zero_grad()
        assert unused.grad is None
        with torch.no_grad():
            module.weight.add_(0.1)  # a step of the optimizer
        assert bool(replays) == (step > 0)
    assert graphs(of(module), {"x": torch.randn(2, 4)}, both, "key")[0].shape == (2,)  # other shapes


def test_gradients_of_micro_batches_add_up(replays):
    module, _ = layer()
    graphs = StepGraphs()
    x = [torch.randn(6, 4) for _ in range(4)]
    for part in x[:2]:  # seen, captured
        graphs(of(module), {"x": part}, module, 0)
    results = []
    for part in x[2:]:
        results.append(graphs(of(module), {"x": part}, module, 0)[0])
        results[-1].sum().backward()
    torch.testing.assert_close(results[0], of(module)({"x": x[2]})[0])  # not overwritten by the second
    found = module.weight.grad.clone()
    module.zero_grad()
    sum(of(module)({"x": part})[0].sum() for part in x[2:]).backward()
    torch.testing.assert_close(found, module.weight.grad)


def test_a_backward_that_comes_too_late_is_refused(replays):
    module, _ = layer()
    graphs = StepGraphs()
    for _ in range(2):
        late = graphs(of(module), {"x": torch.randn(6, 4)}, module, 0)[0]
    graphs(of(module), {"x": torch.randn(6, 4)}, module, 0)
    with pytest.raises(RuntimeError, match="backward: expected one, and before the next forward"):
        late.sum().backward()
    twice = graphs(of(module), {"x": torch.randn(6, 4)}, module, 0)[0].sum()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="got it later or a second time"):
        twice.backward()
    for _ in range(2):  # other shapes, whose graph has its intermediate results in the same memory
        late = graphs(of(module), {"x": torch.randn(5, 4)}, module, 0)[0]
    graphs(of(module), {"x": torch.randn(6, 4)}, module, 0)
    with pytest.raises(RuntimeError, match="backward: expected one, and before the next forward"):
        late.sum().backward()


@pytest.mark.parametrize("fault", ["differs", "raises"])
def test_what_does_not_come_out_equal_goes_on_one_by_one(replays, monkeypatch, caplog, fault):
    module, _ = layer()
    calls = []

    def call(tensors):
        calls.append(len(calls))
        if fault == "raises" and len(calls) == 4:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (of(module, scale=1.0 + (fault == "differs" and len(calls) > 3))(tensors)[0],)

    graphs = StepGraphs()
    for _ in range(4):
        graphs(call, {"x": torch.randn(6, 4)}, module, 0)
    assert graphs.refused
    assert [r.message for r in caplog.records if "without CUDA graphs" in r.message] == [
        "training without CUDA graphs: "
        + ("operation not permitted when stream is capturing" if fault == "raises" else caplog.records[0].args[0])
    ]
    assert not graphs._known


@pytest.mark.parametrize("fault", [None, "differs", "raises"])
def test_compiled_layers_are_captured_where_they_come_out_equal(fault, monkeypatch, caplog):
    """Replays run under the layers of their capture, as a graph would."""
    torch._dynamo.reset()
    model, prompts, group = group_case("qwen2", torch.float32)
    compilations, replays = [], []

    def backend(graph, inputs):
        compilations.append(graph)
        if fault == "raises":
            raise RuntimeError("no such compiler")
        return graph.forward if fault is None else lambda *args: [x * 1.5 for x in graph.forward(*args)]

    graphs = StepGraphs(backend)
    program = graphs._program

    def record(function, pool):
        changed = "forward" in model.model.layers[0].__dict__

        def replay():
            replays.append(changed)
            with step_graphs.compiled_layers(model, program) if changed else contextlib.nullcontext():
                function()

        function()
        return replay

    monkeypatch.setattr(step_graphs, "_record", record)
    monkeypatch.setattr(step_graphs, "_new_pool", lambda: None)
    expected = model(**prompts, group=group).logprobs
    gradients = gradients_of(model, expected.sum())
    for _ in range(3):
        found = by_graphs(graphs, model, prompts, group).logprobs
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert_same_gradients(gradients_of(model, found.sum()), gradients, 1e-4)
    assert compilations
    assert not graphs.refused
    assert len(graphs._known) == 1
    assert (graphs._program is None) == (fault is not None)
    assert replays[-1] == (fault is None)
    assert ("training without compiled layers: " in caplog.text) == (fault is not None)
    torch._dynamo.reset()


def test_gradients_that_nobody_asks_for_are_not_computed(replays):
    model, prompts, group = group_case("llama", torch.float32)
    every, few = StepGraphs(), StepGraphs()
    for _ in range(3):
        whole = by_graphs(every, model, prompts, group)
        found = by_graphs(few, model, prompts, group, ("thought_logprobs", "regularisers"))
    assert whole.regularisers.requires_grad
    assert whole.thought_logprobs.requires_grad
    assert not found.regularisers.requires_grad
    assert not found.thought_logprobs.requires_grad
    torch.testing.assert_close(found.regularisers, whole.regularisers.detach())
    expected = gradients_of(model, whole.logprobs.sum())  # before the next forward of these graphs
    assert_same_gradients(gradients_of(model, found.logprobs.sum()), expected, 1e-5)


def test_a_batch_without_room_beside_the_graphs_drops_them(replays, caplog):
    module, _ = layer()
    graphs = StepGraphs()
    for _ in range(2):
        graphs(of(module), {"x": torch.randn(6, 4)}, module, 0)
    failures = iter([True, False])

    def large(tensors):
        if next(failures):
            raise torch.OutOfMemoryError("out of memory")
        return of(module)(tensors)

    assert graphs(large, {"x": torch.randn(9, 4)}, module, 0)[0].shape == (9,)
    assert not graphs._known
    assert "needs the memory" in caplog.text


def test_padding_changes_no_loss(tmp_path):
    model, processor = trainable("title")
    train = sft_trainer(tmp_path, model, processor)
    batch = train._batch([DATA.train[i] for i in range(5)])
    first = int((batch["labels"] != IGNORE).any(0).int().argmax())
    wide = padded({**batch, "thought_start": first - processor.num_thoughts}, first)
    width = first + -first % step_graphs.prompt_step(first)
    assert width > first
    assert wide["thought_start"] == width - processor.num_thoughts
    assert (wide["input_ids"].shape[1] - width) % 8 == 0 or wide["input_ids"].shape[1] - width <= 4
    model.eval()
    torch.testing.assert_close(model(**wide).loss, model(**batch).loss)
    train = grpo_trainer(tmp_path, model=model, processor=processor)
    batch = train._batch([DATA.train[i] for i in range(5)])
    wide = padded(batch, batch["input_ids"].shape[1])
    assert wide["input_ids"].shape[1] % 8 == 0
    assert wide["input_ids"].shape[1] > batch["input_ids"].shape[1]
    expected = train.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(5))
    train._micro_batch = 0
    torch.testing.assert_close(train.compute_loss(model, wide, num_items_in_batch=torch.tensor(5)), expected)


def weights_after(train):
    train.train()
    return torch.cat([p.detach().flatten().double() for p in train.model.parameters()])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"cuda_graphs": False}, False),
        ({"device": torch.device("cpu")}, False),
        ({"world_size": 2}, False),
        ({"gradient_checkpointing": True}, False),
        ({"torch_compile": True}, False),
        ({"prompt_cache": "memory"}, False),
    ],
)
def test_where_steps_are_captured(change, expected, monkeypatch):
    monkeypatch.delenv("FLR_CUDA_GRAPHS", raising=False)
    plain = {"device": torch.device("cuda"), "world_size": 1, "n_gpu": 1, "prompt_cache": "none", "cuda_graphs": True}
    off = dict.fromkeys(("gradient_checkpointing", "torch_compile", "fsdp", "deepspeed"), False)
    args = SimpleNamespace(**{**plain, **off, **change})
    assert step_graphs.usable(args, layer()[0]) == expected
    monkeypatch.setenv("FLR_CUDA_GRAPHS", "0")
    assert not step_graphs.usable(args, layer()[0])


def test_compiled_layers_are_refused_where_nothing_is_captured(tmp_path):
    with pytest.raises(ValueError, match="compile_layers: expected steps that CUDA graphs capture, got others"):
        trainer_of(tmp_path, "sft", "id", compile_layers=True)


STAGES = pytest.mark.parametrize("stage", ["sft", "thoughts", "tokens"])


def trainer_of(folder, stage, codec, **options):
    model, processor = trainable(codec)
    if stage == "sft":
        return sft_trainer(folder, model, processor, num_train_epochs=3, **options)
    return grpo_trainer(folder, model=model, processor=processor, policy=stage, num_train_epochs=3, **options)


def test_the_control_without_a_thought_is_captured_too(tmp_path, replays, monkeypatch, caplog):
    def of(folder):
        return sft_trainer(folder, *trainable("title", variant="none"), num_train_epochs=3)

    expected = weights_after(of(tmp_path / "plain"))
    monkeypatch.setattr("flr.train.base.usable", lambda args, model: True)
    torch.testing.assert_close(weights_after(of(tmp_path / "graphs")), expected, rtol=1e-4, atol=1e-5)
    assert replays
    assert "without CUDA graphs" not in caplog.text


@pytest.mark.parametrize("aggregation", ["thought", "mixture"])
def test_targets_of_a_teacher_are_captured_too(tmp_path, replays, monkeypatch, caplog, aggregation):
    def of(folder):
        augment = Augment(teacher=Teacher.fit(DATA.train, len(DATA.catalogue), "item-knn"))
        return sft_trainer(folder, *trainable(aggregation=aggregation), augment, max_steps=6)

    expected = weights_after(of(tmp_path / "plain"))
    monkeypatch.setattr("flr.train.base.usable", lambda args, model: True)
    torch.testing.assert_close(weights_after(of(tmp_path / "graphs")), expected, rtol=1e-4, atol=1e-5)
    assert replays
    assert "without CUDA graphs" not in caplog.text


@STAGES
def test_training_by_replays_comes_out_equal(tmp_path, stage, replays, monkeypatch):
    expected = weights_after(trainer_of(tmp_path, stage, "title"))
    monkeypatch.setattr("flr.train.base.usable", lambda args, model: True)
    graphed = trainer_of(tmp_path, stage, "title")
    torch.testing.assert_close(weights_after(graphed), expected, rtol=1e-4, atol=1e-5)
    assert replays
    lines = [x for x in graphed.state.log_history if "loss" in x]
    assert all(("diversity" if stage == "sft" else "clip_fraction") in x for x in lines)


@pytest.mark.gpu
@pytest.mark.parametrize(("codec", "batches"), [("id", 1), ("sid", 2), ("title", 1)])
@STAGES
def test_on_the_device_training_comes_out_equal(tmp_path, stage, codec, batches, caplog):
    options = {"use_cpu": False, "gradient_accumulation_steps": batches, "per_device_train_batch_size": 16 // batches}
    graphed, plain = (trainer_of(tmp_path, stage, codec, cuda_graphs=x, **options) for x in (True, False))
    start = torch.cat([p.detach().flatten().double() for p in plain.model.parameters()])
    found, expected = weights_after(graphed), weights_after(plain)
    assert "without CUDA graphs" not in caplog.text
    assert graphed._graphs._known
    assert plain._graphs is None
    assert float((found - expected).norm()) < 2e-2 * float((expected - start).norm())


@pytest.mark.gpu
def test_on_the_device_a_capture_that_fails_leaves_everything_as_it_was(caplog):
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)).cuda()

    def waits(tensors):
        y = layer(tensors["x"])
        return (y * float(y.detach().sum()),)

    graphs, x = StepGraphs(), torch.ones(8, 64, device="cuda")
    for _ in range(4):
        graphs(waits, {"x": x}, layer, 0)[0].sum().backward()
    assert graphs.refused
    assert "without CUDA graphs" in caplog.text
    assert layer[0].weight.grad is not None


@pytest.mark.gpu
def test_on_the_device_dropout_is_drawn_anew_at_every_replay():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)).cuda()
    graphs, x = StepGraphs(), torch.ones(8, 64, device="cuda")
    found = [graphs(lambda t: (layer(t["x"]),), {"x": x}, layer, 0)[0] for _ in range(5)]
    assert not graphs.refused
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(found))
