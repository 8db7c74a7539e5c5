"""What keeps the project's shape: where Megatron-Core is imported, what the objective needs, how long the loop is."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "eaopd_megatron"
SOURCES = sorted(path for folder in (PACKAGE, ROOT / "tools") for path in folder.rglob("*.py"))
TEXTS = {".py", ".sh", ".yaml", ".toml", ".md", ".json", ".run", ".cfg", ""}


MACHINE_PATH = re.compile(r"(?<![\w.}>])/(?:root|work|Users|home)/\w|(?<![\w.}])/tmp/(?:work|venv)\b")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted module) of every import statement in a file, at any depth."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            yield node.lineno, ".".join(part for part in (base, node.module) if part)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(part.value)) for part in node.args[:1] if isinstance(part, ast.Constant))


def test_megatron_core_spreads_over_the_package() -> None:
    allowed = [PACKAGE / folder for folder in ("megatron", "checkpoint", "distributed", "models")]
    allowed.append(ROOT / "tools" / "benchmark_objective.py")  # times Megatron-Core's own cross entropy
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        if not any(path.is_relative_to(folder) for folder in allowed)
        for line, name in imports(path)
        if name.split(".")[0] == "megatron"
    ]
    assert not found, "Megatron-Core is imported in megatron/, checkpoint/, distributed/ and models/ only"


def test_the_objective_needs_more_than_torch() -> None:
    files = sorted((PACKAGE / "objective").rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in imports(path)
        if not name.startswith((".", "eaopd_megatron.objective"))
        and name.split(".")[0] not in {*sys.stdlib_module_names, "torch"}
        and not (path.name.startswith("triton_") and name.split(".")[0] == "triton")  # imported with a CUDA tensor
    ]
    assert not found, "the objective imports torch and the standard library only"


def test_the_training_loop_outgrows_a_screen() -> None:
    assert len((PACKAGE / "training" / "loop.py").read_text().splitlines()) <= 120


def test_a_package_without_init_is_left_out_of_the_installation() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert not missing


def texts() -> list[Path]:
    hidden = {"runs", "build", "dist"}
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.suffix in TEXTS
        and path.is_file()
        and not any(
            (part.startswith(".") and part != ".ci") or part in hidden or part.endswith(".egg-info")
            for part in path.relative_to(ROOT).parts
        )
    ]


def test_a_path_of_one_machine_is_written_down() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found


def test_the_search_for_machine_paths_finds_nothing_or_too_much() -> None:
    for line in ("see https://example.org/home/page", "a/work/b", "$HOME/work/x", "{root}/work/x"):
        assert not MACHINE_PATH.search(line), line
    for place in ("root/x", "home/me/x", "Users/me/x", "tmp/venv/bin"):
        assert MACHINE_PATH.search(f"cd '/{place}'"), place
