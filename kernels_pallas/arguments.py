"""What operators do with arguments first: checks of shapes, and of values where they can be seen; and padding."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# exp(floor) is 0 in the dtype of the state, so a lower log-decay says nothing more.
_FLOORS = {"float32": -104.0, "float64": -746.0}


def check_shape(op: str, name: str, value, shape: Sequence[int]) -> None:
    """Raise ValueError, naming the argument, unless `value` is None or has this shape."""
    if value is not None and value.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, not {value.shape}")


def check_rank(op: str, name: str, value, axes: str) -> None:
    """Raise ValueError, naming the argument, unless `value` has as many axes as `axes` names."""
    if value.ndim != len(axes.split(", ")):
        raise ValueError(f"{op}: {name} must be [{axes}], not shape {value.shape}")


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """Raise ValueError unless `chunk_size` is None or positive."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1, not {chunk_size}")


def check_sign(op: str, name: str, value, sign: int) -> None:
    """Raise ValueError if a value that can be seen (no tracer) has somewhere the opposite of `sign`."""
    if value is None or isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return
    seen = np.asarray(value)  # in jax.numpy a constant would become a tracer under jit
    if np.any(seen > 0 if sign < 0 else seen < 0):
        worst = float(seen.max() if sign < 0 else seen.min())
        raise ValueError(f"{op}: {name} must be {'at least' if sign > 0 else 'at most'} 0 everywhere, not {worst:g}")


def state_dtype(*values) -> jnp.dtype:
    """Dtype of states and sums: float64 if any of the values has it, else float32."""
    return jnp.result_type(jnp.float32, *(value.dtype for value in values if value is not None))


def bounded_log_decay(log_decay: jax.Array, dtype) -> jax.Array:
    """The log-decay in `dtype`, within what exp can tell: above 0 counts as 0, below the floor as the floor.

    The gradient is 1 within the bounds, themselves included, and 0 beyond.
    """
    log_decay = log_decay.astype(dtype)
    floor = _FLOORS[jnp.dtype(dtype).name]
    return jnp.where(log_decay > 0, 0, jnp.where(log_decay < floor, floor, log_decay))


def initial(op: str, initial_state, shape: Sequence[int], dtype) -> jax.Array:
    """The initial state in `dtype`, zeros if None; ValueError if its shape is another."""
    check_shape(op, "initial_state", initial_state, shape)
    return jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)


def check_heads(op: str, q, k, v) -> tuple[int, int, int]:
    """Check q, k [B, T, G, K] and v [B, T, H, V], H a multiple of G; batch, time and heads, or ValueError."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_rank(op, name, value, "batch, time, heads, width")
    check_shape(op, "k", k, q.shape)
    (batch, time, groups, _), heads = q.shape, v.shape[2]
    check_shape(op, "v", v, (batch, time, heads, v.shape[3]))
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: v has {heads} heads, not a multiple of the {groups} of q and k")
    return batch, time, heads


def check_log_decay(op: str, log_decay, q, v, *, constant: bool = False) -> None:
    """Check a log-decay per head [B, T, H], per channel [B, T, H, K] or, if `constant`, fixed [H]; or ValueError."""
    if log_decay is None:
        return
    per_head = v.shape[:3]
    shapes = [per_head, (*per_head, q.shape[3])] + [per_head[2:]] * constant
    if log_decay.shape not in shapes:
        valid = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{op}: log_decay must have shape {valid}, not {log_decay.shape}")
    check_sign(op, "log_decay", log_decay, -1)


def padded(x: jax.Array, multiples: Sequence[int]) -> jax.Array:
    """`x` with zeros behind, so that its last axes are multiples of these."""
    widths = [(0, -size % multiple) for size, multiple in zip(x.shape[-len(multiples) :], multiples, strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(widths)) + widths) if any(behind for _, behind in widths) else x
