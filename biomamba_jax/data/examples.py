"""Supervised examples: prompts and answers as documents whose targets are the answer alone.

    ids       prompt  answer  EOS        targets   -1 ... -1  answer  EOS         the language model answers
    ids       prompt  EOS                targets   -1 ... -1  class               a classifier answers

Where targets are negative nothing is counted. A classifier's one target stands behind the prompt's last token. Rows are
packed like any others (see `packing`), except that no example is ever cut in two.
"""

import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from biomamba_jax.data.text import split_position
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_lines

NOT_COUNTED = -1


@dataclass(frozen=True)
class Example:
    """A prompt and its answer."""

    prompt: str
    answer: str
    """As it stands behind the prompt, its leading space included."""
    label: str = ""
    """The answer as a class of its task, where it has classes."""
    key: str = ""
    """What the example is called where it comes from."""


class Encoded(NamedTuple):
    """One example as int32 [tokens]."""

    ids: np.ndarray
    targets: np.ndarray


class EncodedExamples:
    """Examples in memory, as `pipeline` takes documents; made by `encode_examples`."""

    def __init__(self, folder: str, examples: Sequence[Encoded], shortened: int):
        self.folder = folder
        self.shortened = shortened
        """Examples whose prompt lost its beginning."""
        self.lengths = np.array([len(example.ids) for example in examples], np.int64)
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Encoded:
        return self._examples[index]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    source: str,
    labels: Sequence[str] = (),
) -> EncodedExamples:
    """Tokenizes examples.

    A prompt that does not fit into a row with its answer loses its beginning; questions stand at the end.

    Args:
      source: where the examples come from, for messages.
      labels: the classes of a classifier; without them the answer's text is what is learnt.

    Raises:
      UserError: there are no examples, an answer that is empty or does not fit into a row, or a class that is not
        among `labels`; names the example.
    """
    if not examples:
        raise UserError(f"{source}: holds no example; give more, or another split")
    prompts = tokenizer.encode_batch([example.prompt for example in examples])
    answers = tokenizer.encode_batch(["" if labels else example.answer for example in examples])
    encoded, shortened = [], 0
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        where = f"{source}: example {example.key!r}"
        if labels and example.label not in labels:
            raise UserError(f"{where} is of class {example.label!r}, none of {', '.join(labels)}; check labels")
        if not labels and not answer:
            raise UserError(f"{where} has an empty answer; give one, or leave the example out")
        room = sequence_length - len(answer) - 1
        if room < 1:
            raise UserError(
                f"{where}: its answer of {len(answer)} tokens and EOS leave a row of {sequence_length} no room for a "
                "prompt; raise data.sequence_length"
            )
        shortened += len(prompt) > room
        prompt = prompt[-room:]
        ids = np.array([*prompt, *answer, tokenizer.eos_id], np.int32)
        targets = ids.copy()
        targets[: len(prompt)] = NOT_COUNTED
        if labels:
            targets[-1] = labels.index(example.label)
        encoded.append(Encoded(ids, targets))
    return EncodedExamples(source, encoded, shortened)


def read_examples(path: str, prompt: str, answer: str) -> Iterator[Example]:
    """The examples of a file of JSON lines. The label of each is its answer without white space around it.

    Args:
      prompt: template; "{name}" stands for that key of the line.
      answer: template.

    Raises:
      UserError: a line that is not a JSON object or has not the keys; names the line.
    """
    for where, record in read_records(path, read_lines(path)):
        text = fill_template(answer, record, where, "data.answer")
        yield Example(fill_template(prompt, record, where, "data.prompt"), text, text.strip(), where)


def read_records(name: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of JSON lines, each with where it stands; empty lines are skipped.

    Raises:
      UserError: a line that is not a JSON object.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f'{where}: give an object, {{"prompt": "...", ...}}')
        yield where, record


def fill_template(template: str, record: Mapping[str, Any], where: str, key: str) -> str:
    """`template` with the values of a record in place of {their names}; numbers are written as Python does.

    Args:
      where: the record's place, for messages.
      key: the setting that the template is of.

    Raises:
      UserError: the template is none, or names what the record has no text or number for.
    """
    parts = []
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key} = {template!r}: is no template ({error}); write {{{{ and }}}} for braces") from None
    for text, name, _, _ in fields:
        parts.append(text)
        if name is not None:
            if not isinstance(record.get(name), str | int | float):
                raise UserError(f"{where}: has no text {name!r}, which {key} names; its keys are {', '.join(record)}")
            parts.append(str(record[name]))
    return "".join(parts)


def held_out_share(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Training and development examples. Which one an example is in depends on its prompt alone, so prompts that occur
    twice stay together and nothing changes side when others come or go."""
    border = fraction * 2**32
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[split_position(example.prompt.encode("utf-8", "surrogatepass")) < border].append(example)
    return sides
