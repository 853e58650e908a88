"""Readers of annotated texts in the formats of published corpora.

    conll       a word and its tag a line, the tag last; IOB or IOBES; an empty line ends a sentence
    pubtator    PMID|t|title, PMID|a|abstract, then lines of mentions and of relations
    bioc        BioC XML: passages, annotations, relations
    marked      JSON lines {"text", "label"}; the two entities in << >> and [[ ]], as ChemProt's
    spans       JSON lines {"text", "spans": [{"start", "end", "type"}], "labels", "score"}
    tsv         text, tab, labels joined by a separator, as HoC's
    squad       JSON of paragraphs with questions and answers, as BioASQ's factoids

Each may be compressed: .gz, .bz2 or .zst.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from lxml import etree

from biomamba_jax.config import ExamplesConfig
from biomamba_jax.config.heads import TAG
from biomamba_jax.data.annotations import AnnotatedText, Relation, Span, from_tags
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_any_json, read_chunks, read_json_lines, read_lines

_Stated = tuple[Span, str | None]
"""A span and what the file says that it spells; None where it does not."""
_OFFSET = re.compile("[0-9]{1,9}")
_NO_CONCEPT = ("-1", "-", "")
_MARKED = {"head": re.compile(r"<< (.+?) >>"), "tail": re.compile(r"\[\[ (.+?) \]\]")}


def read_annotated(path: str, config: ExamplesConfig) -> list[AnnotatedText]:
    """Read a file; spans of other types than `config.types`, if it names any, are left out.

    Raises:
      UserError: the file is not of the format, or offsets do not fit a text; names the record.
    """
    texts = list(_READERS[config.format](path, config))
    if not texts:
        raise UserError(f"{path}: holds no text; is it of data.format {config.format}?")
    return texts


def _blocks(path: str, borders: Sequence[Sequence[str]]) -> Iterator[list[tuple[int, str]]]:
    """Yield the runs of lines, each with its number, between lines whose first word ([]: none) is one of `borders`."""
    for border, block in groupby(enumerate(read_lines(path), 1), lambda line: line[1].split()[:1] in borders):
        if not border:
            yield list(block)


def _conll(path: str, config: ExamplesConfig) -> Iterator[AnnotatedText]:
    for block in _blocks(path, ([], ["-DOCSTART-"])):
        rows = [(number, _columns(line)) for number, line in block]
        offsets, place = [], 0
        for number, columns in rows:
            if len(columns) < 2 or not TAG.fullmatch(columns[-1]):
                raise UserError(
                    f"{path}, line {number}: is not a word and a tag such as B-Disease or O, but {' '.join(columns)!r}"
                )
            offsets.append((place, place + len(columns[0])))
            place += len(columns[0]) + 1
        stated = [(span, None) for span in from_tags(offsets, [columns[-1] for _, columns in rows])]
        text = " ".join(columns[0] for _, columns in rows)
        yield AnnotatedText(f"{Path(path).name}:{rows[0][0]}", text, _checked(text, stated, path, config.types))


def _columns(line: str) -> list[str]:
    """Return the cells of a line, which tabs or spaces separate; other white space may be in a word."""
    return [cell.strip() for cell in re.split("\t" if "\t" in line else " +", line.strip())]


def _pubtator(path: str, config: ExamplesConfig) -> Iterator[AnnotatedText]:
    for block in _blocks(path, [[]]):
        parts, spans, relations = dict[str, str](), list[_Stated](), list[Relation]()
        key = re.split(r"[|\t]", block[0][1])[0]
        for number, line in block:
            columns = line.split("\t")
            if re.split(r"[|\t]", line)[0] != key:
                raise UserError(f"{path}, line {number}: is not of PMID {key}; put an empty line between two texts")
            head = re.match(r"[^|\t]*\|([ta])\|(.*)", line)
            if head and head[1] not in parts and (head[1], *parts) != ("t", "a"):
                parts[head[1]] = head[2]
            elif len(columns) == 4 and not _OFFSET.fullmatch(columns[1]):
                relations.append(Relation(*columns[1:]))
            elif len(columns) >= 5 and _OFFSET.fullmatch(columns[1]) and _OFFSET.fullmatch(columns[2]):
                concepts = [each for each in "|".join(columns[5:6]).split("|") if each not in _NO_CONCEPT]
                spans.append((Span(int(columns[1]), int(columns[2]), columns[4], tuple(concepts)), columns[3]))
            else:
                raise UserError(f"{path}, line {number}: is not a title, abstract, mention or relation of PubTator")
        text = "\n".join(parts.values())
        kept = _checked(text, spans, f"{path}, PMID {key}", config.types)
        yield AnnotatedText(key, text, kept, relations=tuple(relations))


def _checked(text: str, spans: Sequence[_Stated], where: str, types: Sequence[str] = ()) -> tuple[Span, ...]:
    """Return the spans of some types, by default of all.

    Raises:
      UserError: a span has no type, or one of any type does not fit the text; names `where`.
    """
    for span, mention in spans:
        if not span.type.strip():
            raise UserError(f"{where}: span {span.start}-{span.end} has no type; name it, such as Disease")
        if not 0 <= span.start < span.end <= len(text):
            raise UserError(f"{where}: span {span.start}-{span.end} is not in its {len(text)} characters; fix it")
        found = text[span.start : span.end]
        if mention is not None and found.split() != mention.split():
            raise UserError(
                f"{where}: characters {span.start}-{span.end} are {found!r}, not {mention!r}; are the offsets bytes, "
                "or of another version of the text?"
            )
    return tuple(span for span, _ in spans if not types or span.type in types)


def _bioc(path: str, config: ExamplesConfig) -> Iterator[AnnotatedText]:
    parser = etree.XMLParser(resolve_entities=False, load_dtd=False, no_network=True, remove_comments=True)
    try:
        content = b"".join(read_chunks(path, 1 << 20))
        root = etree.fromstring(content, parser)
    except etree.XMLSyntaxError as error:
        raise UserError(f"{path}: not well-formed XML ({error.msg}); download it again") from None
    for number, document in enumerate(root.iter("document"), 1):
        where = f"{path}, document {document.findtext('id') or f'number {number}'}"
        try:
            text = _bioc_text(document, len(content))  # no text is longer than its file
            spans, concepts, unplaced = _bioc_annotations(document)
            relations = [relation for each in document.iter("relation") for relation in _bioc_relation(each, concepts)]
        except ValueError as error:
            raise UserError(f"{where}: has an offset that is not a number, or not in the text ({error})") from None
        kept = _checked(text, spans, where, config.types)
        left_out = sum(kind in (config.types or [kind]) for kind in unplaced)
        yield AnnotatedText(document.findtext("id") or where, text, kept, relations=tuple(relations), left_out=left_out)


def _bioc_text(document: Any, most: int) -> str:
    """Return a document's text; offsets count characters of all of it, of which passages may leave some out.

    Raises:
      ValueError: a passage begins before the document or after `most` characters.
    """
    text = ""
    for passage in document.iter("passage"):
        for part in [passage] if passage.find("text") is not None else passage.iter("sentence"):
            offset = int(part.findtext("offset", "0"))
            if not 0 <= offset <= most:
                raise ValueError(f"passage at {offset}")
            text = text.ljust(offset)[:offset] + (part.findtext("text") or "")
    return text


def _bioc_annotations(document: Any) -> tuple[list[_Stated], dict[str, tuple[str, ...]], list[str]]:
    """Return a document's spans, the concepts of each annotation by its id, and types of annotations not in one part.

    Such an annotation, in several parts or without a place, has no offsets of its own.
    """
    spans, unplaced, concepts = list[_Stated](), list[str](), dict[str, tuple[str, ...]]()
    for annotation in (each for passage in document.iter("passage") for each in passage.iter("annotation")):
        facts = {infon.get("key", "").lower(): infon.text or "" for infon in annotation.iter("infon")}
        stated = next((facts[key] for key in ("identifier", "mesh") if key in facts), "")
        ids = tuple(each for each in re.split(r"[|,;]", stated) if each not in _NO_CONCEPT)
        concepts[annotation.get("id", "")] = ids
        places = annotation.findall("location")
        if len(places) != 1:
            unplaced.append(facts.get("type", ""))
        else:
            start = int(places[0].get("offset", ""))
            end = start + int(places[0].get("length", ""))
            spans.append((Span(start, end, facts.get("type", ""), ids), annotation.findtext("text")))
    return spans, concepts, unplaced


def _bioc_relation(element: Any, concepts: dict[str, tuple[str, ...]]) -> Iterator[Relation]:
    """Yield a relation for each pair of concepts; BC5CDR's names them, other corpora refer to annotations."""
    facts = {infon.get("key", ""): infon.text or "" for infon in element.iter("infon")}
    kind = facts.pop("relation", facts.pop("type", ""))
    nodes = [concepts.get(node.get("refid", ""), ()) for node in element.iter("node")]
    pairs = nodes if len(nodes) == 2 else [(value,) for value in facts.values()]
    if len(pairs) == 2:
        yield from (Relation(kind, head, tail) for head in pairs[0] for tail in pairs[1])


def _marked(path: str, config: ExamplesConfig) -> Iterator[AnnotatedText]:
    for number, line in read_json_lines(path):
        where = f"{path}, line {number}"
        text, label = line.get("text"), line.get("label")
        if not isinstance(text, str) or not isinstance(label, str):
            raise UserError(f'{where}: lacks a "text" or a "label" that is text')
        spans = [Span(*match.span(1), name) for name, mark in _MARKED.items() for match in mark.finditer(text)]
        if [span.type for span in spans] != list(_MARKED):
            raise UserError(f"{where}: does not mark one entity with << >> and one with [[ ]]")
        yield AnnotatedText(f"{Path(path).name}:{number}", text, tuple(spans), (label,))


def _spans(path: str, config: ExamplesConfig) -> Iterator[AnnotatedText]:
    for number, line in read_json_lines(path):
        where = f"{path}, line {number}"
        try:
            key = next((line[name] for name in ("key", "id") if line.get(name) is not None), where)
            text, question = line["text"], line.get("question", "")
            labels = [line["label"]] if "label" in line else line.get("labels", [])
            if not isinstance(labels, list) or not all(isinstance(label, str | int | float) for label in labels):
                raise TypeError("labels that are not a list of texts or numbers")
            raw, score = line.get("spans", ()), None if line.get("score") is None else float(line["score"])
            if score is not None and not math.isfinite(score):
                raise ValueError(f"a score of {score}")
            spans = [Span(s["start"], s["end"], s["type"], tuple(map(str, s.get("ids", ())))) for s in raw]
            mentions = [s.get("text") for s in raw]
            relations = tuple(Relation(*map(str, each)) for each in line.get("relations", ()))
            read = [text, question, *(s.type for s in spans), *(each for each in mentions if each is not None)]
            if not all(isinstance(each, str) for each in read):
                raise TypeError("a text, question, type or mention that is not text")
            if not all(isinstance(s.get("ids", []), list) for s in raw):
                raise TypeError("ids that are not a list")
            if not all(type(place) is int for span in spans for place in span[:2]):
                raise TypeError("a start or end that is not a whole number")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(f'{where}: lacks "text", or a span\'s "start", "end" or "type" ({error!r})') from None
        kept = _checked(text, list(zip(spans, mentions, strict=True)), where, config.types)
        yield AnnotatedText(str(key), text, kept, tuple(map(str, labels)), relations, score, question)


def _tsv(path: str, config: ExamplesConfig) -> Iterator[AnnotatedText]:
    for number, line in chain.from_iterable(_blocks(path, [[]])):
        text, tab, joined = line.rpartition("\t")
        if not tab:
            raise UserError(f"{path}, line {number}: has no tab between text and labels")
        if number == 1 and joined.strip().lower() in ("label", "labels"):
            raise UserError(f"{path}, line 1: names the columns; remove it, or it would be a text of class {joined!r}")
        labels = [each.strip() for each in joined.split(config.separator)]
        kept = tuple(each for each in labels if each not in ("", config.no_label))
        yield AnnotatedText(f"{Path(path).name}:{number}", text, labels=kept)


def _squad(path: str, config: ExamplesConfig) -> Iterator[AnnotatedText]:
    try:
        for paragraph in (each for article in read_any_json(path)["data"] for each in article["paragraphs"]):
            context = paragraph["context"]
            for qa in paragraph["qas"]:
                if not isinstance(context, str) or not isinstance(qa["question"], str):
                    raise TypeError("a context or question that is not text")
                places = [(int(each["answer_start"]), each["text"]) for each in qa.get("answers", ())]
                answers = [(Span(start, start + len(text), "answer"), text) for start, text in places]
                spans = _checked(context, answers, f"{path}, question {qa['id']}")
                yield AnnotatedText(str(qa["id"]), context, spans, question=qa["question"])
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(f"{path}: is not JSON of paragraphs and questions as SQuAD's ({error!r})") from None


_READERS: dict[str, Callable[[str, ExamplesConfig], Iterator[AnnotatedText]]] = {
    "conll": _conll,
    "pubtator": _pubtator,
    "bioc": _bioc,
    "marked": _marked,
    "spans": _spans,
    "tsv": _tsv,
    "squad": _squad,
}
