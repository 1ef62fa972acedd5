"""A user's own script, before and after the one line: ``flr.patch_model(model)``.

The scripts know nothing of thoughts: prompts, collator, trainer and decoding are as anybody has them.
"""

import inspect

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import flr
from tests.helpers.models import tiny_llama, tiny_model

WORDS = ["red", "green", "blue", "cup", "plate", "bowl", "likes", "then"]
#: What comes next in a history: a colour decides the dish. Easy to learn, and the same for every script.
ROWS = [
    {"prompt": f"ann likes {a} then {b}", "completion": f" {dish}"}
    for a in WORDS[:3]
    for b in WORDS[:3]
    for dish in [WORDS[3 + WORDS.index(b)]]
]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "ann", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model_for(tokenizer, one_line, **options):
    torch.manual_seed(0)
    model = tiny_llama(len(tokenizer), num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return flr.patch_model(model, **options) if one_line else model


def arguments(cls, folder, **options):
    shared = {"max_steps": 60, "per_device_train_batch_size": 9, "learning_rate": 0.02, "report_to": "none"}
    shared |= {"logging_steps": 5, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return cls(output_dir=str(folder), **shared, **options)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_transformers(model, tokenizer, folder):
    """The script of the transformers documentation: tokens, labels, a padding collator, Trainer."""
    rows = []
    for row in ROWS:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"] + [2]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model, arguments(TrainingArguments, folder), train_dataset=rows, data_collator=collator)
    trainer.train()
    return trainer


def with_trl(model, tokenizer, folder, **options):
    """The script of the TRL documentation: a data set of prompts and completions, SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model,
        args=arguments(SFTConfig, folder, **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def answers(model, tokenizer):
    """Batched generation as anybody writes it, with padding on the left."""
    tokenizer.padding_side = "left"
    prompts = [row["prompt"] for row in ROWS] + ["likes red"]  # of two lengths
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = model.eval().generate(**inputs, max_new_tokens=2, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)[: len(ROWS)]


@pytest.mark.parametrize("script", [with_transformers, with_trl])
@pytest.mark.parametrize("one_line", [False, True], ids=["before", "after"])
def test_a_script_trains_and_answers(script, one_line, tokenizer, tmp_path):
    model = model_for(tokenizer, one_line)
    start = None if not one_line else {k: v.clone() for k, v in model.flr.state_dict().items()}
    trainer = script(model, tokenizer, tmp_path)
    assert losses(trainer)[-1] < 0.1 * losses(trainer)[0]
    expected = [row["completion"].strip() for row in ROWS]
    assert answers(model, tokenizer) == expected
    if one_line:
        moved = {k for k, v in model.flr.state_dict().items() if not torch.equal(v, start[k])}
        assert {"output", "query"} <= {k.split(".")[0] for k in moved}
        row = torch.tensor([tokenizer(ROWS[0]["prompt"])["input_ids"]])
        assert model(row).flr is not None
    served = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    said = served(ROWS[4]["prompt"], max_new_tokens=1, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"].strip() == expected[4]


@pytest.mark.parametrize("one_line", [False, True], ids=["before", "after"])
def test_columns_that_the_model_does_not_take_are_left_out_as_before(one_line, tokenizer, tmp_path):
    from datasets import Dataset

    prompt, answer = tokenizer(ROWS[0]["prompt"])["input_ids"], tokenizer(ROWS[0]["completion"])["input_ids"]
    row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    rows = Dataset.from_list([{**row, "group": 3, "user": "ann", "thoughts": 1, "targets": 2}] * 4)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    model = model_for(tokenizer, one_line)
    assert Trainer(model, args, train_dataset=rows, data_collator=collator).train().training_loss > 0


def test_a_thought_takes_part_in_the_answer(tokenizer, tmp_path):
    """Trained by the script, the factors' sum is what the answers hang on: without it they are worse."""
    model = model_for(tokenizer, True, init_scale=0.3)
    with_transformers(model, tokenizer, tmp_path)
    inputs = tokenizer([row["prompt"] + row["completion"] for row in ROWS], return_tensors="pt")["input_ids"]
    labels = inputs.clone()
    labels[:, :-1] = -100
    model.eval()
    with torch.no_grad():
        whole = model(input_ids=inputs, labels=labels)
        without = model(input_ids=inputs, labels=labels, insert_thought=False)
    assert whole.flr.thought.abs().max() > 0
    assert without.loss > whole.loss
    assert whole.logits.shape == (*inputs.shape, len(tokenizer) + 1)


def test_trl_with_lora_trains_the_reasoner_or_says_that_it_does_not(tokenizer, tmp_path, caplog):
    from peft import LoraConfig

    for names, frozen in (({"modules_to_save": ["flr"]}, False), ({}, True)):
        model = model_for(tokenizer, True)
        caplog.clear()
        flr.model.backbone.warn_once.cache_clear()
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", **names)
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model,
            args=arguments(SFTConfig, tmp_path),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
        assert ("the reasoner is frozen" in caplog.text) == frozen


def test_trl_s_packing_is_refused(tokenizer, tmp_path):
    model = model_for(tokenizer, True)
    with pytest.raises(ValueError, match="packed"):
        with_trl(model, tokenizer, tmp_path, packing=True, max_length=32, padding_free=True)


def test_prefix_tuning_says_that_there_would_be_no_thought():
    """PEFT fills the cache before the prompt, whose states nobody has then."""
    peft = pytest.importorskip("peft")
    lm = flr.patch_model(tiny_model())
    model = peft.get_peft_model(lm, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[-100, -100, 7, 8]])}
    with pytest.raises(ValueError, match="past_key_values: expected no tokens in the cache in training"):
        model(**batch)
    assert model(**batch, insert_thought=False).loss.isfinite()


def test_columns_of_the_model_s_own_inputs_reach_it(tokenizer, tmp_path):
    """Trainer passes on what the signature names; what a patch does not take is refused, and not left out."""
    model = flr.patch_model(tiny_model("gpt2", vocab_size=len(tokenizer)), tokenizer)
    names = inspect.signature(model.forward).parameters
    assert set(inspect.signature(type(model).forward).parameters) - {"self"} <= set(names)
    assert list(names)[-1] == "kwargs"
    ids = tokenizer(ROWS[0]["prompt"])["input_ids"]
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]], "token_type_ids": [0] * len(ids), "group": 1}] * 4
    trainer = Trainer(model, arguments(TrainingArguments, tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match="token_type_ids: expected"):
        trainer.train()
