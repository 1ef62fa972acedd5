"""What the log says of the factors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from flr.train.factors import FactorTrace
from tests.helpers.models import trainable
from tests.helpers.training import sft_trainer


def output(gates, attention):
    return SimpleNamespace(gates=torch.tensor(gates)[:, None], attention=torch.tensor(attention)[:, None])


def test_figures_are_means_over_thoughts_of_any_batches():
    trace = FactorTrace()
    mask = torch.tensor([[True, True, False]])
    same, apart = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    trace.add(None, (None, mask, 1), output([[0.25, 0.75]], [same]))
    trace.add(None, (None, mask, 1), output([[0.75, 0.25]], [apart]))
    short = torch.tensor([[True, False, False]])  # one token: says nothing of attention
    trace.add(None, (None, short, 0), output([[0.2, 0.8]], [[[1.0, 0.0, 0.0]] * 2]))
    figures = trace.figures()
    assert figures["gate_1"] == pytest.approx(0.4)
    assert figures["attention_entropy_1"] == figures["attention_entropy_2"] == pytest.approx(0.5)
    assert figures["attention_overlap"] == pytest.approx(0.5)


def test_entropy_is_1_where_all_of_any_number_of_tokens_are_alike():
    trace = FactorTrace()
    trace.add(None, (None, None, 4), output([[1.0]], [[[0.2] * 5]]))
    assert trace.figures() == {"gate_1": 1.0, "attention_entropy_1": pytest.approx(1)}
    assert FactorTrace().figures() == {}
    assert math.isfinite(trace.figures()["gate_1"])


def test_evaluations_log_them_and_leave_no_hook(tmp_path):
    model, processor = trainable("id")
    trainer = sft_trainer(tmp_path, model, processor)
    metrics = trainer.evaluate()
    (line,) = trainer.state.log_history
    gates = [line[f"eval_gate_{k + 1}"] for k in range(trainer.model.config.flr["num_factors"])]
    assert sum(gates) == pytest.approx(1, abs=1e-5)
    assert 0 <= line["eval_attention_overlap"] <= 1
    assert not any("gate" in name for name in metrics)  # not among what a model is chosen by
    assert not trainer.model.flr._forward_hooks
