"""Whether pyproject.toml and constraints.txt can be installed, for every Python and platform that we state.

    python scripts/resolve.py          # asks the package index through uv; a table, exit 1 where there is no solution

Three ways: the newest versions, those of constraints.txt, and the lowest that pyproject.toml admits; all extras, wheels
alone. Pythons are those of the classifiers. CUDA builds of torch exist for Linux; macOS has the CPU half.
constraints.txt must pin every package that it leads to. Its header says how it is made; to renew it, add ``--upgrade``
or ``--upgrade-package NAME`` to that command.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
MODES = {
    "newest": ("--resolution", "highest"),
    "constraints": ("--constraints", "constraints.txt"),
    "lowest": ("--resolution", "lowest-direct"),
}
SHOWN = ("torch", "triton", "transformers", "accelerate", "peft", "numpy")
MACOS = "14.0"  # what torch's wheels need


def supported(pyproject: str) -> list[str]:
    """Python versions among the classifiers.

    >>> supported('"Programming Language :: Python :: 3.10",\\n"Programming Language :: Python :: 3 :: Only"')
    ['3.10']
    """
    return re.findall(r"Programming Language :: Python :: (3\.\d+)", pyproject)


def pins(text: str) -> dict[str, set[str]]:
    """Versions of each package that a file of requirements pins, whatever the environment.

    >>> pins("# by hand\\nnumpy==2.2.6 ; python_full_version < '3.11'\\nnumpy==2.4.6\\nFoo_Bar==1\\n")["foo-bar"]
    {'1'}
    """
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.M):
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    return found


def problem(mode: str, solution: dict[str, set[str]], constraints: dict[str, set[str]]) -> str | None:
    """What is wrong with a solution, or None.

    >>> problem("constraints", {"torch": {"2.8.0"}, "six": {"1"}}, {"torch": {"2.8.0"}})
    'constraints.txt: expected a pin of every package, got none of six'
    """
    missing = sorted(name for name in solution if name not in constraints)
    if mode == "constraints" and missing:
        return f"constraints.txt: expected a pin of every package, got none of {', '.join(missing)}"
    return None


def solve(case: tuple[str, str, str]) -> tuple[bool, str]:
    """Whether a Python, a platform and a mode have a solution, and its main versions, or why there is none."""
    python, platform, mode = case
    command = ["uv", "pip", "compile", "pyproject.toml", "--quiet", "--all-extras", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--python-platform", platform, "--only-binary", ":all:", *MODES[mode]]
    # the system's certificates, as pip takes them: an index behind a proxy has one that uv's own list lacks
    environment = {"UV_SYSTEM_CERTS": "1", **os.environ, "MACOSX_DEPLOYMENT_TARGET": MACOS}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        return False, done.stderr.strip()
    solution = pins(done.stdout)
    reason = problem(mode, solution, pins((ROOT / "constraints.txt").read_text()))
    versions = " ".join(f"{name} {min(solution[name])}" for name in SHOWN if name in solution)
    return reason is None, reason or versions


def main() -> int:
    pythons = supported((ROOT / "pyproject.toml").read_text())
    cases = list(product(pythons, PLATFORMS, MODES))
    if sys.argv[1:] == ["--quick"]:  # every value once: Pythons, platforms, modes beside constraints.txt on Linux
        usual = (pythons[0], PLATFORMS[0], "constraints")
        cases = [case for case in cases if sum(a != b for a, b in zip(case, usual, strict=True)) <= 1]
    elif sys.argv[1:]:
        print(f"scripts/resolve.py: expected no argument or --quick, got {' '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(solve, cases))
    for (python, platform, mode), (solved, text) in zip(cases, results, strict=True):
        print(f"{python:5} {platform:23} {mode:12} {'' if solved else 'NO SOLUTION: '}{text}")
    failed = sum(not solved for solved, _ in results)
    print(f"{len(results) - failed} of {len(results)} have a solution")
    return int(failed > 0 or not results)


if __name__ == "__main__":
    sys.exit(main())
