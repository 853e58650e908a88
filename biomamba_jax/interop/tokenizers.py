"""Tokenizer files of an exported model, in the form that `transformers.AutoTokenizer` loads offline."""

from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers as hf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import write_json

SENTENCEPIECE, TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_SPACE = "▁"  # SentencePiece's symbol for a space
_PROBE = (
    "Serum TNF-α rose 2.5-fold (p<0.001).\nMETHODS: 1,024 patients",
    "  two  spaces, a tab\t and <0x0A>, Ångström, naïve, ﬁ, ½, µg",
    "日本語 🧬\r\n\n end ",
    "",
)


def find(folder: Path) -> Path | None:
    """Return the tokenizer file in `folder`: a SentencePiece model before a tokenizer.json."""
    return next((folder / name for name in (SENTENCEPIECE, TOKENIZER_JSON) if (folder / name).exists()), None)


def write_for_transformers(file: Path, folder: Path, stated: dict[str, Any], token_ids: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json of a fast tokenizer.

    Args:
      file: the model's tokenizer; a tokenizer.json must already be in `folder`.
      folder: folder of the model.
      stated: an earlier tokenizer_config.json, whose special tokens win.
      token_ids: ids of special tokens, used next; the default is the EOS token.

    Raises:
      UserError: the SentencePiece model cannot be converted, see `from_sentencepiece`.
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
    write_json(folder / TOKENIZER_CONFIG, settings)


def from_sentencepiece(file: Path) -> hf.Tokenizer:
    """Convert a SentencePiece model of `data.tokenizer.train_sentencepiece` to the tokenizers library.

    Prepends `<|endoftext|>`, the start symbol of every document in training, and recognises it in text. All other ids
    are the same, except where two segmentations of a word have the same score to within SentencePiece's float32 sums
    (5 of 6,000 PubMed abstracts, 1 token in 300,000).

    Raises:
      UserError: the two disagree on test texts, since the model was trained with other settings.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = range(processor.vocab_size())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in ids]
    tokenizer = hf.Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    # Pieces have a space only in front, and digits are separate pieces: splitting there changes nothing, except for
    # text that looks like the name of a byte, "<0x0A>".
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
                f"{file}: cannot be converted to tokenizer.json, unlike SentencePiece models of `prepare "
                "--train_tokenizer`; give --tokenizer with a tokenizer.json of the same ids"
            )
    return tokenizer


def generation_config(config: ModelConfig, token_ids: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' generation_config.json: EOS and other ids, and padded ids suppressed."""
    padding = list(range(config.known_vocab, config.padded_vocab))
    return token_ids | ({"suppress_tokens": padding} if padding else {})
