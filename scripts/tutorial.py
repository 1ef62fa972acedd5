"""Run docs/tutorial.ipynb and keep what its cells say: python scripts/tutorial.py

The site shows the notebook with these outputs; tests/docs/test_site.py runs it again and compares.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/tutorial.ipynb"


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run in ``folder``, where it writes its model.

    What is kept of a cell is its text, without times and without what libraries say on standard error.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=240, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _text(output))]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def _text(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """An output as plain text: what was printed, or the value of the last line."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type == "execute_result":
        output.data = {"text/plain": output.data["text/plain"]}
        return output
    return None  # bars and tables that a library draws while it works


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(Path(folder)), NOTEBOOK)


if __name__ == "__main__":
    main()
