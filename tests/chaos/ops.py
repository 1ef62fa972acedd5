"""Random calls of every public op: equal to the definition, or exactly an exception that its docstring names.

    python -m tests.chaos.ops --calls 100000 --seed 0

A call has random shapes (0 and 1 among them), dtypes, strides and values (NaN, infinite, huge), and half of the calls
have faults: a wrong rank, size, dtype or device, a sparse or nested tensor, no tensor at all, a name or number of any
type, an index out of range. A fault that the docstring speaks of must raise ValueError, IndexError or
BackendUnavailable, whose message begins with a name of an argument; any other exception, a result that differs from
the definition in float64, memory of more than 256 MiB beyond the start, and a call of more than five seconds count as
failures. Prints one JSON line, and exits with 1 where anything failed.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import math
import os
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import flr_kernels
from flr_kernels import reference
from tests.helpers.trie_steps import call, case

from .figures import keep

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Largest difference to the definition in float64, of the largest number: rounding of sums in the accumulation dtype.
#: Token log-probabilities round their logits to the input's dtype.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
DOCUMENTED = (ValueError, IndexError, flr_kernels.BackendUnavailable)
SECONDS, MEBIBYTES = 5.0, 256
BACKENDS = ("auto", "auto", "reference", "host", "triton", "log_normaliser=host,group_advantage=host")
Case = tuple[Callable[..., Any], dict[str, Any], Callable[..., Any]]


class Fuzz:
    """Makes calls. Everything random comes from ``seed``."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, most: int = 9) -> int:
        return self.random.choice((0, 1, 1, 2, 3, 5, 8, most))

    def floats(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Random values in random strides; now and then special ones."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.random.random()
        if x.numel() and kind < 0.05:
            special = self.random.choice((math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4))
            x.view(-1)[self.random.randrange(x.numel())] = special
        return self.strided(x.to(dtype))

    def strided(self, x: torch.Tensor) -> torch.Tensor:
        """The same values with other strides."""
        kind = self.random.randrange(6)
        if kind == 0 and x.dim() >= 2:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 1 and x.dim():
            wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
            wide[..., ::2] = x
            return wide[..., ::2]
        if kind == 2 and x.dim() and x.shape[0]:
            return x[:1].expand(x.shape)  # one row for all
        if kind == 3:
            padded = x.new_empty(x.numel() + 3)
            padded[3:] = x.reshape(-1)
            return padded[3:].view(x.shape)
        return x

    def mask(self, *shape: int) -> torch.Tensor | None:
        if self.random.random() < 0.3:
            return None
        return torch.rand(shape, generator=self.generator) < self.random.choice((0.0, 0.5, 1.0))

    def factor_attention(self) -> Case:
        dtype, b, k, d = self.random.choice(FLOATS), self.size(), self.size(5), self.size()
        length = max(self.size(), 1)
        arguments = {"h": self.floats(b, length, d, dtype=dtype), "u": self.floats(b, k, d, dtype=dtype)}
        more = {"mask": self.mask(b, length), "last_first": self.random.random() < 0.5}
        return (
            flr_kernels.factor_attention,
            arguments | more,
            lambda h, u, mask, last_first: reference.factor_attention(h, u, mask),
        )

    def factor_aggregate(self) -> Case:
        b, k, d = self.size(), self.size(5), self.size()
        f = self.floats(b, k, d, dtype=self.random.choice(FLOATS))
        logits = self.floats(b, k, dtype=self.random.choice((f.dtype, torch.float32)))
        eps = self.random.choice((1e-6, 1e-3, 1, 1e-18))
        return flr_kernels.factor_aggregate, {"f": f, "gate_logits": logits, "eps": eps}, reference.factor_aggregate

    def log_normaliser(self) -> Case:
        logits = self.floats(self.size(), max(self.size(700), 1), dtype=self.random.choice(FLOATS))
        return flr_kernels.log_normaliser, {"logits": logits}, reference.log_normaliser

    def token_logprob(self) -> Case:
        dtype, m, v, d = self.random.choice(FLOATS), self.size(), max(self.size(40), 1), self.size()
        target = self.strided(torch.randint(0, v, (m,), generator=self.generator))
        hidden, weight = self.floats(m, d, dtype=dtype), self.floats(v, d, dtype=dtype)
        arguments = {"hidden": hidden, "weight": weight, "target": target}
        return flr_kernels.token_logprob, arguments, reference.token_logprob

    def group_advantage(self) -> Case:
        dtype, group, groups, length = self.random.choice(FLOATS), max(self.size(8), 1), self.size(), self.size()
        kind = self.random.choice(("grpo", "dr_grpo", "rloo", "latentr3"))
        reward = self.random.choice(("neg_perplexity", "log_likelihood", "given"))
        given = reward == "given"
        logp = self.floats(*((groups * group,) if given else (groups * group, length)), dtype=dtype)
        arguments = {
            "token_logprobs": logp if given else -logp.abs(),
            "mask": None if given else self.mask(groups * group, length),
            "group_size": group,
            "kind": kind,
            "reward": reward,
            "eps": self.random.choice((1e-4, 1e-2, 1)),
        }
        # the definition sums float64 rewards of the accumulation dtype, so it is asked in that dtype
        return flr_kernels.group_advantage, arguments, lambda **a: reference_advantage(dtype, **a)

    def trie_step(self) -> Case:
        kind = self.random.choice(("none", "prefix", "only", "exclude"))
        seed = self.random.randrange(1 << 30)
        made = case(seed, self.random.randint(1, 3), self.random.randint(4, 30), 3, 1, 6, kind)
        arguments = call(made, num_unfinished=self.size(), num_all=self.size())
        dtype = self.random.choice((torch.float32, torch.float32, torch.bfloat16))
        arguments["logits"] = self.strided(arguments["logits"].to(dtype))
        arguments["node"], arguments["score"] = self.strided_rows(arguments["node"]), arguments["score"]
        arguments["unique"] = self.random.random() < 0.5
        arguments["norm"] = None if self.random.random() < 0.5 else arguments["logits"].float().logsumexp(-1)
        return flr_kernels.trie_step, arguments, reference_trie_step

    def strided_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous().t() if self.random.random() < 0.3 else x

    def fault(self, arguments: dict[str, Any]) -> str:
        """Change one argument to something that may be wrong; which it was."""
        name = self.random.choice(list(arguments))
        value = arguments[name]
        junk = (None, "x", -1, 0, 2.5, math.nan, math.inf, True, [1], 10**40, torch.zeros(2), object(), 1 << 62)
        if not isinstance(value, torch.Tensor) or self.random.random() < 0.25:
            arguments[name] = self.random.choice(junk)
            return name
        ways: tuple[Callable[[], torch.Tensor], ...] = (
            lambda: value[None],
            lambda: value[..., :0] if value.dim() else value,
            lambda: value[0] if value.dim() and len(value) else value,
            lambda: torch.cat([value, value]) if value.dim() else value,
            lambda: value.to(self.random.choice((*FLOATS, torch.int32, torch.int64, torch.bool, torch.complex64))),
            lambda: value.to("meta"),
            lambda: value.to_sparse(),
            lambda: torch.nested.as_nested_tensor([value, value]),
            lambda: value * 0 + self.random.choice((-1, 3) if value.is_floating_point() else (-1, 3, 1 << 20)),
            lambda: value.sum(),
        )
        arguments[name] = self.random.choice(ways)()
        return name


def reference_advantage(dtype: torch.dtype, **arguments: Any) -> Any:
    """The definition, with inputs that hold the same values in the accumulation dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logp = arguments.pop("token_logprobs")
    return reference_group(logp.to(wide), **arguments)


def reference_group(logp: torch.Tensor, mask: Any, group_size: int, kind: str, reward: str, eps: float) -> Any:
    rewards = reference.sequence_rewards(logp, mask, reward).view(-1, group_size)
    mean, std, _ = reference.group_statistics(rewards)
    advantages = reference.group_advantages(rewards, kind, float(eps))
    return rewards, advantages, mean[:, 0].to(rewards.dtype), std[:, 0].to(rewards.dtype)


def reference_trie_step(**a: Any) -> Any:
    order = (
        "logits", "score", "node", "norm", "children", "tokens", "leaf_begin", "leaf_end", "listed", "offset",
        "entries", "num_unfinished", "num_all", "widest", "unique", "filter",
    )  # fmt: skip
    return reference.trie_step(*(a[name] for name in order))


def flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in flat(part)]


def different(found: Any, arguments: dict[str, Any], definition: Callable[..., Any], name: str) -> str | None:
    """How a result differs from the definition, None where it does not."""
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    if any(x.is_meta for x in tensors):
        return None if all(x.is_meta for x in flat(found)) else "a result with values, from tensors without"
    dtype = next(x.dtype for x in tensors if x.dtype.is_floating_point)
    exact = name in ("trie_step", "group_advantage")
    wide = {
        key: x.double() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point and not exact else x
        for key, x in arguments.items()
    }
    tolerance = 1e-5 if exact else ROUNDING[dtype if name == "token_logprob" or dtype.itemsize > 2 else torch.float32]
    for mine, theirs in zip(flat(found), flat(definition(**wide)), strict=True):
        if mine.shape != theirs.shape:
            return f"shape {tuple(mine.shape)} for {tuple(theirs.shape)}"
        if not theirs.is_floating_point():
            if not torch.equal(mine, theirs):
                return f"numbers {mine.flatten()[:6].tolist()} for {theirs.flatten()[:6].tolist()}"
            continue
        if name == "log_normaliser":  # of a row with +inf it promises only that the result is not finite
            mine = torch.where(mine.isfinite(), mine, torch.nan)
            theirs = torch.where(theirs.isfinite(), theirs, torch.nan)
        scale = max(1.0, float(theirs[theirs.isfinite()].abs().amax()) if theirs.isfinite().any() else 0.0)
        if not torch.allclose(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            return f"values {mine.flatten()[:6].tolist()} for {theirs.flatten()[:6].tolist()}"
    return None


def run(calls: int, seed: int) -> dict[str, Any]:
    """Make the calls; what came of them."""
    fuzz, outcomes = Fuzz(seed), collections.Counter()
    failures: list[str] = []
    names = ("factor_attention", "factor_aggregate", "log_normaliser", "token_logprob", "group_advantage", "trie_step")
    start, before, slowest = time.monotonic(), _peak(), 0.0
    for number in range(calls):
        name = fuzz.random.choice(names)
        function, arguments, definition = getattr(fuzz, name)()
        wrong = fuzz.fault(arguments) if fuzz.random.random() < 0.5 else None
        backend = fuzz.random.choice(BACKENDS)
        os.environ["FLR_BACKEND"] = backend
        began = time.monotonic()
        try:
            result = function(**arguments)
        except DOCUMENTED as error:
            outcomes[type(error).__name__] += 1
            problem = None if wrong or backend not in ("auto", "reference") else f"a call in order raised {error!r}"
            unnamed = not _names(str(error), inspect.signature(function).parameters)
            if unnamed and not isinstance(error, flr_kernels.BackendUnavailable):
                problem = f"the message names no argument: {error!r}"
        except Exception as error:
            outcomes["other"] += 1
            problem = repr(error)
        else:
            outcomes["equal"] += 1
            problem = different(result, arguments, definition, name)
        seconds = time.monotonic() - began
        slowest = max(slowest, seconds)
        if seconds > SECONDS:
            problem = f"took {seconds:.1f} s"
        if problem:
            failures.append(f"call {number} of {name}, fault in {wrong}, {backend}: {problem[:300]}")
    grown = _peak() - before
    if grown > MEBIBYTES:
        failures.append(f"memory grew by {grown} MiB")
    os.environ.pop("FLR_BACKEND", None)
    return {
        "part": "ops", "calls": calls, "seed": seed, "outcomes": dict(outcomes), "failures": len(failures),
        "first_failures": failures[:10], "slowest_ms": round(1000 * slowest, 1), "grown_mib": grown,
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def _names(message: str, parameters: Any) -> bool:
    """Whether a message is ``name: …`` or ``name, name: …``."""
    head = message.partition(":")[0]
    return all(name in parameters for name in re.split(r", ", head))


def _peak() -> int:
    """Most memory that the process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to which the figures are added")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures = run(options.calls, options.seed)
    print(json.dumps(figures))
    keep(options.json, {figures.pop("part"): figures})
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
