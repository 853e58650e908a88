"""Supervised examples: prompts and answers as documents whose targets are the answer alone.

    inputs    start  prompt  answer        targets   -1 ... -1  answer  EOS         the language model answers
    inputs    start  text                  targets   -1 ... -1  class               a head predicts from the last token,
                                                     -1  tag ... -1  tag            or from the last token of each word

Negative targets do not count in the loss. Rows are packed like any others (see `packing`), except that no example is
ever split.
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.annotations import AnnotatedText, EncodedWords, encode_words, to_tags
from biomamba_jax.data.shards import shifted
from biomamba_jax.data.text import split_position
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json_lines

NOT_COUNTED = -1
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A prompt and its answer."""

    prompt: str
    """The text before the answer."""
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

    def __init__(self, folder: str, examples: Sequence[Encoded], shortened: int, left_out: int = 0):
        self.folder = folder
        self.shortened = shortened
        """Number of examples that did not fit into a row."""
        self.left_out = left_out
        """Number of questions that have no answer of whole words in the text that fits into a row."""
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
) -> EncodedExamples:
    """Tokenize examples.

    A prompt that does not fit into a row with its answer loses its beginning, since questions are at the end.

    Args:
      examples: at least one.
      tokenizer: encodes prompts and answers.
      sequence_length: tokens of a row.
      source: where the examples come from, for messages.

    Raises:
      UserError: there is no example, or an answer is empty or does not fit into a row; names the example.
    """
    if not examples:
        raise UserError(f"{source}: holds no example; give more, or another split")
    encode = tokenizer.encode_batch
    pairs = encode_answers([(example.prompt, example.answer) for example in examples], encode, encode)
    encoded, shortened = [], 0
    for example, (prompt, answer) in zip(examples, pairs, strict=True):
        where = f"{source}: example {example.key!r}"
        if not answer:
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
        encoded.append(Encoded(shifted(ids, tokenizer.start_id), targets))
    return EncodedExamples(source, encoded, shortened)


def encode_texts(
    texts: Sequence[AnnotatedText], tokenizer: Tokenizer, sequence_length: int, head: HeadConfig, *, source: str
) -> EncodedExamples:
    """Tokenize texts for a head, with what it is to predict.

    A text that does not fit into a row loses its beginning where the head predicts from the last token. The words of a
    longer one are split into several examples for a token classifier; for a span it loses its end.

    Args:
      texts: at least one.
      tokenizer: encodes the texts.
      sequence_length: tokens of a row.
      head: what is predicted, and how often the text is read.
      source: where the texts come from, for messages.

    Raises:
      UserError: there is no text, or it is of a class that the head lacks, of several, or has no score; names the text.
    """
    if not texts:
        raise UserError(f"{source}: holds no example; give more, or another split")
    readings = 2 if head.reading == "echo" else 1
    room = max(1, sequence_length // readings - 1)  # the start token precedes each reading
    encoded, shortened, left_out = [], 0, 0
    for ids, (of_start, *targets) in _tokens_and_targets(texts, tokenizer, head, source):
        shortened += len(ids) > room
        for part in windows(len(ids), room, head):
            wanted, inputs = [of_start, *targets[part]], [tokenizer.start_id, *ids[part]] * readings
            if head.kind == "span" and not ({1, 3} & set(wanted) and {2, 3} & set(wanted)):
                left_out += 1
                continue
            unread = [NOT_COUNTED] * (len(inputs) - len(wanted))
            encoded.append(Encoded(np.array(inputs, np.int32), np.array(unread + wanted, np.int32)))
    if not encoded:
        raise UserError(f"{source}: no answer is in its text; check data.format, or raise data.sequence_length")
    return EncodedExamples(source, encoded, shortened, left_out)


def windows(length: int, room: int, head: HeadConfig) -> list[slice]:
    """Return the parts of a text of `length` tokens that a head with room for `room` of them reads; at least one.

    All, one after the other, for tags of words; the beginning for an answer; the end for what the last token tells.
    """
    if head.kind == "token_classifier":
        return [slice(begin, begin + room) for begin in range(0, max(length, 1), room)]
    return [slice(room) if head.of_words else slice(-room, None)]


def _tokens_and_targets(
    texts: Sequence[AnnotatedText], tokenizer: Tokenizer, head: HeadConfig, source: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of each text, and the targets of the start token and of each id."""
    if not head.of_words:
        for text, ids in zip(texts, tokenizer.encode_batch([text.text for text in texts]), strict=True):
            yield ids, [NOT_COUNTED] * len(ids) + [text_target(text, head, source)]
        return
    for text, question, words in zip(texts, *encode_questions(texts, tokenizer), strict=True):
        own = [NOT_COUNTED] * len(words.ids)
        if head.kind == "span":
            answer = text.spans[:1]
            starts, ends = [answer[0].start] if answer else [], [answer[0].end] if answer else []
            values = [(start in starts) + 2 * (end in ends) for start, end in words.words]
        else:
            tags = to_tags(words.words, text.spans)
            if unknown := set(tags) - set(head.labels):
                raise UserError(f"{source}: {text.key!r} has tags {', '.join(unknown)}, none of labels {head.labels}")
            values = [head.labels.index(tag) for tag in tags]
        for place, value in zip(words.last, values, strict=True):
            own[place] = value
        yield [*question, *words.ids], [NOT_COUNTED] * (1 + len(question)) + own


def encode_questions(
    texts: Sequence[AnnotatedText], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[EncodedWords]]:
    """Return the ids of each text's question, which precedes it, and the words of the text itself."""
    questions = tokenizer.encode_batch([f"{text.question}\n" if text.question else "" for text in texts])
    return questions, encode_words([text.text for text in texts], tokenizer)


def text_target(text: AnnotatedText, head: HeadConfig, source: str) -> int:
    """Return what a head is to predict of a whole text, as one int32; see `model.heads`.

    Raises:
      UserError: the head has no such class, the text has not one class, or no score.
    """
    where = f"{source}: example {text.key!r}"
    if head.kind == "regression":
        if text.score is None or not 0 <= text.score < float("inf"):
            raise UserError(f"{where} has the score {text.score}; a regression needs one that is 0 or more; shift them")
        return int(np.float32(text.score + 0.0).view(np.int32))  # -0.0 becomes 0.0
    for label in text.labels:
        if label not in head.labels:
            raise UserError(f"{where} is of class {label!r}, none of {', '.join(head.labels)}; check labels")
    if head.kind == "multi_label":
        return sum(1 << index for index, label in enumerate(head.labels) if label in text.labels)
    if len(text.labels) != 1:
        raise UserError(f"{where} has {len(text.labels)} classes, a classifier needs one; use head multi_label")
    return head.labels.index(text.labels[0])


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
    for text, name, specification, conversion in fields:
        if specification or conversion:
            raise UserError(f"{key} = {template!r}: names {name!r} with a format after : or !; leave that out")
        parts.append(text)
        if name is not None:
            if not isinstance(record.get(name), str | int | float):
                raise UserError(f"{where}: has no text {name!r}, which {key} names; its keys are {', '.join(record)}")
            parts.append(str(record[name]))
    return "".join(parts)


def held_out_share(examples: Sequence[T], fraction: float, text: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """Split examples into training and development examples.

    The split depends on each example's text alone: equal texts stay together, and no example changes sides when others
    are added or removed.

    Args:
      examples: to split.
      fraction: share of the development examples.
      text: returns an example's text.
    """
    border = fraction * 2**32
    sides: tuple[list[T], list[T]] = ([], [])
    for example in examples:
        sides[split_position(text(example).encode("utf-8", "surrogatepass")) < border].append(example)
    return sides
