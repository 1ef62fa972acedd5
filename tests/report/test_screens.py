"""The report and the explanation on phones and desks, light and dark."""

from __future__ import annotations

import pytest

from flr.cli import main
from flr.cli.compare import MODES
from flr.report.quickstart import quickstart_report
from tests.helpers.browser import SCREENS, browser, faults
from tests.helpers.catalogues import nasty_catalogue
from tests.helpers.models import build_recommender
from tests.helpers.runs import run_folder

assert browser  # a fixture


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of an explanation, of one of many factors, of a whole report, and of two runs."""
    out = tmp_path_factory.mktemp("pages")
    explanation = build_recommender(catalogue=nasty_catalogue()).explain(["item_0", "item_1", "item_2", "item_9"], k=4)
    explanation.html(out / "why.html")
    build_recommender(num_factors=8).explain(["item_0", "item_1"], k=2).html(out / "many.html")
    metrics = {f"{name}@{k}": 0.12345 for name in ("hr", "ndcg") for k in (5, 10)}
    intervals = {"hr@10": (0.1042, 0.2042), "ndcg@10": (0.1042, 0.2042)}
    rows = [{"mode": mode, "seed": 0, "metrics": metrics, "intervals": intervals, "seconds": 9.0} for mode in MODES]
    shares = [[9, 1, 0, 3], [0, 5, 5, 1], [2, 2, 2, 2], [0, 0, 1, 9]]
    agreement = {"nmi": 0.4, "chance": 0.03, "chance_high": 0.04, "confusion": shares}
    quickstart_report(
        {
            "title": "Factorized latent reasoning: quickstart",
            "text": "Models of 54,272 parameters on generated data.",
            "rows": rows,
            "differences": {"flr-plain": {"ndcg@10": (0.01, -0.01, 0.02)}},
            "nmi": {"flr-plain": agreement},
            "names": MODES,
            "example": explanation.to_dict(),
            "next_steps": ["flr recommend --model quickstart/runs/flr-0 --history item_5 item_54 item_158"],
            "settings": {"SFTConfig": "x" * 300},
        },
        out / "report.html",
    )
    assert (
        main(["report", *(str(run_folder(out / name, 0.5)) for name in ("a", "b")), "--output", str(out / "runs.html")])
        == 0
    )
    return {path.stem: path.as_uri() for path in out.glob("*.html")}


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("name", ["why", "many", "report", "runs"])
def test_a_page_fits_and_is_accessible(browser, pages, name, width, scheme):
    with browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True) as context:
        page = context.new_page()
        page.goto(pages[name])
        page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
        assert faults(page) == []


def test_a_phone_shows_the_comparison_whole(browser, pages):
    """Nothing has to be scrolled sideways to see what the page is about."""
    with browser.new_context(viewport={"width": 320, "height": 800}) as context:
        page = context.new_page()
        page.goto(pages["report"])
        for label in ("Metrics by mode", "Agreement of factors and interests"):
            box = page.get_by_role("region", name=label, exact=True)
            assert box.evaluate("node => node.scrollWidth <= node.clientWidth"), label


def test_the_plot_has_a_dark_form(browser, pages):
    shown = {}
    for scheme in ("light", "dark"):
        with browser.new_context(color_scheme=scheme) as context:
            page = context.new_page()
            page.goto(pages["report"])
            shown[scheme] = page.evaluate("document.querySelector('figure img').currentSrc")
    assert shown["light"] != shown["dark"]


def test_the_checks_find_what_they_are_for(browser):
    wrong = """<!DOCTYPE html><html lang="en"><title>t</title><main><h1>t</h1><div style="width: 900px">wide</div>
      <p style="width: 1rem; overflow-wrap: anywhere">Kind of Blue</p><p style="color: #bbb">pale</p></main></html>"""
    with browser.new_context(viewport={"width": 375, "height": 800}) as context:
        page = context.new_page()
        page.set_content(wrong)
        found = " ".join(faults(page))
    assert all(word in found for word in ("outside", "broken", "sideways", "color-contrast"))
