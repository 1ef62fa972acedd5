"""Which room of the package may import which: the rules, what the code does, and the picture of both.

    python -m scripts.architecture           # write docs/figures/architecture.svg and the table in docs/architecture.md
    python -m scripts.architecture --check   # exit 1 where they are stale or an import is against the rules

Imports are read from the source. Those in functions and under ``TYPE_CHECKING`` count like any other, and a name that
an ``__init__.py`` passes on counts as an import of the module that defines it, too.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
PICTURE, PAGE = "docs/figures/architecture.svg", "docs/architecture.md"


class Room(NamedTuple):
    """A folder or a file with one purpose; ``may`` names the rooms, or single modules of rooms, that it may import."""

    name: str
    path: str
    purpose: str
    may: tuple[str, ...] = ()


#: For ``may``: every room that stands before.
EVERYTHING = ("everything",)
#: Bottom first: a room may import only what stands before it.
ROOMS = (
    Room("kernels", "flr_kernels/", "six fused operations and their backends"),
    Room("lazy", "flr/lazy.py", "names imported at their first use"),
    Room("files", "flr/files/", "files that appear whole or not at all"),
    Room("config", "flr/config.py", "what kind of thought, and constants of all"),
    Room("data", "flr/data/", "catalogue, codecs, trie, logs, prompts, batches", ("files", "config")),
    Room("report", "flr/report/", "HTML pages, plots, model cards", ("files",)),
    Room("model", "flr/model/", "the latent thought in a causal LM", ("kernels", "files", "config", "data.trie")),
    Room(
        "sids",
        "flr/sids/",
        "semantic IDs: embeddings, codebooks",
        ("lazy", "files", "config", "data", "model.backbone", "model.folder"),
    ),
    Room("decode", "flr/decode/", "from a prompt to items", ("kernels", "config", "data", "model")),
    Room("explain", "flr/explain/", "what the factors did", ("data", "model", "decode")),
    Room(
        "evaluate",
        "flr/evaluate/",
        "ranks, metrics, baselines",
        ("kernels", "files", "data", "model.backbone", "decode"),
    ),
    Room(
        "recommend",
        "flr/recommend/",
        "histories by name, items with reasons",
        ("config", "data", "report", "model", "decode", "explain"),
    ),
    Room("flr", "flr/__init__.py", "the public names", ("lazy", "config", "model", "recommend")),
    Room("batch", "flr/batch/", "everybody's lists, offline", ("files", "config", "data", "model", "recommend", "flr")),
    Room(
        "train",
        "flr/train/",
        "supervised training, latent GRPO",
        ("lazy", "kernels", "files", "config", "data", "model", "decode", "evaluate"),
    ),
    Room("serve", "flr/serve/", "recommendations over HTTP", ("lazy", "config", "data", "decode", "recommend", "flr")),
    Room("cli", "flr/cli/", "the commands; bench/ by its name alone", EVERYTHING),
    Room("bench", "bench/", "speed and memory beside competitors", EVERYTHING),
    Room("scripts", "scripts/", "experiments, tuning, pictures", EVERYTHING),
)


class Import(NamedTuple):
    """One name that a module imports.

    ``written`` is the module that the statement names, ``target`` the one that defines the name, ``lazy`` whether
    importing ``source`` leaves the statement out.
    """

    source: str
    written: str
    target: str
    where: str
    relative: bool
    lazy: bool


def module_of(path: Path) -> str:
    """The dotted name of a file below the root, an ``__init__.py`` being its folder.

    >>> module_of(Path("flr/data/trie.py")), module_of(Path("flr/data/__init__.py"))
    ('flr.data.trie', 'flr.data')
    """
    return ".".join((path.parent if path.name == "__init__.py" else path.with_suffix("")).parts)


def room_of(path: Path) -> Room | None:
    """The room that a file below the root belongs to."""
    for room in ROOMS:
        if path.as_posix() == room.path or (room.path.endswith("/") and path.as_posix().startswith(room.path)):
            return room
    return None


class Code:
    """The modules below a root and their imports of each other (``imports``) and of other packages (``others``)."""

    def __init__(self, root: Path = ROOT) -> None:
        folders = {room.path.split("/")[0] for room in ROOMS}
        files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
        self.paths = {module_of(path.relative_to(root)): path.relative_to(root) for path in files}
        self.rooms = {name: room_of(path) for name, path in self.paths.items()}
        trees = {name: ast.parse((root / path).read_text(), str(path)) for name, path in self.paths.items()}
        found = [(name, *statement) for name, tree in trees.items() for statement in _statements(tree)]
        self._passed_on: dict[tuple[str, str], tuple[str, str]] = {}
        for name, node, _ in found:
            if isinstance(node, ast.ImportFrom) and self._is_package(name):
                base = self._base(name, node)
                self._passed_on |= {(name, alias.asname or alias.name): (base, alias.name) for alias in node.names}
        self.imports: list[Import] = []
        self.others: list[Import] = []
        for name, node, lazy in found:
            base = self._base(name, node) if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                where = f"{self.paths[name]}:{node.lineno}"
                relative = isinstance(node, ast.ImportFrom) and node.level > 0
                written, target = self._resolved(base, alias.name)
                if written not in self.paths:
                    self.others.append(Import(name, written, target, where, relative, lazy))
                elif target != name:
                    self.imports.append(Import(name, written, target, where, relative, lazy))

    def _is_package(self, name: str) -> bool:
        return self.paths[name].name == "__init__.py"

    def _base(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = name.split(".") if self._is_package(name) else name.split(".")[:-1]
        return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])

    def _resolved(self, base: str, name: str) -> tuple[str, str]:
        """The module that ``from base import name`` names (``import name`` if no base), and the one that defines it."""
        whole = f"{base}.{name}" if base else name
        if whole in self.paths:
            return whole, whole
        if not base:  # import a.b.c of something that is no module of ours, or of a folder without __init__.py
            return whole, whole
        target, seen = (base, name), set()
        while target in self._passed_on and target not in seen:
            seen.add(target)
            target = self._passed_on[target]
        module = ".".join(target) if ".".join(target) in self.paths else target[0]
        return base, module if module in self.paths else base

    def arrows(self) -> set[tuple[str, str]]:
        """Pairs of rooms, the first of which imports the second."""
        pairs = ((self.rooms[i.source], self.rooms[m]) for i in self.imports for m in (i.written, i.target))
        return {(a.name, b.name) for a, b in pairs if a and b and a != b}

    def faults(self) -> list[str]:
        """Every breach of the rules, a line each."""
        found = [*self._homeless(), *self._against(), *self._forms(), *self._circles(), *self._needs()]
        return list(dict.fromkeys(found))

    def _homeless(self) -> Iterator[str]:
        for name, room in self.rooms.items():
            if room is None:
                yield f"{self.paths[name]}: expected a file of a room (ROOMS in scripts/architecture.py), got none"

    def _against(self) -> Iterator[str]:
        for i in self.imports:
            own = self.rooms[i.source]
            for module in dict.fromkeys((i.written, i.target)):
                other = self.rooms[module]
                if own and other and own != other and not self._allowed(own, other, i.target):
                    expected = ", ".join(own.may) or "nothing of ours"
                    yield f"{i.where}: {own.name} may import {expected}; got {module}, which is {other.name}"

    def _allowed(self, own: Room, other: Room, target: str) -> bool:
        if own.may == EVERYTHING:
            return ROOMS.index(other) < ROOMS.index(own)
        names = [way.partition(".")[2] for way in own.may if way.split(".")[0] == other.name]
        # of a single module, what counts is where the name is defined
        folder = module_of(Path(other.path))
        return any(not name or f"{target}.".startswith(f"{folder}.{name}.") for name in names)

    def _forms(self) -> Iterator[str]:
        """Relative inside a room, absolute from another one; ``flr/__init__.py``, the folder of the rooms, is free."""
        for i in self.imports:
            own, other = self.rooms[i.source], self.rooms[i.written]
            if own is None or other is None or own.name == "flr":
                continue
            if i.relative and own != other:
                yield f"{i.where}: expected an absolute import of another room, got a relative one of {i.written}"
            if not i.relative and own == other:
                yield f"{i.where}: expected a relative import inside {own.path}, got an absolute one of {i.written}"

    def _circles(self) -> Iterator[str]:
        graph: dict[str, set[str]] = {name: set() for name in self.paths}
        for i in self.imports:
            passes_on = self._is_package(i.source) and i.target.startswith(f"{i.source}.")  # names of its own folder
            if not passes_on:
                graph[i.source].add(i.target)
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            yield f"circle: {' imports '.join(reversed(error.args[1]))}"

    def _needs(self) -> Iterator[str]:
        """Importing ``flr_kernels`` needs torch alone: triton waits in files named ``triton_…`` and in functions."""
        needs = {}
        for i in self.others:
            package = i.written.split(".")[0]
            if i.lazy or not i.source.startswith("flr_kernels"):
                continue
            if package == "triton":
                needs[i.source] = i.where
            elif package != "torch" and package not in sys.stdlib_module_names:
                yield f"{i.where}: expected torch, triton or the standard library on import, got {i.written}"
        eager = [i for i in self.imports if not i.lazy and i.source.startswith("flr_kernels")]
        for _ in self.paths:
            needs |= {i.source: i.where for i in eager if i.target in needs and i.source not in needs}
        for name, where in needs.items():
            if not self.paths[name].name.startswith("triton_"):
                yield f"{where}: expected triton in a function or in a file named triton_…, got it on import of {name}"


def _statements(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether importing the module leaves them out: in a function or under ``TYPE_CHECKING``."""
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, lazy = stack.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = inside or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        stack += [(child, inside) for child in reversed(list(ast.iter_child_nodes(node)))]


def rules() -> str:
    """The table of docs/architecture.md, the top room first, as in the picture."""
    lines = ["| room | path | holds | may import |", "| --- | --- | --- | --- |"]
    for room in reversed(ROOMS):
        may = "everything below" if room.may == EVERYTHING else ", ".join(room.may) or "nothing of ours"
        lines.append(f"| {room.name} | `{room.path}` | {room.purpose} | {may} |")
    return "\n".join(lines)


WIDTH, ROW, CELL, LEFT, TOP = 850, 30, 22, 16, 128
SIDE = WIDTH - LEFT - CELL * len(ROOMS)  # where the matrix begins
INK, SOFT, LINE, NEVER, RING, BLUE = "#1f2933", "#52606d", "#d9dfe5", "#eef1f4", "#9aa5b1", "#2f6ea8"
COLOURS = {"kernels": "#c2571a", "bench": "#66727f", "scripts": "#66727f"}
FONTS = "'DejaVu Sans', Verdana, 'Segoe UI', Helvetica, Arial, sans-serif"


def draw(arrows: set[tuple[str, str]]) -> str:
    """The rooms as a stack, bottom at the bottom, and beside each the rooms that it imports."""
    bottom = TOP + ROW * len(ROOMS)
    height = bottom + 54
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="{FONTS}" font-size="11">',
        "<title>The rooms of the package, bottom at the bottom, and which imports which</title>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="#ffffff" stroke="{LINE}"/>',
        _text(LEFT, 34, "What stands on what", INK, 'font-size="17" font-weight="bold"'),
        _text(LEFT, 58, "A room may import rooms below it, never one above it.", SOFT, 'font-size="12"'),
        _text(LEFT, 76, "Read a row to the right: a dot is a room that it imports.", SOFT, 'font-size="12"'),
    ]
    for index, room in enumerate(ROOMS):
        x, y, colour = SIDE + CELL * index, bottom - ROW * (index + 1), COLOURS.get(room.name, BLUE)
        out += [
            _box(LEFT, y + 2, SIDE - LEFT - 14, ROW - 4, colour, 'fill-opacity="0.1"'),
            _box(LEFT, y + 2, 4, ROW - 4, colour),
            _text(LEFT + 13, y + 19, room.path.rstrip("/"), INK, 'font-size="12" font-weight="bold"'),
            _text(LEFT + 126, y + 19, room.purpose, SOFT),
            _text(0, 0, room.name, INK, f'transform="translate({x + CELL / 2 + 4:g} {TOP - 8}) rotate(-60)"'),
            _box(x + CELL, y, WIDTH - LEFT - x - CELL, ROW, NEVER),
            _box(x + 3, y + 7, 16, 16, colour, 'rx="3"'),
        ]
        for column, other in enumerate(ROOMS[:index]):
            if (room.name, other.name) in arrows:
                out.append(_dot(SIDE + CELL * column + CELL // 2, y + ROW // 2))
            elif room.may == EVERYTHING or other.name in {way.split(".")[0] for way in room.may}:
                out.append(_ring(SIDE + CELL * column + CELL // 2, y + ROW // 2))
    for index in range(len(ROOMS) + 1):
        x, y = SIDE + CELL * index, TOP + ROW * index
        out.append(f'<path d="M{SIDE} {y}H{WIDTH - LEFT}M{x} {TOP}V{bottom}" stroke="{LINE}"/>')
    y = bottom + 29
    legend = {
        SIDE - 228: (_box(SIDE - 228, y - 8, 16, 16, BLUE, 'rx="3"'), "the room itself"),
        SIDE - 84: (_dot(SIDE - 76, y), "imports"),
        SIDE + 12: (_ring(SIDE + 20, y), "may, does not"),
        SIDE + 148: (_box(SIDE + 148, y - 8, 16, 16, NEVER, f'stroke="{LINE}"'), "never: it stands above"),
    }
    for x, (mark, text) in legend.items():
        out += [mark, _text(x + 24, y + 4, text, SOFT)]
    return "\n".join([*out, "</svg>", ""])


def _text(x: float, y: float, text: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" {more}>{text}</text>'.replace(" >", ">")


def _box(x: float, y: float, width: float, height: float, colour: str, more: str = "") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}" {more}/>'.replace(" />", "/>")


def _dot(x: int, y: int) -> str:
    return f'<circle cx="{x}" cy="{y}" r="5" fill="{INK}"/>'


def _ring(x: int, y: int) -> str:
    return f'<circle cx="{x}" cy="{y}" r="3.5" fill="none" stroke="{RING}" stroke-width="1.2"/>'


def outputs(code: Code, root: Path = ROOT) -> dict[Path, str]:
    """What the picture and the page should hold."""
    page = root / PAGE
    found = {root / PICTURE: draw(code.arrows())}
    if page.exists():
        found[page] = filled(page.read_text(), "architecture:rules", rules())
    return found


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where something is stale or against the rules"
    )
    options = parser.parse_args(argv)
    code = Code(root)
    messages = code.faults()
    if not messages:
        for path, text in outputs(code, root).items():
            if path.exists() and path.read_text() == text:
                continue
            name = path.relative_to(root)
            if options.check:
                messages.append(
                    f"{name}: expected what the code gives, got something else: run python -m scripts.architecture"
                )
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                print(f"wrote {name}")
    print("\n".join(messages), file=sys.stderr, end="\n" if messages else "")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
