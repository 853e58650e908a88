"""Supervised examples: prompts and answers as documents whose targets are the answer alone.

    inputs    start  prompt  answer        targets   -1 ... -1  answer  EOS         the language model answers
    inputs    start  prompt                targets   -1 ... -1  class               a classifier answers

Negative targets do not count in the loss. A classifier's one target is predicted from the prompt's last token. Rows are
packed like any others (see `packing`), except that no example is ever split.
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from biomamba_jax.data.shards import shifted
from biomamba_jax.data.text import split_position
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json_lines

NOT_COUNTED = -1


@dataclass(frozen=True)
class Example:
    """A prompt and its answer."""

    prompt: str
    answer: str
    """The text that follows the prompt, including a leading space."""
    label: str = ""
    """The answer as a class of the task; "" without classes."""
    key: str = ""
    """Name of the example in its source."""


class Encoded(NamedTuple):
    """An encoded example."""

    inputs: np.ndarray
    """int32 [tokens], the first one the start token."""
    targets: np.ndarray
    """int32 [tokens]; negative ones do not count."""


class EncodedExamples:
    """Encoded examples in memory, as documents for `pipeline`."""

    def __init__(self, folder: str, examples: Sequence[Encoded], shortened: int):
        self.folder = folder
        self.shortened = shortened
        """Number of examples whose prompt lost its beginning."""
        self.lengths = np.array([len(example.inputs) for example in examples], np.int64)
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Encoded:
        return self._examples[index]


def encode_answers(
    pairs: Sequence[tuple[str, str]],
    encode: Callable[[Sequence[str]], list[list[int]]],
    encode_prompts: Callable[[Sequence[str]], list[list[int]]],
) -> list[tuple[list[int], list[int]]]:
    """Tokenize prompts and answers alike for training, scoring and generation: as one text, cut behind the prompt.

    Args:
      pairs: prompts and answers; white space at a prompt's end counts as part of the answer.
      encode: encodes texts.
      encode_prompts: encodes texts together with what precedes them.

    Returns:
      The ids of each prompt and of its answer. Where the whole text is cut otherwise at their border, those of the
      answer by itself.
    """
    moved = [(prompt.rstrip(), prompt[len(prompt.rstrip()) :] + answer) for prompt, answer in pairs]
    wholes = encode_prompts([prompt + answer for prompt, answer in moved])
    alone = encode([answer for _, answer in moved])
    prompts = dict.fromkeys(prompt for prompt, _ in moved)
    ids = dict(zip(prompts, encode_prompts(list(prompts)), strict=True))
    return [
        (before := ids[prompt], whole[len(before) :] if [*before, *whole[len(before) :]] == whole != before else own)
        for (prompt, _), whole, own in zip(moved, wholes, alone, strict=True)
    ]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    source: str,
    labels: Sequence[str] = (),
) -> EncodedExamples:
    """Tokenize examples.

    A prompt that does not fit into a row with its answer loses its beginning, since questions are at the end.

    Args:
      examples: at least one.
      tokenizer: encodes prompts and answers.
      sequence_length: tokens of a row.
      source: where the examples come from, for messages.
      labels: the classes of a classifier; without them the model learns the answer's text.

    Raises:
      UserError: there is no example, an answer is empty or does not fit into a row, or a class is not among `labels`;
        names the example.
    """
    if not examples:
        raise UserError(f"{source}: holds no example; give more, or another split")
    encode = tokenizer.encode_batch
    if labels:
        pairs = [(prompt, list[int]()) for prompt in encode([example.prompt for example in examples])]
    else:
        pairs = encode_answers([(example.prompt, example.answer) for example in examples], encode, encode)
    encoded, shortened = [], 0
    for example, (prompt, answer) in zip(examples, pairs, strict=True):
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
        encoded.append(Encoded(shifted(ids, tokenizer.start_id), targets))
    return EncodedExamples(source, encoded, shortened)


def read_examples(path: str, prompt: str, answer: str) -> Iterator[Example]:
    """Yield the examples of a file of JSON lines. The label of each is its answer without surrounding white space.

    Args:
      path: the file.
      prompt: template; "{name}" stands for that key of the line.
      answer: template.

    Raises:
      UserError: a line is not a JSON object or lacks a key; names the line.
    """
    for number, record in read_json_lines(path):
        where = f"{path}, line {number}"
        text = fill_template(answer, record, where, "data.answer")
        yield Example(fill_template(prompt, record, where, "data.prompt"), text, text.strip(), where)


def fill_template(template: str, record: Mapping[str, Any], where: str, key: str) -> str:
    """Fill in the values of a record for {their names}; numbers are written as Python does.

    Args:
      template: text with "{name}"s.
      record: values by name.
      where: place of the record, for messages.
      key: name of the setting that holds the template, for messages.

    Raises:
      UserError: the template is malformed, or names a key that is not a text or number in the record.
    """
    parts = []
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key} = {template!r}: is not a template ({error}); write {{{{ and }}}} for braces") from None
    for text, name, _, _ in fields:
        parts.append(text)
        if name is not None:
            if not isinstance(record.get(name), str | int | float):
                raise UserError(f"{where}: has no text {name!r}, which {key} names; its keys are {', '.join(record)}")
            parts.append(str(record[name]))
    return "".join(parts)


def held_out_share(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Split examples into training and development examples.

    The split depends on each prompt alone: equal prompts stay together, and no example changes sides when others are
    added or removed.
    """
    border = fraction * 2**32
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[split_position(example.prompt.encode("utf-8", "surrogatepass")) < border].append(example)
    return sides
