"""More of what scripts/before_after.py measures: races against competitors, the server; and the process that works.

    PYTHONPATH=WORKTREE python scripts/before_after_races.py logprob

The process writes a line of JSON when it is ready, with what was computed, and one for every line that it reads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from before_after_work import (
    Work,
    baseline,
    cpu,
    forced_runs,
    heads,
    item_knn,
    listed,
    loading,
    one_token,
    shares,
)  # fmt: skip

MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
VOCABULARY, PROMPT, TARGET, MEMBERS = 10432, 256, 16, 8
REQUESTS, CLIENTS, START_SECONDS = 64, 8, 300


def logprob() -> Work:
    """Log-probabilities of 512 target tokens and their gradients, ours and with all logits at once."""
    from flr_kernels import token_logprob

    rows, size, vocabulary = 512, 512, 10432
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, size, generator=generator) * size**-0.5
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    grad = torch.rand(rows, generator=generator)
    eager = baseline("logprob").token_logprob

    def step(call: Any, trained: bool) -> Any:
        weight.requires_grad_(trained)
        return torch.autograd.grad(call(hidden, weight, target), [hidden, weight][: 1 + trained], grad)

    names = {"frozen": False, "trained": True}
    found = {name: listed(*step(token_logprob, trained)) for name, trained in names.items()}

    def measure() -> dict[str, float]:
        numbers = {}
        for name, trained in names.items():
            turns = [cpu(lambda c=call, t=trained: step(c, t)) for _ in range(3) for call in (eager, token_logprob)]
            numbers[name] = sum(turns[::2]) / sum(turns[1::2])
            numbers[f"{name} ours"] = sum(turns[1::2]) / 3
        return numbers

    return Work(measure, found)


def groups() -> Work:
    """Group advantages at three sizes, and the aggregation of factors, beside eager PyTorch."""
    from flr_kernels import factor_aggregate, group_advantage, reference

    competitor, generator = baseline("logprob").group_advantages, torch.Generator().manual_seed(0)
    pairs: dict[str, tuple[Any, Any, int]] = {}
    for users, size, length in ((4, 8, 16), (64, 8, 16), (64, 64, 256)):
        logp = -4 * torch.rand(users * size, length, generator=generator)
        mask = torch.arange(length) < torch.randint(1, length + 1, (users * size, 1), generator=generator)
        both = tuple(lambda f=f, a=(logp, mask, size, "grpo"): f(*a, eps=1e-4) for f in (competitor, group_advantage))
        pairs[f"advantages {users} × {size} × {length}"] = (*both, 200 if users * size * length < 10**5 else 10)
    f = torch.randn(64, 4, 1536, generator=generator).requires_grad_(True)
    logits = torch.randn(64, 4, generator=generator).requires_grad_(True)

    def aggregate(call: Any) -> Any:
        thought, _, orthogonality, entropy = call(f, logits, eps=1e-6)
        return torch.autograd.grad(thought.square().sum() + orthogonality.sum() + entropy.sum(), (f, logits))

    both = tuple(lambda c=call: aggregate(c) for call in (reference.factor_aggregate, factor_aggregate))
    pairs["aggregate"] = (*both, 20)
    found = {name: listed(*ours()) for name, (_, ours, _) in pairs.items()}

    def measure() -> dict[str, float]:
        numbers = {}
        for name, (eager, ours, calls) in pairs.items():
            turns = [cpu(call, calls) for _ in range(5) for call in (eager, ours)]
            numbers[name] = sum(turns[::2]) / sum(turns[1::2])
            numbers[f"{name} ours"] = sum(turns[1::2]) / 5
        return numbers

    return Work(measure, found)


def in_qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import flr

    torch.manual_seed(0)
    of_heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **MODEL, **of_heads))
    return flr.patch_model(model, config=flr.FLRConfig(num_factors=4, thought_token_id=VOCABULARY - 1))


def prompts_of(users: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Prompts that end in a thought token, and targets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY - 1, (users, PROMPT + 1), generator=generator)
    ids[:, -1] = VOCABULARY - 1
    targets = torch.randint(5, VOCABULARY - 1, (users, TARGET), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets


def computed(model: Any, step: Any) -> dict[str, list[float]]:
    """A step's loss and the reasoner's gradients."""
    model.zero_grad()
    loss = [float(step())]
    return {"loss": loss, "gradients": listed(*(p.grad for p in model.flr.parameters() if p.grad is not None))}


def raced(model: Any, steps: dict[str, Any], theirs: str) -> dict[str, float]:
    """CPU seconds of ours and of a competitor, in turn, and their ratio."""
    seconds = dict.fromkeys(steps, 0.0)
    for name in [*steps, *reversed(steps)]:
        model.zero_grad()
        seconds[name] += cpu(steps[name]) / 2
    return {"ratio": seconds[theirs] / seconds["ours"], "ours": seconds["ours"], theirs: seconds[theirs]}


def reinforcement() -> Work:
    """An RL step of one prompt and of four, eight members each, beside the shared-prefix group forward."""
    from flr.model.outputs import GroupInputs
    from flr.train.policy_loss import clipped_surrogate
    from flr_kernels import group_advantage

    grouped, two_pass = baseline("grouped"), baseline("two_pass")
    model = in_qwen2().requires_grad_(False).eval()
    model.flr.requires_grad_(True)
    cases, found = {}, {}
    for users in (1, 4):
        prompts, targets = prompts_of(users)
        noise = torch.randn(users, MEMBERS, 1, MODEL["hidden_size"], generator=torch.Generator().manual_seed(1))
        noise[:, 0] = 0
        group = GroupInputs(targets, torch.ones_like(targets, dtype=torch.bool), noise, noise_scale=3.0)

        def ours(prompts: Any = prompts, group: Any = group) -> torch.Tensor:
            out = model(**prompts, group=group)
            rows = group.target_mask.repeat_interleave(MEMBERS, 0)
            advantages = group_advantage(out.logprobs.detach().flatten(0, 1), rows, MEMBERS).advantages
            clipped_surrogate(out.logprobs, out.logprobs.detach(), group.target_mask, advantages).loss.mean().backward()
            return two_pass.group_loss(out.logprobs.detach(), group.target_mask)[0]

        def theirs(prompts: Any = prompts, group: Any = group) -> torch.Tensor:
            return grouped.rl_step(model, prompts, group)

        cases[users] = {"ours": ours, "grouped": theirs}
        found[f"{users}: log-probabilities"] = listed(model(**prompts, group=group).logprobs)
    prompts, group = prompts_of(1)[0], cases[1]["ours"].__defaults__[1]
    wide = dataclasses.replace(group, noise=group.noise.double())  # advantages divide by the spread of like rewards
    model.double()
    found |= computed(model, lambda: cases[1]["ours"](prompts, wide))
    model.float()

    def measure() -> dict[str, float]:
        numbers = {}
        for users, steps in cases.items():
            numbers |= {f"{users} {name}": x for name, x in raced(model, steps, "grouped").items()}
        return numbers

    return Work(measure, found)


def supervised() -> Work:
    """A supervised step of eight rows beside Hugging Face's own of the same rows without a thought."""
    model = in_qwen2().train()
    prompts, targets = prompts_of(8)
    ids = torch.cat([prompts["input_ids"], targets], 1)
    labels = torch.cat([torch.full_like(prompts["input_ids"], -100), targets], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    rows = {k: torch.cat([v[:, :PROMPT], v[:, PROMPT + 1 :]], 1) for k, v in inputs.items()}

    def step(forward: Any, given: Any) -> torch.Tensor:
        loss = forward(**given).loss
        loss.backward()
        return loss.detach()

    steps = {
        "ours": lambda: step(model, inputs),
        "plain": lambda: step(model._flr_patch.original(model), rows),
    }
    return Work(lambda: raced(model, steps, "plain"), computed(model, steps["ours"]))


def started(folder: Path, name: str, flags: list[str]) -> tuple[subprocess.Popen[bytes], str, int]:
    """A server of the model in ``folder``, its host and its port."""
    code = "import sys; from flr.cli import main; sys.exit(main())"
    words = ["serve", "--model", str(folder), "--port", "0", "--threads", "1", "--device", "cpu"]
    words += ["--max_queue", "4096", "--timeout_ms", "600000", *flags]
    log = folder / f"{name}.log"
    with log.open("w") as sink:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=sink, stderr=sink)
    end = time.monotonic() + START_SECONDS
    while not (said := re.search(r'"url": "http://([\d.]+):(\d+)"', log.read_text())):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RuntimeError(f"the server did not start: {log.read_text()[-1000:]}")
        time.sleep(0.1)
    return process, said[1], int(said[2])


def cpu_of(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds of another process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def server() -> Work:
    """Requests for a CPU second of ``flr serve``, eight clients at a time, one by one and in batches."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import flr
    from flr.data import RecProcessor, build_tokenizer, planted_dataset

    load, folder = baseline("load"), tempfile.TemporaryDirectory()
    torch.manual_seed(0)
    catalogue = planted_dataset(num_items=300, num_users=10).catalogue
    tokenizer = build_tokenizer(catalogue, "title", vocab_size=4096)
    processor = RecProcessor(tokenizer, catalogue, "title", max_history=20)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    of_heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes, **of_heads))
    flr.patch_model(model, tokenizer, flr.FLRConfig(num_factors=4))
    model.save_pretrained(folder.name)
    processor.save_pretrained(folder.name)
    drawn = np.random.default_rng(1).integers(0, 300, (REQUESTS, 20))
    bodies = [{"history": [catalogue.item_ids[i] for i in row], "k": 10, "num_beams": 20} for row in drawn]
    flags = {"batches": [], "one": ["--max_batch_size", "1", "--max_wait_ms", "0"]}
    servers = {name: started(Path(folder.name), name, words) for name, words in flags.items()}

    def ask(name: str) -> tuple[float, list[Any]]:
        process, host, port = servers[name]
        began = cpu_of(process)

        async def asked() -> list[Any]:
            client = load.Client(host, port)
            replies = await load.closed_loop(client, "/v1/recommend", bodies, CLIENTS)
            client.close()
            return replies

        replies = asyncio.run(asked())
        assert {reply.status for reply in replies} == {200}
        return REQUESTS / (cpu_of(process) - began), sorted(replies, key=lambda reply: reply.number)

    found = {}
    for name in servers:
        answers = [reply.json()["items"] for reply in ask(name)[1]]
        found[f"{name}: scores"] = [item["score"] for items in answers for item in items]

    def measure(kept: Any = folder) -> dict[str, float]:
        numbers = {name: ask(name)[0] for name in servers}
        return {**numbers, "ratio": numbers["batches"] / numbers["one"]}

    measure.close = lambda: [process.kill() for process, _, _ in servers.values()]  # type: ignore[attr-defined]
    return Work(measure, found)


WORK = {
    "shares": shares, "one_token": one_token, "loading": loading, "loading_million": lambda: loading(10**6),
    "forced_runs": forced_runs, "heads": heads, "item_knn": item_knn, "logprob": logprob, "groups": groups,
    "reinforcement": reinforcement, "supervised": supervised, "server": server,
}  # fmt: skip


def main(name: str) -> None:
    import flr

    torch.set_num_threads(1)
    work = WORK[name]()
    print(json.dumps({"flr": flr.__file__, "found": work.found}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(work.round()), flush=True)
    getattr(work.round, "close", lambda: None)()


if __name__ == "__main__":
    main(sys.argv[1])
