"""The public names: few, and one list in each package's ``__all__`` and on its page of the API reference."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fastft

PAGES = Path(__file__).resolve().parent.parent / "docs" / "api"
# "::: path.to.object", and under it "members: [a, b]" where it is a module whose members are documented.
ENTRY = re.compile(r"^::: (\S+)\n(?:    options:\n      members: \[([^\]]*)\])?", re.MULTILINE)
PACKAGES = ("fastft", *(f"fastft.{name}" for name in ("optim", "nn", "layers", "unfreeze", "retention", "data")))
INTEGRATIONS = tuple(f"fastft.integrations.{name}" for name in ("transformers", "lightning", "deepspeed"))
MOST = 95


def documented(page: str) -> dict[str, Any]:
    """The objects on a page, by their names. A module is one, and its listed members are there to be found."""
    found: dict[str, Any] = {}
    for path, members in ENTRY.findall((PAGES / f"{page}.md").read_text(encoding="utf-8")):
        name = path.rpartition(".")[2]
        assert name not in found, f"{page}.md: {name} is there twice"
        found[name] = resolved(path)
        for member in filter(None, map(str.strip, members.split(","))):
            assert hasattr(found[name], member), f"{page}.md: {path} has no {member}"
    return found


def resolved(path: str) -> Any:
    """The object of a dotted path; a module by itself."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            pytest.fail(f"the API reference describes {path}, which does not exist")


def exported(package: str) -> dict[str, Any]:
    """The objects in a package's ``__all__``, by their names."""
    module = import_module(package)
    return {name: getattr(module, name) for name in module.__all__}


def expected_on_page(package: str) -> dict[str, Any]:
    """A package's exports, but for those that are described on the page of fastft itself."""
    elsewhere = {} if package == "fastft" else exported("fastft")
    named = {name: value for name, value in exported(package).items() if not name.startswith("__")}
    return {name: value for name, value in named.items() if elsewhere.get(name) is not value}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_what_its_page_describes(package: str) -> None:
    on_page, expected = documented(package.rpartition(".")[2]), expected_on_page(package)
    assert sorted(on_page) == sorted(expected)
    assert all(on_page[name] is expected[name] for name in expected)


def test_the_integrations_export_what_their_page_describes() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("lightning")
    entries = ENTRY.findall((PAGES / "integrations.md").read_text(encoding="utf-8"))
    assert sorted(path for path, _ in entries) == sorted(
        f"{module}.{name}" for module in INTEGRATIONS for name in import_module(module).__all__
    )


def test_there_are_few() -> None:
    names = [f"{package}.{name}" for package in PACKAGES for name in exported(package)]
    names += [path for path, _ in ENTRY.findall((PAGES / "integrations.md").read_text(encoding="utf-8"))]
    assert len(names) <= MOST, names


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_whole(package: str) -> None:
    names = import_module(package).__all__
    assert len(set(names)) == len(names)
    assert set(exported(package)) == set(names)


def test_packages_are_reached_from_fastft() -> None:
    for package in PACKAGES[1:]:
        assert getattr(fastft, package.rpartition(".")[2]) is import_module(package)
