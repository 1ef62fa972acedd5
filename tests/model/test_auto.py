"""Saved folders in transformers' own hands: the thought is there, or the failure says what is missing."""

import copy
import functools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import flr
from flr.model.auto import FLRModelConfig, register_config, register_model
from flr.model.saved_config import MODEL_TYPE, REMEDY
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import FAMILIES, build_recommender, patched_model, tiny_model

OLD = Path(__file__).parents[1] / "fixtures" / "saved-0.1.0"
#: Ways into a folder that know nothing of this package.
_PLAIN = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaModel
from transformers import Qwen2ForCausalLM, pipeline
folder = sys.argv[1]
ways = [AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoModelForCausalLM.from_pretrained,
        LlamaForCausalLM.from_pretrained, LlamaModel.from_pretrained, Qwen2ForCausalLM.from_pretrained,
        lambda folder: pipeline("text-generation", model=folder)]
for way in ways:
    try:
        print("loaded", type(way(folder)))
    except Exception as error:
        print(repr(str(error)))
print(len(AutoTokenizer.from_pretrained(folder)))
assert not any(name.split(".")[0] == "flr" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A recommender and the folder that it was saved into."""
    folder, recommender = tmp_path_factory.mktemp("saved"), build_recommender()
    recommender.model.save_pretrained(folder)
    recommender.processor.save_pretrained(folder)
    return folder, recommender


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_without_flr_transformers_fails_and_says_what_to_install(saved):
    folder, recommender = saved
    command = [sys.executable, "-c", _PLAIN, str(folder)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    *failures, tokens = outcome.stdout.splitlines()
    assert len(failures) == 7
    assert all(REMEDY in line for line in failures), failures
    assert int(tokens) == len(recommender.processor.tokenizer)


def test_with_flr_the_auto_classes_give_the_patched_model(saved):
    folder, recommender = saved
    ids = torch.tensor([[5, 6, recommender.model._flr_patch.config.thought_token_id]])
    expected = recommender.model(input_ids=ids).logits
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(recommender.model)
    # not to the bit: where weights lie in memory, and so how a CPU adds, may differ
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    made = pipeline("text-generation", model=str(folder))
    torch.testing.assert_close(made.model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    assert made.tokenizer.get_vocab() == recommender.processor.tokenizer.get_vocab()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == made.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="FLRModelConfig"):
        AutoModel.from_pretrained(folder)  # a model without an lm_head has no place for a thought


def test_options_of_the_auto_classes_reach_the_base_model(saved):
    options = {"attn_implementation": "eager", "dtype": torch.bfloat16, "use_cache": False}
    for load in (AutoModelForCausalLM.from_pretrained, flr.from_pretrained):
        model = load(saved[0], **options)
        assert model.config._attn_implementation == "eager"
        assert model.dtype == torch.bfloat16
        assert model.config.use_cache is False
    config = AutoConfig.from_pretrained(saved[0])
    config.base_config.use_cache = False
    assert AutoModelForCausalLM.from_pretrained(saved[0], config=config).config.use_cache is False


def test_from_config_makes_a_new_patched_model(saved):
    config = AutoConfig.from_pretrained(saved[0])
    model = AutoModelForCausalLM.from_config(config)
    assert flr.is_patched(model)
    assert model.config.flr == config.flr
    assert config.get_text_config().hidden_size == model.config.hidden_size
    with pytest.raises(ValueError, match="base_config: expected the configuration of a causal LM, got None"):
        AutoModelForCausalLM.from_config(FLRModelConfig())


def test_registering_again_changes_nothing(saved):
    for _ in range(2):
        register_config(transformers.models.auto.configuration_auto)
        register_model(transformers.models.auto.modeling_auto)
    assert type(AutoConfig.from_pretrained(saved[0])) is FLRModelConfig


#: A process for each first import and loader; what neither library belongs to is imported before them all.
_LOADERS = """
import importlib, os, sys
import huggingface_hub, numpy, safetensors.torch, tokenizers, torch._dynamo
assert "transformers" not in sys.modules and "flr" not in sys.modules
for first in sys.argv[2:]:
    for loader in "AutoModelForCausalLM", "AutoConfig":
        child = os.fork()
        if child == 0:
            importlib.import_module(first)
            import flr, transformers
            print(first, loader, hasattr(getattr(transformers, loader).from_pretrained(sys.argv[1]), "flr"), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, (first, loader)
"""


def test_whichever_is_imported_first(saved):
    firsts = ["flr", "transformers", "transformers.modeling_utils", "transformers.pipelines", "flr.model.saved_config"]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", _LOADERS, str(saved[0]), *firsts]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    expected = [f"{first} {loader} True" for first in firsts for loader in ("AutoModelForCausalLM", "AutoConfig")]
    assert outcome.stdout.splitlines() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_the_same_after_a_second_save(tmp_path, family):
    model = patched_model(family)
    own = type(model.config)
    model.save_pretrained(tmp_path / "first")
    assert type(model.config) is own
    assert model.config.model_type == own.model_type
    flr.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "third")
    for file in (tmp_path / "first").iterdir():
        for again in ("second", "third"):
            assert (tmp_path / again / file.name).read_bytes() == file.read_bytes(), file.name
    AutoConfig.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "config")
    assert config_of(tmp_path / "config") == config_of(tmp_path / "first")
    plain = tiny_model(family)
    plain.config.save_pretrained(tmp_path / "plain")
    base = config_of(tmp_path / "first")["base_config"]
    assert base.pop("transformers_weights") == REMEDY
    dropped = {"dtype", "architectures"}  # which a model's save sets
    assert {k: v for k, v in base.items() if k not in dropped} == {
        k: v for k, v in config_of(tmp_path / "plain").items() if k not in dropped
    }


@pytest.mark.parametrize("codec", ["id", "sid", "title", "0.1.0"])
def test_the_whole_folder_is_the_same_after_a_second_save(tmp_path, codec):
    old = codec == "0.1.0"
    recommender = flr.Recommender.from_pretrained(OLD) if old else build_recommender(codec)
    for name in ("first", "second"):
        recommender.model.save_pretrained(tmp_path / name)
        recommender.processor.save_pretrained(tmp_path / name)
        recommender = flr.Recommender.from_pretrained(tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert config_of(tmp_path / "first")["model_type"] == MODEL_TYPE


def test_copies_save_as_the_original_does_and_unpatched_models_as_before(tmp_path):
    model = patched_model()
    twin = copy.deepcopy(model)
    assert twin.save_pretrained.__self__ is twin
    del model
    twin.config.flr["dropout"] = 0.25
    twin.save_pretrained(tmp_path / "twin")
    assert config_of(tmp_path / "twin")["flr"]["dropout"] == 0.25
    assert "to_json_file" not in vars(twin.config)
    pickle.loads(pickle.dumps(twin)).save_pretrained(tmp_path / "pickled")
    assert (tmp_path / "pickled" / "config.json").read_bytes() == (tmp_path / "twin" / "config.json").read_bytes()
    flr.unpatch_model(twin).save_pretrained(tmp_path / "plain")
    assert config_of(tmp_path / "plain")["model_type"] == "llama"
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")) is type(twin)


def test_a_save_of_somebody_elses_is_kept_and_comes_back(tmp_path):
    model, calls = tiny_model(), []
    own = functools.partial(lambda *args, **kwargs: calls.append(kwargs) or type(model).save_pretrained(model, *args))
    model.save_pretrained = own
    flr.patch_model(model, config=flr.FLRConfig(thought_token_id=60))
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    assert calls == [{"max_shard_size": "1GB"}]
    assert config_of(tmp_path)["model_type"] == MODEL_TYPE
    assert flr.unpatch_model(model).save_pretrained is own


def test_a_save_that_fails_leaves_the_configuration_as_it_was(tmp_path, monkeypatch):
    model = patched_model()
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert "to_json_file" not in vars(model.config)


def test_trainers_checkpoints_are_ours(tmp_path):
    batch = supervised_batch("left")
    rows = [{name: value[i] for name, value in batch.items()} for i in range(len(batch["input_ids"]))]
    options = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(patched_model(), options, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "last")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "last"):
        assert config_of(folder)["model_type"] == MODEL_TYPE
        assert torch.equal(flr.from_pretrained(folder).flr.query, trainer.model.flr.query)
    options.max_steps = 2
    assert Trainer(patched_model(), options, train_dataset=rows).train(str(tmp_path / "checkpoint-1")).global_step == 2


class _Hub:
    """Stands in for ``HfApi``: keeps what is uploaded."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            with operation.as_file() as stream:
                self.files[operation.path_in_repo] = stream.read()


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_uploads_our_configuration(tmp_path, monkeypatch, way):
    hub, model = _Hub(), patched_model()
    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
    card = ModelCard.from_template(ModelCardData(), model_description="")
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    if way == "push_to_hub":
        model.push_to_hub("user/name")
    else:
        model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="user/name")
    assert json.loads(hub.files["config.json"])["model_type"] == MODEL_TYPE
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(flr.from_pretrained(tmp_path).flr.query, model.flr.query)
