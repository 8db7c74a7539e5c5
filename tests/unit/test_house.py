"""The structure of the package: unique names, floors without arrows up, short files, declared dependencies."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "eaopd_megatron"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = (
    {"__init__", "errors", "utils"},
    {"objective"},
    {"config"},
    {"models"},
    {"distributed"},
    {"data"},
    {"megatron"},
    {"checkpoint"},
    {"serving", "launch"},
    {"rollout"},
    {"teacher"},
    {"plotting"},
    {"evaluation"},
    {"reporting", "planning"},
    {"training"},
    {"diagnostics"},
    {"slurm_job"},
    {"worker", "cli", "__main__"},
)
"""Folders and files of the package's root, low to high; a floor imports from itself and from lower ones."""
MOST_FILES, MOST_LINES, MOST_PARAMETERS = 159, 400, 10
LONG_CALLS = {"objective/entropy_aware.py", "objective/linear.py"}
"""The objective's public calls take tensors and settings one by one, as a loss does. Triton's kernels may, too."""
IMPORTED_ELSEWHERE = {"tensorboard": "torch.utils.tensorboard imports it"}
"""Declared dependencies that no file imports."""
PART_OF = {"yarl": "aiohttp", "pydantic-core": "pydantic", "sympy": "math-verify"}
PART_OF["latex2sympy2-extended"] = "math-verify"
"""Distributions whose names appear in the interface of a declared one."""


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """Dotted names of what a file imports at run time, also inside functions."""
    tree = parsed(file)
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from ({name for name in modules if name in MODULES} or {node.module})


MODULES = {module_name(file) for file in FILES}
EDGES = {
    module_name(file): {name for name in imports(file) if name in MODULES and name != module_name(file)}
    for file in FILES
}


def room(module: str) -> str:
    """The folder of the package, or the file in its root, that a module lies in."""
    return [*module.split("."), "__init__"][1]


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and "TypeVar" not in ast.unparse(node.value):
            yield from (part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_a_public_name_means_two_things() -> None:
    found = defaultdict(list)
    for file in FILES:
        for name in public_names(parsed(file)):
            if not name.startswith("_"):
                found[name].append(str(file.relative_to(ROOT)))
    twice = [f"{name}: {', '.join(places)}" for name, places in found.items() if len(places) > 1]
    assert not twice, "\n".join(twice)


def test_two_files_have_one_name() -> None:
    found = defaultdict(list)
    for file in FILES:
        if not file.stem.startswith("__"):
            found[file.stem].append(str(file.relative_to(ROOT)))
    twice = [f"{name}: {', '.join(places)}" for name, places in found.items() if len(places) > 1]
    assert not twice, "\n".join(twice)


def test_a_room_imports_one_above_it_or_two_import_each_other() -> None:
    """The order of FLOORS forbids both between floors; within a floor no pair may import each other."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    pairs = defaultdict(list)
    for module, targets in EDGES.items():
        for target in targets:
            if target != "eaopd_megatron" and room(module) != room(target):
                pairs[room(module), room(target)].append(f"{module} imports {target}")
    wrong = [line for (a, b), lines in pairs.items() if floor[b] > floor[a] for line in lines]
    wrong += [line for (a, b), lines in pairs.items() if (b, a) in pairs for line in lines]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(EDGES).prepare()
    except CycleError as circle:
        raise AssertionError(" imports ".join(reversed(circle.args[1]))) from None


def test_a_file_is_long_or_there_are_many() -> None:
    tests = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    long = [str(file.relative_to(ROOT)) for file in [*FILES, *tests] if file.read_text().count("\n") > MOST_LINES]
    assert not long, "\n".join(long)
    assert len(FILES) <= MOST_FILES


def test_a_call_takes_more_parameters_than_anybody_remembers() -> None:
    long = []
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([one for one in arguments if one.arg not in ("self", "cls")])
                kernel = any("triton.jit" in ast.unparse(one) for one in node.decorator_list)
                public = not node.name.startswith("_") or node.name == "__init__"
                if count > MOST_PARAMETERS and public and not kernel:
                    long.append((str(file.relative_to(PACKAGE)), f"{node.name}: {count}"))
    assert not [entry for entry in long if entry[0] not in LONG_CALLS], long


def test_a_tool_needs_the_tests() -> None:
    files = [*(ROOT / "tools").rglob("*.py"), *FILES]
    wrong = [f"{file}: {name}" for file in files for name in imports(file) if name.partition(".")[0] == "tests"]
    assert not wrong, "\n".join(wrong)


def test_a_dependency_is_undeclared_or_idle() -> None:
    declared = {
        canonicalize_name(Requirement(line).name)
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    distributions = packages_distributions()
    imported = {name.partition(".")[0] for file in FILES for name in imports(file)}
    imported -= {*sys.stdlib_module_names, "eaopd_megatron"}
    used = {canonicalize_name(distributions.get(name, [name])[0]) for name in imported}
    used = {canonicalize_name(PART_OF.get(name, name)) for name in used}
    assert not used - declared, f"imported, not declared: {sorted(used - declared)}"
    idle = declared - used - set(IMPORTED_ELSEWHERE)
    assert not idle, f"declared, not imported: {sorted(idle)}"
