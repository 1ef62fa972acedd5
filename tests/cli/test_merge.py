"""Adapters from the command line: trained on a plain model, taken by every command, merged into a whole one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import flr
from flr.cli import main
from flr.data import RecProcessor, build_tokenizer, planted_dataset
from tests.helpers.models import tiny_llama

pytest.importorskip("peft")
DATA = ["--planted_items", "40", "--planted_users", "60"]
TRAINING = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "1e-2"]
HISTORY = ["--history", "item_1"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    """A model in bfloat16 that has seen the titles' words and no items."""
    folder = tmp_path_factory.mktemp("base")
    dataset = planted_dataset(num_items=40, num_users=60)
    tokenizer = build_tokenizer(dataset.catalogue, "title", vocab_size=400)
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "tie_word_embeddings": request.param, "initializer_range": 0.1}
    model = tiny_llama(len(tokenizer), eos_token_id=2, pad_token_id=0, bos_token_id=1, **shape)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    options = ["--model", str(base), "--lora_rank", "2", "--max_steps", "4", "--num_factors", "2"]
    assert main(["sft", *DATA, *TRAINING, *options, "--output_dir", str(folder)]) == 0
    return folder


def test_every_command_takes_what_sft_wrote(adapter, tmp_path, capsys):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["lora_alpha"] == 4  # twice the rank
    saved = load_file(adapter / "adapter_model.safetensors")
    rows = {len(value) for name, value in saved.items() if "embed_tokens" in name or "lm_head" in name}
    assert rows == {41}  # forty items and the thought, and not the whole table beside them
    assert main(["evaluate", "--model", str(adapter), *DATA, "--dtype", "float32"]) == 0
    assert main(["recommend", "--model", str(adapter), *HISTORY]) == 0
    assert main(["explain", "--model", str(adapter), *HISTORY, "--json"]) == 0
    for command, extra in (("sft", []), ("rl", ["--group_size", "2", "--per_device_train_batch_size", "8"])):
        out = tmp_path / command
        more = ["--model", str(adapter), "--max_steps", "1", "--output_dir", str(out), *extra]
        capsys.readouterr()
        assert main([command, *DATA, *TRAINING, *more]) == 0
        assert "rows of tokens" in capsys.readouterr().err or command == "rl"
        old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out))
        assert old.keys() == new.keys()
        assert any(not torch.equal(old[name], new[name]) for name in old)
    wrong = ["sft", *DATA, "--model", str(adapter), "--lora_rank", "4", "--output_dir", str(tmp_path / "no")]
    assert main(wrong) == 1
    assert "lora_rank: expected 0, since" in capsys.readouterr().err


def test_a_merged_model_answers_as_the_adapter(adapter, base, tmp_path, capsys):
    assert main(["merge", str(adapter), "--output", str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    ours, theirs = (flr.from_pretrained(f, dtype="float32") for f in (adapter, tmp_path / "whole"))
    assert type(theirs).__name__ == "LlamaForCausalLM"
    processor = RecProcessor.from_pretrained(tmp_path / "whole")
    inputs = {"input_ids": torch.tensor([[*processor.item_codec.tokens[:6].tolist(), processor.thought_token_id]])}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, ours(**inputs).logits, rtol=1e-4, atol=1e-4)
        plain = flr.from_pretrained(adapter, dtype="float32").unload()
        assert not torch.allclose(plain(**inputs).logits, ours(**inputs).logits, rtol=1e-2, atol=1e-2)
    capsys.readouterr()
    answers = []
    for folder in (adapter, tmp_path / "whole"):
        assert main(["recommend", "--model", str(folder), *HISTORY, "--dtype", "float32", "--json"]) == 0
        answers.append([x["item_id"] for x in json.loads(capsys.readouterr().out)["recommendations"][0]])
    assert answers[0] == answers[1]
    assert main(["merge", "--model", str(adapter), "--output", str(tmp_path / "own"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"  # what the base model has
    saved = load_file(tmp_path / "own" / "model.safetensors")
    assert {value.dtype for name, value in saved.items() if not name.startswith("flr.")} == {torch.bfloat16}
    assert {value.dtype for name, value in saved.items() if name.startswith("flr.")} == {torch.float32}
    assert (tmp_path / "own" / "README.md").is_file()


def test_the_card_of_an_adapter_is_ours_and_keeps_what_others_wrote(adapter, base, tmp_path):
    """PEFT's own is a form to fill in, names the base model's folder and calls a merged model an adapter."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    card = (folder / "README.md").read_text()
    assert "More Information Needed" not in card
    assert "library_name: peft" not in card
    assert str(base) not in card
    (folder / "README.md").write_text(card + "\nmy words\n")
    options = ["--model", str(base), "--lora_rank", "2", "--max_steps", "2", "--num_factors", "2"]
    assert main(["sft", *DATA, *TRAINING, *options, "--output_dir", str(folder), "--overwrite_output_dir", "true"]) == 0
    assert "\nmy words\n" in (folder / "README.md").read_text()


def test_what_cannot_be_merged_is_refused(adapter, base, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, message in (
        ([str(base), "--output", str(tmp_path / "x")], "model: expected the folder of an adapter, with"),
        ([str(adapter), "--output", str(tmp_path / "full")], "output: expected a new or an empty folder, got"),
        ([str(adapter)], "output: expected a folder to write, got none"),
        ([str(adapter), "--output", "x", "--dtype", "int8"], "dtype: expected one of auto, float32"),
    ):
        assert main(["merge", *words]) == 1
        assert message in capsys.readouterr().err


def test_an_adapter_on_a_model_that_flr_trained(tmp_path, capsys, recwarn):
    """The base model is a patched one, whole; another adapter is trained on what was merged."""
    shape = ["--hidden_size", "16", "--intermediate_size", "16", "--num_factors", "2", "--max_steps", "1"]
    run, adapter, whole = (str(tmp_path / name) for name in ("run", "adapter", "whole"))
    assert main(["sft", *DATA, *TRAINING, *shape, "--output_dir", run]) == 0
    lora = ["--lora_rank", "2", "--lora_targets", "q_proj, v_proj", "--lora_dropout", "0.1", "--max_steps", "2"]
    assert main(["sft", *DATA, *TRAINING, "--model", run, *lora, "--output_dir", adapter]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    assert config["lora_dropout"] == 0.1
    assert main(["factors", "--models", adapter, *DATA]) == 1
    assert "got those of an adapter, which flr merge makes one model with its base" in capsys.readouterr().err
    assert main(["merge", adapter, "--output", whole]) == 0
    assert main(["evaluate", "--model", whole, *DATA, "--baselines", "false"]) == 0
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "flr.query"} <= changed
    assert "model.layers.0.mlp.up_proj.weight" not in changed
    assert not [w for w in recwarn if "is_gradient_checkpointing" in str(w.message)]  # PEFT's, of no use to a user


def test_full_training_of_a_bfloat16_checkpoint_moves_its_weights(base, tmp_path, capsys):
    """In the checkpoint's own dtype most steps would be rounded away."""
    rate = ["--learning_rate", "1e-5", "--max_steps", "3", "--lr_scheduler_type", "constant", "--num_factors", "2"]
    out = tmp_path / "out"
    assert main(["sft", *DATA, *TRAINING, *rate, "--model", str(base), "--output_dir", str(out)]) == 0
    assert "in float32" in capsys.readouterr().err
    old, new = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {value.dtype for value in new.values()} == {torch.float32}
    layers = [name for name in old if ".layers." in name]
    moved = [float((old[name].float() != new[name]).float().mean()) for name in layers]
    assert min(moved) > 0.9
    rounded = [float((old[name] != new[name].bfloat16()).float().mean()) for name in layers]
    assert max(rounded) < 0.5  # what the same steps would have left of themselves
