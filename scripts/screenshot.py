"""Take the picture of the server's page that README shows: python scripts/screenshot.py --model quickstart/runs/flr-0

It needs playwright and a Chromium, the system's or the one of ``playwright install chromium``. The PNG holds a digest
of the page's files, by which a test tells a stale picture.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE, PAGE = ROOT / "docs/img/serve.png", ROOT / "flr/serve/static"
KEY = "Source"


def digest() -> str:
    """Of what the page is made of."""
    whole = hashlib.sha256()
    for path in sorted(PAGE.iterdir()):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def taken(url: str, path: Path) -> None:
    """The page at ``url`` with its first example, as a desk shows it by day."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 800}, color_scheme="light")
        page.goto(url)
        page.wait_for_selector("body[data-answered]")
        before = page.get_attribute("body", "data-answered")
        page.click("#example")
        page.wait_for_selector(f'body:not([data-answered="{before}"]):not(.waiting)')
        page.evaluate("document.getAnimations().forEach((moving) => moving.finish())")
        page.screenshot(path=path, full_page=True)
        browser.close()


def small(path: Path) -> None:
    """Keep 128 colours, which a page of flat colours does not miss, and note what the picture is of."""
    from PIL import Image, PngImagePlugin

    note = PngImagePlugin.PngInfo()
    note.add_text(KEY, digest())
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(128).save(path, optimize=True, pnginfo=note)


def main() -> None:
    import uvicorn

    from flr import Recommender
    from flr.serve import Settings, create_app

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--output", type=Path, default=PICTURE)
    args = parser.parse_args()
    app = create_app(Recommender.from_pretrained(args.model), Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.1)
    port = server.servers[0].sockets[0].getsockname()[1]
    taken(f"http://127.0.0.1:{port}", args.output)
    server.should_exit = True
    thread.join()
    small(args.output)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    main()
