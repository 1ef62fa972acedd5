"""Pages in headless Chromium: nothing overflows, no text is broken letter by letter, and axe-core finds no fault."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python")

#: The system's; None where Playwright is to take the one that it fetched.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = (Path(str(axe.__file__)).parent / "axe.min.js").read_text(encoding="utf-8")
SCREENS = [(width, scheme) for width in (320, 375, 768, 1280) for scheme in ("light", "dark")]

#: Elements whose text stands in a column of a few letters: five lines or more of less than seven letters each.
_BROKEN = """() => [...document.querySelectorAll("body *")].filter((node) => {
  const text = [...node.childNodes].filter((c) => c.nodeType === 3 && c.data.trim());
  if (!text.length || !node.getClientRects().length) return false;
  const range = document.createRange();
  range.selectNodeContents(text[0]);
  const lines = new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size;
  return lines >= 5 && text[0].data.trim().length / lines < 7;
}).map((node) => node.outerHTML.slice(0, 120))"""
#: Elements that reach out of the window, unless something around them scrolls.
_OUTSIDE = """() => [...document.querySelectorAll("body *")].filter((node) => {
  const box = node.getBoundingClientRect();
  if (!box.width || box.right <= innerWidth + 1 || node.closest(".scroll, pre, .skip, .unseen")) return false;
  return true;
}).map((node) => node.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            if CHROMIUM is None and "playwright install" in str(error):
                pytest.skip("needs Chromium: playwright install chromium")
            raise
        yield started
        started.close()


def faults(page) -> list:
    """What is wrong with an open page; its context must have been made with ``bypass_csp``, for axe-core."""
    found = [f"outside: {html}" for html in page.evaluate(_OUTSIDE)]
    found += [f"broken: {html}" for html in page.evaluate(_BROKEN)]
    if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        found.append("the page scrolls sideways")
    page.evaluate(f"{AXE}; undefined")
    violations = page.evaluate("axe.run()")["violations"]
    return found + [f"{v['id']}: {node['html'][:120]}" for v in violations for node in v["nodes"]]
