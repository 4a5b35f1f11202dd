"""Lightning Fabric without the rest of lightning: 2 s and 1,500 modules less at the start of every rank.

`import lightning.fabric` first loads lightning's Trainer, and torchmetrics to compare its version; that brings scipy,
matplotlib and transformers, of which Fabric uses nothing. So both packages stand there with their versions, unloaded,
while Fabric is imported. Code of the same process that says `from lightning import Trainer` later gets the whole.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def _unloaded(name: str) -> ModuleType:
    """The package as before its __init__ runs, which is when somebody asks for a name of it."""
    spec = find_spec(name)
    assert isinstance(spec, ModuleSpec), name
    loader, package = spec.loader, module_from_spec(spec)
    assert loader, name

    def load(attribute: str) -> Any:
        if f"{name}.{attribute}" in sys.modules:  # a submodule that is being imported, bound only at its end
            return sys.modules[f"{name}.{attribute}"]
        del package.__dict__["__getattr__"]
        loader.exec_module(package)
        return getattr(package, attribute)

    package.__dict__.update(__version__=version(name), __getattr__=load)
    return sys.modules.setdefault(name, package)


UNLOADED = [_unloaded(name) for name in ("lightning", "torchmetrics") if name not in sys.modules]
"""Must stand there before the imports below."""

from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.plugins.environments import (  # noqa: E402
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.strategies import ModelParallelStrategy, SingleDeviceStrategy  # noqa: E402

__all__ = [
    "ClusterEnvironment",
    "Fabric",
    "LightningEnvironment",
    "ModelParallelStrategy",
    "SLURMEnvironment",
    "SingleDeviceStrategy",
    "TorchElasticEnvironment",
]
