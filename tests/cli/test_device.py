"""Where commands compute that train nothing."""

import dataclasses

import pytest
import torch

from flr.cli import evaluate, explain, factors, neighbours, recommend, robustness, views, weights
from flr.cli.options import load_trained
from flr.recommend import Recommender
from tests.helpers.models import build_recommender

COMMANDS = {
    evaluate: "EvaluateOptions", explain: "ExplainOptions", factors: "FactorsOptions", neighbours: "NeighbourOptions",
    recommend: "RecommendOptions", robustness: "RobustnessOptions",
    views: "MixingOptions",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda x: x.__name__.rpartition(".")[2])
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = getattr(command, COMMANDS[command])()
    assert options.as_saved() == {"device": "cuda:0"}
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert options.as_saved() == {"device": "cuda:1"}  # four processes on two devices
    assert dataclasses.replace(options, device="cpu").as_saved() == {"device": "cpu"}


def test_without_one_it_is_the_cpu():
    assert weights.device_named("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device: expected auto or a device of this machine, got 'gpu'"):
        weights.device_named("gpu")


def test_models_are_put_there(tmp_path):
    build_recommender().save_pretrained(tmp_path)
    model, _ = load_trained(str(tmp_path), None, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert Recommender.from_pretrained(tmp_path, "cpu").device.type == "cpu"


def test_a_model_of_four_bits_stays_where_its_loader_put_it(monkeypatch):
    from flr.model.backbone import placed

    model = build_recommender().model
    model.is_quantized = True
    assert placed(model, "meta") is model
    assert {p.device.type for p in model.parameters()} == {"cpu"}
