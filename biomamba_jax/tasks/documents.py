"""Documents of a text domain: the same text for every model, whatever its tokenizer.

Shards hold token ids, which their own tokenizer decodes. A document that comes out with another number of bytes than
was recorded is left out and counted: its ids do not spell its text.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biomamba_jax.config import DomainConfig
from biomamba_jax.config.prepare import FilterConfig, TextFields
from biomamba_jax.data.filters import judge
from biomamba_jax.data.readers import read_records
from biomamba_jax.data.records import CODE, KEPT
from biomamba_jax.data.shards import MANIFEST_NAME, open_split
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_any_json
from biomamba_jax.object_store import local_copy
from biomamba_jax.tasks import bioasq

UNSPELLED = "unspelled"
"""Stored documents whose ids do not spell their text."""
_REASONS = {code: reason for reason, code in CODE.items()}


@dataclass(frozen=True)
class Document:
    """One text of a domain."""

    key: str
    """PMID, id of a question, or file and number."""
    text: str
    """The text."""

    @property
    def bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode())

    @property
    def words(self) -> int:
        """Number of words, separated by white space."""
        return len(self.text.split())


def read_domain(name: str, config: DomainConfig, seed: int = 0) -> tuple[list[Document], dict[str, int]]:
    """Read the documents of a domain, in the order of its source.

    Args:
      name: the domain's name, for errors.
      config: source, split and number of documents.
      seed: seed of the sample, if the config limits the number of documents.

    Returns:
      The documents, and the number of those that are left out, by reason: `read_documents`' and "not in the sample".

    Raises:
      UserError: a source that cannot be read, or contains no document.
    """
    reasons: Counter[str] = Counter()
    documents = list(read_documents(config.paths, config.split, reasons, config))
    if not documents:
        stored = reasons[UNSPELLED]
        why = f"no document whose ids spell its text, of {stored}" if stored else "no document"
        raise UserError(f"domains.{name}: {', '.join(config.paths)} holds {why}; give another path or split")
    if config.max_documents is not None and config.max_documents < len(documents):
        chosen = np.random.default_rng(seed).choice(len(documents), config.max_documents, replace=False)
        reasons["not in the sample"] = len(documents) - len(chosen)
        documents = [documents[index] for index in sorted(chosen)]
    return documents, dict(reasons)


def read_documents(
    sources: Iterable[str], split: str, left_out: Counter[str], fields: TextFields | None = None
) -> Iterator[Document]:
    """Yield the documents of sources, one at a time.

    Args:
      sources: folders of shards or URLs of such, files that `prepare` reads, or BioASQ files.
      split: split of the shards.
      left_out: counts what is left out, by the keys of `records.REASONS`, and as UNSPELLED.
      fields: keys of text, title and id in rows.

    Raises:
      UserError: a source cannot be read.
    """
    for path in (local_copy(source, split) for source in sources):
        if path.is_dir() or (path / MANIFEST_NAME).exists():
            yield from _shards(path, split, left_out)
        elif path.suffix == ".json" and _is_bioasq(path):
            for question in bioasq.read_questions(path):
                yield Document(question.key, question.text)
        else:
            records = read_records(path, fields or TextFields())
            for number, record in enumerate(judge(records, FilterConfig(min_abstract_characters=0)), 1):
                if record.status == KEPT:
                    yield Document(str(record.pmid or record.id or f"{path.name}:{number}"), record.text)
                elif record.status in _REASONS:
                    left_out[_REASONS[record.status]] += 1


def _is_bioasq(path: Path) -> bool:
    """Return True if the file is one JSON value of questions, not JSON lines."""
    try:
        raw = read_any_json(path)
    except UserError:
        return False
    return isinstance(raw, list) or (isinstance(raw, dict) and "questions" in raw)


def _shards(folder: Path, split: str, left_out: Counter[str]) -> Iterator[Document]:
    manifest, reader = open_split(folder, split)
    tokenizer = load_tokenizer(folder / manifest.tokenizer.file)
    manifest.check_tokenizer(tokenizer.sha256)
    for index in range(len(reader)):
        stored = reader[index]
        key = str(stored.pmid or stored.id or f"{split}:{index}")
        document = Document(key, tokenizer.decode(stored.ids[:-1].tolist()))
        if document.bytes == stored.num_bytes:
            yield document
        else:
            left_out[UNSPELLED] += 1
