"""Mamba-3 (arXiv 2603.15569) as a loop over tokens, for `trust_remote_code`: transformers has no class for it yet."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .modeling_biomamba import AnswerHead, SequenceHead, TokenHead


class Mamba3Config(PretrainedConfig):
    """Sizes; config.json states every one of them."""

    model_type = "mamba3"
    mimo_rank = None  # SISO


@dataclass
class Mamba3Output(CausalLMOutput):
    """Logits, and the states of all layers after the last token."""

    state: list | None = None


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, or over each of its groups of channels."""

    def __init__(self, width, eps, group=None):
        super().__init__()
        self.weight, self.eps, self.group = nn.Parameter(torch.ones(width)), eps, group or width

    def forward(self, x):
        """Return the norm of x in its own dtype."""
        groups = functional.rms_norm(x.float().unflatten(-1, (-1, self.group)), (self.group,), eps=self.eps)
        return (groups.flatten(-2) * self.weight.float()).to(x.dtype)


class Mamba3Mixer(nn.Module):
    """The mixer: one step of the recurrence for each token."""

    def __init__(self, config):
        super().__init__()
        width, d_state = config.expand * config.hidden_size, config.state_size
        self.heads, self.channels, self.d_state = width // config.head_dim, config.head_dim, d_state
        self.mimo, self.ranks, self.groups = config.mimo_rank is not None, config.mimo_rank or 1, config.n_groups
        self.angles, self.a_floor = int(d_state * config.rope_fraction) // 2, config.a_floor
        self.split = [width] * 2 + [self.ranks * self.groups * d_state] * 2 + [self.heads] * 3 + [self.angles]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.split), bias=False)
        self.dt_bias, self.D = (nn.Parameter(torch.ones(self.heads)) for _ in range(2))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(self.heads, self.ranks, d_state)) for _ in range(2))
        self.B_norm, self.C_norm = (RMSNorm(d_state, config.layer_norm_epsilon) for _ in range(2))
        for name in ("mimo_x", "mimo_z", "mimo_o") if self.mimo else ():
            self.register_parameter(name, nn.Parameter(torch.ones(self.heads, self.ranks, self.channels)))
        self.norm = RMSNorm(width, config.layer_norm_epsilon, self.channels) if config.outproj_norm else None
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden, state=None, keep=None):
        """Return the output [B L D] and the state: angle, S, and the last token's B and x.

        `keep` [B L] is False for padding, which leaves the state as it is.
        """
        z, x, B, C, dt, A, trap, angle = self.in_proj(hidden).split(self.split, dim=-1)
        rows, length = hidden.shape[:2]
        dt = functional.softplus(dt.float() + self.dt_bias.float())
        A = -(A.float().clamp_min(0) + 1 / (1 - A.float().clamp_max(0))).clamp_min(self.a_floor)
        trap, turn = torch.sigmoid(trap.float()), math.pi * torch.tanh(angle.float())[:, :, None] * dt[..., None]
        B, C = self._of_heads(B, self.B_norm, self.B_bias), self._of_heads(C, self.C_norm, self.C_bias)
        x, z = (v.float().view(rows, length, self.heads, 1, self.channels) for v in (x, z))
        x = x * self.mimo_x.float() if self.mimo else x
        if state is None:
            sizes = (self.angles,), (self.channels, self.d_state), (self.ranks, self.d_state), x.shape[3:]
            state = [x.new_zeros(rows, self.heads, *size) for size in sizes]
        outputs = []
        for t in range(length):
            sums, S, last_B, last_x = state
            sums = (sums + turn[:, t]) % (2 * math.pi)
            b, c = self._rotated(B[:, t], sums), self._rotated(C[:, t], sums)
            d, share = dt[:, t, :, None, None], trap[:, t, :, None, None]
            S = torch.exp(A[:, t, :, None, None] * d) * (S + (1 - share) * d * last_x.mT @ last_B)
            S = S + share * d * x[:, t].mT @ b
            outputs.append(c @ S.mT + self.D.float()[:, None, None] * x[:, t])
            new = [sums, S, b, x[:, t]]
            if keep is not None:
                here = [keep[:, t].view(-1, *[1] * (v.dim() - 1)) for v in new]
                new = [torch.where(k, after, before) for k, after, before in zip(here, new, state, strict=True)]
            state = new
        y = torch.stack(outputs, 1)  # [B L H R P]
        if self.norm is not None:
            y = self.norm(y.transpose(2, 3).flatten(3)).unflatten(-1, (self.heads, -1)).transpose(2, 3)
        y = y * functional.silu(z * self.mimo_z.float() if self.mimo else z)
        y = (y * self.mimo_o.float() if self.mimo else y).sum(3)
        return self.out_proj(y.flatten(2).to(hidden.dtype)), state

    def _of_heads(self, v, norm, bias):
        """Return B or C [B L H R N] before the rotation."""
        v = norm(v.float().unflatten(-1, (self.ranks, self.groups, self.d_state))).transpose(2, 3)
        return v.repeat_interleave(self.heads // self.groups, 2) + bias.float()

    def _rotated(self, v, sums):
        """Turn pairs of dimensions: neighbours in SISO, half the state apart in MIMO."""
        halves = v.unflatten(-1, (2, -1)).unbind(-2) if self.mimo else v.unflatten(-1, (-1, 2)).unbind(-1)
        fixed = v.shape[-1] // 2 - self.angles
        cos, sin = functional.pad(sums.cos(), (0, fixed), value=1.0), functional.pad(sums.sin(), (0, fixed))
        cos, sin = cos[:, :, None], sin[:, :, None]
        turned = halves[0] * cos - halves[1] * sin, halves[0] * sin + halves[1] * cos
        return torch.cat(turned, -1) if self.mimo else torch.stack(turned, -1).flatten(-2)


class GatedMLP(nn.Module):
    """fc2(y * silu(gate)) with y, gate = fc1(x)."""

    def __init__(self, config):
        super().__init__()
        width = -(-config.d_intermediate // 128) * 128
        self.fc1 = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x):
        """Return the MLP's output."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * functional.silu(gate))


class Block(nn.Module):
    """The mixer and the MLP, each with a norm and a float32 residual stream around it."""

    def __init__(self, config):
        super().__init__()
        self.norm, self.mixer = RMSNorm(config.hidden_size, config.layer_norm_epsilon), Mamba3Mixer(config)
        self.norm2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon) if config.d_intermediate else None
        self.mlp = GatedMLP(config) if config.d_intermediate else None

    def forward(self, h, state=None, keep=None):
        """Return the residual stream and the mixer's state."""
        dtype = self.norm.weight.dtype
        y, state = self.mixer(self.norm(h).to(dtype), state, keep)
        h = h + y.float()
        return (h if self.mlp is None else h + self.mlp(self.norm2(h).to(dtype)).float()), state


class Mamba3PreTrainedModel(PreTrainedModel):
    """Base of every Mamba-3 model."""

    config_class = Mamba3Config
    base_model_prefix = "backbone"
    _is_stateful = True

    def _init_weights(self, module):
        """Leave initial values to the modules: these classes run and fine-tune trained weights."""


class Mamba3Model(Mamba3PreTrainedModel):
    """Embedding, blocks and the final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def run(self, input_ids, state=None, attention_mask=None):
        """Return hidden vectors [B L D] and the states of all layers."""
        h, states, keep = self.embeddings(input_ids).float(), [], attention_mask
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            h, after = layer(h, before, None if keep is None else keep.bool())
            states.append(after)
        return self.norm_f(h).to(self.embeddings.weight.dtype), states

    def forward(self, input_ids, attention_mask=None, **_):
        """Return the hidden vectors."""
        return BaseModelOutput(last_hidden_state=self.run(input_ids, None, attention_mask)[0])


class Mamba3ForCausalLM(Mamba3PreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.backbone = Mamba3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def prepare_inputs_for_generation(self, input_ids, state=None, attention_mask=None, **_):
        """Return the prompt, or the last token and the states before it."""
        if state is not None:
            return {"input_ids": input_ids[:, -1:], "state": state}
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **options):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **options)
        return {**model_kwargs, "state": outputs.state}

    def forward(self, input_ids, state=None, attention_mask=None, labels=None, **_):
        """Return logits, the loss of `labels` (shifted here), and the states."""
        hidden, state = self.backbone.run(input_ids, state, attention_mask)
        logits = self.lm_head(hidden).float()
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Mamba3Output(loss=loss, logits=logits, state=state)


class Mamba3ForSequenceClassification(SequenceHead, Mamba3PreTrainedModel):
    """Mamba-3 with a head for whole texts."""

    backbone_class = Mamba3Model


class Mamba3ForTokenClassification(TokenHead, Mamba3PreTrainedModel):
    """Mamba-3 with a head for words."""

    backbone_class = Mamba3Model


class Mamba3ForQuestionAnswering(AnswerHead, Mamba3PreTrainedModel):
    """Mamba-3 with a head for answers."""

    backbone_class = Mamba3Model
