"""How much memory a catalogue of a million and of ten million items takes, and what processes of a machine share.

    python -m scripts.scale_memory               # docs/results/scale_memory.json and the table of docs/scale.md
    python -m scripts.scale_memory --table       # the table alone, from the result
    python -m scripts.scale_memory --sizes 10000000 --work "item-kNN: fit"   # this alone; other figures stay

Every piece of work runs in a process of its own, which says by how much its memory rose at most and how much of that
stayed. Two processes then open the same files at the same time; what is shared between them the kernel tells
(``/proc/self/smaps_rollup``: Pss divides a page by the processes that have it). Items have 4 codes of 256 values, as
semantic IDs have; a row of item-kNN has 20 neighbours. About 8 GB of memory and 10 minutes are needed.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flr.files import read_json, write_json

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/scale_memory.json", ROOT / "docs/scale.md"
SIZES = (10**6, 10**7)
CODES, LEVELS, NEIGHBOURS, USERS = 256, 4, 20, 64
TRIE, KNN, CATALOGUE = "trie.safetensors", "item_knn.safetensors", "catalogue.parquet"


def codes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of ``size`` items: tokens int32 and offsets int64."""
    rng = np.random.default_rng(0)
    drawn = np.unique(rng.integers(0, CODES**LEVELS, size + size // 2, dtype=np.uint32))
    chosen = rng.permutation(drawn)[:size]
    levels = [(chosen >> (8 * level)).astype(np.int32) % CODES + 10 + CODES * level for level in range(LEVELS)]
    return np.stack(levels, 1).ravel(), np.arange(0, size * LEVELS + 1, LEVELS)


def build_trie(folder: Path, size: int) -> Callable[[], Any]:
    from flr.data.trie import CatalogueTrie

    tokens, offsets = codes(size)
    return lambda: CatalogueTrie.from_sequences(tokens, offsets)


def save_trie(folder: Path, size: int) -> Callable[[], Any]:
    trie = build_trie(folder, size)()
    return lambda: trie.save(folder / TRIE)


def open_trie(folder: Path, size: int) -> Callable[[], Any]:
    from flr.data.trie import CatalogueTrie

    return lambda: CatalogueTrie.load(folder / TRIE)


def add_items(folder: Path, size: int) -> Callable[[], Any]:
    """One item in a hundred is new."""
    trie = open_trie(folder, size)()
    new = np.arange(size // 100) + 10 + CODES * LEVELS
    return lambda: trie.updated(new, np.arange(len(new) + 1))


def filter_users(folder: Path, size: int) -> Callable[[], Any]:
    """As many users as are computed together, each with a mask over the catalogue of its own."""
    import torch

    from flr.decode.filters import item_filter

    trie = open_trie(folder, size)()
    users = max(1, min(USERS, (1 << 27) // size))
    allowed = torch.ones(users, size, dtype=torch.bool)
    return lambda: item_filter(trie, users, allowed)


def small_model(hidden_size: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_attention_heads=4, **sizes)).eval()


def score_catalogue(folder: Path, size: int) -> Callable[[], Any]:
    """Of one user, by the smallest of models: what the catalogue costs is asked here."""
    import torch

    from flr.decode import score_all_items

    trie, model = open_trie(folder, size)(), small_model(16, 1)
    ids = torch.randint(10, 1000, (1, 16))
    return lambda: score_all_items(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, trie)


def search(folder: Path, size: int) -> Callable[[], Any]:
    import torch

    from flr.decode import beam_search

    trie, model = open_trie(folder, size)(), small_model(64, 2)
    ids = torch.randint(10, 1000, (USERS, 64))
    return lambda: beam_search(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, trie, 20, 10)


def fit_knn(folder: Path, size: int) -> Callable[[], Any]:
    """On two rows of five items for every ten items of the catalogue."""
    from flr.data import CSR, Interactions, NeighbourTable

    rng = np.random.default_rng(0)
    rows = size // 5
    histories = CSR(rng.integers(0, size, 5 * rows).astype(np.int32), np.arange(0, 5 * rows + 1, 5))
    train = Interactions(np.arange(rows).astype(str).tolist(), histories, rng.integers(0, size, rows))
    return lambda: NeighbourTable.fit(train, size, top=NEIGHBOURS)


def save_knn(folder: Path, size: int) -> Callable[[], Any]:
    """A table with every row full."""
    import scipy.sparse as sp

    from flr.data import NeighbourTable

    rng = np.random.default_rng(0)
    items = np.sort(rng.integers(0, size, (size, NEIGHBOURS), dtype=np.int32), 1).ravel()
    weights = rng.random(size * NEIGHBOURS, dtype=np.float32)
    matrix = sp.csr_matrix((weights, items, np.arange(0, len(items) + 1, NEIGHBOURS)), shape=(size, size))
    table = NeighbourTable(matrix, np.ones(size))
    return lambda: table.save(folder / KNN)


def open_knn(folder: Path, size: int) -> Callable[[], Any]:
    from flr.data import NeighbourTable

    return lambda: NeighbourTable.load(folder / KNN, size)


def score_knn(folder: Path, size: int) -> Callable[[], Any]:
    """A batch of evaluation: scores of every item and the ranks of targets."""
    import torch

    from flr.data import CSR
    from flr.evaluate.metrics import ranks_from_scores, within_memory

    table = open_knn(folder, size)()
    users = within_memory(256, size)
    histories = CSR(np.arange(users * 50, dtype=np.int32), np.arange(0, users * 50 + 1, 50))
    return lambda: ranks_from_scores(torch.from_numpy(table.scores(histories)), torch.arange(users))


def save_catalogue(folder: Path, size: int) -> Callable[[], Any]:
    from flr.data import Catalogue

    words = ["blue", "train", "kind", "of", "round", "midnight", "trip", "love", "supreme", "giant"]
    draw = random.Random(0)
    titles = (f"{draw.choice(words)} {draw.choice(words)} {draw.choice(words)} {i}" for i in range(size))
    catalogue = Catalogue((f"B{i:08d}" for i in range(size)), titles)
    return lambda: catalogue.save(folder / CATALOGUE)


def open_catalogue(folder: Path, size: int) -> Callable[[], Any]:
    """With what a server makes of it at its start."""
    from flr.data import Catalogue
    from flr.serve.search import ItemSearch

    def opened() -> Any:
        catalogue = Catalogue.load(folder / CATALOGUE)
        catalogue.lookup("\0")
        return catalogue, ItemSearch(catalogue)

    return opened


#: What is measured, in this order: its name in the table, the work, and whether two processes do it beside each other.
WORK: dict[str, tuple[Callable[[Path, int], Callable[[], Any]], bool]] = {
    "trie: build": (build_trie, False),
    "trie: save": (save_trie, False),
    "trie: open": (open_trie, True),
    "trie: 1 % new items": (add_items, False),
    "filters: a mask for each user of a part": (filter_users, False),
    "search: 64 users, 20 beams": (search, False),
    "every item's score, 1 user": (score_catalogue, False),
    "item-kNN: fit": (fit_knn, False),
    "item-kNN: save, 20 neighbours": (save_knn, False),
    "item-kNN: open": (open_knn, True),
    "item-kNN: a batch of evaluation": (score_knn, False),
    "ids and titles: save": (save_catalogue, False),
    "ids and titles: open for a server": (open_catalogue, False),
}


def memory() -> dict[str, int]:
    """Of this process, bytes: resident, divided among sharers, its own, and the most so far."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    found = {name: 1024 * int(re.search(rf"^{name}:\s+(\d+)", rollup, re.M)[1]) for name in ("Rss", "Pss")}
    found["own"] = sum(1024 * int(x) for x in re.findall(r"^Private_\w+:\s+(\d+)", rollup, re.M))
    status = Path("/proc/self/status").read_text()
    return {**found, "peak": 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])}


def child(name: str, folder: Path, size: int) -> None:
    """Do one piece of work; waits for a line before it and after it, so that several go in step."""
    work = WORK[name][0](folder, size)
    gc.collect()
    print(json.dumps({}), flush=True)
    sys.stdin.readline()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = memory(), time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    gc.collect()
    print(json.dumps({}), flush=True)
    sys.stdin.readline()
    after = memory()
    grown = {key: after[key] - before[key] for key in ("Rss", "Pss", "own")}
    print(json.dumps({**grown, "peak": after["peak"] - before["Rss"], "seconds": seconds, "kept": kept is not None}))


def measured(name: str, folder: Path, size: int) -> dict[str, Any]:
    """What one process, or two in step, say of a piece of work."""
    command = [sys.executable, "-m", "scripts.scale_memory", "--child", name, str(folder), str(size)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2 if WORK[name][1] else 1)]
    for _ in range(2):
        for process in processes:
            process.stdout.readline()
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
    found = [json.loads(process.communicate()[0]) for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{name}: the process failed")
    return {"processes": len(found), **found[0]}


def run(sizes: list[int], output: Path, works: list[str] | None = None) -> None:
    """Measure these sizes; others that ``output`` has stay, and so do its figures of other work than ``works``."""
    report: dict[str, Any] = {"levels": LEVELS, "codes": CODES, "neighbours": NEIGHBOURS, "sizes": {}}
    if output.exists():
        report["sizes"] = read_json(output, 1 << 20)["sizes"]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            kept = report["sizes"].get(str(size)) if works else None
            found = {**report["sizes"], str(size): kept or {"files": {}}}
            report["sizes"] = {key: found[key] for key in sorted(found, key=int)}
            rows = report["sizes"][str(size)]
            for name in works or WORK:
                rows[name] = measured(name, Path(folder), size)
                rows["files"] |= {file.name: file.stat().st_size for file in sorted(Path(folder).iterdir())}
                print(size, name, rows[name], flush=True)
                write_json(output, report)  # as far as it is


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    sizes = report["sizes"]
    head = " | ".join(f"{int(size):,} items: at most, stays, own | s" for size in sizes)
    lines = [f"| MB | {head} |", "|---|" + "---|---|" * len(sizes)]
    for name in WORK:
        cells = [_cell(sizes[size].get(name)) for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for file in (TRIE, KNN, CATALOGUE):
        disk = [sizes[size]["files"].get(file) for size in sizes]
        cells = ["not measured | " if number is None else f"{_mb(number)} on disk | " for number in disk]
        lines.append(f"| `{file}` | {' | '.join(cells)} |")
    shared = [
        f"{int(size):,} items, {name} {_mb(row['Pss'])} of {_mb(row['Rss'])} MB"
        for size, rows in sizes.items()
        for name in ("trie", "item-kNN")
        if (row := rows.get(f"{name}: open"))
    ]
    lines.append(f"\nTwo processes that opened the same files, Pss of Rss of each: {'; '.join(shared)}.")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured | "
    return f"{_mb(row['peak'])}, {_mb(row['Rss'])}, {_mb(row['own'])} | {row['seconds']:.1f}"


def _mb(number: int) -> str:
    return f"{number / 1e6:,.0f}"


def write_page(report: dict[str, Any]) -> None:
    """Put the table between its markers."""
    PAGE.write_text(filled(PAGE.read_text(), "scale:memory", table(report)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="Only write the page, from the result.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="Items (default: 10^6 and 10^7).")
    work = "Work to measure, in this order; what reads a file comes after what writes it (default: all)."
    parser.add_argument("--work", nargs="+", choices=WORK, metavar="NAME", help=work)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, folder, size = args.child
        child(name, Path(folder), int(size))
        return
    if not args.table:
        run(list(args.sizes), args.output, args.work)
    if args.output == RESULT:
        write_page(read_json(RESULT, 1 << 20))


if __name__ == "__main__":
    main()
