"""README.md for the package index's page, where relative links and pictures lead nowhere. setup.py runs this file."""

from __future__ import annotations

import re

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def absolute_links(text: str, url: str) -> str:
    """Markdown with its relative links under ``url``, a repository's address: ``/raw/HEAD/`` for pictures.

    >>> absolute_links("![a](docs/a.png) [b](B.md#c) [d](https://e.org)", "https://example.org/flr/")
    '![a](https://example.org/flr/raw/HEAD/docs/a.png) [b](https://example.org/flr/blob/HEAD/B.md#c) [d](https://e.org)'
    """
    if not re.fullmatch(r"https://[^\s/]+/\S+", url):
        raise ValueError(f"FLR_PROJECT_URL: expected the https address of the repository, got {url!r}")

    def absolute(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        return f"{picture}[{words}]({url.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{path})"

    return _LINK.sub(absolute, text)


def project_urls(url: str) -> dict[str, str]:
    """Links beside the description.

    >>> project_urls("https://example.org/flr")["Changelog"]
    'https://example.org/flr/blob/HEAD/CHANGELOG.md'
    """
    url = url.rstrip("/")
    pages = {"Documentation": "docs/installation.md", "Changelog": "CHANGELOG.md"}
    return {"Repository": url, "Issues": f"{url}/issues"} | {k: f"{url}/blob/HEAD/{v}" for k, v in pages.items()}
