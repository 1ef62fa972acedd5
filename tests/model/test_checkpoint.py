"""Patched models saved and loaded: whole, sharded, from the Hub, as adapters; and checkpoints of LatentR3."""

import functools
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import flr
from flr.model.adapter import write_beside
from flr.model.patch import reasoner_parameters
from tests.helpers.extras import needs_adapters_of_transformers
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import HIDDEN, THOUGHT, VOCAB, build_recommender, patched_model, tiny_model


@pytest.mark.parametrize("variant", ["flr", "latentr3", "anchor", "none"])
def test_save_and_load(tmp_path, variant):
    model = patched_model("qwen2", variant=variant, num_thoughts=2).eval()
    inputs = supervised_batch("right", 0 if variant == "none" else 2)
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    loaded = flr.from_pretrained(tmp_path)
    assert loaded._flr_patch.config == model._flr_patch.config
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
    half = flr.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in reasoner_parameters(half)} <= {torch.float32}


def test_loading_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(OSError, match=r"directory: expected a folder with config\.json"):
        flr.from_pretrained(tmp_path / "nothing")
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="key 'flr'"):
        flr.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"attention\.query"):
        flr.load_latentr3(tmp_path / "plain")
    patched_model().eval().save_pretrained(tmp_path / "ours")
    for option in ({"trust_remote_code": True}, {"use_safetensors": False}, {"subfolder": "x"}, {"variant": "../x"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected"):
            flr.from_pretrained(tmp_path / "ours", **option)
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    del weights["flr.gate"]
    save_file(weights, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected weights that fit the reasoner in .*, got gate missing instead of"):
        flr.from_pretrained(tmp_path / "ours")


def test_whatever_is_wrong_with_a_folder_names_it(tmp_path):
    folder = tmp_path / "ours"
    patched_model().eval().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value * math.nan for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"{folder}: model: expected "):
        flr.from_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "generation_config.json").write_text('{"eos_token_id": ' + "1" * 100_000 + "}")
    with pytest.raises(
        ValueError, match=f"{folder}: expected a model whose files fit together, got ValueError: Exceeds"
    ):
        flr.from_pretrained(folder)
    (folder / "generation_config.json").unlink()
    _set(folder, "flr", "sparsity_target", value="x" * 10_000)
    with pytest.raises(ValueError, match=r"config\.json: flr: sparsity_target: expected one of .*…$") as error:
        flr.from_pretrained(folder)
    assert len(str(error.value)) < 1000


def test_a_base_model_that_is_not_there_names_the_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/no/such/place"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(OSError, match=f"{tmp_path / 'adapter_config.json'}: base model: directory: expected"):
        flr.from_pretrained(tmp_path)


def _set(folder, *path, value):
    """Change one value in the folder's config.json."""
    values = json.loads((folder / "config.json").read_text())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("flr", "num_factors"), 99, r"config\.json: flr: num_factors: expected 1 to 16, got 99"),
        (("flr", "dropout"), "much", r"config\.json: flr: dropout: expected a number in \[0, 1\), got 'much'"),
        (("flr", "odd"), 1, r"config\.json: flr: values: expected options of FLRConfig, got odd"),
        (("flr", "factor_size"), 1 << 40, r"config\.json: flr: factor_size: expected None or an integer from 1 to"),
        (("flr", "factor_size"), 1 << 15, "expected weights that fit the reasoner"),
        (("flr",), [1], r"config\.json: flr: expected an object, got list"),
        (("base_config",), None, "base_config: expected the configuration of a causal LM"),
        (("base_config", "model_type"), "no-such-model", "base_config: expected a model type that comes with"),
        (("base_config", "num_hidden_layers"), 10**6, "num_hidden_layers: expected at most .* got 1000000"),
        (("base_config", "hidden_size"), "wide", "base_config: expected a configuration of llama, got"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path, path, value, message):
    patched_model().save_pretrained(tmp_path)
    _set(tmp_path, *path, value=value)
    with pytest.raises(ValueError, match=message):
        flr.from_pretrained(tmp_path)


def test_a_whole_file_goes_before_a_stale_index_as_in_transformers(tmp_path):
    old, new = patched_model(seed=1), patched_model(seed=2)
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    sharded = flr.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(sharded.flr.query, old.flr.query)
    new.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text((tmp_path / "model.safetensors.index.json").read_text())
    loaded = flr.from_pretrained(tmp_path)
    for name, value in new.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_variants_of_the_weights(tmp_path):
    plain, half = patched_model(seed=1), patched_model(seed=2)
    plain.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert torch.equal(flr.from_pretrained(tmp_path).flr.query, plain.flr.query)
    assert torch.equal(flr.from_pretrained(tmp_path, variant="fp16").flr.query, half.flr.query)
    with pytest.raises(ValueError, match=r"expected model\.bf16\.safetensors or its index"):
        flr.from_pretrained(tmp_path, variant="bf16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model.safetensors", "expected safetensors files of the same folder"),
        ("/etc/passwd", "expected safetensors files of the same folder"),
        ("model.bin", "expected safetensors files of the same folder"),
        ("model-00009-of-00009.safetensors", "beside it, found none"),
        (7, "expected a weight_map"),
    ],
)
def test_an_index_names_files_of_its_folder_only(tmp_path, name, message):
    folder = tmp_path / "model"
    patched_model().save_pretrained(folder)
    shutil.copy(folder / "model.safetensors", tmp_path)  # what an index that leads out would find
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    with pytest.raises(ValueError, match=message):
        flr.from_pretrained(folder)


def test_files_that_are_too_long_or_no_such_files_are_named(tmp_path):
    patched_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
        flr.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        flr.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(" " * (1 << 24) + "{}")
    with pytest.raises(ValueError, match=r"config\.json: expected at most 16777216 bytes, got more"):
        flr.from_pretrained(tmp_path)


class _Hub:
    """Stands in for the Hub: a folder for each revision of ``user/name``."""

    def __init__(self, cache, revisions):
        self.cache, self.revisions, self.calls = cache, revisions, []

    def __call__(self, repo_id, *, revision=None, allow_patterns, ignore_patterns, **options):
        self.calls.append(options)
        if repo_id != "user/name":
            response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
            raise RepositoryNotFoundError(f"404 for {repo_id}\nmore", response=response)
        source = self.revisions[revision or "main"]
        files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        target = self.cache / (revision or "main")
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)


def test_models_are_loaded_from_the_hub(tmp_path, monkeypatch):
    recommender = build_recommender()
    for name in ("first", "second"):
        folder = tmp_path / name
        recommender.model.save_pretrained(folder, max_shard_size="20KB" if name == "first" else "1GB")
        recommender.processor.save_pretrained(folder)
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
        (folder / "checkpoint-1").mkdir()
        shutil.copy(folder / "config.json", folder / "checkpoint-1")
        with torch.no_grad():
            recommender.model.flr.query += 1
    hub = _Hub(tmp_path / "cache", {"main": tmp_path / "first", "v2": tmp_path / "second"})
    monkeypatch.setattr("flr.model.folder.snapshot_download", hub)
    model = flr.from_pretrained("user/name", token="secret", cache_dir="somewhere")
    assert hub.calls == [{"token": "secret", "cache_dir": "somewhere"}]
    assert model.name_or_path == model.config.name_or_path == "user/name"
    fetched = {path.relative_to(tmp_path / "cache" / "main").as_posix() for path in hub.cache.rglob("*.*")}
    wanted = {path.name for path in (tmp_path / "first").iterdir()} - {"pytorch_model.bin", "checkpoint-1"}
    assert fetched == wanted
    second = flr.Recommender.from_pretrained("user/name", revision="v2")
    assert torch.equal(second.model.flr.query, model.flr.query + 1)
    assert second.processor.catalogue.item_ids == recommender.processor.catalogue.item_ids
    with pytest.raises(OSError, match=r"model on the Hub, got 'user/other': no folder, and 404 for user/other$"):
        flr.from_pretrained("user/other")
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"got 'user/name': no folder, and .*"):  # nothing is downloaded in tests
        flr.from_pretrained("user/name", local_files_only=True, cache_dir=tmp_path / "empty")
    for path in (Path("user/name"), "./user/name", "user/name/deeper", "~/name"):
        with pytest.raises(OSError, match=r"directory: expected a folder with config\.json or a model on the Hub"):
            flr.from_pretrained(path)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def _adapter(peft, model, **options):
    """LoRA on the backbone and the whole reasoner, none of which is at its beginning."""
    config = {"target_modules": ["q_proj"], "modules_to_save": ["flr"], "r": 2, "task_type": "CAUSAL_LM", **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    return wrapped


def test_an_adapter_on_a_plain_model(tmp_path, peft):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = flr.FLRConfig(thought_token_id=VOCAB, num_factors=2)  # one row more than the base model has
    wrapped = _adapter(peft, flr.patch_model(base, config=config))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    inputs = {"input_ids": torch.tensor([[5, 6, VOCAB]])}
    expected = wrapped(**inputs).logits
    with pytest.raises(ValueError, match=r"expected config\.json of the patched model beside the adapter"):
        flr.from_pretrained(tmp_path / "adapter")
    given = flr.from_pretrained(tmp_path / "adapter", config=flr.FLRConfig.from_dict(wrapped.config.flr))
    torch.testing.assert_close(given(**inputs).logits, expected)
    wrapped.config.save_pretrained(tmp_path / "adapter")
    loaded = flr.from_pretrained(tmp_path / "adapter", is_trainable=True)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    trained = {name.split(".")[-2] for name, p in loaded.named_parameters() if p.requires_grad}
    assert {"default", "modules_to_save"} & trained
    assert not any(p.requires_grad for p in given.parameters())


def test_an_adapter_on_a_patched_model(tmp_path, peft):
    patched_model("qwen2").save_pretrained(tmp_path / "base")
    base = flr.from_pretrained(tmp_path / "base")
    wrapped = _adapter(peft, base)
    wrapped.save_pretrained(tmp_path / "adapter")
    inputs = supervised_batch("left")
    loaded = flr.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(wrapped)
    torch.testing.assert_close(loaded(**inputs).loss, wrapped(**inputs).loss)
    with pytest.raises(ValueError, match="config: expected the thought of the base model"):
        flr.from_pretrained(tmp_path / "adapter", config=flr.FLRConfig(num_factors=2, thought_token_id=THOUGHT))


@pytest.mark.parametrize("tokens", [None, [5, 7], {"embed_tokens": [5, 7]}], ids=["no rows", "rows", "rows of a table"])
def test_loaders_that_would_leave_out_the_thought_refuse_an_adapter(tmp_path, peft, tokens):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = _adapter(peft, flr.patch_model(base, config=flr.FLRConfig(num_factors=2)), trainable_token_indices=tokens)
    wrapped.save_pretrained(tmp_path / "first")
    write_beside(tmp_path / "first", wrapped.get_base_model())
    loaded = flr.from_pretrained(tmp_path / "first")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    torch.testing.assert_close(loaded(**inputs).logits, wrapped(**inputs).logits)
    loaded.save_pretrained(tmp_path / "second")
    loaded.save_pretrained(tmp_path / "third", is_main_process=False)
    assert not (tmp_path / "third" / "adapter_config.json").exists()
    (tmp_path / "second" / "config.json").write_bytes((tmp_path / "first" / "config.json").read_bytes())
    torch.testing.assert_close(flr.from_pretrained(tmp_path / "second")(**inputs).logits, wrapped(**inputs).logits)
    for folder in (tmp_path / "first", tmp_path / "second"):
        saved = (folder / "adapter_config.json").read_bytes()
        assert saved == (tmp_path / "first" / "adapter_config.json").read_bytes()
        (folder / "config.json").unlink()  # PEFT writes none
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        for load in (
            peft.AutoPeftModelForCausalLM.from_pretrained,
            transformers.AutoModelForCausalLM.from_pretrained,
            functools.partial(peft.PeftModel.from_pretrained, plain),
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").load_adapter,
        ):
            with pytest.raises(ValueError, match=r"load this adapter by flr\.from_pretrained \(pip install flr\)"):
                load(str(folder))


def test_an_adapter_that_transformers_holds(tmp_path, peft):
    """What transformers itself writes for it, and finds with our model type beside it."""
    needs_adapters_of_transformers()
    patched_model("qwen2").save_pretrained(tmp_path / "base")
    held = flr.from_pretrained(tmp_path / "base")
    held.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    held.save_pretrained(tmp_path / "held")
    assert json.loads((tmp_path / "held" / "config.json").read_text())["flr"] == held.config.flr
    assert flr.is_patched(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "held").get_base_model())
    with pytest.raises(ValueError, match=r"load this adapter by flr\.from_pretrained"):
        peft.PeftModel.from_pretrained(tiny_model("qwen2"), str(tmp_path / "held"))


def test_an_adapter_that_leaves_something_to_chance_is_refused(tmp_path, peft):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCAB + 3)
    wrapped = _adapter(peft, flr.patch_model(base, config=flr.FLRConfig(thought_token_id=VOCAB + 3)))
    folder = tmp_path / "adapter"
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    wrapped.config.save_pretrained(folder)
    with pytest.raises(ValueError, match="expected embeddings of the 3 tokens that were added"):
        flr.from_pretrained(folder)
    wrapped.save_pretrained(folder, save_embedding_layers=True)
    inputs = {"input_ids": torch.tensor([[5, VOCAB, VOCAB + 3]])}
    torch.testing.assert_close(flr.from_pretrained(folder)(**inputs).logits, wrapped(**inputs).logits)
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("flr.gate")}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected weights of the whole reasoner .*, got others for \['gate'\]"):
        flr.from_pretrained(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"expected adapter_model\.safetensors in .*, found none"):
        flr.from_pretrained(folder)
    shutil.copytree(folder, tmp_path / "base", dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    (tmp_path / "base" / "model.safetensors").unlink()
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"expected a whole base model, got .*, an adapter"):
        flr.from_pretrained(folder)


def test_latentr3_checkpoint(tmp_path):
    """A Qwen2 state dict plus attention.{query,key,value}; its formula written out for one user at a time."""
    backbone = tiny_model("qwen2", tie_word_embeddings=False)
    size, thought = HIDDEN, VOCAB - 1
    layers = {name: torch.nn.Linear(size, size) for name in ("query", "key", "value")}
    extra = {f"attention.{n}.{p}": v for n, layer in layers.items() for p, v in layer.state_dict().items()}
    backbone.save_pretrained(tmp_path)
    save_file({**load_file(tmp_path / "model.safetensors"), **extra}, tmp_path / "model.safetensors", {"format": "pt"})
    model = flr.load_latentr3(tmp_path)

    def rotate(x):  # [n, D]: complex numbers (x_i, x_{i + D/2}) turned by position × 1000^(-2i/D)
        half = size // 2
        z = torch.complex(x[:, :half].double(), x[:, half:].double())
        angle = torch.arange(len(x))[:, None] * 1000 ** (-2 * torch.arange(half).double() / size)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], 1).float()

    for prompt in ([7, 8, 9, 10, 11], [12]):
        ids = torch.tensor([[*prompt, thought, 20]])
        with torch.no_grad():
            hidden = backbone.eval().model(input_ids=ids[:, : len(prompt)]).last_hidden_state[0]
            query, key = rotate(layers["query"](hidden)), rotate(layers["key"](hidden))
            weights = torch.softmax(query[-1] @ key.T / math.sqrt(size), -1)
            expected = weights @ layers["value"](hidden)
            padded = torch.nn.functional.pad(ids, (3, 0))
            out = model(input_ids=padded, attention_mask=(padded != 0).long())
        torch.testing.assert_close(out.flr.thought[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.flr.attention[0, 0, 0, 3:], weights, rtol=1e-4, atol=1e-6)
        embeds = backbone.get_input_embeddings()(ids)
        embeds[0, len(prompt)] = expected
        torch.testing.assert_close(out.logits[0, 3:], backbone(inputs_embeds=embeds).logits[0], rtol=1e-4, atol=1e-4)


def test_settings_of_generation_are_saved_and_loaded(tmp_path, caplog):
    """Those that were set on the patched model are its own: only a base model's are set aside."""
    model = patched_model()
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.5
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        with caplog.at_level(logging.WARNING, logger="flr"):
            model = flr.from_pretrained(tmp_path / name)
        assert (model.generation_config.do_sample, model.generation_config.temperature) == (True, 0.5)
        assert model.generation_config.suppress_tokens == [THOUGHT]
    assert not caplog.records
