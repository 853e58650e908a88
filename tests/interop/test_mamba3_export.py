"""Exports of Mamba-3 run in transformers by the module that they carry."""

import dataclasses

import numpy as np
import pytest
from random_weights import random_weights
from test_parity import our_logits, their_logits, tokens

from biomamba_jax.config import ModelConfig
from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop import write_model
from biomamba_jax.interop.heads import Head

torch = pytest.importorskip("torch", reason="transformers runs on torch")
transformers = pytest.importorskip("transformers", reason="what is exported is for transformers")

SISO = ModelConfig(
    kind="mamba3", d_model=32, n_layers=2, vocab_size=61, d_state=16, headdim=16, n_groups=2, d_intermediate=100
)
MIMO = dataclasses.replace(
    SISO, mimo_rank=2, rope_fraction=1.0, outproj_norm=True, a_floor=0.5, d_intermediate=0, tie_embeddings=False
)


@pytest.fixture(scope="module", params=[SISO, MIMO], ids=["siso", "mimo"])
def exported(request, tmp_path_factory):
    """Weights, and what transformers loads from their export."""
    weights, folder = random_weights(request.param), tmp_path_factory.mktemp("export") / "hf"
    head = Head(HeadConfig("classifier", ("a", "b")), np.ones((2, 32), np.float32), np.zeros(2, np.float32))
    write_model(dataclasses.replace(weights, head=head), folder, "hf")
    return weights, folder, transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_its_logits_are_ours(exported):
    weights, _, model = exported
    text = tokens(weights.config, 2, 21)
    ours, theirs = our_logits(weights, text), their_logits(model, text)
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max(), rtol=0)


def test_it_generates_from_padded_prompts_what_each_prompt_gives_alone(exported):
    _, _, model = exported
    long, short = torch.arange(3, 12)[None], torch.arange(20, 25)[None]
    padded = torch.cat([long, torch.nn.functional.pad(short, (4, 0))])
    mask = torch.cat([torch.ones_like(long), torch.nn.functional.pad(torch.ones_like(short), (4, 0))])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(padded, attention_mask=mask, **options)[:, 9:]
    for row, prompt in enumerate((long, short)):
        text = prompt
        for _ in range(6):  # without a state
            with torch.no_grad():
                text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        assert together[row].equal(text[0, prompt.shape[1] :])


def test_its_classifier_is_loaded_with_it(exported):
    _, folder, model = exported
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    classifier.config.start_token_id = 0
    logits = classifier(torch.tensor([[0, 7, 9]])).logits
    hidden = model.backbone(torch.tensor([[0, 7, 9]])).last_hidden_state[:, -1]
    assert classifier.config.id2label == {0: "a", 1: "b"}
    torch.testing.assert_close(logits, hidden.sum(-1, keepdim=True).expand(1, 2))


def test_an_mlp_after_another_mixer_is_refused(tmp_path):
    config = ModelConfig(kind="mamba2", d_model=32, n_layers=1, vocab_size=61, headdim=16, d_intermediate=100)
    with pytest.raises(UserError, match="d_intermediate = 100: transformers' mamba2 has no MLP"):
        write_model(random_weights(config), tmp_path / "hf", "hf")
