"""What is shipped: declared packages against those on disk, the wheel's contents, and declared dependencies."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from tests.test_layers import imports, python_files

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's content, the wheel built from a copy of the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("clawnet", "commands"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(place / done.stdout.split()[-1]) as wheel:
        wheel.extractall(place / "installed")
    return place / "installed"


def test_declared_packages_are_those_on_disk(project: dict[str, Any]) -> None:
    declared = set(project["tool"]["setuptools"]["packages"])
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "clawnet").rglob("__init__.py")} | {
        ".".join(("clawnet", *path.parent.relative_to(ROOT).parts)) for path in (ROOT / "commands").rglob("__init__.py")
    }
    assert declared == on_disk


def test_no_folder_of_modules_lacks_its_package() -> None:
    folders = {path.parent for path in python_files("clawnet", "commands")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_the_wheel_has_every_module_and_no_top_level_commands(installed: Path) -> None:
    shipped = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    expected = {path.relative_to(ROOT).as_posix() for path in python_files("clawnet")}
    expected |= {f"clawnet/{path.relative_to(ROOT).as_posix()}" for path in python_files("commands")}
    assert shipped == expected
    assert (installed / "clawnet" / "py.typed").exists()


def test_commands_is_no_name_of_its_own_once_installed(installed: Path, tmp_path: Path) -> None:
    probe = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import importlib.util as u\n"
        "import clawnet.commands\n"
        "print(clawnet.commands.__file__.startswith(sys.argv[1]), u.find_spec('commands') is None)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", probe, str(installed)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_entry_point_and_licence(installed: Path) -> None:
    (info,) = installed.glob("clawnet-*.dist-info")
    assert "clawnet = clawnet.commands.app:main" in (info / "entry_points.txt").read_text()
    assert "License-Expression: MIT" in (info / "METADATA").read_text()
    assert "clawnet contributors" in (info / "licenses" / "LICENSE").read_text()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(lines: list[str]) -> dict[str, str]:
    """Normalised name to the rest of each requirement."""
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)(.*)", line)
        assert match is not None
        found[_normal(match[1])] = match[2]
    return found


def test_every_dependency_is_declared_with_a_lower_bound_and_used(project: dict[str, Any]) -> None:
    declared = _requirements(project["project"]["dependencies"])
    assert [name for name, rest in declared.items() if ">=" not in rest] == []
    distributions = packages_distributions()
    used: dict[str, str] = {}
    for path in python_files("clawnet", "commands"):
        for module, line in imports(ast.parse(path.read_text())):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top not in ("clawnet", "commands"):
                for distribution in distributions.get(top, [top]):
                    used[_normal(distribution)] = f"{path.relative_to(ROOT)}:{line}"
    assert {name: where for name, where in used.items() if name not in declared} == {}
    assert sorted(set(declared) - set(used)) == []


def test_extras_have_lower_bounds(project: dict[str, Any]) -> None:
    for lines in project["project"]["optional-dependencies"].values():
        assert [line for line in lines if ">=" not in line] == []


def test_python_versions_agree(project: dict[str, Any]) -> None:
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert project["tool"]["mypy"]["python_version"] == "3.11"


def test_no_machine_and_no_registry_is_named() -> None:
    """The project's own files name no path of a build machine and no package registry's host."""
    told = re.compile(r"https?://[\w.-]*(pypi|pythonhosted|npmjs|debian)\.|/(root|home/\w+)/\.(pyenv|npm|cache)")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.splitlines()]
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()}
    assert [path for path, text in texts.items() if told.search(text) and path != Path(__file__).resolve()] == []
