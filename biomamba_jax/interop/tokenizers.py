"""Tokenizer files beside a model, in the form that `transformers.AutoTokenizer` loads without the network."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers as hf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError

SENTENCEPIECE, TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_SPACE = "▁"  # SentencePiece's sign for a space
_PROBE = (
    "Serum TNF-α rose 2.5-fold (p<0.001).\nMETHODS: 1,024 patients",
    "  two  spaces, a tab\t and <0x0A>, Ångström, naïve, ﬁ, ½, µg",
    "日本語 🧬\r\n\n end ",
    "",
)


def find(folder: Path) -> Path | None:
    """The tokenizer file in `folder`: the SentencePiece model first, whose tokenizer.json may lie beside it."""
    return next((folder / name for name in (SENTENCEPIECE, TOKENIZER_JSON) if (folder / name).exists()), None)


def vocab_size(file: Path) -> int:
    """One more than the tokenizer's largest id."""
    return load_tokenizer(file).vocab_size


def eos_id(file: Path) -> int:
    """Id of the token that ends every document."""
    return load_tokenizer(file).eos_id


def copy(file: Path, folder: Path) -> Path:
    """Copies a tokenizer file into `folder` under its usual name."""
    return load_tokenizer(file).save_to(folder)


def write_for_transformers(file: Path, folder: Path, stated: dict[str, Any], token_ids: dict[str, Any]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which make a fast tokenizer; a tokenizer.json is left as it is.

    Special tokens are those of `stated`, an earlier tokenizer_config.json, else those of `token_ids`, else the token
    that ends a text.

    Raises:
      UserError: a SentencePiece model of another make than ours.
    """
    tokenizer = load_tokenizer(file)
    if file.suffix == ".model":
        from_sentencepiece(file).save(str(folder / TOKENIZER_JSON))
    library = hf.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    eos = library.id_to_token(tokenizer.eos_id)

    def special(name: str) -> Any:
        known = token_ids.get(f"{name}_id")
        return stated.get(name) or (library.id_to_token(known) if isinstance(known, int) else None) or eos

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special("bos_token"),
        "eos_token": eos,
        "pad_token": special("pad_token"),
        "unk_token": special("unk_token"),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def from_sentencepiece(file: Path) -> hf.Tokenizer:
    """Our SentencePiece models (see `data.tokenizer.train_sentencepiece`) as a tokenizer of the tokenizers library.

    It puts `<|endoftext|>` in front, the start symbol of every document in training; a text that spells it means it.
    All other ids are the same, but where two cuts of a word score the same to within SentencePiece's float32 sums (5
    of 6,000 PubMed abstracts, 1 token in 300,000).

    Raises:
      UserError: the two disagree on a probe of texts: the model was trained with other settings.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = range(processor.vocab_size())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in ids]
    tokenizer = hf.Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    # Pieces have the space in front and nowhere else, and digits stand alone: cutting there changes nothing, but for
    # text that reads like a byte's name, "<0x0A>".
    words = pre_tokenizers.Split(Regex(f"{_SPACE}[^{_SPACE}]*"), "isolated")
    digits = pre_tokenizers.Split(Regex("[0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, digits])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    eos = processor.id_to_piece(processor.eos_id())
    tokenizer.add_special_tokens([AddedToken(eos, normalized=False, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(f"{eos} $A", special_tokens=[(eos, processor.eos_id())])
    for text in _PROBE:
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise UserError(
                f"{file}: cannot be turned into a tokenizer.json: only SentencePiece models as `prepare "
                "--train-tokenizer` makes them can; give --tokenizer with a tokenizer.json of the same ids"
            )
    return tokenizer


def generation_config(config: ModelConfig, token_ids: dict[str, Any]) -> dict[str, Any]:
    """transformers' generation_config.json: where text ends, and never an id that is mere padding."""
    padding = list(range(config.known_vocab, config.padded_vocab))
    return token_ids | ({"suppress_tokens": padding} if padding else {})
