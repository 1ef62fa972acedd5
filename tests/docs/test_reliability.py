"""The figures of docs/reliability.md are those of docs/results."""

import json
import shutil

from scripts import reliability


def test_the_page_is_fresh():
    assert reliability.main(["--check"]) == 0


def test_other_figures_are_found(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    shutil.copy(reliability.ROOT / reliability.PAGE, tmp_path / reliability.PAGE)
    shutil.copytree(reliability.ROOT / reliability.RESULTS, tmp_path / reliability.RESULTS)
    file = tmp_path / reliability.RESULTS / "chaos_training.json"
    result = json.loads(file.read_text())
    result["sft"]["bit-equal"] = -1
    file.write_text(json.dumps(result))
    assert reliability.main(["--check"], tmp_path) == 1
    assert "docs/reliability.md: expected what" in capsys.readouterr().err
    assert reliability.main([], tmp_path) == 0
    assert "| -1 |" in (tmp_path / reliability.PAGE).read_text()
