"""The torch arm of train_step.py: `python train_step_torch.py SETTINGS`, with torch and transformers and no jax.

Builds and warms up a `LlamaForCausalLM`, prints ``{"loss", "versions"}``, then reads numbers of steps from standard
input, one a line, and answers each with the seconds they took.
"""

import json
import sys
import time

import torch
import transformers


def build(settings: dict) -> torch.nn.Module:
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
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu").train()


def make_optimizer(model: torch.nn.Module, settings: dict) -> torch.optim.Optimizer:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
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
