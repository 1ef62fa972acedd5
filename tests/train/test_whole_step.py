"""A training step is one graph to ``torch.compile``, and its backward another: losses and gradients are the step's own.

What is compiled is ``compute_loss`` of the trainers: for SFT the forward with its loss and regularisers, for latent
GRPO the group forward, rewards, advantages and the objective. The uncompiled step takes the CPU's other way, which
looks at the data.
"""

import shutil

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from flr.model import group_forward
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.models import trainable
from tests.helpers.training import grpo_trainer, sft_trainer

#: Users of batches whose widths differ, too.
BATCHES = (range(7), range(7, 12), range(50, 54))
#: What differs from SFT with factors under the vocabulary's normalisation, and from latent GRPO's default.
SFT = {
    "factors": {},
    "offsets": {"variant": "offsets"},
    "latentr3": {"variant": "latentr3"},
    "mixture": {"aggregation": "mixture"},
    "no thought": {"variant": "none"},
    "two thoughts": {"num_thoughts": 2},
}
GRPO = {
    "tokens": {"policy": "tokens"},
    "thoughts": {"policy": "thoughts", "likelihood_weight": 0.3},
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def supervised(folder, normalisation="full", layers=1, **config):
    """A trainer and its batches, which say where thoughts stand, as on a device."""
    made = trainable("title", layers=layers, **config)
    return sft_trainer(folder, *made, normalisation=normalisation, torch_compile=True)


def reinforced(folder, layers=1, **options):
    model, processor = trainable("title", layers=layers)
    trainer = grpo_trainer(folder, model=model, processor=processor, kl_weight=0.1, regularise=True, **options)
    with torch.no_grad():  # so that there is a divergence from the reference
        for parameter in model.flr.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return trainer


def check(trainer, step, batches=BATCHES):
    """Loss and gradients of ``step`` for batches of several sizes are those of the trainer's own step."""
    model, widths = trainer.model.train(), set()

    def run(function, batch):
        trainer._terms, trainer._sums, trainer._micro_batch = {}, {}, 0  # logs, which grow from call to call
        loss = function(model, dict(batch), num_items_in_batch=torch.tensor(40))
        return loss, gradients_of(model, loss)

    for users in batches:
        batch = trainer._numbered_batch([trainer.train_dataset[i] for i in users])
        widths.add(batch["input_ids"].shape[1])
        expected, gradients = run(trainer.compute_loss, batch)
        found, others = run(step, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert_same_gradients(others, gradients, 1e-4)
        assert max(gradient.norm() for gradient in gradients.values()) > 1e-3
    assert len(widths) == len(batches)


def one_graph(trainer, batches=BATCHES):
    """As :func:`check`; the first sizes are compiled as they are, and the second for all others."""
    traced = {"forward": 0, "backward": 0}

    def counted(name):
        def compiler(graph, inputs):
            traced[name] += 1
            return graph.forward

        return compiler

    backend = aot_autograd(fw_compiler=counted("forward"), bw_compiler=counted("backward"))
    check(trainer, torch.compile(trainer.compute_loss, fullgraph=True, backend=backend), batches)
    assert traced == dict.fromkeys(traced, min(len(batches), 2))


@pytest.mark.parametrize("name", SFT)
def test_a_supervised_step_is_one_graph(tmp_path, name):
    layers = 2 if name == "factors" else 1
    one_graph(
        supervised(tmp_path, layers=layers, **SFT[name]), BATCHES if name in ("factors", "mixture") else BATCHES[:1]
    )


def test_so_is_one_under_the_catalogues_normalisation(tmp_path):
    one_graph(supervised(tmp_path, "catalogue"), BATCHES[:1])


@pytest.mark.parametrize("name", GRPO)
def test_a_step_of_latent_grpo_is_one_graph(tmp_path, name):
    layers = 2 if name == "tokens" else 1
    one_graph(reinforced(tmp_path, layers=layers, **GRPO[name]), BATCHES if name == "tokens" else BATCHES[:1])


def test_so_is_one_whose_logits_are_not_kept(tmp_path, monkeypatch):
    """The way of a device, and of large vocabularies: the lm_head's product is part of an operator."""
    monkeypatch.setattr(group_forward, "MAX_LOSS_LOGITS", 0)
    one_graph(reinforced(tmp_path, **GRPO["tokens"]), BATCHES[:1])


def test_a_hooked_lm_head_is_run_outside_of_the_graph(tmp_path, monkeypatch):
    """Hooks see the call that gives the log-probabilities, compiled or not."""
    monkeypatch.setattr(group_forward, "MAX_LOSS_LOGITS", 0)
    trainer, seen = reinforced(tmp_path, **GRPO["tokens"]), []
    trainer.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape))
    check(trainer, torch.compile(trainer.compute_loss, backend="eager"), BATCHES[:1])
    assert len(seen) == 2
    assert seen[0] != ()


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute or two by itself, in C++ compilers and in what writes their input
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["supervised", "tokens"])
@pytest.mark.usefixtures("inductor")
def test_inductor_gives_the_same(tmp_path, name):
    trainer = supervised(tmp_path) if name == "supervised" else reinforced(tmp_path, **GRPO[name])
    check(trainer, torch.compile(trainer.compute_loss, fullgraph=True), BATCHES[:1])
