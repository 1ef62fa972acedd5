"""Good data files, and seeded damage to them: of their bytes, their text, their JSON values, their Parquet tables."""

from __future__ import annotations

import ast
import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flr.data import RecDataset, RecProcessor, build_tokenizer, load_dataset, planted_dataset
from tests.helpers.logs import ROWS, recbole

_DATA = planted_dataset(num_items=20, num_users=30, seed=3)
_WEIRD: tuple[Any, ...] = (None, [], {}, "", "x", -1, 0, 1.5, 1e300, 10**9, 10**30, True, [[None]], {"a": 1}, "\ud800")
_HUGE = ("9" * 100_000, "1e300", "-1e300", "NaN", "inf", str(2**63), "-" + "8" * 30, "0x10", "1_000", "١٢٣", "")


def _prepared(folder: Path) -> None:
    _DATA.save(folder)


def _prepared_old(folder: Path) -> None:
    """As version 0.1 wrote it, without hashes of its files."""
    _DATA.save(folder)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    (folder / "meta.json").write_text(json.dumps(meta))


def _published(folder: Path) -> None:
    folder.mkdir()
    catalogue = _DATA.catalogue
    lines = (f"{title}\t{item}\n" for item, title in zip(catalogue.item_ids, catalogue.titles, strict=True))
    (folder / "items.txt").write_text("".join(lines), encoding="utf-8")
    for part in ("train", "valid", "test"):
        rows = ["user_id,history_item_id,item_id,timestamp"]
        for row in getattr(_DATA, part):
            history = [catalogue.item_ids[i] for i in row.history]
            rows.append(f'{row.user},"{history}",{catalogue.item_ids[row.target]},{row.timestamp}')
        (folder / f"{part}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _recbole(folder: Path) -> None:
    recbole(folder, ROWS, items=["item_id:token\ttitle:token_seq", *(f"i{i}\tTitle é {i}" for i in range(5))])


def _parquet(folder: Path) -> None:
    folder.mkdir()
    columns = {name: [f"u{u}" if name == "user" else (u + i) % 5 if name == "item" else 100 * i + u
                      for u in range(10) for i in range(5)] for name in ("user", "item", "timestamp")}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    items = {"item": list(range(5)), "title": list("ABCDE"), "sid": [["<a>", f"<{i}>"] for i in range(5)]}
    pq.write_table(pa.table({**items, "price": [0.5] * 5}), folder / "items.parquet")


def _amazon(folder: Path) -> None:
    folder.mkdir()
    events = [{"reviewerID": f"u{u}", "asin": f"i{(u + i) % 5}", "unixReviewTime": 10**9 + 100 * i + u}
              for u in range(10) for i in range(5)]  # fmt: skip
    (folder / "reviews.json").write_text("".join(json.dumps(event) + "\n" for event in events))
    with gzip.open(folder / "meta.json.gz", "wt") as stream:
        stream.writelines(json.dumps({"asin": f"i{i}", "title": f"Title {i}"}) + "\n" for i in range(5))


def _movielens(folder: Path) -> None:
    folder.mkdir()
    rows = (f"{u}::{(u + i) % 5}::5::{10**9 + 100 * i + u}\n" for u in range(10) for i in range(5))
    (folder / "ratings.dat").write_text("".join(rows))
    (folder / "movies.dat").write_bytes("".join(f"{i}::Amélie {i}::Drama\n" for i in range(5)).encode("latin-1"))


def _steam(folder: Path) -> None:
    folder.mkdir()
    days = [{"username": f"u{u}", "product_id": str((u + i) % 5), "date": f"2015-01-{1 + i + 5 * (u % 5):02}"}
            for u in range(10) for i in range(5)]  # fmt: skip
    with gzip.open(folder / "steam_reviews.json.gz", "wt") as stream:
        stream.writelines(f"{day}\n" for day in days)
    (folder / "steam_games.json").write_text("".join(f"{{u'id': u'{i}', u'title': u'Game {i}'}}\n" for i in range(5)))


def _log(folder: Path) -> None:
    folder.mkdir()
    rows = (f'u{u},"i{(u + i) % 5}",2015-01-{1 + i + 5 * (u % 5):02}\n' for u in range(10) for i in range(5))
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))


def _sequences(folder: Path) -> None:
    folder.mkdir()
    (folder / "inter.json").write_text(json.dumps({f"u{u}": [(u + i) % 5 for i in range(5)] for u in range(10)}))
    (folder / "index.json").write_text(json.dumps({str(i): ["<a_1>", f"<b_{i}>"] for i in range(5)}))
    (folder / "item.json").write_text(json.dumps({str(i): {"title": f"Title {i}"} for i in range(5)}))


def _processor(folder: Path, codec: str = "id") -> None:
    catalogue = _DATA.catalogue
    RecProcessor(build_tokenizer(catalogue, codec, vocab_size=300), catalogue, codec).save_pretrained(folder)


def _read_amazon(folder: Path) -> RecDataset:
    return load_dataset(folder / "reviews.json", "amazon", metadata=folder / "meta.json.gz")


#: What makes a folder of each form, and what reads it.
FORMS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "prepared": (_prepared, load_dataset),
    "prepared-old": (_prepared_old, load_dataset),
    "published": (_published, load_dataset),
    "recbole": (_recbole, load_dataset),
    "parquet": (_parquet, load_dataset),
    "amazon": (_amazon, _read_amazon),
    "movielens": (_movielens, partial(load_dataset, format="movielens")),
    "steam": (_steam, partial(load_dataset, format="steam")),
    "log": (_log, lambda folder: load_dataset(folder / "log.csv", "csv")),
    "sequences": (_sequences, load_dataset),
    "processor-id": (_processor, RecProcessor.from_pretrained),
    "processor-title": (partial(_processor, codec="title"), RecProcessor.from_pretrained),
}


# ---------------------------------------------------------------- damage: (file, generator) -> None


def _bits(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _slices(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    middle = content[a:b]
    ways = (b"", middle * 2, bytes(b - a), rng.randbytes(b - a), middle[::-1], b"\r\n" + middle, b'"' + middle)
    file.write_bytes(content[:a] + rng.choice(ways) + content[b:])


def _cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    ways = (
        content[: rng.randrange(len(content))],
        b"",
        content + rng.randbytes(50),
        content * 2,
        b"\xef\xbb\xbf" + content,
    )
    file.write_bytes(rng.choice(ways))


def _not_a_file(file: Path, rng: random.Random) -> None:
    file.unlink()
    rng.choice((lambda: None, file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero")))()


def _other_file(file: Path, rng: random.Random) -> None:
    others = [path for path in file.parent.iterdir() if path.is_file()]
    shutil.copyfile(rng.choice(others), file.with_name("copy"))
    os.replace(file.with_name("copy"), file)


def _encoding(file: Path, rng: random.Random) -> None:
    text = file.read_bytes().decode("utf-8", "replace")
    file.write_bytes(text.encode(rng.choice(("utf-16", "utf-32", "latin-1", "utf-7", "cp037")), "replace"))


def _lines(file: Path, rng: random.Random) -> None:
    lines = file.read_text(encoding="utf-8").split("\n")
    place = rng.randrange(len(lines))
    line = lines[place]
    ways = (
        [],
        [line, line],
        [line[: len(line) // 2]],
        [line + "\0"],
        [line * 50_000],
        [rng.choice(lines)],
        ["", line, ""],
    )
    lines[place : place + 1] = rng.choice(ways)
    if rng.random() < 0.2:
        rng.shuffle(lines)
    file.write_text("\n".join(lines), encoding="utf-8")


def _cells(file: Path, rng: random.Random) -> None:
    """A cell of a row or the header: removed, repeated, another value, or two of them swapped in every row."""
    separator = "," if file.suffix == ".csv" else "\t"
    rows = [line.split(separator) for line in file.read_text(encoding="utf-8").split("\n")]
    chosen = rows if rng.random() < 0.3 else [rng.choice(rows)]
    width = max(map(len, chosen))
    i, j, way, value = rng.randrange(width), rng.randrange(width), rng.randrange(4), rng.choice(_HUGE)
    for row in chosen:
        if max(i, j) < len(row):
            if way == 0:
                del row[i]
            elif way == 1:
                row.insert(i, row[j])
            elif way == 2:
                row[i], row[j] = row[j], row[i]
            else:
                row[i] = value
    file.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8")


def _values(file: Path, rng: random.Random) -> None:
    """A value somewhere in JSON or a Python dict: another one, gone, huge, nested up to a hundred thousand levels."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        whole = file.suffix == ".json" and file.name not in ("reviews.json", "steam_games.json")
        lines = [stream.read()] if whole else stream.read().splitlines()
    place = rng.randrange(len(lines))
    is_python = file.name.startswith("steam_")
    root = ast.literal_eval(lines[place]) if is_python else json.loads(lines[place])
    node, key = root, None
    while isinstance(node, (dict, list)) and node and (key is None or rng.random() < 0.7):
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    way = rng.randrange(5)
    if way == 0:
        del parent[key]
    else:
        parent[key] = rng.choice(_WEIRD) if way < 4 else "@"
    deep = rng.choice((1000, 100_000))
    raw = rng.choice(
        (rng.choice(_HUGE[:7]), "[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, '"' + "x" * 500_000 + '"')
    )
    lines[place] = repr(root).replace("'@'", raw) if is_python else json.dumps(root).replace('"@"', raw)
    with opener(file, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(lines))


def _table(file: Path, rng: random.Random) -> None:
    """A column of a Parquet file: nulls, another type, another name, gone, twice, swapped, shuffled, extreme values."""
    table = pq.read_table(file)
    i, j = (rng.randrange(table.num_columns) for _ in range(2))
    field, rows = table.schema.field(i), table.num_rows
    shuffled = pa.array(rng.sample(range(rows), rows))
    number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    junk = pa.Array.from_buffers(pa.string(), rows, [None, pa.array(range(rows + 1), pa.int32()).buffers()[1],
                                                     pa.py_buffer(b"\xff" * max(rows, 1))])  # fmt: skip
    columns: tuple[Any, ...] = (
        pa.nulls(rows, field.type), pa.nulls(rows), junk, pa.array([b"x"] * rows), pa.array([[1, None]] * rows),
        pa.array([rng.choice((2**62, -1, 0))] * rows), pa.array([rng.choice((1e300, float("nan"), -1.0))] * rows),
        table[i].take(shuffled), table[i].take(pa.array([0] * rows, pa.int64())), table[j],
        table[i].cast(pa.string()) if number else table[i],
    )  # fmt: skip
    way = rng.randrange(len(columns) + 5)
    if way < len(columns):
        changed = table.set_column(i, field.name, columns[way])
    elif way == len(columns):
        changed = table.remove_column(i)
    elif way == len(columns) + 1:
        changed = table.append_column(field.name, table[i])
    elif way == len(columns) + 2:
        names = table.column_names
        names[i], names[j] = names[j], names[i]
        changed = table.rename_columns(names)
    else:
        changed = (table.take(shuffled), table.slice(0, rng.randrange(rows)))[way - len(columns) - 3]
    pq.write_table(changed, file)


def _tensors(file: Path, rng: random.Random) -> None:
    """A tensor of a safetensors file: gone, renamed, another shape or type, numbers that are none, one more."""
    with safe_open(file, framework="pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    worst = float("nan") if value.is_floating_point() else torch.iinfo(value.dtype).max
    ways: tuple[Any, ...] = (
        {}, {f"{name}.odd": value}, {name: value.flatten()}, {name: value.to(torch.int8)}, {name: value[:1].clone()},
        {name: value, "odd": value.clone()}, {name: torch.full_like(value, worst)},
        {name: value.repeat(*[2] * value.dim())}, {name: value.half()},
    )  # fmt: skip
    save_file({**tensors, **rng.choice(ways)}, file, {"format": "pt"})


_BYTES = (_bits, _bits, _slices, _cut, _not_a_file, _other_file, _encoding)
_BY_KIND: dict[str, tuple[Callable[[Path, random.Random], None], ...]] = {
    ".json": (_values, _values, _values, _lines),
    ".gz": (_values, _values),
    ".csv": (_cells, _cells, _lines),
    ".txt": (_cells, _cells, _lines),
    ".inter": (_cells, _cells, _lines),
    ".item": (_cells, _cells, _lines),
    ".safetensors": (_tensors, _tensors, _tensors),
    ".parquet": (_table, _table, _table, _table),
}


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of ``folder``; says what was done to which."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    way = rng.choice(_BYTES + _BY_KIND.get(file.suffix, ()) * 2)
    way(file, rng)
    return f"{way.__name__.strip('_')} of {file.name}"
