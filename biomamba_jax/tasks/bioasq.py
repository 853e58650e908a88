"""BioASQ task B (Tsatsaronis et al. 2015): reads golden files of every year.

The files need registration. Formats that have changed over the years are read alike: the exact answer of a factoid
question was a string, then a list of synonyms, then a list of such lists; that of a list question was a list of strings
before it became a list of lists of synonyms; the ideal answer was a string before it became a list.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from biomamba_jax.config import BioASQConfig
from biomamba_jax.config.evaluate import QuestionKind
from biomamba_jax.data.text import clean_document
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_any_json
from biomamba_jax.tasks import measures

_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)


@dataclass(frozen=True)
class Question:
    """One question of a golden file."""

    key: str
    """BioASQ's id, or the question's number in its file."""
    kind: QuestionKind
    """Type of the question."""
    question: str
    """The question."""
    snippets: tuple[str, ...]
    """Quoted passages that answer it."""
    ideal_answers: tuple[str, ...]
    """Answers in sentences."""
    golden: tuple[tuple[str, ...], ...]
    """Correct answers, each with its synonyms; (("yes",),) or (("no",),) for yes/no; () if the file has none."""
    batch: str = ""
    """The file."""

    @property
    def answer(self) -> str:
        """Golden answer of a yes/no question."""
        return self.golden[0][0]

    def prompt(self, config: BioASQConfig, context: str | None = None) -> str:
        """Return the question's prompt, by default with its first snippets, one a line, as context."""
        context = "\n".join(self.snippets[: config.max_snippets]) if context is None else context
        return getattr(config, f"{self.kind}_prompt").format(question=self.question, context=context)

    @property
    def text(self) -> str:
        """All text of the entry, each once: question, snippets and ideal answers, one a line."""
        return clean_document("\n".join(dict.fromkeys([self.question, *self.snippets, *self.ideal_answers])))


def read_questions(path: str | Path) -> list[Question]:
    """Read a golden file, in its order.

    Raises:
      UserError: the file cannot be read, or an entry is not a question; names the file and the question.
    """
    try:
        raw = read_any_json(path)
    except UserError as error:
        raise UserError(f"{error}; give a golden file of BioASQ task B") from None
    entries = raw.get("questions") if isinstance(raw, dict) else raw
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path}: holds no list of "questions"; give a golden file of BioASQ task B')
    return [_question(path, number, entry) for number, entry in enumerate(entries, 1)]


def _question(path: str | Path, number: int, entry: Any) -> Question:
    try:
        key, kind, body = str(entry.get("id") or number), entry["type"], entry["body"]
        if kind not in _KINDS or not body.strip():
            raise ValueError
        snippets = _texts([s if isinstance(s, str) else s["text"] for s in _listed(entry.get("snippets") or [])])
        ideal = _texts(entry.get("ideal_answer") or [])
        golden = _golden(kind, entry.get("exact_answer"))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: question {number} has no type ({', '.join(_KINDS)}), no body, or a snippet or exact_answer of an "
            "unknown form; give a golden file of BioASQ task B"
        ) from None
    return Question(key, kind, body, snippets, ideal, golden, str(path))


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """Return a text or a list of texts as a tuple; numbers are converted to text."""
    texts = [value] if isinstance(value, str) else _listed(value)
    if not all(isinstance(text, str) or type(text) in (int, float) for text in texts):
        raise TypeError("not a text")
    return tuple(map(str, texts))


def _golden(kind: QuestionKind, answer: Any) -> tuple[tuple[str, ...], ...]:
    """Return an exact answer of any year as a tuple of tuples of synonyms."""
    if answer is None or answer == [] or answer == "" or kind == "summary":
        return ()
    if kind == "yesno":
        while isinstance(answer, list):
            answer = answer[0] if answer else ""
        read = measures.read_yesno(answer)
        return () if read == "none" else ((read,),)
    if isinstance(answer, str):
        return ((answer,),)
    if all(isinstance(item, str) for item in _listed(answer)):  # of years before lists of lists
        return (tuple(answer),) if kind == "factoid" else tuple((item,) for item in answer)
    return tuple(item for item in map(_texts, answer) if item)
