"""Every command takes a saved model alike: whole, of an older version, or an adapter; and keeps its card."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import flr
from flr.cli import main
from flr.cli.backbone import ModelOptions
from flr.cli.card import changed_settings
from flr.cli.options import AugmentOptions, DataOptions
from flr.data import RecProcessor
from flr.model.saved_config import MODEL_TYPE
from flr.train import SFTConfig

DATA = ["--planted_items", "40", "--planted_users", "60"]
TRAINING = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--num_train_epochs", "1"]
RL = ["--group_size", "2", "--per_device_train_batch_size", "16", "--max_steps", "1"]


def _result(capsys):
    """What ``--json`` wrote on standard output."""
    out = capsys.readouterr().out
    return json.loads(out[out.index("{\n") :])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that ``flr sft`` trained, with options that are not the defaults."""
    folder = tmp_path_factory.mktemp("run") / "someone" / "start"
    shape = ["--hidden_size", "16", "--intermediate_size", "16", "--num_factors", "2", "--anchor", "last"]
    prompts = ["--max_history", "5", "--views_weight", "0.25"]
    assert main(["sft", *DATA, *TRAINING, *shape, *prompts, "--output_dir", str(folder)]) == 0
    return folder


def test_sft_goes_on_with_thought_prompts_and_views(start, tmp_path, capsys):
    out = tmp_path / "on"
    arguments = ["sft", *DATA, *TRAINING, "--model", str(start), "--learning_rate", "0", "--output_dir", str(out)]
    assert main(arguments) == 0
    before, after = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)  # at rate 0 training leaves what it was given
    for name in (
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "catalogue.parquet",
    ):
        assert (start / name).read_bytes() == (out / name).read_bytes(), name
    for option, value, message in (
        ("num_factors", "3", "num_factors: expected 2, that of"),
        ("variant", "anchor", "variant: expected 'flr', that of"),
        ("codec", "title", "codec: expected 'id', that of"),
        ("max_history", "7", "max_history: expected 5, that of"),
        ("template", "a {history}", "template: expected"),
    ):
        assert main([*arguments, f"--{option}", value]) == 1
        assert message in capsys.readouterr().err
    again = tmp_path / "views"
    changed = ["--views_weight", "0.75", "--max_prompt_tokens", "4", "--freeze_backbone", "true"]
    assert main([*arguments[:-1], str(again), *changed]) == 0
    assert RecProcessor.from_pretrained(again).views.weight == 0.75
    assert RecProcessor.from_pretrained(again).max_prompt_tokens == 4
    assert main(["sft", "--planted_items", "41", *DATA[2:], *TRAINING, *arguments[-6:]]) == 1
    assert "expected the catalogue that" in capsys.readouterr().err


def test_every_command_takes_an_adapters_folder(start, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        flr.from_pretrained(start), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["flr"], r=2)
    )
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    RecProcessor.from_pretrained(start).save_pretrained(adapter)
    assert main(["evaluate", "--model", str(adapter), *DATA]) == 0
    capsys.readouterr()
    assert main(["recommend", "--model", str(adapter), "--history", "item_1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["recommendations"][0]) == 10
    assert main(["explain", "--model", str(adapter), "--history", "item_1", "--json"]) == 0
    capsys.readouterr()
    for command, extra in (("sft", []), ("rl", RL)):
        out = tmp_path / command
        rate = ["--learning_rate", "0.1"]
        assert main([command, *DATA, *TRAINING, *extra, *rate, "--model", str(adapter), "--output_dir", str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["model_type"] == MODEL_TYPE
        old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out))
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert any(".flr." in name for name in changed)
        assert any("lora_B" in name for name in changed) == (command == "sft")
        assert flr.Recommender.from_pretrained(out).variant == "flr"


def test_every_command_takes_an_id_on_the_hub(start, tmp_path, capsys, monkeypatch):
    asked = []
    download = lambda name, *, revision, **_: asked.append((name, revision)) or str(start)  # noqa: E731
    monkeypatch.setattr("flr.model.folder.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    card = (start / "README.md").read_bytes()
    there = ["--model", "user/name", "--revision", "v2"]
    assert main(["evaluate", *there, *DATA]) == 0
    assert (start / "README.md").read_bytes() == card  # that of a model on the Hub is its owner's
    for command in ("recommend", "explain"):
        assert main([command, *there, "--history", "item_1", "--json"]) == 0
    for command, extra in (("sft", ["--max_steps", "1"]), ("rl", RL)):
        assert main([command, *there, *DATA, *TRAINING, *extra, "--output_dir", command]) == 0
        assert ModelCard.load(tmp_path / command / "README.md").data.base_model == "user/name"
    pytest.importorskip("uvicorn")
    from flr.serve import server

    server.load(server.Settings(model="user/name", revision="v2"))
    assert set(asked) == {("user/name", "v2")}
    assert len(asked) >= 6


def test_the_card_of_a_trained_model(start, tmp_path):
    text, card = (start / "README.md").read_text(), ModelCard.load(start / "README.md")
    assert {result.dataset_split for result in card.data.eval_results} == {"valid"}
    for row in ("Data | planted", "Users | 60", "Item codec | id", "Variant of the thought | flr", "Factors K | 2",
                "Refinements T | 2", "num_factors | 2", "views_weight | 0.25"):  # fmt: skip
        assert f"| {row} |" in text, row
    assert "someone" not in text
    state = json.loads((start / "trainer_state.json").read_text())
    best = next(r for r in card.data.eval_results if r.metric_name == "ndcg@10")
    assert best.metric_value == state["best_metric"]
    low, high = best.metric_args["interval"]
    assert low < best.metric_value < high
    rl = tmp_path / "rl"
    assert main(["rl", *DATA, *TRAINING, *RL, "--model", str(start), "--output_dir", str(rl)]) == 0
    assert "`flr rl`" in (rl / "README.md").read_text()
    assert "someone" not in (rl / "README.md").read_text()
    assert main(["evaluate", *DATA, "--model", str(rl), "--split", "test"]) == 0
    assert {r.dataset_split for r in ModelCard.load(rl / "README.md").data.eval_results} == {"test", "valid"}
    again = ["--model", str(start), "--output_dir", str(rl), "--overwrite_output_dir", "true", "--seed", "5"]
    assert main(["rl", *DATA, *TRAINING, *RL, *again]) == 0
    assert {r.dataset_split for r in ModelCard.load(rl / "README.md").data.eval_results} == {
        "valid"
    }  # of these weights


def test_evaluate_brings_the_metrics_up_to_date(start, tmp_path, capsys):
    folder = tmp_path / "copy"
    recommender = flr.Recommender.from_pretrained(start)
    recommender.model.save_pretrained(folder)
    recommender.processor.save_pretrained(folder)
    assert main(["evaluate", "--model", str(folder), *DATA, "--card", "false"]) == 0
    assert not (folder / "README.md").exists()
    capsys.readouterr()
    assert main(["evaluate", "--model", str(folder), *DATA, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["flr"]["metrics"]["item"]
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {r.metric_name: r.metric_value for r in results}.items() <= report.items()
    assert {r.dataset_split for r in results} == {"test"}
    with (folder / "README.md").open("a") as stream:
        stream.write("by hand\n")
    assert main(["evaluate", "--model", str(folder), *DATA, "--split", "valid"]) == 0
    text = (folder / "README.md").read_text()
    assert "by hand" in text
    assert {r.dataset_split for r in ModelCard.load(folder / "README.md").data.eval_results} == {"test", "valid"}
    (folder / "README.md").write_text("---\na: [\n---\n")
    assert main(["evaluate", "--model", str(folder), *DATA]) == 0  # what was computed is worth more than its card
    assert "the model card stays as it is" in capsys.readouterr().err


def test_the_card_has_figures_of_the_saved_answers_alone(start, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    evaluation = ["evaluate", "--model", str(folder), *DATA, "--baselines", "false"]
    assert main(evaluation) == 0
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {r.dataset_split for r in results} == {"valid", "test"}
    assert results[0].dataset_args.items() >= {"views_weight": 0.25, "views_decay": 0.6, "neighbours_weight": 0}.items()
    text = (folder / "README.md").read_text()
    assert "views_weight 0.25" in text
    for option, value in (("views_weight", "0.9"), ("neighbours_weight", "0"), ("max_prompt_tokens", "5")):
        capsys.readouterr()
        assert main([*evaluation, f"--{option}", value]) == 0
        same = option == "neighbours_weight"  # has no table, and these views are the saved ones
        assert ("The model card stays as it is" in capsys.readouterr().err) != same
        assert (folder / "README.md").read_text() == text
    for command in ("views", "neighbours"):
        assert main([command, *DATA, "--model", str(folder), "--weights", "0.5", "--dry_run"]) == 0
        assert (folder / "README.md").read_text() == text
    views = ["views", *DATA, "--model", str(folder), "--weights"]
    assert main([*views, "0.25"]) == 0
    assert (folder / "README.md").read_text() == text, "answers are as before"
    capsys.readouterr()
    assert main([*views, "0.5"]) == 0
    assert "The model card has no metrics any more" in capsys.readouterr().err
    assert not ModelCard.load(folder / "README.md").data.eval_results
    assert "views_weight 0.25" not in (folder / "README.md").read_text()
    assert main(evaluation) == 0
    assert "views_weight 0.5" in (folder / "README.md").read_text()
    assert main(["neighbours", *DATA, "--model", str(folder), "--weights", "0.5"]) == 0
    assert not ModelCard.load(folder / "README.md").data.eval_results


def test_settings_leave_out_paths_and_names(tmp_path):
    data, args = (
        DataOptions(data=str(tmp_path), max_history=3),
        SFTConfig(output_dir=str(tmp_path), run_name="me", seed=7),
    )
    model = ModelOptions(model=str(tmp_path), tie_word_embeddings=False)
    found = changed_settings((data, AugmentOptions(), model, args))
    assert found.items() >= {"max_history": 3, "tie_word_embeddings": False, "seed": 7}.items()
    assert not {"data", "model", "output_dir", "run_name"} & set(found)
    assert str(tmp_path) not in str(found)


def test_neighbours_are_written_into_the_folder_and_every_command_uses_them(start, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    arguments = ["neighbours", *DATA, "--model", str(folder), "--weights", "0,0.3,1", "--json"]
    assert main([*arguments, "--dry_run"]) == 0
    fit = _result(capsys)
    assert not (folder / "item_knn.safetensors").exists()
    assert main(arguments) == 0
    assert (folder / "item_knn.safetensors").exists()
    views = RecProcessor.from_pretrained(folder).views
    assert (views.weight, views.neighbours) == (0.25, fit["best"])
    tried = {method: max(one["metrics"]["ndcg@10"]) for method, one in fit["methods"].items()}
    assert set(tried) == {"item-knn", "linear"}
    assert fit["method"] == max(tried, key=tried.__getitem__)
    capsys.readouterr()
    evaluation = ["evaluate", *DATA, "--model", str(folder), "--split", "valid", "--json", "--baselines", "false"]
    for weight, expected in zip(fit["weights"], fit["metrics"]["ndcg@10"], strict=True):
        assert main([*evaluation, "--neighbours_weight", str(weight)]) == 0
        result = next(iter(_result(capsys).values()))
        assert result["metrics"]["item"]["ndcg@10"] == pytest.approx(expected, abs=1e-6)
    assert main([*evaluation, "--max_users", "7"]) == 0
    result = next(iter(_result(capsys).values()))
    assert result["settings"]["views"]["neighbours"] == fit["best"]
    assert main(["recommend", "--model", str(folder), "--history", "item_1", "item_2", "--k", "3"]) == 0
    bad = (("weights", "0,2"), ("max_users", "0"), ("top", "0"), ("model", str(tmp_path / "none")), ("method", "x"))
    for option, value in bad:
        assert main([*arguments, f"--{option}", value]) == 1
        assert f"{option}: expected" in capsys.readouterr().err


def test_the_weight_of_views_is_written_into_the_folder(start, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    before = RecProcessor.from_pretrained(folder).views
    arguments = ["views", *DATA, "--model", str(folder), "--weights", "0.2,0.3,1", "--json"]
    assert main([*arguments, "--dry_run"]) == 0
    fit = _result(capsys)
    assert fit["decay"] == before.decay
    assert RecProcessor.from_pretrained(folder).views == before
    assert main([*arguments, "--views_decay", "0.9"]) == 0
    fit = _result(capsys)
    assert fit["decay"] == 0.9
    assert RecProcessor.from_pretrained(folder).views == replace(before, weight=fit["best"], decay=0.9)
    assert main([*arguments, "--views_decay", "0.6", "--dry_run", "--max_users", "7"]) == 0
    few = _result(capsys)
    assert (few["decay"], few["rows"]) == (0.6, 7)
    evaluation = ["evaluate", *DATA, "--model", str(folder), "--split", "valid", "--json", "--baselines", "false"]
    assert main(evaluation) == 0
    result = next(iter(_result(capsys).values()))
    assert result["metrics"]["item"]["ndcg@10"] == pytest.approx(max(fit["metrics"]["ndcg@10"]), abs=1e-6)
    assert main(["views", *DATA, "--model", str(folder), "--weights", "0"]) == 0
    assert RecProcessor.from_pretrained(folder).views is None
    capsys.readouterr()
    for option, value in (("weights", "0,2"), ("batch_size", "0"), ("model", "none"), ("views_weight", "0.5")):
        assert main([*arguments, f"--{option}", value]) == 1
        assert f"{option}: expected" in capsys.readouterr().err


def test_a_report_has_no_figures_of_what_a_folder_answered_before(start, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    (folder / "notes.json").write_text("{}")  # is not read with the model
    test = ["evaluate", *DATA, "--model", str(folder), "--output", str(folder / "test"), "--baselines", "false"]
    for changed, shown in (
        ([], {"valid", "test"}),
        (["views", *DATA, "--model", str(folder), "--weights", "0"], set()),
    ):
        assert main(changed or test) == 0
        capsys.readouterr()
        assert main(["report", str(folder), "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["runs"][0]["evaluations"].keys() == shown
        notes = " ".join(told.err.split())
        for split in ("valid", "test"):
            assert (f"--split {split} --output {folder / split}" in notes) == (split not in shown)
    assert main(test) == main(["report", str(folder)]) == 0
    assert f"Again: flr evaluate --model {folder} --split valid" in " ".join(capsys.readouterr().err.split())
    assert "test split" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("method", "decay"), [("item-knn", 0.6), ("linear", 0.8)])
def test_neighbours_of_one_method(start, tmp_path, capsys, method, decay):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    arguments = ["neighbours", *DATA, "--model", str(folder), "--weights", "0.5", "--method", method, "--json"]
    assert main(arguments) == 0
    assert set(_result(capsys)["methods"]) == {method}
    table = RecProcessor.from_pretrained(folder).item_knn
    assert table.history_decay == decay
    assert (table.similarity.data.min() < 0) == (method == "linear")


def test_a_large_catalogue_is_not_solved_for(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flr.data.MOST_LINEAR_ITEMS", 10)
    arguments = ["neighbours", *DATA, "--model", str(start), "--weights", "0.5", "--dry_run", "--json"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "Item-kNN alone is tried" in output.out + output.err
    assert '"linear"' not in output.out


def test_evaluation_shows_the_linear_model(start, capsys, monkeypatch):
    options = ["--max_users", "9", "--linear", "--card", "false", "--json"]
    assert main(["evaluate", *DATA, "--model", str(start), *options]) == 0
    assert set(_result(capsys)) == {"flr", "popularity", "item-kNN", "linear"}
    monkeypatch.setattr("flr.data.MOST_LINEAR_ITEMS", 10)
    assert main(["evaluate", *DATA, "--model", str(start), *options]) == 1
    assert "linear: expected False with more than 10 items" in capsys.readouterr().err


def test_robustness_writes_what_it_measured(start, tmp_path, capsys):
    arguments = ["robustness", *DATA, "--models", f"first={start}", "--kinds", "drop,poison", "--severities", "0.5"]
    assert main([*arguments, "--output", str(tmp_path), "--json"]) == 0
    found = _result(capsys)["measurements"]
    assert found == json.loads((tmp_path / "robustness.json").read_text())["measurements"]
    assert {row["ranker"] for row in found} == {"first", "item-kNN"}
    assert {row["kind"] for row in found} >= {"clean", "drop", "poison"}
    assert (tmp_path / "robustness.png").stat().st_size > 5000
    bad = [("kinds", "burn"), ("severities", "0,0.5"), ("models", "a=x,a=y"), ("split", "train"), ("max_users", "0")]
    for option, value in bad:
        assert main([*arguments, "--output", str(tmp_path), f"--{option}", value]) in (1, 2)
        assert f"{option}: expected" in capsys.readouterr().err


_OTHERS = [
    ("max_history", "2", "expected 5"),
    ("codec", "sid", "expected 'id'"),
    ("template", "After {history}:", "expected '"),
    ("max_title_tokens", "3", "expected None"),
    ("vocab_size", "300", "expected 4"),
]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("evaluate", [*_OTHERS, ("views_decay", "0.1", "expected a views_weight beside it, got 0.1 alone")]),
        ("robustness", [*_OTHERS[:2], ("views_decay", "0.1", "expected a views_weight")]),
        ("factors", [*_OTHERS[:2], ("views_weight", "0.5", "expected none")]),
        ("neighbours", [*_OTHERS[:2], ("views_decay", "0.1", "expected a views_weight")]),
        ("views", _OTHERS[:2]),
        ("rl", [*_OTHERS[:2], ("views_decay", "0.1", "expected a views_weight")]),
        ("sft", [*_OTHERS, ("views_decay", "0.1", "expected a views_weight")]),
    ],
)  # fmt: skip
def test_an_option_that_the_model_would_not_follow_is_refused(start, tmp_path, capsys, command, options):
    name = "--models" if command in ("robustness", "factors") else "--model"
    line = [command, *DATA, name, str(start)]
    line += [*TRAINING, "--output_dir", str(tmp_path)] if command in ("rl", "sft") else []
    for option, value, expected in options:
        capsys.readouterr()
        assert main([*line, f"--{option}", value]) == 1
        assert f"{option}: {expected}" in capsys.readouterr().err


def test_options_that_the_model_says_too_are_taken(start, capsys):
    same = ["--max_history", "5", "--codec", "id", "--template", RecProcessor.from_pretrained(start).template.text]
    assert main(["evaluate", *DATA, "--model", str(start), "--max_users", "9", "--card", "false", *same]) == 0
