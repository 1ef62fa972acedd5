"""The page in headless Chromium: it shows what the API says, whatever the titles hold, with mouse and keyboard."""

from __future__ import annotations

import json
import re
import urllib.request

import pytest

from tests.helpers.browser import SCREENS, browser, faults
from tests.helpers.catalogues import nasty_catalogue
from tests.helpers.serving import save, serving

assert browser  # a fixture
EXAMPLES = [["item_0", "item_1", "item_2", "item_9"], ["item_5"] * 12]
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), catalogue=nasty_catalogue())


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "examples.txt").write_text("\n".join("\t".join(history) for history in EXAMPLES))
    with serving(model, folder / "log", "--examples", str(folder / "examples.txt")) as running:
        yield running


@pytest.fixture
def page(browser, server):
    """An open page; at the end nothing was complained about, and nothing was asked of anybody else."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        opened = context.new_page()
        complaints, asked = [], []
        opened.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        opened.on("pageerror", lambda e: complaints.append(str(e)))
        opened.on("dialog", lambda d: complaints.append(d.message))
        opened.on("request", lambda r: asked.append(r.url))
        opened.goto(server.url)
        opened.wait_for_selector("body[data-answered]")
        yield opened
        assert complaints == []
        assert all(url.startswith((server.url, "data:")) for url in asked), asked


def explain(server, history, **more):
    body = {"history": history, "k": 6, "exclude_seen": True, **more}
    request = urllib.request.Request(
        f"{server.url}/v1/explain", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def settle(page, act):
    """Do something that asks the server, and wait for what it says."""
    before = page.get_attribute("body", "data-answered")
    act()
    page.wait_for_selector(
        f'body:not([data-answered="{before}"]):not(.waiting)'
    )  # its policy forbids waiting for an expression


def texts(page, selector):
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def names(server, items):
    return [" ".join(item["title"].split()) or item["item_id"] for item in items]


def test_an_example_is_shown_as_the_api_tells_it(page, server):
    settle(page, lambda: page.click("#example"))
    told = explain(server, EXAMPLES[0])
    assert [" ".join(t.split()) for t in texts(page, "#history .name")] == names(server, told["history"])
    assert [" ".join(t.split()) for t in texts(page, ".items .what button")] == names(server, told["recommendations"])
    assert texts(page, ".items .what .id") == [item["item_id"] for item in told["recommendations"]]
    attention, factors = told["attention"][-1][-1], told["num_factors"]
    cells = texts(page, ".map .cell")
    expected = [f"{100 * attention[k][m]:.0f} %" for m in range(4) for k in range(factors)]
    assert cells == expected
    assert texts(page, ".map .gates td")[:factors] == [f"{100 * g:.0f} %" for g in told["gates"][-1][-1]]
    filled = """gates => gates.map(
        g => g.firstElementChild.getBoundingClientRect().width / g.getBoundingClientRect().width)"""
    assert page.eval_on_selector_all(".map .gate", filled) == pytest.approx(told["gates"][-1][-1], abs=0.01)
    for place, item in enumerate(told["recommendations"]):
        label = page.locator(".why .stack").nth(place).get_attribute("aria-label")
        given = [float(x.replace("−", "-")) for x in re.findall(r"factor \d+ ([+−]?[\d.]+) nats", label)]
        assert given == pytest.approx(item["contributions"], abs=0.00051)
        told_total = page.locator(".why .total").nth(place).inner_text()
        effect = told["effects"]["items"][place]
        assert told_total.startswith(f"{effect['total_times']} (")
        assert f"{abs(sum(item['contributions'])):.3f} nats" in told_total
        assert f"without the factors −{abs(item['base_score']):.3f}" in told_total
    ticks = [float(t.replace("−", "-")) for t in texts(page, ".ticks span")]
    assert ticks == pytest.approx(told["effects"]["ticks"])
    # bars are as long as the numbers say, on this axis
    widths = page.eval_on_selector_all(
        ".why .stack", "stacks => stacks.map(s => [...s.querySelectorAll('.part')].map(p => p.style.width))"
    )
    totals = [sum(float(w.rstrip("%")) for w in row) for row in widths]
    sums = [sum(map(abs, item["contributions"])) for item in told["recommendations"]]
    for total, size in zip(totals, sums, strict=True):
        assert total / 100 * (ticks[-1] - ticks[0]) == pytest.approx(size, rel=1e-3)
    settle(page, lambda: page.click("#example"))
    assert page.locator("#history li.far").count() == 2  # the model looks at the latest ten


def test_choosing_an_item_a_factor_and_a_refinement(page, server):
    settle(page, lambda: page.click("#example"))
    told = explain(server, EXAMPLES[0])
    page.locator(".items .what button").nth(2).press("Enter")
    assert page.locator(".items tr.chosen .id").inner_text() == told["recommendations"][2]["item_id"]
    shares, attention = told["recommendations"][2]["factor_shares"], told["attention"][-1][-1]
    expected = [f"{100 * sum(s * attention[k][m] for k, s in enumerate(shares)):.1f}" for m in range(4)]
    shown = [float(t.rstrip(" %")) for t in texts(page, ".map .bar .number")]
    assert shown == pytest.approx([float(e) for e in expected], abs=0.51)
    page.click("#legend button >> nth=1")
    assert page.locator(".map td.part.dim .cell").count() == 4 * (told["num_factors"] - 1)
    page.click("#legend button >> nth=1")
    page.click("#steps button >> nth=0")
    first = told["attention"][0][0]
    assert texts(page, ".map .cell") == [
        f"{100 * first[k][m]:.0f} %" for m in range(4) for k in range(told["num_factors"])
    ]


def test_typing_with_the_keyboard_reordering_and_removing(page, server):
    page.focus("#query")
    page.keyboard.type("wonder")
    page.wait_for_selector("#options:not([hidden])")
    assert page.get_attribute("#query", "aria-expanded") == "true"
    settle(page, lambda: page.keyboard.press("Enter"))
    assert page.locator("#history .name").inner_text().startswith("<script>alert(1)</script>")  # as text, not as script
    for word in ("item_7", "item_8"):
        page.fill("#query", word)
        page.wait_for_selector(f"#options li:has-text('{word}')")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowUp")
        settle(page, lambda: page.keyboard.press("Enter"))
    assert page.locator("#history li").count() == 3
    told = explain(server, ["item_0", "item_7", "item_8"])
    assert texts(page, ".items .what .id") == [item["item_id"] for item in told["recommendations"]]
    settle(page, lambda: page.locator("#history .up").nth(2).press("Enter"))
    told = explain(server, ["item_0", "item_8", "item_7"])
    assert [" ".join(t.split()) for t in texts(page, "#history .name")] == names(server, told["history"])
    assert texts(page, ".items .what .id") == [item["item_id"] for item in told["recommendations"]]
    settle(page, lambda: page.locator("#history .remove").nth(0).click())
    assert page.locator("#history li").count() == 2
    page.fill("#query", "no such thing")
    page.wait_for_selector("#options li.none")
    page.keyboard.press("Escape")
    assert not page.is_visible("#options")
    settle(page, lambda: page.click("#clear"))
    assert page.is_visible("#empty")
    assert page.locator(".items tbody tr").count() == 6


def test_settings(page, server):
    settle(page, lambda: page.click("#example"))
    settle(page, lambda: page.locator("#k").fill("3"))
    assert page.locator(".items tbody tr").count() == 3
    settle(page, lambda: page.select_option("#scoring", "catalogue"))
    settle(page, lambda: page.uncheck("#exclude"))
    told = explain(server, EXAMPLES[0], k=3, scoring="catalogue", exclude_seen=False)
    assert texts(page, ".items .what .id") == [item["item_id"] for item in told["recommendations"]]


CONTRAST = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (c) => c.map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => { for (; node; node = node.parentElement) {
    const c = getComputedStyle(node).backgroundColor; if (!c.startsWith("rgba(0, 0, 0, 0")) return channels(c); }
    return [255, 255, 255]; };
  return [...document.querySelectorAll("body *")].filter(
    (n) => [...n.childNodes].some((c) => c.nodeType === 3 && c.data.trim())
      && n.getClientRects().length && !n.closest(".skip, .far, .dim, :disabled, noscript"))
    .map((n) => { const a = light(channels(getComputedStyle(n).color)), b = light(ground(n));
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), n.className, n.textContent.slice(0, 40)]; })
    .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_controls_have_names(page, scheme):
    page.emulate_media(color_scheme=scheme)
    settle(page, lambda: page.click("#example"))
    assert page.evaluate(CONTRAST) == []
    nameless = """() => [...document.querySelectorAll("button, input, select")].filter((n) => n.getClientRects().length
        && !(n.getAttribute("aria-label") || n.textContent.trim() || (n.labels && n.labels.length)))
        .map((n) => n.outerHTML)"""
    assert page.evaluate(nameless) == []


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_page_fits_and_is_accessible(browser, server, width, scheme):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "bypass_csp": True}
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("body[data-answered]")
        settle(page, lambda: page.click("#example"))
        page.evaluate("document.getAnimations().forEach((moving) => moving.finish())")
        assert faults(page) == []


def test_the_theme_button_and_a_narrow_window(page):
    settle(page, lambda: page.click("#example"))
    grounds = set()
    for _ in range(2):
        page.click("#theme")
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_token_and_a_model_without_factors(browser, tmp_path):
    model = save(tmp_path / "plain", variant="anchor")
    with (
        serving(model, tmp_path / "log", environment={"FLR_SERVE_TOKEN": TOKEN}) as server,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.goto(server.url)
        for attempt in ("wrong", TOKEN):
            page.wait_for_selector("#login[open]")
            page.fill("#token", attempt)
            page.keyboard.press("Enter")
        page.wait_for_selector("body[data-answered]")
        assert page.locator(".items tbody tr").count() == 6
        assert not page.is_visible("#factors")
        assert "no factors" in page.inner_text("#list-note")
