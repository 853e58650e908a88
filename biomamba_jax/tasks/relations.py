"""Relations between concepts of a document: each pair of concepts as a text to classify, and the predicted pairs."""

import itertools
from collections.abc import Iterator, Sequence

from biomamba_jax.data.annotations import AnnotatedText, Relation, outermost, pieces

NO_RELATION = "none"
_MARKS = ("<< {} >>", "[[ {} ]]")


def candidates(document: AnnotatedText, relation: str, pair: Sequence[str]) -> Iterator[AnnotatedText]:
    """Yield a text for each pair of concepts of two types, with their mentions marked << >> and [[ ]].

    Its label is `relation` if the document says so, else "none"; the pair is in its `relations`.

    Args:
      document: with spans that have identifiers.
      relation: type of the relation.
      pair: types of the first and of the second concept.
    """
    ids = [dict.fromkeys(each for span in document.spans if span.type == kind for each in span.ids) for kind in pair]
    for head, tail in itertools.product(*ids):
        claim = Relation(relation, head, tail)
        label = relation if claim in document.relations else NO_RELATION
        parts, sides = [], list(zip(_MARKS, pair, (head, tail), strict=True))
        for part, span in pieces(document.text, outermost(document.spans)):
            marks = (mark for mark, kind, concept in sides if span and span.type == kind and concept in span.ids)
            parts.append(next(marks, "{}").format(part))
        yield AnnotatedText(document.key, "".join(parts), labels=(label,), relations=(claim,))


def predicted_relations(predicted: Sequence[AnnotatedText]) -> dict[str, set[Relation]]:
    """Return the relations of each document, by its key, that were predicted for its candidates."""
    found: dict[str, set[Relation]] = {}
    for text in predicted:
        if text.labels != (NO_RELATION,):
            found.setdefault(text.key, set()).update(text.relations)
    return found
