"""Parts import only from parts below, applications only what is exported, and nothing in a circle; read with ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    {
        "_C",
        "_core",
        "checks",
        "environment",
        "errors",
        "names",
        "output",
        "plotting",
        "reports",
        "tables",
        "warning",
        "weight_file",
    },
    {"layers"},
    {"anchor"},
    {"optim", "nn"},
    {"data", "unfreeze", "retention"},
    {"recipes", "diagnosis"},
    {"__init__"},  # of fastft itself: it imports all of the above
    {"integrations"},
    {"problems"},
    {"commands"},
    {"__main__"},
    {"benchmarks"},
]
"""Parts of ``fastft``, and the benchmarks: each imports from lines above its own, the first line from itself too."""
LIBRARY = {"optim", "nn", "layers", "unfreeze", "retention", "data"}
"""Packages that applications import from as a whole: ``from fastft.optim import X``, no module inside."""
APPLICATIONS = {"problems", "commands", "benchmarks"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for folder in ("fastft", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
MODULES = {*FILES, "fastft._C"}


def statements(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if inside_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from statements(child, inside_functions)


def imports(module: str, inside_functions: bool = True) -> Iterator[tuple[str, str | None]]:
    """(module, name) for each name of ours that a module imports; None for a module as a whole."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in statements(TREES[module], inside_functions):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((source, alias.name) for alias in node.names if source in MODULES)


def target(source: str, name: str | None) -> str:
    """The module that ``from source import name`` makes use of."""
    return f"{source}.{name}" if f"{source}.{name}" in MODULES else source


def part_of(module: str) -> str:
    first, *rest = module.split(".")
    return first if first == "benchmarks" else rest[0] if rest else "__init__"


def application_of(module: str) -> str:
    """A command, the other modules of ``commands``, the problems, or the benchmarks."""
    one_command = module.startswith("fastft.commands.") and "fastft.commands" not in (module, module.rpartition(".")[0])
    return ".".join(module.split(".")[: 3 if one_command else 1 if part_of(module) == "benchmarks" else 2])


def exported(module: str) -> set[str]:
    """The names in a module's ``__all__``."""
    for node in TREES[module].body if module in TREES else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@pytest.mark.parametrize("part", sorted({part_of(module) for module in FILES}))
def test_a_part_imports_only_from_parts_below_it(part: str) -> None:
    (place,) = (i for i, parts in enumerate(ORDER) if part in parts)
    below = {part}.union(*ORDER[: max(place, 1)])
    wrong = {
        f"{module}: {target(source, name)}"
        for module in FILES
        if part_of(module) == part
        for source, name in imports(module)
        if part_of(target(source, name)) not in below
    }
    assert not wrong


@pytest.mark.parametrize("module", [module for module in FILES if part_of(module) in APPLICATIONS])
def test_an_application_imports_exported_names_only(module: str) -> None:
    for source, name in imports(module):
        if f"{target(source, name)}.".startswith(f"{application_of(module)}."):
            continue
        assert part_of(source) not in LIBRARY or source.count(".") == 1, f"{source}: import from its package instead"
        assert name is None or name in exported(source), f"{source} does not export {name}"


def test_no_modules_import_each_other() -> None:
    graph = {module: {target(*found) for found in imports(module, inside_functions=False)} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")
