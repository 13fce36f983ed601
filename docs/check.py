"""Check a built site without a network: its links and pictures, and that it fetches no other's.

Run it: python docs/check.py docs/_build/html. Links to other sites are listed, not fetched.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

# What a browser fetches by itself. Of <link> some are only told to it.
FETCHED = {"script", "img", "source", "iframe", "video", "audio", "embed", "use", "image"}
TOLD = {"canonical", "index", "search", "next", "prev", "author", "license"}


class Page(HTMLParser):
    """The anchors and links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors = {""}
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag is, and where it leads."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        found = {given[name] for name in ("href", "src", "xlink:href", "data") if name in given}
        told = tag == "link" and given.get("rel", "") in TOLD
        is_fetched = tag in FETCHED or (tag == "link" and not told)
        (self.fetched if is_fetched else self.links).update(found)


def main(root: Path) -> int:
    """Print what is wrong, and what is outside; 1 if anything is wrong."""
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    wrong, outside = [], set()
    for path, page in pages.items():
        for link in sorted(page.links | page.fetched):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https") or parts.netloc:
                outside.add(link)
                if link in page.fetched:
                    wrong.append(f"{path.relative_to(root.resolve())} fetches {link}")
            elif parts.scheme not in ("data", "mailto") and not is_there(path, parts, pages):
                wrong.append(f"{path.relative_to(root.resolve())} has a broken link: {link}")
    print(f"{len(pages)} pages; {len(outside)} links to other sites, not followed:")
    print(*sorted(outside), *wrong, sep="\n")
    return int(bool(wrong) or not pages)


def is_there(path: Path, parts: SplitResult, pages: dict[Path, Page]) -> bool:
    """If a link within the site leads to a file, and to an anchor of it."""
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target not in pages:
        return target.is_file()
    return unquote(parts.fragment) in pages[target].anchors


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
