"""docs/quality.md shows the committed results, and what README says of them holds."""

import re
from pathlib import Path

from flr.files import read_json

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/quality.md").read_text()


def test_the_tables_are_of_the_committed_results():
    from scripts.quality import page

    assert page(PAGE) == PAGE, "run python scripts/quality.py --table"


def test_models_are_level_with_item_knn_and_ahead_beside_it():
    """README and the page: level alone, ahead with item-kNN as a part."""
    models = read_json(ROOT / "docs/results/quality_instruments.json", 1 << 24)["models"]
    assert "about level with a well-tuned item-kNN" in (ROOT / "README.md").read_text()
    for name, entry in models.items():
        if name != "item-kNN":
            assert abs(entry["alone"]["to_knn"][0]) < 0.003, name
            assert entry["mixed"]["to_knn"][1] > 0, name


def test_factors_are_ahead_on_generated_data_and_find_its_interests():
    report = read_json(ROOT / "docs/results/quickstart.json", 1 << 24)
    ndcg = {}
    for row in report["rows"]:
        ndcg.setdefault(row["mode"], []).append(row["metrics"]["ndcg@10"])
    assert min(ndcg["flr"]) > max(ndcg["anchor"])
    assert min(ndcg["offsets-mixture"]) > max(ndcg["flr-mixture"])
    assert all(found["nmi"] > 10 * found["chance"] for found in report["nmi"].values())


def test_figures_that_were_measured_once_stand_in_the_log():
    """The table of CDs and Office is of runs whose seeds and conditions docs/log.md has."""
    section = re.search(r"## Amazon CDs and Office\n(.*?)\n## ", PAGE, re.S)[1]
    figures = re.findall(r"(?<![\d.])\.\d{4}", section)
    log = (ROOT / "docs/log.md").read_text()
    assert len(figures) == 13
    assert [figure for figure in figures if figure not in log] == []
