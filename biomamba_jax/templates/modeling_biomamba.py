"""Mamba and Mamba-2 with the head that biomamba_jax exported next to them, for `trust_remote_code`."""

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import Mamba2Model, Mamba2PreTrainedModel, MambaModel, MambaPreTrainedModel
from transformers import modeling_outputs as outputs
from transformers.utils import cached_file


def _turned(row):
    """Return a text with its tokens in reverse order, but for the start token."""
    return torch.cat([row[:1], row[1:].flip(0)])


class _Head:
    """A linear layer on hidden states; config.reading is once, echo (twice) or bidirectional (with two backbones)."""

    _keys_to_ignore_on_load_missing = [r"^classifier\.", r"^reversed_backbone\."]  # noqa: RUF012 (in a file of their own)
    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.reading = getattr(config, "reading", "once")
        both = self.reading == "bidirectional"
        if both:
            self.reversed_backbone = self.backbone_class(config)
            del self.reversed_backbone.embeddings
            self.reversed_backbone.__dict__["embeddings"] = self.backbone.embeddings  # shared, but saved once
        self.classifier = torch.nn.Linear(config.hidden_size * (2 if both else 1), config.num_labels)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name, *arguments, **options):
        """Load the model, and its head from head.safetensors where there is one."""
        loaded = super().from_pretrained(name, *arguments, **options)
        hub = {key: options[key] for key in ("revision", "token", "cache_dir", "subfolder") if options.get(key)}
        file = cached_file(name, "head.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            own = model.state_dict()
            with torch.no_grad():
                for key, value in load_file(file).items():
                    own[key if key.startswith("reversed_") else f"classifier.{key}"].copy_(value)
        return loaded

    def _logits(self, input_ids, attention_mask, of_words):
        """Return the logits [tokens, labels] of each text.

        Each text begins with the start token, as in training: rows that lack it get it. Rows are computed without
        their padding, on whichever side it is.
        """
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        start = input_ids.new_tensor([self.config.start_token_id])
        given = [row[mask.bool()] for row, mask in zip(input_ids, keep, strict=True)]
        rows = [row if row[:1].equal(start) else torch.cat([start, row]) for row in given]
        tokens = [row.repeat(2) if self.reading == "echo" else row for row in rows]
        hidden = self.backbone(pad_sequence(tokens, batch_first=True), use_cache=False).last_hidden_state
        states = [each[: len(own)][-len(row) :] for each, own, row in zip(hidden, tokens, rows, strict=True)]
        if self.reading == "bidirectional":
            turned = pad_sequence([_turned(row) for row in rows], batch_first=True)
            hidden = self.reversed_backbone(turned, use_cache=False).last_hidden_state
            back = [each[: len(row)] for each, row in zip(hidden, rows, strict=True)]
            back = [_turned(each) for each in back] if of_words else back
            states = [torch.cat(pair, -1) for pair in zip(states, back, strict=True)]
        return [self.classifier(each) for each in states]

    def _of_tokens(self, input_ids, attention_mask):
        """Return logits [B, L, labels]; zero where there is padding."""
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found = self._logits(input_ids, attention_mask, True)
        logits = found[0].new_zeros(*input_ids.shape, self.config.num_labels)
        for row, mask, each in zip(logits, keep.bool(), found, strict=True):
            row[mask] = each[len(each) - int(mask.sum()) :]
        return logits


class SequenceHead(_Head):
    """A head on the state after a text's last token."""

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=None, **_):
        """Return the logits of the classes, or the score."""
        logits = torch.stack([each[-1] for each in self._logits(input_ids, attention_mask, False)])
        loss = None
        if labels is not None:
            wanted = labels if self.config.problem_type == "single_label_classification" else labels.float()
            loss = self.loss_function(labels=wanted, pooled_logits=logits.float(), config=self.config)
        return outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class TokenHead(_Head):
    """A head on the state after each token; it was trained on the last token of each word."""

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=None, **_):
        """Return the logits of the tags."""
        logits = self._of_tokens(input_ids, attention_mask)
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, config=self.config)
        return outputs.TokenClassifierOutput(loss=loss, logits=logits)


class AnswerHead(_Head):
    """A head on the state after each token of a question, a line end and a text."""

    def forward(self, input_ids, attention_mask=None, return_dict=None, **_):
        """Return the logits of an answer's first word and of its last one, at the last token of each."""
        start, end = self._of_tokens(input_ids, attention_mask).unbind(-1)
        return outputs.QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


class MambaForSequenceClassification(SequenceHead, MambaPreTrainedModel):
    """Mamba-1 with a head for whole texts."""

    backbone_class = MambaModel


class Mamba2ForSequenceClassification(SequenceHead, Mamba2PreTrainedModel):
    """Mamba-2 with a head for whole texts."""

    backbone_class = Mamba2Model


class MambaForTokenClassification(TokenHead, MambaPreTrainedModel):
    """Mamba-1 with a head for words."""

    backbone_class = MambaModel


class Mamba2ForTokenClassification(TokenHead, Mamba2PreTrainedModel):
    """Mamba-2 with a head for words."""

    backbone_class = Mamba2Model


class MambaForQuestionAnswering(AnswerHead, MambaPreTrainedModel):
    """Mamba-1 with a head for answers."""

    backbone_class = MambaModel


class Mamba2ForQuestionAnswering(AnswerHead, Mamba2PreTrainedModel):
    """Mamba-2 with a head for answers."""

    backbone_class = Mamba2Model
