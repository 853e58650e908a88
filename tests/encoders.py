"""Small encoders of transformers with random weights, and tokenizers of their kinds."""

import tokenizers
from tiny_models import sentences
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_SPECIAL = {
    "wordpiece": ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
    "bpe": ["<pad>", "<s>", "</s>", "<unk>", "<mask>"],
}


def train_library(kind: str) -> tokenizers.Tokenizer:
    """A lower-cased WordPiece tokenizer, or GPT-2's kind, of 120 or 300 pieces."""
    special = _SPECIAL[kind]
    if kind == "wordpiece":
        library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    else:
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    library.train_from_iterator(sentences(), trainer)
    template = {"single": f"{special[1]} $A {special[2]}", "pair": f"{special[1]} $A {special[2]} $B:1 {special[2]}:1"}
    library.post_processor = processors.TemplateProcessing(
        **template, special_tokens=[(special[1], 1), (special[2], 2)]
    )
    return library


def write_encoder(folder, name, **changes):
    """A folder of a class of transformers, such as BertModel, that holds 62 tokens at most."""
    import torch
    import transformers

    kind = next(each for each in ("Roberta", "Electra", "Bert") if name.startswith(each))
    scheme = "bpe" if kind == "Roberta" else "wordpiece"
    library, special = train_library(scheme), _SPECIAL[scheme]
    keys = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind != "Roberta")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, model_input_names=inputs, **dict(zip(keys, special, strict=True))
    ).save_pretrained(folder)
    torch.manual_seed(0)
    settings = {"vocab_size": library.get_vocab_size(), "pad_token_id": 0, "max_position_embeddings": 62} | SIZES
    settings |= {"max_position_embeddings": 63} if kind == "Roberta" else {}
    settings |= {"embedding_size": 32} if kind == "Electra" else {"type_vocab_size": 2}
    getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**settings | changes)).save_pretrained(folder)
    return folder
