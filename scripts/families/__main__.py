"""Every causal-LM family of the installed transformers, patched and compared with the two-pass computation.

    python -m scripts.families                     # all that have no outcome yet, then docs/families.md
    python -m scripts.families --again llama qwen3 # these again
    python -m scripts.families --page              # the page alone

Each family has a process of its own with a bound on time and memory. Outcomes are kept in
docs/results/families.json as soon as they are known, so that a sweep that was ended goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flr.files import write_json

from .check import Fault, check_family
from .page import write_page
from .tiny import families, tiny_model

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/families.json"
SECONDS, ADDRESS_SPACE = 300, 16 << 30


def outcome(family: str) -> dict[str, Any]:
    """What comes of one family: equal, refused, not built, or a fault."""
    try:
        tiny_model(family)
    except Exception as error:
        return {"outcome": "not built", "reason": f"{type(error).__name__}: {error}"}
    try:
        return {"outcome": "equal", **check_family(family)}
    except Fault as fault:
        return {"outcome": "FAULT", "reason": str(fault)}
    except ValueError as error:
        refused = str(error).startswith("model: expected")
        return {"outcome": "refused" if refused else "FAULT", "reason": str(error)}
    except Exception as error:
        return {"outcome": "FAULT", "reason": f"{type(error).__name__}: {error}"}


def in_a_process(family: str, find: Callable[[str], dict[str, Any]] = outcome) -> dict[str, Any]:
    """The outcome of a family, found by a child of this process, with its seconds and MiB."""
    read, write = os.pipe()
    started, child = time.monotonic(), os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        try:
            found = find(family)
            found["mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            os.write(write, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    found = json.loads(text) if text else {"outcome": "FAULT", "reason": f"no answer within {SECONDS} s"}
    found["reason"] = " ".join(found.get("reason", "").split())[:200]
    return {
        "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family],
        **found,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", default=[], metavar="FAMILY", help="Families whose outcome is dropped.")
    parser.add_argument("--page", action="store_true", help="Write docs/families.md alone.")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    same = kept.get("transformers") == transformers.__version__
    found: dict[str, Any] = {k: v for k, v in kept.get("families", {}).items() if same and k not in options.again}
    todo = [] if options.page else [family for family in families() if family not in found]
    for n, family in enumerate(todo, 1):
        found[family] = in_a_process(family)
        text = f"{found[family]['outcome']} {found[family]['reason']}"
        print(f"{n}/{len(todo)} {family}: {text[:100]} ({found[family]['seconds']} s)", file=sys.stderr, flush=True)
        write_json(RESULTS, {"transformers": transformers.__version__, "families": dict(sorted(found.items()))})
    write_page(found, transformers.__version__)
    return int(any(row["outcome"] == "FAULT" for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
