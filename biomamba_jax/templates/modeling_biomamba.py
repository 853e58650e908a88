"""Mamba and Mamba-2 with the classifier that biomamba_jax exported next to them, for `trust_remote_code`."""

import torch
from safetensors.torch import load_file
from transformers import Mamba2Model, Mamba2PreTrainedModel, MambaModel, MambaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file


class _Classifier:
    """A linear layer on the hidden state after a text's last token."""

    _keys_to_ignore_on_load_missing = ["classifier.weight"]  # noqa: RUF012 (read from its own file)
    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name, *arguments, **options):
        """Load the model, and its classifier from classifier.safetensors where there is one."""
        loaded = super().from_pretrained(name, *arguments, **options)
        hub = {key: options[key] for key in ("revision", "token", "cache_dir", "subfolder") if options.get(key)}
        file = cached_file(name, "classifier.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            with torch.no_grad():
                model.classifier.weight.copy_(load_file(file)["weight"])
        return loaded

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=None, **_):
        """Return the logits of the classes.

        Each text begins with the start token, as in training: rows that lack it get it. Rows are computed without
        their padding, on whichever side it is.
        """
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        start = input_ids.new_tensor([self.config.start_token_id])
        rows = [row[mask.bool()] for row, mask in zip(input_ids, keep, strict=True)]
        rows = [row if row[:1].equal(start) else torch.cat([start, row]) for row in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = self.backbone(tokens, use_cache=False).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
        logits = self.classifier(hidden[torch.arange(len(rows), device=hidden.device), last])
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MambaForSequenceClassification(_Classifier, MambaPreTrainedModel):
    """Mamba-1 with a classifier."""

    backbone_class = MambaModel


class Mamba2ForSequenceClassification(_Classifier, Mamba2PreTrainedModel):
    """Mamba-2 with a classifier."""

    backbone_class = Mamba2Model
