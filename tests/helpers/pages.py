"""HTML pages are what they claim to be."""

from __future__ import annotations

from html.parser import HTMLParser


class Checker(HTMLParser):
    """Elements are balanced, and nothing is loaded or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object", "b"), tag
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset"):
                assert value.startswith("data:image/png;base64,"), value[:80]
        if tag not in ("meta", "br", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
