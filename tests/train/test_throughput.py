"""Padding and tokens a second: in the log beside the loss, and of the whole training."""

import numpy as np
import pytest
import torch

from flr.train.throughput import COUNTS
from tests.helpers.models import trainable
from tests.helpers.training import grpo_trainer, sft_trainer

MAKE = {
    "sft": lambda folder, **options: sft_trainer(folder, *trainable("title"), **options),
    "rl": lambda folder, **options: grpo_trainer(folder, "title", **options),
}
BASE = {"seed": 3, "max_steps": 4, "logging_steps": 2, "include_num_input_tokens_seen": "non_padding"}


@pytest.mark.parametrize("make", MAKE)
def test_the_log_has_the_share_and_the_rate_of_its_steps(tmp_path, make):
    train = MAKE[make](tmp_path, **BASE, gradient_accumulation_steps=2)
    seen = []
    collate = train.data_collator
    train.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    output = train.train()
    lines = [line for line in train.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    counts = np.array([(int(b["attention_mask"].sum()), b["attention_mask"].numel()) for b in seen[:8]])
    for line, part in zip(lines, (counts[:4], counts[4:]), strict=True):
        assert line["padding"] == pytest.approx(1 - part[:, 0].sum() / part[:, 1].sum(), abs=1e-4)
        assert 0 < line["padding"] < 1
    # transformers' own count, which looks at the device's mask
    assert train.state.num_input_tokens_seen == counts[:, 0].sum()
    assert output.metrics["padding"] == pytest.approx(1 - counts[:, 0].sum() / counts[:, 1].sum(), abs=1e-4)
    rate = output.metrics["tokens_per_second"]
    assert counts[:, 0].sum() / output.metrics["train_runtime"] < rate, "the steps alone take less than the whole"
    assert min(line["tokens_per_second"] for line in lines) <= rate <= max(line["tokens_per_second"] for line in lines)


def test_time_beside_the_steps_does_not_count(tmp_path, monkeypatch):
    """A clock that goes a second on at every look: a step takes one from its batches to its end."""
    ticks = iter(range(10**6))
    train = MAKE["sft"](tmp_path, **BASE | {"logging_steps": 1}, eval_strategy="steps", eval_steps=1)
    monkeypatch.setattr("flr.train.throughput.time.perf_counter", lambda: float(next(ticks)))
    train.train()
    before = 0
    for line in train.state.log_history:
        if "loss" in line:
            assert line["tokens_per_second"] == line["num_input_tokens_seen"] - before
            before = line["num_input_tokens_seen"]


def test_counts_are_numbers_on_the_host(tmp_path):
    batch = next(iter(MAKE["sft"](tmp_path).get_train_dataloader()))
    assert all(type(number) is int for number in batch[COUNTS])
    assert batch[COUNTS] == (int(batch["attention_mask"].sum()), batch["attention_mask"].numel())


@pytest.mark.parametrize("make", MAKE)
def test_batches_of_similar_length_hold_less_padding(tmp_path, make):
    def padding(strategy):
        options = {"max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": strategy}
        return MAKE[make](tmp_path, **{**BASE, **options}, per_device_train_batch_size=8).train().metrics["padding"]

    assert padding("group_by_length") < 0.5 * padding("random")


@pytest.mark.parametrize("make", MAKE)
def test_a_run_that_goes_on_has_the_same_batches(tmp_path, make):
    """Killed in its second epoch, and continued to the weights of the whole run."""
    options = {
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 16,
        "save_strategy": "steps",
    }
    rows = len(MAKE[make](tmp_path).train_dataset)
    save = rows // 16 + 3
    options |= {"max_steps": save + 4, "save_steps": save, "save_total_limit": 9, "learning_rate": 1e-2}
    whole = MAKE[make](tmp_path / "run", **{**BASE, **options})
    whole.train()
    again = MAKE[make](tmp_path / "run", **{**BASE, **options})
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{save}"))
    assert again.state.global_step == save + 4
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_repeated_groups_stay_whole(tmp_path):
    """Reinforcement repeats a step's batch, whose rows are alike, and groups them by the rows of all micro-batches."""
    options = {"train_sampling_strategy": "group_by_length", "num_iterations": 2, "gradient_accumulation_steps": 2}
    train = MAKE["rl"](tmp_path, **options, per_device_train_batch_size=4)
    rows = list(train._get_train_sampler())
    blocks = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    assert all(a == b for a, b in zip(blocks[::2], blocks[1::2], strict=True))
    lengths = train.processor.prompt_lengths(train.train_dataset.interactions.histories)
    widths = [np.ptp(lengths[[row for _, row in block[:4]]]) for block in blocks]
    assert np.mean(widths) < 0.3 * np.ptp(lengths)


def test_log_likelihoods_come_back_in_the_rows_order(tmp_path):
    train = MAKE["rl"](tmp_path)
    whole = train.target_logprobs(train.valid)
    train.args.per_device_eval_batch_size = 1
    alone = [train.target_logprobs(train.valid.select([row]))[0] for row in range(5)]
    np.testing.assert_allclose(whole[:5], alone, rtol=1e-4)
