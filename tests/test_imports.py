"""The rules of scripts/architecture.py hold for the code, and a breach of each of them is found."""

from __future__ import annotations

import pytest

from scripts import architecture
from scripts.architecture import EVERYTHING, ROOMS, ROOT, Code


@pytest.fixture(scope="module")
def code():
    return Code()


def test_no_import_is_against_the_rules(code):
    assert not code.faults(), "\n" + "\n".join(code.faults())


def test_the_rules_forbid_circles_of_rooms():
    for index, room in enumerate(ROOMS):
        below = {other.name for other in ROOMS[:index]}
        assert room.may == EVERYTHING or {name.split(".")[0] for name in room.may} <= below, room.name
        assert (ROOT / room.path).exists(), room.path
    for name in (name for room in ROOMS for name in room.may if "." in name):
        assert (ROOT / "flr" / f"{name.replace('.', '/')}.py").exists(), name


def test_the_reader_sees_the_code(code):
    """Had it read nothing, nothing would be against the rules."""
    assert set(code.rooms.values()) == set(ROOMS)
    assert {("model", "kernels"), ("decode", "model"), ("cli", "train"), ("bench", "flr")} <= code.arrows()
    assert any(i.written == "triton" for i in code.others)


def test_the_kernels_import_nothing_of_flr(code):
    assert not {target for source, target in code.arrows() if source == "kernels"}


def test_the_command_line_imports_the_benchmarks_by_name_only(code):
    assert ("cli", "bench") not in code.arrows()


def test_picture_and_page_show_the_code(code):
    for path, text in architecture.outputs(code).items():
        assert path.read_text() == text, f"{path.name} is stale: run python -m scripts.architecture"


# A small tree that keeps every rule. Each case below changes one file of it.
TREE = {
    "flr_kernels/__init__.py": "from .ops.sum.op import add\n",
    "flr_kernels/ops/__init__.py": "",
    "flr_kernels/ops/sum/__init__.py": "",
    "flr_kernels/ops/sum/op.py": "import torch\n\ndef add():\n    from . import triton_kernels\n",
    "flr_kernels/ops/sum/triton_kernels.py": "import math\nimport triton\nimport triton.language as tl\n",
    "flr/__init__.py": "from .model.patch import patch\n",
    "flr/files/__init__.py": "import json\n",
    "flr/config.py": "",
    "flr/data/__init__.py": "from .catalogue import Catalogue\nfrom .trie import Trie\n",
    "flr/data/catalogue.py": "from flr.files import write\n",
    "flr/data/trie.py": "from .catalogue import Catalogue\n",
    "flr/model/__init__.py": "",
    "flr/model/patch.py": "import numpy\nfrom flr.data import Trie\nfrom flr_kernels import add\n",
    "flr/decode/__init__.py": "from .beam import search\n",
    "flr/decode/beam.py": "from flr.data import Catalogue\nfrom flr.model.patch import patch\n",
    "flr/cli/__init__.py": "import importlib\nimportlib.import_module('bench.report')\n",
    "bench/__init__.py": "",
    "bench/report.py": "import flr\nfrom flr.cli import main\n",
}


def faults(folder, **changes: str) -> list[str]:
    for name, text in (TREE | changes).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Code(folder).faults()


def test_the_small_tree_keeps_the_rules(tmp_path):
    assert faults(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("flr/config.py", "from flr.data import Catalogue", "config may import nothing of ours; got flr.data"),
        (
            "flr/files/__init__.py",
            "def f():\n    import flr.decode.beam",
            "files may import nothing of ours",
        ),
        ("flr/data/trie.py", "if TYPE_CHECKING:\n    from flr.decode import search", "got flr.decode, which is decode"),
        ("flr/model/patch.py", "from flr.data import Catalogue", "model may import kernels, files, config, data.trie"),
        ("flr/model/patch.py", "from flr import patch_model", "got flr, which is flr"),
        ("flr/data/trie.py", "from flr_kernels import add", "data may import files, config; got flr_kernels"),
        ("flr_kernels/ops/sum/op.py", "from flr.config import FLRConfig", "kernels may import nothing of ours"),
        ("flr_kernels/ops/sum/op.py", "def f():\n    import flr", "kernels may import nothing of ours; got flr"),
        ("flr_kernels/ops/sum/op.py", "import numpy as np", "expected torch, triton or the standard library"),
        ("flr_kernels/ops/sum/op.py", "import triton", "expected triton in a function or in a file named triton_"),
        ("flr_kernels/ops/sum/op.py", "from . import triton_kernels", "got it on import of flr_kernels.ops.sum.op"),
        ("flr/cli/__init__.py", "def f():\n    import bench.report", "cli may import everything; got bench.report"),
        ("flr/decode/beam.py", "from ..data import Catalogue", "expected an absolute import of another room"),
        ("flr/data/trie.py", "from flr.data.catalogue import Catalogue", "expected a relative import inside flr/data/"),
        ("flr/data/catalogue.py", "from .trie import Trie", "circle: "),
        ("flr/data/catalogue.py", "def f():\n    from . import trie", "circle: "),
        ("flr/data/catalogue.py", "def f():\n    from . import Trie", "circle: "),
        ("flr/views.py", "", "flr/views.py: expected a file of a room"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, name, text, message):
    found = faults(tmp_path, **{name: text})
    assert any(message in fault for fault in found), found


def test_check_says_what_is_stale_or_forbidden(tmp_path, capsys):
    assert faults(tmp_path) == []
    assert architecture.main(["--check"], tmp_path) == 1
    assert "architecture.svg: expected what the code gives" in capsys.readouterr().err
    assert architecture.main([], tmp_path) == 0
    picture = tmp_path / architecture.PICTURE
    first = picture.read_bytes()
    assert architecture.main(["--check"], tmp_path) == 0
    picture.unlink()
    assert architecture.main([], tmp_path) == 0
    assert picture.read_bytes() == first
    (tmp_path / "flr/decode/beam.py").write_text("")  # an arrow less
    assert architecture.main(["--check"], tmp_path) == 1
    (tmp_path / "flr/config.py").write_text("import flr")
    assert architecture.main([], tmp_path) == 1
    assert "flr/config.py:1: config may import nothing of ours; got flr" in capsys.readouterr().err
