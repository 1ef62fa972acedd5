"""Checkpoints are whole or left out, of this run or refused; a run ends where it should, however often it is cut."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flr
from flr.cli import main
from flr.data import Interactions, RecProcessor, Teacher
from flr.train.run_folder import begin, checkpoints, last_complete_checkpoint, newest_whole, rotate
from flr.train.settings import differences, of_augment
from tests.helpers.catalogues import DATA
from tests.helpers.kills import bound_files, in_child, kill_at, killed_inside
from tests.helpers.models import trainable
from tests.helpers.training import grpo_trainer, sft_trainer

STEPS = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, "max_steps": 5, "learning_rate": 1e-3}


def job(folder, codec="id", rows=None, **options):
    config = {name: options.pop(name) for name in ("num_factors",) if name in options}
    model, processor = trainable(codec, **config)
    return sft_trainer(folder, model, processor, train=rows, **{**STEPS, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of five steps with checkpoints at 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("run")
    job(folder).train()
    return folder


def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_newest_checkpoint_is_whole(run):
    assert [p.name for p in checkpoints(run)] == ["checkpoint-5", "checkpoint-4", "checkpoint-2"]
    assert newest_whole(run) == (run / "checkpoint-5", [])
    assert not list(run.rglob("training_args.bin"))
    assert not list(run.glob(".saving"))


def test_damage_to_any_file_of_a_checkpoint_is_found(run, tmp_path):
    names = [p.name for p in (run / "checkpoint-5").iterdir()]
    assert {"manifest.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"} < set(names)
    for name in names:
        for damage in ("missing", "cut", "flipped"):
            if (name, damage) == ("manifest.json", "flipped"):
                continue  # below: a bit of a digest, which then differs, or of the form, which is no JSON
            folder = copy(run, tmp_path)
            file = folder / "checkpoint-5" / name
            content = bytearray(file.read_bytes())
            if damage == "flipped":
                content[len(content) // 2] ^= 4
            file.unlink()
            if damage != "missing":
                file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
            whole, faults = newest_whole(folder)
            assert whole == folder / "checkpoint-4", (name, damage)
            assert len(faults) == 1
            assert name in faults[0]
            assert "checkpoint-5 is left out" in faults[0]
            shutil.rmtree(folder)


def test_a_flipped_bit_of_the_manifest_is_found_or_harmless(run, tmp_path):
    folder = copy(run, tmp_path)
    file = folder / "checkpoint-5" / "manifest.json"
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        newest_whole(folder)  # whole, or named: no other error


def test_a_broken_best_checkpoint_is_not_ended_with(tmp_path):
    """What is whole itself but would end with weights that are damaged cannot be continued from."""
    job(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2).train()
    place = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(place) != tmp_path / "checkpoint-5"
    file = Path(place) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    whole, faults = newest_whole(tmp_path)
    assert whole is None
    assert "checkpoint-5 is left out" in faults[0]
    assert str(file) in faults[0]


def test_without_the_optimizer_a_checkpoint_is_not_resumed_from(tmp_path):
    job(tmp_path, save_only_model=True).train()
    whole, faults = newest_whole(tmp_path)
    assert whole is None
    assert "checkpoint-5: expected its scheduler" in faults[0]


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_run_ends_at_the_same_weights_from_any_checkpoint(run, tmp_path, step):
    """From the last one, which leaves no step, too; ``Trainer`` would take one more."""
    train = job(tmp_path)
    train.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    assert train.state.global_step == 5
    train.save_model()
    assert same(weights(tmp_path), weights(run / "checkpoint-5"))
    assert same(weights(tmp_path), {n: p for n, p in train.model.state_dict().items() if n in weights(tmp_path)})


def test_a_run_in_the_middle_of_an_epoch_is_not_trained_past_its_end(run, tmp_path):
    folder = copy(run, tmp_path)
    for _ in range(2):
        train = job(folder)
        train.train(resume_from_checkpoint=True)
        assert train.state.global_step == 5
    assert checkpoints(folder)[0].name == "checkpoint-5"


OTHERS = {
    "learning_rate": {"learning_rate": 2e-3},
    "seed": {"seed": 7},
    "per_device_train_batch_size": {"per_device_train_batch_size": 16},
    "max_steps": {"max_steps": 6},
    "model.flr.num_factors": {"num_factors": 2},
    "scoring": {"normalisation": "catalogue"},
    "codec": {"codec": "sid"},
    "data.train": {"rows": DATA.train.select(list(range(len(DATA.train) - 1)))},
    "warmup_steps": {"warmup_steps": 2},
    "augment_drop_item": {},
    "model.weights": {},
    "processes": {},
}


def test_a_teacher_is_told_apart_by_what_its_answers_follow_from():
    def made(rows=DATA.train, **options):
        return of_augment(flr.data.Augment(teacher=Teacher.fit(rows, len(DATA.catalogue), "item-knn", **options)))

    assert made() == made()
    other_bits = Teacher.fit(DATA.train, len(DATA.catalogue), "item-knn")
    other_bits.left_out.table.similarity.data *= 1 + 1e-6  # as another processor may add
    assert of_augment(flr.data.Augment(teacher=other_bits)) == made()
    fewer = DATA.train.select(list(range(len(DATA.train) - 1)))
    linear = of_augment(flr.data.Augment(teacher=Teacher.fit(DATA.train, len(DATA.catalogue), "linear")))
    alone = Interactions([str(n) for n in range(len(DATA.train))], DATA.train.histories, DATA.train.targets)
    others = [linear, made(weight=0.6), made(temperature=1.0), made(top=3), made(fewer), of_augment(flr.data.Augment())]
    others.append(made(alone))
    for other in others:
        (difference,) = differences(made(), other)
        assert difference.startswith("augment_teacher was ")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("resume", [True, False, "path"])
def test_another_run_is_refused_by_what_differs(run, tmp_path, name, resume):
    folder = copy(run, tmp_path)
    if name == "augment_drop_item":
        train = sft_trainer(folder, *trainable(), flr.data.Augment(drop_item=0.1), **STEPS)
    else:
        train = job(folder, **OTHERS[name])
    if name == "model.weights":
        model, processor = trainable()
        with torch.no_grad():
            model.flr.output.mul_(1.001)
        train = sft_trainer(folder, model, processor, **STEPS)
    if name == "processes":
        train.settings["processes"] = 2
    with pytest.raises(ValueError, match=rf"output_dir: expected the run that .*checkpoint-5 is of, .*{name} was "):
        train.train(resume_from_checkpoint=str(folder / "checkpoint-5") if resume == "path" else resume)
    assert same(weights(folder / "checkpoint-5"), weights(run / "checkpoint-5"))


def test_what_a_run_reports_or_where_it_lies_does_not_matter(run, tmp_path):
    folder = copy(run, tmp_path)
    train = job(folder, logging_steps=1, save_total_limit=7, dataloader_num_workers=1)
    train.train(resume_from_checkpoint=True)
    assert train.state.global_step == 5


def test_overwriting_deletes_the_other_run_and_nothing_else(run, tmp_path):
    folder = copy(run, tmp_path)
    (folder / "notes.txt").write_text("mine")
    job(folder).save_model()
    train = job(folder, seed=8, overwrite_output_dir=True, max_steps=2)
    train.train()
    assert sorted(os.listdir(folder)) == [".lock", "checkpoint-2", "notes.txt"]
    assert begin(folder, train.settings, None, False).checkpoint == str(folder / "checkpoint-2")


def test_where_a_run_begins(run, tmp_path):
    folder, settings = copy(run, tmp_path), job(tmp_path / "other").settings
    newest = str(folder / "checkpoint-5")
    assert begin(folder, settings, None, False).checkpoint == newest
    assert begin(folder, settings, "auto", False).checkpoint == newest
    assert begin(folder, settings, "True", False).checkpoint == newest
    assert begin(folder, settings, "none", False).checkpoint is None
    assert begin(folder, settings, False, False).checkpoint is None
    assert begin(folder, settings, str(folder / "checkpoint-2"), False).checkpoint == str(folder / "checkpoint-2")
    assert begin(tmp_path / "empty", settings, None, False).checkpoint is None
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected a whole checkpoint"):
        begin(tmp_path / "empty", settings, True, False)
    with pytest.raises(ValueError, match=r"absent/manifest.json, got none"):
        begin(folder, settings, str(folder / "absent"), False)
    shutil.rmtree(folder / "checkpoint-5" / "manifest.json", ignore_errors=True)
    os.unlink(folder / "checkpoint-5" / "manifest.json")
    start = begin(folder, settings, None, False)
    assert start.checkpoint == str(folder / "checkpoint-4")
    assert len(start.notices) == 1


def test_a_moved_run_ends_with_its_best(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "mrr"}
    job(tmp_path / "here", **best, greater_is_better=False).train()
    os.rename(tmp_path / "here", tmp_path / "there")
    train = job(tmp_path / "there", **best, greater_is_better=False)
    train.train(resume_from_checkpoint=True)
    assert Path(train.state.best_model_checkpoint).parent == tmp_path / "there"
    loaded = {name: tensor for name, tensor in train.model.state_dict().items() if not name.startswith("lm_head")}
    assert same(loaded, weights(train.state.best_model_checkpoint))


def test_rotation_keeps_what_is_needed(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-final").mkdir()  # not ours
    rotate(tmp_path, None, {"checkpoint-6"})
    assert len(checkpoints(tmp_path)) == 4
    rotate(tmp_path, 2, {"checkpoint-6", "checkpoint-2"})  # 8 is of a future that did not happen
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-2"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-6", "checkpoint-final"]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    class Slow(flr.train.SFTTrainer):
        def training_step(self, *args):
            self.stay()

    def first(stay):
        model, processor = trainable()
        args = sft_trainer(tmp_path, model, processor, **STEPS).args
        train = Slow(model, args, processor, DATA.train)
        train.stay = stay
        train.train()

    def second(child):
        with pytest.raises(ValueError, match=f"no other run writes to, got {tmp_path}, which process {child} on"):
            job(tmp_path).train()

    assert killed_inside(first, second) == -signal.SIGKILL
    job(tmp_path).train()


def test_a_save_that_is_killed_anywhere_leaves_the_old_the_new_or_nothing(tmp_path):
    """The old folder has another catalogue codec, thought and shards; a reader takes model and processor together."""
    old_model, old_processor = trainable("sid", num_thoughts=2)
    old_model.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    old_processor.save_pretrained(tmp_path / "old")
    assert len(list((tmp_path / "old").glob("*.safetensors"))) > 1
    new_model, new_processor = trainable("id")
    train = sft_trainer(tmp_path / "trainer", new_model, new_processor)
    seen, status, number = [], 1, 0
    while status != 0:
        number += 1
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / str(number)))

        def save(folder=folder, number=number):
            kill_at(number, folder)
            train.save_model(str(folder))

        status = in_child(save)
        assert status in (0, -signal.SIGKILL)
        try:
            model, processor = flr.from_pretrained(folder), RecProcessor.from_pretrained(folder)
        except (ValueError, OSError):
            seen.append("refused")
            continue
        is_new = processor.codec == "id"
        assert processor.num_thoughts == model.config.flr["num_thoughts"] == (1 if is_new else 2)
        state = (new_model if is_new else old_model).state_dict()
        assert same(model.state_dict(), state)
        seen.append("new" if is_new else "old")
    assert len(seen) > 15
    assert re.fullmatch("(old )+(refused )+(new )+", " ".join(seen) + " "), seen
    assert not (folder / ".saving").exists()


def test_a_checkpoint_that_is_killed_anywhere_is_resumed_before_or_after(run, tmp_path):
    """Some of the operations on files; the chaos run draws them at random."""
    status, number = 1, 3
    while status != 0:
        folder = tmp_path / str(number)

        def go(folder=folder, number=number):
            kill_at(number, folder)
            job(folder).train()

        status = in_child(go)
        assert status in (0, -signal.SIGKILL)
        assert newest_whole(folder)[1] == []  # nothing torn is called a checkpoint
        train = job(folder)
        train.train(resume_from_checkpoint="auto")
        assert train.state.global_step == 5
        assert same(weights(folder / "checkpoint-5"), weights(run / "checkpoint-5"))
        shutil.rmtree(folder)
        number += 31


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("missing", [1, 700])
def test_a_full_disk_is_one_line_and_leaves_checkpoints_whole(run, tmp_path, file, missing, capfd):
    """No file may be larger than this one less some bytes, and this one is not the only one that fails then."""
    folder = copy(run, tmp_path)
    size = (folder / "checkpoint-5" / file).stat().st_size - missing
    shutil.rmtree(folder / "checkpoint-5")

    def go():
        bound_files(size)
        job(folder).train(resume_from_checkpoint=True)

    assert in_child(go) == 70
    message = capfd.readouterr().err.strip().split("\n")[-1]
    assert re.match(rf"OSError: {folder}/checkpoint-5: expected to write it whole, got .*", message), message
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    assert not list(folder.glob(".saving"))


SMALL = [
    "sft", "--planted_items", "40", "--planted_users", "60", "--hidden_size", "16", "--intermediate_size", "16",
    "--num_attention_heads", "2", "--use_cpu", "true", "--report_to", "none", "--max_steps", "3", "--eval_strategy",
    "no", "--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "false",
]  # fmt: skip


def test_the_command_line_runs_once_and_refuses_another_run(tmp_path, capsys):
    folder = ["--output_dir", str(tmp_path / "run")]
    assert main([*SMALL, *folder]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    capsys.readouterr()
    assert main([*SMALL, *folder, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 3
    assert "3 steps; nothing to do" in " ".join(err.split())
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert main([*SMALL, *folder, "--learning_rate", "0.1"]) == 1
    assert "learning_rate was 5e-05 and is 0.1" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert main([*SMALL, *folder, "--learning_rate", "0.1", "--overwrite_output_dir", "true"]) == 0
    assert not same(weights(tmp_path / "run"), {})


def test_another_model_under_rl_is_refused(tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    grpo_trainer(tmp_path, **steps).train()
    model, processor = trainable()
    with torch.no_grad():
        model.flr.output.mul_(2)
    with pytest.raises(ValueError, match=r"model\.weights was "):
        grpo_trainer(tmp_path, model=model, processor=processor, **steps).train(resume_from_checkpoint=True)
