"""Published families, one file each. Every file of this folder with a `FAMILY` is known by its `model_type`."""

import importlib
import pkgutil

from efficient_lm.interop.families.base import Family


def _load() -> dict[str, Family]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in families}


FAMILIES: dict[str, Family] = _load()
"""model_type → family."""
