"""Tokenizers: one interface to Hugging Face's tokenizer.json and SentencePiece's .model, and SentencePiece training.

Which tokens begin, end and pad a text is what the files state, see `special_tokens`. A special token that a text merely
spells (`<|endoftext|>` in a document or a prompt) is encoded as ordinary text, and none is added at either end:
documents get `start_id` and `eos_id` from their readers and writers, prompts from `encode_prompts`.
"""

import hashlib
import io
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from biomamba_jax.config.prepare import TokenizerTraining
from biomamba_jax.data.special_tokens import EOS, EOS_NAMES, TOKENIZER_CONFIG, SpecialTokens, read_stated
from biomamba_jax.errors import UserError
from biomamba_jax.files import write_json

# Fixed, since the result of unigram training depends on the number of threads.
_TRAINING_THREADS = 4
_MOST_GAPS = 1 << 12  # ids without a token that a small vocabulary may have
_LARGE_SAMPLE_BYTES = 1_000_000_000  # from here on SentencePiece needs 64-bit suffix arrays


class Tokenizer(ABC):
    """A loaded tokenizer file."""

    filename: str
    """Name of the copy that `save_to` makes."""

    def __init__(self, path: Path, content: bytes, vocab_size: int, default_eos: int | None):
        self.path = path
        """The file it was read from."""
        self.name = path.stem
        """A name for people."""
        self.sha256 = hashlib.sha256(content).hexdigest()
        """Digest of the file; identifies the tokenizer."""
        self.vocab_size = vocab_size
        """One more than the largest id."""
        self.unknown_id: int | None = None
        """Id of the token that stands for text that has no other token; None if there is no such token."""
        self.config: dict[str, Any] = {}
        """tokenizer_config.json next to the file, with the special tokens that other files state."""
        stated: dict[str, int] = {}
        if path.name == self.filename:  # else one of several tokenizers: the files next to it may be another's
            self.config, stated = read_stated(path, vocab_size, self.token_id, self.token)
        eos = stated.get("eos", default_eos)
        if eos is None:
            raise UserError(
                f"{path}: has no end-of-text token ({', '.join(EOS_NAMES)}), which must end every document; state it "
                f"as eos_token in a {TOKENIZER_CONFIG} beside it, give --tokenizer another file or train one with "
                "--train-tokenizer"
            )
        start = self._added_start(eos, stated.get("bos"))
        found = stated | {"eos": eos, "start": eos if start is None else start}
        self.special = SpecialTokens(**found, adds_start=start is not None)
        """Which tokens begin, end and pad a text."""
        self.start_id, self.eos_id = self.special.start, eos
        self._make_special()

    @cached_property
    def vocabulary_sha256(self) -> str:
        """Digest of what the ids mean; other bytes in the file or other merges do not change it."""
        tokens = "\0".join(map(self.token, range(self.vocab_size)))
        return hashlib.sha256(tokens.encode()).hexdigest()

    @abstractmethod
    def _added_start(self, eos: int, bos: int | None) -> int | None:
        """Return the token that the files say is added before a text, None: none.

        Args:
          eos: the end-of-text token.
          bos: the stated beginning of a text.
        """

    def _made_by_text(self) -> set[int]:
        """Return the special tokens that a text which spells them is encoded as."""
        return {token for token in self.special.never_text if token in self.encode_batch([self.token(token)])[0]}

    def _refuse_made_by_text(self) -> None:
        if self._made_by_text():
            raise UserError(
                f"{self.path}: text that spells one of its special tokens gets that token's id and would be cut in "
                "two; give another tokenizer"
            )

    @abstractmethod
    def _make_special(self) -> None:
        """Let no text be encoded as one of the tokens in `special`, as far as the library can be told."""

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """Return the id of a token by its text, None if there is none."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """Return the text of a token."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each prompt, preceded by the start token where the files say that it is; never empty.

        GPT-NeoX's files say nothing, so that a prompt is read as by transformers; a document begins with its start
        token all the same, since its first token must be predicted from something.
        """
        start = [self.start_id] if self.special.adds_start else []
        return [[*start, *ids] or [self.start_id] for ids in self.encode_batch(texts)]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that the ids spell, including special tokens."""

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids."""
        return [self.decode(ids) for ids in batch]

    def spell(self, texts: Sequence[str]) -> list[str]:
        """Return the text that the ids of each text spell; unknown tokens spell nothing."""
        return self.decode_batch([[i for i in ids if i != self.unknown_id] for ids in self.encode_batch(texts)])

    def save_to(self, folder: str | os.PathLike[str]) -> Path:
        """Copy the tokenizer's file into `folder` under its usual name, with what was stated next to it.

        Returns:
          The path of the copy.
        """
        if self.config:
            write_json(Path(folder) / TOKENIZER_CONFIG, self.config)
        return Path(shutil.copyfile(self.path, Path(folder) / self.filename))


class _HuggingFace(Tokenizer):
    filename = "tokenizer.json"

    def __init__(self, path: Path, content: bytes):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # for any damage a bare Exception, or the Rust library's panic
            raise UserError(f"{path}: not a Hugging Face tokenizer.json ({error}); give --tokenizer another") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._never_text: set[int] = set()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        eos = next((vocabulary[name] for name in EOS_NAMES if name in vocabulary), None)
        vocab_size = max(vocabulary.values(), default=-1) + 1
        if vocab_size > 2 * len(vocabulary) + _MOST_GAPS:  # each id would get a row of the embedding
            raise UserError(
                f"{path}: has ids up to {vocab_size - 1:,} for {len(vocabulary):,} tokens; give --tokenizer another"
            )
        super().__init__(path, content, vocab_size, eos)
        self.encode_batch(["\U000f0000"])  # an unknown character, for which its unknown token must exist
        unknown = getattr(self._tokenizer.model, "unk_token", None)  # Unigram models name its id
        self.unknown_id = vocabulary.get(unknown) if unknown else getattr(self._tokenizer.model, "unk_id", None)
        if self.unknown_id is None:
            self._refuse_made_by_text()
        else:  # where tokens are whole words: such a word is one that the model lacks
            self._never_text = self._made_by_text()

    def _added_start(self, eos: int, bos: int | None) -> int | None:
        self.encode_batch(["a"])  # which names the file if it cannot encode
        encoding = self._tokenizer.encode("a")
        added = encoding.special_tokens_mask
        before = added.index(0) if 0 in added else 0
        if before > 1:
            raise UserError(
                f"{self.path}: adds {before} tokens before a text, where one can be; give another tokenizer"
            )
        return encoding.ids[0] if before else bos if self.config.get("add_bos_token") else None

    def _make_special(self) -> None:
        added = self._tokenizer.get_added_tokens_decoder()
        for token in (added[i] for i in {self.start_id, *self.special.named.values()} if i in added):
            token.special = True  # else the library looks for it in text
            self._tokenizer.add_special_tokens([token])

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a bare Exception, or the Rust library's panic
            raise UserError(f"{self.path}: cannot encode text ({error}); give another tokenizer") from None
        unknown = self.unknown_id
        if not self._never_text or unknown is None:
            return [encoding.ids for encoding in encoded]
        return [[unknown if i in self._never_text else i for i in encoding.ids] for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        return self._tokenizer.decode_batch(batch, skip_special_tokens=False)


class _SentencePiece(Tokenizer):
    filename = "tokenizer.model"

    def __init__(self, path: Path, content: bytes):
        try:
            if not content:
                raise OSError("it is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error}); give --tokenizer another file") from None
        eos = self._processor.eos_id()
        super().__init__(path, content, self._processor.vocab_size(), None if eos < 0 else eos)
        self.unknown_id = self._processor.unk_id()
        self._refuse_made_by_text()

    def _added_start(self, eos: int, bos: int | None) -> int | None:
        if "add_bos_token" not in self.config:
            return eos  # as in the models that `train_sentencepiece` makes
        bos = self._processor.bos_id() if bos is None else bos
        return bos if self.config["add_bos_token"] and bos >= 0 else None

    def _make_special(self) -> None:
        pass  # it makes no control piece of text

    def token_id(self, text: str) -> int | None:
        found = self._processor.piece_to_id(text)  # that of the unknown token for a text that is not a piece
        return found if self.token(found) == text else None

    def token(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        # SentencePiece decodes a control piece to nothing; spell it, as other tokenizers do.
        spelled, start = [], 0
        ids = [int(i) for i in ids]
        for end in [i for i, token in enumerate(ids) if token == self.eos_id]:
            spelled += [self._processor.decode(ids[start:end]), self._processor.id_to_piece(self.eos_id)]
            start = end + 1
        return "".join([*spelled, self._processor.decode(ids[start:])])

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        if any(self.eos_id in ids for ids in batch):
            return super().decode_batch(batch)
        return self._processor.decode(batch, num_threads=1)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a Hugging Face `tokenizer.json` (any name that ends in .json) or a SentencePiece `.model`.

    Raises:
      UserError: the file cannot be read, is of another kind, has no end-of-text token, or encodes text as one.
    """
    path = Path(path)
    kinds = {".json": _HuggingFace, ".model": _SentencePiece}
    if path.suffix not in kinds:
        raise UserError(f"{path}: a tokenizer must be a Hugging Face tokenizer.json or a SentencePiece .model file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --tokenizer") from None
    return kinds[path.suffix](path, content)


def train_sentencepiece(
    texts: Iterable[str], training: TokenizerTraining | int, output: str | os.PathLike[str]
) -> Tokenizer:
    """Train a SentencePiece model on `texts`, write it to the file `output` and return it.

    The same texts in the same order give the same bytes. Ids: 0 `<|endoftext|>`, 1 unknown (never used with byte
    fallback), 2 newline, 3 ... 258 bytes, then the learnt pieces. With byte fallback every text with single spaces
    decodes to itself, unless it holds U+2581, SentencePiece's own sign for a space.

    Args:
      texts: the training text.
      training: settings, or the vocabulary size alone.
      output: path of the .model file.

    Raises:
      UserError: the texts cannot fill, or do not fit, a vocabulary of that size.
    """
    training = TokenizerTraining(training) if isinstance(training, int) else training
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n")),
            model_writer=model,
            model_type=training.tokenizer_kind,
            vocab_size=training.train_tokenizer,
            eos_id=0,
            eos_piece=EOS,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            user_defined_symbols=["\n"],
            byte_fallback=training.tokenizer_byte_fallback,
            split_digits=training.tokenizer_split_digits,
            character_coverage=0.9999,  # fraction of the training text's characters that become pieces
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            train_extremely_large_corpus=training.tokenizer_sample_bytes > _LARGE_SAMPLE_BYTES,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        size = training.train_tokenizer
        raise UserError(f"--train-tokenizer {size}: {reason}; give another size or more text") from None
    Path(output).write_bytes(model.getvalue())
    return load_tokenizer(output)
