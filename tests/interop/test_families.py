"""Every family against the torch reference: logits, loss, every gradient norm, greedy tokens, and back to the bit."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import efficient_lm as elm
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.interop.families import FAMILIES
from efficient_lm.interop.families.base import essence
from efficient_lm.interop.state import published
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.objectives.causal_lm import CausalLMSpec

GOLDENS = Path(__file__).parent.parent / "goldens"
END = 2
NAMES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3n", "olmo2", "gpt_neox", "gpt2", "diffllama",
    "mamba", "falcon_mamba", "recurrent_gemma", "lfm2", "olmo_hybrid", "mixtral", "olmoe", "qwen3_moe", "gpt_oss",
    "deepseek_v3", "minimax", "jamba", "nemotron_h", "qwen3_next", "kimi_linear", "qwen3_next_dense",
    "kimi_linear_dense", "deepseek_v3_dense", "mamba2", "bamba", "falcon_h1", "jamba_dense", "nemotron_h_dense",
    "minimax_dense",
]  # fmt: skip
# What the reference names otherwise when it saves than in its modules; three convolutions are one of its modules, and
# so are the gates and values of all experts.
MODULES = {
    r"^embed_out\.": "lm_head.",
    r"^backbone\.": "model.",
    r"\.attention_layer_norm\.": ".input_layernorm.",
    r"\.feedforward_layer_norm\.": ".post_attention_layernorm.",
    r"\.[qkv]_conv1d\.": ".conv1d.",
    r"\.block_sparse_moe\.": ".mlp.",
    r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)\.weight": ".experts.gate_up_proj",
    r"\.experts\.\d+\.(w2|down_proj)\.weight": ".experts.down_proj",
    r"\.mixer\.experts\.gate_up_proj": ".mixer.experts.up_proj",
    r"\.self_attn\.(f_[ab]_proj|A_log|dt_bias)": r".self_attn.forget_gate.\1",
}


class Golden:
    def __init__(self, name):
        self.folder = GOLDENS / name
        self.config = json.loads((self.folder / "config.json").read_text())
        self.family = FAMILIES[self.config["model_type"]]
        self.model = elm.from_hf(self.folder)
        self.arrays = load_file(self.folder / "golden.safetensors")
        self.norms = json.loads((self.folder / "grad_norms.json").read_text())
        self.ids = jnp.asarray(self.arrays["input_ids"], jnp.int32)

    def loss(self, params):
        context = Context.rows(self.ids.shape[0], self.ids.shape[1] - 1)
        batch = {
            "tokens": self.ids[:, :-1], "targets": self.ids[:, 1:], "weights": jnp.ones(self.ids[:, 1:].shape),
            "positions": context.positions, "segment_ids": context.segment_ids,
        }  # fmt: skip
        sums = CausalLMSpec().sums(self.model.model, params, batch, jnp.float32)
        return sums.loss / sums.weight


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return Golden(request.param)


# Families without their experts are made of mixers that have goldens or equations of their own.
WHOLE = [name for name in NAMES if not name.endswith("_dense")]


@pytest.mark.quick_for(*WHOLE)
@pytest.mark.usefixtures("optimized")
def test_logits(golden):
    want = golden.arrays["logits"]
    assert np.abs(np.asarray(golden.model.logits(golden.ids)) - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.quick_for("gpt2", "deepseek_v3", "mamba2")
def test_loss_and_every_gradient_norm(golden):
    loss, gradients = jax.jit(jax.value_and_grad(golden.loss))(golden.model.params)
    np.testing.assert_allclose(loss, golden.arrays["loss"][0], rtol=1e-5)
    found = {}
    for name, array in published(golden.family, golden.model.model, gradients):
        for pattern, module in MODULES.items():
            name = name if name in golden.norms else re.sub(pattern, module, name)
        found[name] = np.hypot(found.get(name, 0.0), np.linalg.norm(array))
    # Rounding is all the gradient that a router of one expert per token has, and what corrects its choice has none.
    for name in found | golden.norms:
        want = golden.norms.get(name, 0.0)
        np.testing.assert_allclose(found.get(name, 0.0), want, rtol=1e-3, atol=1e-7, err_msg=name)


class Endless(LanguageModel):
    """A model that never chooses the end of text, as the reference's tokens were made."""

    def logits_from(self, params, hidden):
        return super().logits_from(params, hidden).at[..., END].set(-jnp.inf)


@pytest.mark.quick_for("gpt2", "mamba2", "gpt_oss")
def test_greedy_tokens(golden):
    prompt = np.asarray(golden.arrays["greedy"][0, :20], np.int32)
    decoder = Decoder(Endless(golden.model.config.model), golden.model.params)
    made = decoder.stream([prompt], 12, SamplingSpec(temperature=0.0))
    assert [int(token[0]) for token in made] == golden.arrays["greedy"][0, 20:].tolist()


def test_back_to_the_bit(golden, tmp_path):
    folder = golden.model.to_hf(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (golden.folder, folder))
    ignored = [name for name in before if any(re.search(pattern, name) for pattern in golden.family.ignored)]
    assert before.keys() - set(ignored) == after.keys() - set(ignored)
    assert all(before[name].dtype == after[name].dtype for name in after)
    assert all(before[name].tobytes() == after[name].tobytes() for name in after.keys() - set(ignored))
    for name in after.keys() & set(ignored):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-6, atol=1e-7, err_msg=name)
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in golden.config} == golden.config
    assert elm.from_hf(folder).config.model == golden.model.config.model


def test_a_config_is_written_from_the_spec_alone(golden):
    """Nothing of the original config is needed: what is written describes the same model."""
    written = golden.family.config(golden.model.config.model)
    assert essence(golden.family.spec(written)) == essence(golden.model.config.model)
    same = {name for name in golden.config.keys() & written.keys() if golden.config[name] == written[name]}
    assert {"vocab_size", "model_type", "tie_word_embeddings"} <= same
