"""Stand-ins with which unmodified SGLang imports on a machine without CUDA.

A `.pth` line of the servers' environment imports this module when Python starts. A stand-in is created when its package
is imported; an installed package always takes precedence:

* `triton`: a tree of empty modules whose decorators return functions unchanged, without a driver. No kernel can be
  launched.
* `sgl_kernel`: the names that SGLang imports unconditionally for a CPU, each of which raises when called. They are
  for speculative decoding, which the rollout does not use.
* torchvision's operators: if its compiled library does not load, signatures of the two that have shapes registered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SGL_KERNEL_NAMES = frozenset(
    {
        "assign_draft_cache_locs_contiguous_cpu",
        "assign_extend_cache_locs_cpu",
        "assign_req_to_token_pool_cpu",
        "build_tree_kernel_efficient_cpu",
        "copy_all_layer_kv_cache_cpu",
        "fill_accept_out_cache_loc_cpu",
        "fill_bonus_tokens_cpu",
        "rotate_input_ids_cpu",
        "verify_tree_greedy_cpu",
    }
)
TORCHVISION_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class _Name(type):
    """Any name of triton: a class without instances, usable as a decorator and as a decorator factory."""

    def __getattr__(cls, name: str) -> _Name:
        return _triton_name(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else _Name(cls.__name__, (), {})


class _Triton(ModuleType):
    """triton or one of its modules."""

    __version__ = "0"

    def __getattr__(self, name: str) -> _Name:
        return _triton_name(name)


def _triton_name(name: str) -> _Name:
    if name == "active":  # triton.runtime.driver.active, as triton itself answers where no device is
        raise RuntimeError("0 active drivers ([])")
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (), {})


class _SglKernel(ModuleType):
    """sgl_kernel without its compiled part."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in SGL_KERNEL_NAMES:
            raise AttributeError(f"the stand-in for sgl_kernel has no {name}")

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"sgl_kernel.{name} needs the sglang-kernel package, which is not installed")

        return missing


class _Loader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return (_Triton if spec.name.split(".")[0] == "triton" else _SglKernel)(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Missing:
    """Last on sys.meta_path: asked for a package only where no other finder knows it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "sgl_kernel":
            return ModuleSpec(name, _Loader())  # type: ignore[arg-type]
        if name.split(".")[0] == "triton":
            return ModuleSpec(name, _Loader(), is_package=True)  # type: ignore[arg-type]
        return None


class _TorchvisionOperators:
    """First on sys.meta_path: declares what is missing before torchvision registers shapes for its operators."""

    library: Any = None  # torch forgets the declarations when it goes

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name != "torchvision._meta_registrations":  # imported after its compiled library
            return
        import torch

        missing = {n: s for n, s in TORCHVISION_OPERATORS.items() if not hasattr(torch.ops.torchvision, n)}
        if missing:
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator, signature in missing.items():
                self.library.define(operator + signature)


sys.meta_path.append(_Missing())
sys.meta_path.insert(0, _TorchvisionOperators())
