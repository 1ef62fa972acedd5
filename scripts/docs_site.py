"""What mkdocs.yml needs beside docs/: pages that stand elsewhere in the checkout, or are generated from the code.

    index.md            README.md, its links as docs/ sees them
    tutorial.md         docs/tutorial.ipynb with the outputs that it holds
    CHANGELOG.md, CONTRIBUTING.md, examples/*.md
    commands.md         ``--help`` of every command
    api.md              the public names of every public package, from their docstrings

Nothing is written into the checkout. mkdocs calls :func:`on_files`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flr", "flr.data", "flr.decode", "flr.evaluate", "flr.sids", "flr.train", "flr_kernels")
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")


def from_docs(text: str, page: str) -> str:
    """Markdown of ``page``, a path in the checkout, with its relative links as the site has them.

    >>> from_docs("[a](docs/data.md#x) [b](CHANGELOG.md) [c](https://e.org)", "README.md")
    '[a](data.md#x) [b](CHANGELOG.md) [c](https://e.org)'
    >>> from_docs("[a](../docs/data.md)", "examples/smollm2.md")
    '[a](../data.md)'
    >>> from_docs("[a](data.md) [b](../examples/smollm2.md)", "docs/rl.md")
    '[a](data.md) [b](examples/smollm2.md)'
    >>> from_docs("[a](docs/tutorial.ipynb)", "README.md")  # a notebook is a page of the site
    '[a](tutorial.md)'
    """
    folder = os.path.dirname(page)
    place = "" if folder == "docs" else folder.removeprefix("docs/")  # of the page on the site

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(folder, match[2]))
        target = re.sub(r"\.ipynb$", ".md", target.removeprefix("docs/"))
        return match[1] + os.path.relpath(target, place or ".")

    return _LINK.sub(moved, text)


def notebook(path: Path) -> str:
    """A notebook in Markdown, with the outputs that it holds and a link to itself."""
    from nbconvert import MarkdownExporter

    text, _ = MarkdownExporter().from_filename(str(path))
    head, _, rest = from_docs(text, f"docs/{path.name}").partition("\n")
    return f"{head}\n\n[Download this notebook]({path.name}).\n{rest}"


def commands() -> str:
    """The help of every command, in Markdown."""
    from flr.cli import COMMANDS, main

    parts = [
        "# Commands\n\nEvery command takes `--config FILE.yaml` with the options below as keys; flags override it.\n"
    ]
    os.environ["COLUMNS"] = "100"  # of argparse's lines
    for name, about in COMMANDS.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([name, "--help"])
        parts.append(f"## flr {name}\n\n{about[0].upper()}{about[1:]}.\n\n```text\n{out.getvalue().rstrip()}\n```\n")
    return "\n".join(parts)


def api() -> str:
    """A section a package, an entry a public name."""
    parts = ["# Python\n\nWhat is public: the names below. Module paths beneath these packages may change.\n"]
    for package in PACKAGES:
        module = importlib.import_module(package)
        entries = []
        for name in sorted(module.__all__):
            value = getattr(module, name)
            where, known = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
            if where is not None and known is not None and where.split(".")[0] in ("flr", "flr_kernels"):
                heading = f"    options: {{heading: {package}.{name}, toc_label: {name}}}"
                entries.append(f"::: {where}.{known}\n{heading}\n")
        parts.append(f"## {package}\n\n" + "\n".join(entries))
    return "\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of this module's docstring."""
    pages = {"index.md": "README.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
    pages |= {f"examples/{file.name}": f"examples/{file.name}" for file in sorted((ROOT / "examples").glob("*.md"))}
    made = {name: from_docs((ROOT / source).read_text(), source) for name, source in pages.items()}
    made |= {"tutorial.md": notebook(ROOT / "docs/tutorial.ipynb"), "commands.md": commands(), "api.md": api()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Pages of docs/ link to what stands beside docs/ as the checkout has it."""
    return markdown if page.file.generated_by else from_docs(markdown, f"docs/{page.file.src_uri}")
