"""The torch arm of train_step.py: `python train_step_torch.py SETTINGS`, with torch and transformers and no jax.

Builds and warms up a model of transformers with its own defaults, prints ``{"loss", "versions"}``, then reads numbers
of steps from standard input, one a line, and answers each with the seconds they took.
"""

import json
import sys
import time

import torch
import transformers


def llama(settings: dict) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        hidden_size=settings["width"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"],
        intermediate_size=settings["hidden"],
        vocab_size=settings["vocabulary"],
        max_position_embeddings=settings["time"],
        rms_norm_eps=settings["norm_epsilon"],
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


def mamba(settings: dict) -> transformers.MambaForCausalLM:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes(settings)))


def mamba2(settings: dict) -> transformers.Mamba2ForCausalLM:
    heads = 2 * settings["width"] // 64
    config = transformers.Mamba2Config(num_heads=heads, head_dim=64, n_groups=1, **sizes(settings))
    return transformers.Mamba2ForCausalLM(config)


def sizes(settings: dict) -> dict:
    return {
        "hidden_size": settings["width"],
        "num_hidden_layers": settings["layers"],
        "vocab_size": settings["vocabulary"],
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def build(settings: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = {"llama": llama, "mamba": mamba, "mamba2": mamba2}[settings["architecture"]](settings)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def make_optimizer(model: torch.nn.Module, settings: dict) -> torch.optim.Optimizer:
    def decayed(name: str, value: torch.nn.Parameter) -> bool:
        return value.ndim == 2 and "embed" not in name and "A_log" not in name

    matrices = [value for name, value in model.named_parameters() if decayed(name, value)]
    rest = [value for name, value in model.named_parameters() if not decayed(name, value)]
    groups = [{"params": matrices, "weight_decay": settings["decay"]}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=settings["learning_rate"], betas=settings["betas"], eps=settings["epsilon"], fused=True
    )


def main() -> None:
    settings = json.loads(sys.argv[1])
    model = build(settings)
    optimizer = make_optimizer(model, settings)
    device = next(model.parameters()).device
    shape = (settings["batch"], settings["time"])
    tokens = torch.randint(1, settings["vocabulary"], shape, device=device)
    narrow = torch.autocast(device.type, torch.bfloat16, enabled=settings["dtype"] == "bfloat16")

    def step() -> torch.Tensor:
        with narrow:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    print(json.dumps({"loss": step().item(), "versions": versions}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        loss.item()
        print(json.dumps(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
