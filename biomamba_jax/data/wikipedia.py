"""Wikipedia's own dumps (`enwiki-20260101-pages-articles.xml.bz2`): articles as plain prose, page by page.

Needs mwparserfromhell (the [wikipedia] extra) to parse the markup; Wikipedia as Parquet does not.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lxml import etree

from biomamba_jax.data.text import clean_line
from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra
from biomamba_jax.files import read_chunks

_CHUNK_BYTES = 1 << 16
_NO_PROSE = {"table", "gallery", "ref", "math", "chem", "score", "timeline"}
_NOT_A_LINK = re.compile(r"^\s*:?(?:file|image|category|media)\s*:", re.IGNORECASE)
# Lists of links follow these headings.
_TAIL = re.compile(
    r"^==+\s*(?:references|external links|see also|further reading|notes|bibliography|sources|citations)\s*==+\s*$",
    re.IGNORECASE | re.MULTILINE,
)


def read_pages(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (title, prose) of every page; prose is "" for redirects and for pages that are not articles.

    Raises:
      UserError: the file is broken, or mwparserfromhell is not installed.
    """
    parser = etree.XMLPullParser(events=("end",), tag="{*}page", resolve_entities=False, no_network=True)
    last = "before the first page"
    try:
        for chunk in read_chunks(path, _CHUNK_BYTES):
            parser.feed(chunk)
            for _, page in parser.read_events():
                title = page.findtext("{*}title") or ""
                is_article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
                text = page.findtext("{*}revision/{*}text") or "" if is_article else ""
                yield title, prose(text) if text else ""
                last = f"after the page {title!r}"
                page.clear()
                while (parent := page.getparent()) is not None and page.getprevious() is not None:
                    del parent[0]
        parser.close()
    except etree.XMLSyntaxError as error:
        raise UserError(f"{path}: not well-formed XML, {last}: {clean_line(error.msg)}; download it again") from None


def prose(markup: str) -> str:
    """Convert wiki markup to text: keep links' labels, drop templates, tables, references, files and link lists."""
    parser = extra("wikipedia", "mwparserfromhell", "Wikipedia's dumps need mwparserfromhell")
    tail = _TAIL.search(markup)
    code = parser.parse(markup[: tail.start()] if tail else markup)
    for node in [*code.filter_tags(), *code.filter_wikilinks()]:
        name = str(getattr(node, "tag", "")).strip().lower()
        if name in _NO_PROSE or (hasattr(node, "title") and _NOT_A_LINK.match(str(node.title))):
            with suppress(ValueError):  # removed with a node that contained it
                code.remove(node)
    return code.strip_code(normalize=True, collapse=True)
