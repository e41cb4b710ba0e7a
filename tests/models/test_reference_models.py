"""Against the torch reference: logits, loss, every gradient norm and greedy tokens of five published families."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.objectives.causal_lm import CausalLMSpec

GOLDENS = Path(__file__).parent.parent / "goldens"
LAYER_NORM = {"kind": "layernorm"}
GEMMA_NORM = {"kind": "rmsnorm", "one_plus": True}


def attention(**options):
    return {"kind": "attention", "heads": 4, **options}


GATED = {"kind": "swiglu", "hidden": 64}
GEMMA_BLOCK = {"ffn": {"kind": "geglu", "hidden": 64}, "norm": GEMMA_NORM, "norm_position": "sandwich"}
GEMMA_MIXER = attention(kv_heads=2, head_size=16, softcap=50.0)
SPECS = {
    "llama": {"blocks": {"layer": {"mixer": attention(kv_heads=2), "ffn": GATED}}},
    "qwen3": {
        "blocks": {"layer": {"mixer": attention(kv_heads=2, head_size=16, qk_norm={"kind": "rmsnorm"}), "ffn": GATED}}
    },
    "gemma2": {
        "blocks": {
            "local": {"mixer": {**GEMMA_MIXER, "window": 16}, **GEMMA_BLOCK},
            "full": {"mixer": GEMMA_MIXER, **GEMMA_BLOCK},
        },
        "layout": ["local", "full"], "repeats": 1, "final_norm": GEMMA_NORM, "tied": True,
        "embedding_multiplier": "sqrt_width", "logit_softcap": 30.0,
    },
    "gpt_neox": {
        "blocks": {"layer": {
            "mixer": attention(bias=True, output_bias=True, position={"kind": "rotary", "fraction": 0.25}),
            "ffn": {"kind": "mlp", "hidden": 64, "bias": True}, "norm": LAYER_NORM, "residual": "parallel",
        }},
        "final_norm": LAYER_NORM,
    },
    "gpt2": {
        "blocks": {"layer": {
            "mixer": attention(bias=True, output_bias=True, position={"kind": "none"}),
            "ffn": {"kind": "mlp", "activation": "gelu_tanh", "bias": True}, "norm": LAYER_NORM,
        }},
        "final_norm": LAYER_NORM, "tied": True, "learned_positions": 128,
    },
}  # fmt: skip

# Ours → the reference's names and how its array becomes ours. `{i}` is the layer.
EMBEDDING = {
    "llama": "model.embed_tokens.weight", "qwen3": "model.embed_tokens.weight", "gemma2": "model.embed_tokens.weight",
    "gpt_neox": "gpt_neox.embed_in.weight", "gpt2": "transformer.wte.weight",
}  # fmt: skip


def heads(weights, size, *, transpose=True):
    """[out, in] → [in, heads, size]; biases [out] → [heads, size]."""
    return (
        weights.T.reshape(-1, weights.shape[0] // size, size)
        if weights.ndim == 2 and transpose
        else weights.reshape(-1, size)
    )


def llama_layer(w, i, family):
    p = f"model.layers.{i}."
    size = w[p + "self_attn.k_proj.weight"].shape[0] // 2
    names = [p + "self_attn.k_proj.weight", p + "self_attn.v_proj.weight"]
    pairs = [p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"]
    tree = {
        "mixer.inner.query.weight": ([p + "self_attn.q_proj.weight"], heads(w[p + "self_attn.q_proj.weight"], size)),
        "mixer.inner.key_value.weight": (names, np.stack([heads(w[name], size) for name in names], 1)),
        "mixer.inner.output.weight": (
            [p + "self_attn.o_proj.weight"],
            w[p + "self_attn.o_proj.weight"].T.reshape(4, size, 32),
        ),
        "ffn.inner.gate_up.weight": (pairs, np.stack([w[name].T for name in pairs], 1)),
        "ffn.inner.down.weight": ([p + "mlp.down_proj.weight"], w[p + "mlp.down_proj.weight"].T),
        "mixer.input_norm.scale": ([p + "input_layernorm.weight"], w[p + "input_layernorm.weight"]),
    }
    after = "post_attention_layernorm.weight"
    if family == "gemma2":
        tree["mixer.output_norm.scale"] = ([p + after], w[p + after])
        for ours, theirs in (("input_norm", "pre_feedforward"), ("output_norm", "post_feedforward")):
            name = f"{p}{theirs}_layernorm.weight"
            tree[f"ffn.{ours}.scale"] = ([name], w[name])
    else:
        tree["ffn.input_norm.scale"] = ([p + after], w[p + after])
    if family == "qwen3":
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            tree[f"mixer.inner.{ours}.scale"] = ([f"{p}self_attn.{theirs}.weight"], w[f"{p}self_attn.{theirs}.weight"])
    return tree


def neox_layer(w, i, family):
    p, a = f"gpt_neox.layers.{i}.", f"gpt_neox.layers.{i}.attention."
    fused = w[a + "query_key_value.weight"].reshape(4, 3, 8, 32).transpose(3, 1, 0, 2)
    bias = w[a + "query_key_value.bias"].reshape(4, 3, 8).transpose(1, 0, 2)
    tree = {
        "mixer.inner.query.weight": ([], fused[:, 0]), "mixer.inner.key_value.weight": ([], fused[:, 1:]),
        "mixer.inner.query.bias": ([], bias[0]), "mixer.inner.key_value.bias": ([], bias[1:]),
        "mixer.inner.output.weight": ([a + "dense.weight"], w[a + "dense.weight"].T.reshape(4, 8, 32)),
        "mixer.inner.output.bias": ([a + "dense.bias"], w[a + "dense.bias"]),
    }  # fmt: skip
    for ours, theirs in (("up", "dense_h_to_4h"), ("down", "dense_4h_to_h")):
        tree[f"ffn.inner.{ours}.weight"] = ([f"{p}mlp.{theirs}.weight"], w[f"{p}mlp.{theirs}.weight"].T)
        tree[f"ffn.inner.{ours}.bias"] = ([f"{p}mlp.{theirs}.bias"], w[f"{p}mlp.{theirs}.bias"])
    for half, norm in (("mixer", "input_layernorm"), ("ffn", "post_attention_layernorm")):
        for ours, theirs in (("scale", "weight"), ("bias", "bias")):
            tree[f"{half}.input_norm.{ours}"] = ([f"{p}{norm}.{theirs}"], w[f"{p}{norm}.{theirs}"])
    return tree


def gpt2_layer(w, i, family):
    p = f"transformer.h.{i}."
    fused, bias = w[p + "attn.c_attn.weight"].reshape(32, 3, 4, 8), w[p + "attn.c_attn.bias"].reshape(3, 4, 8)
    tree = {
        "mixer.inner.query.weight": ([], fused[:, 0]), "mixer.inner.key_value.weight": ([], fused[:, 1:]),
        "mixer.inner.query.bias": ([], bias[0]), "mixer.inner.key_value.bias": ([], bias[1:]),
        "mixer.inner.output.weight": ([p + "attn.c_proj.weight"], w[p + "attn.c_proj.weight"].reshape(4, 8, 32)),
        "mixer.inner.output.bias": ([p + "attn.c_proj.bias"], w[p + "attn.c_proj.bias"]),
    }  # fmt: skip
    for ours, theirs in (("up", "c_fc"), ("down", "c_proj")):
        for part in ("weight", "bias"):
            tree[f"ffn.inner.{ours}.{part}"] = ([f"{p}mlp.{theirs}.{part}"], w[f"{p}mlp.{theirs}.{part}"])
    for half, norm in (("mixer", "ln_1"), ("ffn", "ln_2")):
        for ours, theirs in (("scale", "weight"), ("bias", "bias")):
            tree[f"{half}.input_norm.{ours}"] = ([f"{p}{norm}.{theirs}"], w[f"{p}{norm}.{theirs}"])
    return tree


LAYERS = {"llama": llama_layer, "qwen3": llama_layer, "gemma2": llama_layer, "gpt_neox": neox_layer, "gpt2": gpt2_layer}
REST = {
    "llama": {"head.norm.scale": "model.norm.weight", "head.weight": "lm_head.weight"},
    "qwen3": {"head.norm.scale": "model.norm.weight", "head.weight": "lm_head.weight"},
    "gemma2": {"head.norm.scale": "model.norm.weight"},
    "gpt_neox": {
        "head.norm.scale": "gpt_neox.final_layer_norm.weight", "head.norm.bias": "gpt_neox.final_layer_norm.bias",
        "head.weight": "embed_out.weight",
    },
    "gpt2": {
        "head.norm.scale": "transformer.ln_f.weight", "head.norm.bias": "transformer.ln_f.bias",
        "embedding.positions": "transformer.wpe.weight",
    },
}  # fmt: skip


def put(tree, path, value):
    *parents, leaf = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = jnp.asarray(value)


def get(tree, path):
    for name in path.split("."):
        tree = tree[name]
    return np.asarray(tree)


class Family:
    def __init__(self, name):
        self.name = name
        self.weights, self.golden = (load_file(GOLDENS / name / f"{part}.safetensors") for part in ("model", "golden"))
        self.norms = json.loads((GOLDENS / name / "grad_norms.json").read_text())
        spec = {"width": 32, "vocab_size": 96, "layout": ["layer"], "repeats": 2, **SPECS[name]}
        self.model = ModelSpec.model_validate(spec).build()
        self.period = len(self.model.stack.segments[0].period)
        self.params = {}
        put(self.params, "embedding.tokens", self.weights[EMBEDDING[name]])
        for ours, theirs in REST[name].items():
            put(
                self.params,
                ours,
                self.weights[theirs].T if theirs in ("lm_head.weight", "embed_out.weight") else self.weights[theirs],
            )
        layers = [LAYERS[name](self.weights, i, name) for i in range(2)]
        for path in layers[0]:
            if self.period == 1 and len(self.model.stack.segments) == 1:
                put(self.params, f"stack.segment_0.layer_0.{path}", np.stack([layer[path][1] for layer in layers]))
            else:
                for i, layer in enumerate(layers):
                    put(self.params, f"stack.segment_{i}.layer_0.{path}", layer[path][1][None])
        self.layers = layers

    def layer_gradient(self, grads, path, i):
        if len(self.model.stack.segments) == 1:
            return get(grads, f"stack.segment_0.layer_0.{path}")[i]
        return get(grads, f"stack.segment_{i}.layer_0.{path}")[0]


@pytest.fixture(scope="module", params=SPECS)
def family(request):
    return Family(request.param)


def batch_of(ids):
    context = Context.rows(ids.shape[0], ids.shape[1] - 1)
    return {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": jnp.ones(ids[:, 1:].shape),
        "positions": context.positions, "segment_ids": context.segment_ids,
    }  # fmt: skip


def test_parameters_have_the_declared_shapes(family):
    declared = jax.tree.map(lambda d: d.shape, family.model.declarations, is_leaf=lambda d: hasattr(d, "axes"))
    assert jax.tree.map(lambda leaf: leaf.shape, family.params) == declared


def test_logits_and_loss(family):
    ids = jnp.asarray(family.golden["input_ids"], jnp.int32)
    logits = np.asarray(jax.jit(family.model.logits)(family.params, ids))
    want = family.golden["logits"]
    assert np.abs(logits - want).max() < 2e-5 * np.abs(want).max()
    batch = batch_of(ids)
    sums = jax.jit(lambda params: CausalLMSpec().sums(family.model, params, batch, jnp.float32))(family.params)
    np.testing.assert_allclose(sums.loss / sums.weight, family.golden["loss"][0], rtol=1e-5)


def test_gradient_norms(family):
    batch = batch_of(jnp.asarray(family.golden["input_ids"], jnp.int32))

    def loss(params):
        sums = CausalLMSpec().sums(family.model, params, batch, jnp.float32)
        return sums.loss / sums.weight

    grads = jax.jit(jax.grad(loss))(family.params)
    checked = 0
    for ours, theirs in {"embedding.tokens": EMBEDDING[family.name], **REST[family.name]}.items():
        # The reference renames GPT-NeoX's head when it saves.
        want = family.norms.get(theirs) or family.norms["lm_head.weight"]
        np.testing.assert_allclose(np.linalg.norm(get(grads, ours)), want, rtol=1e-3)
        checked += 1
    for i, layer in enumerate(family.layers):
        for path, (names, _) in layer.items():
            gradient = family.layer_gradient(grads, path, i)
            # A pair stacked along axis 1 holds two of the reference's parameters.
            parts = [gradient] if len(names) == 1 else [gradient[:, index] for index in range(len(names))]
            for name, part in zip(names, parts, strict=False):
                np.testing.assert_allclose(np.linalg.norm(part), family.norms[name], rtol=1e-3, err_msg=name)
                checked += 1
    assert checked > 12


def test_greedy_tokens(family):
    prompt = np.asarray(family.golden["greedy"][0, :20], np.int32)
    made = Decoder(family.model, family.params).stream([prompt], 12, SamplingSpec(temperature=0.0))
    assert [int(token[0]) for token in made] == family.golden["greedy"][0, 20:].tolist()
