"""Text normalization, applied to every title, abstract and document before it is counted or tokenized.

All text is NFC with single spaces, one paragraph a line, so that decode(encode(text)) == text for our tokenizers.
"""

import hashlib
import html
import html.entities
import re
import unicodedata
from collections import Counter

_ESCAPED = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});")
_XML_NAMES = {"&lt;", "&gt;", "&amp;"}
_MAX_ESCAPES = 3
# Publishers also deliver HTML tags as escaped text. One with a known name is markup; `P<0.05`, `a<c>d` and
# `a<b and c>d` are not.
_ESCAPED_TAG = re.compile(
    r"</?(?:(p|o:p|br|hr|div|ul|ol|li)|i|b|u|em|strong|sub|sup|span)(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>", re.IGNORECASE
)
_PLACEHOLDER_TITLES = {"Not Available.", "In Process Citation"}


def clean_line(text: str) -> str:
    """Normalize to NFC, with every run of Unicode white space (also U+00A0, U+2009, U+202F, newlines) as one space."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def clean_document(text: str) -> str:
    """Clean free text line by line and drop empty lines; lone surrogates become U+FFFD."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    lines = (clean_line(line) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def clean_markup(text: str) -> str:
    """Clean the text content of an XML element to one line; unescape text that was escaped more than once.

    HTML tags that arrive as escaped text are dropped; those of paragraphs and line breaks leave a space. Only HTML
    entities with a semicolon are unescaped; `AT&T;` and `R&D` stay.
    """
    for _ in range(_MAX_ESCAPES):
        before = text
        if "&" in text:
            text = _ESCAPED.sub(_unescape, text)
        if "<" in text:
            text = _ESCAPED_TAG.sub(lambda tag: " " if tag[1] else "", text)
        if text == before:
            break
    return clean_line(text)


def _unescape(match: re.Match[str]) -> str:
    """Unescape an entity; html.unescape alone would also replace the `&not` of an unknown `&notit;`."""
    known = match[0][1] == "#" or match[0][1:] in html.entities.html5
    return html.unescape(match[0]) if known else match[0]


def html_entities(text: str) -> int:
    """Count HTML entities that XML does not have, such as `&nbsp;` or `&rsquo;`."""
    if "&" not in text:
        return 0
    return sum(name[1:] in html.entities.html5 and name not in _XML_NAMES for name in _ESCAPED.findall(text))


def remaining_markup(text: str) -> tuple[bool, bool]:
    """Return (True if a text has tags left, True if it has entities left): two known faults of PubMed corpora."""
    return _ESCAPED_TAG.search(text) is not None, any(
        name[1] == "#" or name[1:] in html.entities.html5 for name in _ESCAPED.findall(text)
    )


def clean_title(text: str) -> str:
    """Clean a title; drop the [brackets] that mark a translation, and NLM's placeholders."""
    title = clean_markup(text)
    if title.startswith("[") and title.endswith(("]", "].")) and _closing_bracket(title) >= len(title) - 2:
        title = (title[1:-2] + "." if title.endswith(".") else title[1:-1]).strip()
        title = title[:-1] if title.endswith(("..", "?.", "!.")) else title
    return "" if title in _PLACEHOLDER_TITLES else title


def _closing_bracket(text: str) -> int:
    """Return the index of the bracket that closes text[0], -1 without one: `[3H]X in [14C].` is not a translation."""
    depth = 0
    for match in re.finditer(r"[\[\]]", text):
        depth += 1 if match[0] == "[" else -1
        if depth == 0:
            return match.start()
    return -1


def normalized_digest(text: str) -> bytes:
    """Return a 16-byte hash that ignores case and white space."""
    return hashlib.blake2b("".join(text.casefold().split()).encode(), digest_size=16).digest()


def unspelled(text: str, spelled: str) -> tuple[int, int]:
    """Return the bytes of the characters of a text that `spelled` lacks, and of all of them, white space aside."""
    characters, kept = (Counter(unicodedata.normalize("NFC", each)) for each in (text, spelled))
    return _bytes(characters - kept), _bytes(characters)


def _bytes(characters: Counter[str]) -> int:
    return sum(count * len(each.encode()) for each, count in characters.items() if not each.isspace())


def split_position(key: bytes) -> int:
    """Return a hash of a document's key in [0, 2**32), which alone decides its split."""
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big")
