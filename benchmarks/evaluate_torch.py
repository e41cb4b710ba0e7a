"""The torch arms of evaluate.py: `python evaluate_torch.py MODEL WINDOWS`, with torch and transformers and no jax.

Reads a Llama in Hugging Face format and windows of tokens (`.npy`, ``[windows, time]``), prints ``{"versions"}``, then
reads batch sizes from standard input, one a line, and answers each with ``{"seconds", "loss"}`` of all windows.
"""

import json
import sys
import time

import numpy as np
import torch
import transformers


def main() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.float32, attn_implementation="sdpa", use_cache=False
    ).eval()
    windows = torch.from_numpy(np.load(sys.argv[2]).astype(np.int64))

    @torch.inference_mode()
    def score(size: int) -> float:
        parts = windows.split(size)
        return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts) / len(windows)

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        loss = score(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
