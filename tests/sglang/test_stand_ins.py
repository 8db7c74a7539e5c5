"""What unmodified SGLang meets on a machine without CUDA, and that a real package is never hidden."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "tools/sglang_cpu"


def run(script: str, *options: str) -> None:
    """In a Python of its own, with the stand-ins loaded as the servers' environment loads them."""
    text = f"import sys\nsys.path.append({str(FOLDER)!r})\nimport stand_ins\n{textwrap.dedent(script)}"
    subprocess.run([sys.executable, *options, "-c", text], check=True, timeout=120)


def test_a_kernel_of_triton_cannot_be_declared_without_it() -> None:
    run(
        """
        import triton
        import triton.language as tl
        import triton.language.extra.libdevice
        from triton.runtime.jit import JITFunction

        @triton.autotune(configs=[triton.Config({"B": 1}, num_warps=4)], key=["n"])
        @triton.heuristics({"even": lambda arguments: True})
        @triton.jit
        def kernel(x, B: tl.constexpr = tl.constexpr(2)):
            return x

        @triton.jit(do_not_specialize=["x"])
        def other(x):
            return x

        assert kernel(3) == 3 and other(4) == 4
        assert not isinstance(kernel, JITFunction)
        try:
            triton.runtime.driver.active.get_current_target()
        except RuntimeError as error:  # SGLang takes the CPU where triton has no driver
            assert "0 active drivers" in str(error)
        else:
            raise AssertionError
        assert "0" == triton.__version__ and not hasattr(triton, "__file__")
        """,
        *("-I", "-S"),  # without installed packages
    )


def test_an_installed_package_is_hidden(tmp_path: Path) -> None:
    for name in ("triton", "sgl_kernel"):
        (tmp_path / f"{name}.py").write_text("real = True\n")
    run(f"sys.path.insert(0, {str(tmp_path)!r})\nimport triton, sgl_kernel\nassert triton.real and sgl_kernel.real")


def test_a_missing_kernel_computes_something() -> None:
    run(
        """
        from sgl_kernel import verify_tree_greedy_cpu

        try:
            verify_tree_greedy_cpu(1, 2)
        except NotImplementedError as error:
            assert "sgl_kernel.verify_tree_greedy_cpu needs the sglang-kernel package" in str(error)
        else:
            raise AssertionError
        for statement in ("from sgl_kernel import fused_experts", "import sgl_kernel.mamba"):
            try:
                exec(statement)
            except ImportError:
                continue
            raise AssertionError(statement)
        """,
        *("-I", "-S"),
    )


def test_torchvision_without_its_library_cannot_be_imported(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("import torchvision._meta_registrations\n")
    registrations = "".join(
        f"@torch.library.register_fake('torchvision::{name}')\ndef {name}(dets, scores, iou_threshold): ...\n"
        for name in ("nms", "qnms")
    )
    (package / "_meta_registrations.py").write_text(f"import torch\n{registrations}")
    run(f"sys.path.insert(0, {str(tmp_path)!r})\nimport torchvision")
