"""Efficient language-model architectures in JAX: trained, compared and cut to size, straight from a config.

``load`` opens a run or a published model for logits, loss, generation and evaluation, ``from_hf`` and ``from_gguf``
a published one; the command line does everything else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficient_lm.api import Model, from_gguf, from_hf, load

__all__ = ["Model", "from_gguf", "from_hf", "load"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: `import efficient_lm` alone, and with it --help, does not start JAX.
    if name in __all__:
        from efficient_lm import api

        return getattr(api, name)
    raise AttributeError(f"module 'efficient_lm' has no attribute '{name}'")
