"""Who is raced: the forms of this package, and other libraries where they are installed.

A peer of JAX is a function of the same arrays. A peer of torch gets the same values as torch tensors on the same GPU,
is timed by CUDA events, and its outputs are compared too. Each is told apart by the operator and the sizes it serves.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kernels_pallas.benchmark.cases import Case

OWN = ("pallas", "xla", "reference", "cudnn")
OTHERS = {
    "tokamax": "tokamax",
    "fla": "fla",
    "mamba_ssm": "mamba_ssm",
    "causal_conv1d": "causal_conv1d",
    "torch": "torch",
}
"""Name of a peer → the package that it comes with."""
PEERS = (*OWN, *OTHERS)


def serves(peer: str, case: Case) -> bool:
    """Whether a peer has a form of a case at all, installed or not."""
    if peer in OWN:
        return peer != "cudnn" or case.op == "attention"
    return case.op in _TOKAMAX if peer == "tokamax" else (peer, case.op) in _TORCH


def installed(peer: str) -> bool:
    """Whether a peer's package is there."""
    return peer in OWN or importlib.util.find_spec(OTHERS[peer]) is not None


def tokamax_form(case: Case) -> Callable[[Mapping[str, jax.Array]], Any]:
    """tokamax's form of a call, of named arrays."""
    tokamax = importlib.import_module("tokamax")
    if case.op == "attention":

        def attend(arrays):
            window = case.sizes.get("window")
            window = None if window is None else (window - 1, 0)
            return tokamax.dot_product_attention(
                arrays["q"], arrays["k"], arrays["v"], is_causal=True, local_window_size=window
            )

        return attend
    if case.op == "grouped_matmul":
        return lambda arrays: tokamax.ragged_dot(arrays["x"], arrays["w"], arrays["group_sizes"])
    return lambda arrays: tokamax.linear_softmax_cross_entropy_loss(
        arrays["x"], arrays["labels"], arrays["w_head"].astype(arrays["x"].dtype)
    )


def torch_form(peer: str, case: Case) -> Callable[[Mapping[str, Any]], Any]:
    """Another library's form of a call, of named torch tensors; ValueError where it has none of this case."""
    form = _TORCH[peer, case.op](case)
    if form is None:
        raise ValueError(f"{peer} has no form of this case")
    return form


def tensors(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The arrays as torch tensors on the GPU, floats with gradients; bfloat16 travels as its bits."""
    torch = importlib.import_module("torch")
    made = {}
    for name, value in arrays.items():
        host = np.asarray(value)
        if value.dtype == jax.numpy.bfloat16:
            tensor = torch.from_numpy(host.view(np.int16).copy()).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(host.copy())
        made[name] = tensor.cuda().requires_grad_(tensor.is_floating_point())
    return made


def torch_milliseconds(run: Callable[[], Any], rounds: int, calls: int = 10) -> list[float]:
    """Times of single calls by CUDA events, after a few that do not count."""
    torch = importlib.import_module("torch")
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return times


def torch_training(function: Callable, values: Mapping[str, Any]) -> Callable[[], Any]:
    """Forward and backward of the sum of the outputs."""
    torch = importlib.import_module("torch")
    inputs = [value for value in values.values() if value.requires_grad]

    def run():
        y = function(values)
        return torch.autograd.grad(y.float().sum(), inputs, allow_unused=True)

    return run


def _torch_attention(case: Case):
    if "window" in case.sizes:
        return None
    attend = importlib.import_module("torch").nn.functional.scaled_dot_product_attention

    def run(values):
        q, k, v = (values[name].transpose(1, 2) for name in "qkv")
        return attend(q, k, v, is_causal=True, enable_gqa=case.sizes["G"] != case.sizes["H"]).transpose(1, 2)

    return run


def _spread(values: Mapping[str, Any], case: Case) -> list[Any]:
    """q and k with a head for every head of v, as flash-linear-attention wants them."""
    times = case.sizes["H"] // case.sizes["G"]
    return [values[name].repeat_interleave(times, dim=2) if times > 1 else values[name] for name in "qk"]


def _fla_linear_attention(case: Case):
    per_channel = case.sizes["decay"] == "channel"
    name = "gla" if per_channel else "simple_gla"
    function = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
    return lambda values: function(*_spread(values, case), values["v"], g=values["log_decay"], scale=1.0)[0]


def _fla_delta_rule(case: Case):
    per_channel = case.sizes["decay"] == "channel"
    folder, name = ("kda", "chunk_kda") if per_channel else ("gated_delta_rule", "chunk_gated_delta_rule")
    function = getattr(importlib.import_module(f"fla.ops.{folder}"), name)
    return lambda values: function(
        *_spread(values, case), values["v"], g=values["log_decay"], beta=values["beta"], scale=1.0
    )[0]


def _fla_recurrence(case: Case):
    function = importlib.import_module("fla.ops.hgrn").chunk_hgrn
    return lambda values: function(values["x"], values["log_a"])[0]


def _mamba_scan(case: Case):
    function = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def run(values):
        u, dt, B, C = (values[name].transpose(1, 2).contiguous() for name in ("u", "dt", "B", "C"))
        return function(u, dt.to(u.dtype), values["A"], B, C, values["D"]).transpose(1, 2)

    return run


def _mamba_ssd(case: Case):
    """Mamba-2's own kernel takes steps and rates: with a rate of -1 the step is the negative log-decay."""
    if case.sizes["decay"] != "head":
        return None
    torch = importlib.import_module("torch")
    function = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def run(values):
        steps = -values["log_decay"]
        rate = -torch.ones(case.sizes["H"], device=steps.device)
        x = (values["v"] / steps[..., None]).to(values["v"].dtype)
        return function(x, steps, rate, values["k"], values["q"], chunk_size=256)

    return run


def _causal_conv(case: Case):
    function = importlib.import_module("causal_conv1d").causal_conv1d_fn
    return lambda values: function(values["x"].transpose(1, 2), values["w"].t().contiguous()).transpose(1, 2)


_TOKAMAX = ("attention", "grouped_matmul", "linear_cross_entropy")
_TORCH = {
    ("torch", "attention"): _torch_attention,
    ("fla", "linear_attention"): _fla_linear_attention,
    ("fla", "delta_rule"): _fla_delta_rule,
    ("fla", "linear_recurrence"): _fla_recurrence,
    ("mamba_ssm", "selective_scan"): _mamba_scan,
    ("mamba_ssm", "linear_attention"): _mamba_ssd,
    ("causal_conv1d", "short_convolution"): _causal_conv,
}
