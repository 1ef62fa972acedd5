"""Whether a source distribution and a wheel are whole.

    python -m build --outdir dist && python scripts/check_dist.py dist

The source distribution holds every file that the repository tracks but those for its host (``.github``); the wheel
every file of the two packages and the compiled extension, and no test. Where ``FLR_PROJECT_URL`` was set, the
description has no relative link left.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_NOT_SHIPPED = (".github/", ".gitignore", ".pre-commit-config.yaml")
_PACKAGES = ("flr/", "flr_kernels/")


def only(folder: Path, pattern: str) -> Path:
    """The one file of that name."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one {pattern}, got {', '.join(p.name for p in found) or 'none'}")
    return found[0]


def missing_from_sdist(tracked: Iterable[str], shipped: Iterable[str]) -> list[str]:
    """Tracked files that should have been shipped.

    >>> missing_from_sdist(["setup.py", "csrc/a.cuh", ".github/x"], ["flr-0.1.0/setup.py"])
    ['csrc/a.cuh']
    """
    held = {name.partition("/")[2] for name in shipped}
    return [name for name in tracked if name not in held and not name.startswith(_NOT_SHIPPED)]


def faults_of_wheel(tracked: Iterable[str], shipped: Iterable[str]) -> list[str]:
    """What a wheel lacks, or holds too much.

    >>> faults_of_wheel(["flr/py.typed"], ["flr/py.typed", "tests/a.py", "flr-0.1.0.dist-info/METADATA"])
    ['unexpected tests/a.py', 'missing flr_kernels/_C*.so']
    """
    held = set(shipped)
    faults = [f"missing {name}" for name in tracked if name.startswith(_PACKAGES) and name not in held]
    faults += [
        f"unexpected {name}" for name in sorted(held) if not re.match(r"flr(_kernels)?/|flr-[^/]*\.dist-info/", name)
    ]
    if not any(re.match(r"flr_kernels/_C\.[^/]*so$", name) for name in held):
        faults.append("missing flr_kernels/_C*.so")
    return faults


def relative_links(description: str) -> list[str]:
    """Targets of Markdown links without a scheme.

    >>> relative_links("![a](docs/a.png) [b](https://e.org) [c](#use)")
    ['docs/a.png']
    """
    return re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", description)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        raise SystemExit(f"scripts/check_dist.py: expected a folder, got {argv}")
    source, wheel = only(Path(argv[0]), "flr-*.tar.gz"), only(Path(argv[0]), "flr-*.whl")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listed.stdout.splitlines()
    with tarfile.open(source) as archive:
        faults = [f"{source.name}: missing {name}" for name in missing_from_sdist(tracked, archive.getnames())]
    with zipfile.ZipFile(wheel) as archive:
        faults += [f"{wheel.name}: {fault}" for fault in faults_of_wheel(tracked, archive.namelist())]
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    if os.environ.get("FLR_PROJECT_URL"):
        faults += [f"{wheel.name}: relative link {link} in the description" for link in relative_links(text)]
        if "Project-URL: Repository, " not in text:
            faults.append(f"{wheel.name}: missing project URLs")
    print("\n".join(faults) or f"{source.name} and {wheel.name} are whole")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
