"""An operator's Pallas kernels: which module holds those of the target, and calling them on each device's part."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from types import ModuleType

from kernels_pallas import tuning
from kernels_pallas.partition import Axes, partitioned
from kernels_pallas.segments import Documents
from kernels_pallas.target import Target


def module(op: str, target: Target) -> ModuleType | None:
    """`kernels_pallas.OP.mosaic_gpu` or `.mosaic_tpu`; None where the target runs no kernels or the operator has none.

    It holds ``obstacles(*inputs) -> list[str]`` (what of the inputs the kernel cannot honour), ``heuristic(*inputs) ->
    dict[str, int]`` (block sizes where no table has them), `CHOICES` (those that tuning tries), and a function named
    like the operator.
    """
    name = f"kernels_pallas.{op}.mosaic_{target.platform}"
    if target.obstacles() or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def ranked(op: str, target: Target, shapes: str, inputs: Sequence, **others: Sequence[str]) -> dict[str, Sequence[str]]:
    """What `dispatch.choose` takes: what was measured first, the fastest before the others, then the rest as they come.

    Args:
        shapes: the `tuning.bucket` of the inputs.
        inputs: what the kernel module's `obstacles` takes.
        others: the other implementations, each with its obstacles, the preferred first; the kernel comes last.
    """
    held = module(op, target)
    obstacles = target.obstacles() or [f"a {target.kind}, for which it has no kernel"]
    pallas = {"pallas": obstacles if held is None else held.obstacles(*inputs)}
    times = tuning.milliseconds(op, target, shapes)
    return dict(sorted((others | pallas).items(), key=lambda form: times.get(form[0], math.inf)))


def recurrent(
    op: str,
    target: Target,
    bucket: Callable[..., str],
    inputs: Sequence,
    axes: Sequence[Axes],
    state,
    documents: Documents | None,
    outputs: Sequence[Axes],
    chunk_size: int | None,
):
    """y and the last state of a recurrent operator by its kernel, under the ambient mesh if there is one.

    Args:
        bucket: of the inputs, see `tuning`.
        axes: of the inputs; outputs: of y and of the state, the initial one too. See `partition`.
        chunk_size: what the caller wants, None for the tuned one. A kernel takes the nearest that it can.
    """
    held = module(op, target)

    def run(state, number, live, *inputs):
        blocks = tuning.blocks(op, target, bucket(*inputs), held.heuristic(*inputs))
        if chunk_size is not None:
            blocks["chunk"] = chunk_size
        rows = None if number is None else Documents(number, live)
        return getattr(held, op)(*inputs, state, rows, blocks=blocks, simulated=target.simulated)

    marks = (None, None) if documents is None else tuple(documents)
    rows = ("batch",)
    return partitioned(run, (state, *marks, *inputs), (outputs[1], rows, rows, *axes), outputs)
