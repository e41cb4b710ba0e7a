"""Make golden folders: tiny models with random weights, and what the reference implementation computes with them.

Runs in an environment with torch and transformers, which the project itself does not need, and never in the tests:

    python tests/goldens/make.py llama gemma3 --output FOLDER
    python tests/goldens/make.py llama --output FOLDER --seed 3 --set '{"attention_bias": true}'

A family is a line in `FAMILIES`: the model type of transformers and what its tiny config has beyond `COMMON`.
"""

import argparse
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
SPARSE = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
MAMBA = {"state_size": 8, "time_step_rank": 4}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
THREE_TO_ONE = ["linear_attention"] * 3 + ["full_attention"]
DELTA = {
    "num_hidden_layers": 4, "layer_types": THREE_TO_ONE, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
KIMI = {"num_hidden_layers": 4, "layer_types": THREE_TO_ONE, "linear_head_dim": 8, "linear_num_heads": 2}
FAMILIES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 6}),
    "gemma3n": (
        "gemma3n_text",
        {
            "head_dim": 8, "sliding_window": 16, "num_hidden_layers": 5, "num_kv_shared_layers": 0, "laurel_rank": 8,
            "altup_num_inputs": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        },
    ),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {"n_inner": None}),
    "diffllama": ("diffllama", {}),
    "mixtral": ("mixtral", EXPERTS),
    "olmoe": ("olmoe", EXPERTS),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "moe_intermediate_size": 24}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, "head_dim": 16, "sliding_window": 16}),
    "deepseek_v3": (
        "deepseek_v3", {**SPARSE, **LATENT, "q_lora_rank": 16, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    ),
    "mamba": ("mamba", MAMBA),
    "falcon_mamba": ("falcon_mamba", MAMBA),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8}),
    "qwen3_next": (
        "qwen3_next",
        {**EXPERTS, **DELTA, "head_dim": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_next_dense": ("qwen3_next", {**DELTA, "head_dim": 16, "mlp_only_layers": [0, 1, 2, 3]}),
    "kimi_linear_dense": ("kimi_linear", {**KIMI, **LATENT, "mlp_layer_types": ["dense"] * 4}),
    "deepseek_v3_dense": ("deepseek_v3", {**LATENT, "q_lora_rank": 16, "first_k_dense_replace": 2}),
    "olmo_hybrid": (
        "olmo_hybrid",
        {**DELTA, "linear_num_value_heads": 2, "linear_value_head_dim": 16, "num_key_value_heads": 4},
    ),
    "bamba": ("bamba", {**MAMBA2, "mamba_n_groups": 1, "attn_layer_indices": [1], "num_hidden_layers": 3}),
    "falcon_h1": ("falcon_h1", {**MAMBA2, "mamba_n_groups": 1, "mamba_d_ssm": 64}),
    "jamba_dense": (
        "jamba",
        {
            "num_hidden_layers": 4, "num_experts": 1, "attn_layer_period": 3, "attn_layer_offset": 1,
            "mamba_d_state": 8, "mamba_dt_rank": 4,
        },
    ),
    "nemotron_h_dense": (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"], "head_dim": 16,
            "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16},
    ),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "block_multiple_of": 16},
    ),
    "minimax_dense": (
        "minimax",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4, "block_size": 8,
            "num_local_experts": 1, "num_experts_per_tok": 1, "linear_attn_alpha_factor": 1.5, "mlp_beta_factor": 0.7,
        },
    ),
}  # fmt: skip

ROWS, LENGTH, PROMPT, MADE = 2, 40, 20, 12


def build(family: str, seed: int, changes: dict) -> nn.Module:
    """A float32 model on the slow paths, every parameter redrawn so that it matters to the logits."""
    model_type, own = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**COMMON, **own, **changes})
    torch.manual_seed(zlib.crc32(family.encode()) + seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                redraw(module, name, parameter)
        head = model.get_output_embeddings()
        head.weight.normal_(std=1.1 / math.sqrt(config.hidden_size))
    return model


def redraw(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Matrices and embeddings afresh; what has a meaning of its own (norms, biases, decays) is only moved a little."""
    if isinstance(module, nn.Embedding):
        parameter.normal_(std=0.8)
    elif parameter.ndim >= 2 and (name == "weight" or "proj" in name):
        # Linear and convolution keep inputs last, GPT-2's own linear map and stacked experts before the outputs.
        inputs_last = isinstance(module, nn.Linear | nn.Conv1d)
        inputs = math.prod(parameter.shape[1:]) if inputs_last else parameter.shape[-2]
        parameter.normal_(std=1.1 / math.sqrt(inputs))
    else:
        parameter.add_(0.2 * torch.randn_like(parameter))


def measure(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What `golden.safetensors` and `grad_norms.json` hold; ids below 3 (padding, begin, end) are not drawn."""
    ids = torch.randint(3, model.config.vocab_size, (ROWS, LENGTH))
    logits = model(input_ids=ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    golden = {
        "input_ids": ids.int(),
        "logits": logits.detach(),
        "loss": loss.detach()[None],
        "greedy": greedy(model, ids),
    }
    return {name: tensor.contiguous() for name, tensor in golden.items()}, norms


@torch.no_grad()
def greedy(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The first tokens of row 0 and the most likely ones after them, without a cache; never the end of text."""
    row = ids[:1, :PROMPT]
    for _ in range(MADE):
        logits = model(input_ids=row, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -math.inf
        row = torch.cat([row, logits.argmax(-1, keepdim=True)], dim=1)
    return row.int()


def make(family: str, folder: Path, seed: int, changes: dict) -> None:
    """Write the folder of one family."""
    model = build(family, seed, changes)
    golden, norms = measure(model)
    model.save_pretrained(folder)
    save_file(golden, folder / "golden.safetensors")
    (folder / "grad_norms.json").write_text(json.dumps(dict(sorted(norms.items())), indent=0) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="+", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--output", type=Path, required=True, help="folder that gets one folder per family")
    parser.add_argument("--seed", type=int, default=0, help="other weights and other tokens")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="config keys to set, as JSON")
    options = parser.parse_args()
    for family in options.families:
        make(family, options.output / family, options.seed, options.set)
        print(options.output / family)


if __name__ == "__main__":
    main()
