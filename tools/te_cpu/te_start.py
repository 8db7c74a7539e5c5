"""Let Transformer Engine's unmodified Python run on a machine without CUDA.

A `.pth` line of the environment of `tools/install_te_cpu.sh` imports this module when Python starts. Two modules of the
package are changed as they are imported: `common` does not load shared objects, the stand-in beside this file being its
compiled module; and DotProductAttention computes by torch what its documentation says. Its module for ONNX, whose
packages are not installed, is empty.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package then does not look for CUDA's libraries


def _no_shared_objects(common: ModuleType) -> None:
    vars(common)["load_framework_extension"] = lambda framework: None


def _torchs_attention(module: ModuleType) -> None:
    import te_attention

    te_attention.replace_forward(module.DotProductAttention)


CHANGED: dict[str, Callable[[ModuleType], None]] = {
    "transformer_engine.common": _no_shared_objects,
    "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention": _torchs_attention,
}


class _Empty(importlib.abc.Loader):
    """Of a module whose names are `None`."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _EmptyModule(ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Changing(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, change: Callable[[ModuleType], None]) -> None:
        self.loader, self.change = loader, change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.change(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "transformer_engine.pytorch.onnx_extensions":
            return importlib.machinery.ModuleSpec(name, _Empty())
        if name not in CHANGED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Changing(spec.loader, CHANGED[name])
        return spec


sys.meta_path.insert(0, _Finder())
