"""What a result says of where it was measured: device, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
#: What a commit is judged dirty by: code that benchmarks run, not results, figures and prose.
CODE = ("flr", "flr_kernels", "csrc", "bench", "setup.py", ":!bench/results", ":!bench/quick_baseline.json")


@cache
def device_name() -> str:
    if ON_GPU:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"CPU {found[1].strip() if found else platform.machine()}"


def slug(name: str) -> str:
    """The folder of a device below bench/results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


@cache
def facts() -> dict[str, Any]:
    """What every run of the suite says about itself."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    found = {
        "commit": os.environ.get("FLR_BENCH_COMMIT") or git("rev-parse", "--short=10", "HEAD") or "unknown",
        # a commit that is named is that of a tree that was sent here, whatever git says of the place
        "dirty": not os.environ.get("FLR_BENCH_COMMIT") and bool(git("status", "--porcelain", "--", *CODE)),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_name(),
        "versions": versions,
        "threads": torch.get_num_threads(),
    }
    if ON_GPU:
        properties = torch.cuda.get_device_properties(DEVICE)
        found["device_memory_gb"] = round(properties.total_memory / 1e9, 1)
    return found
