"""specopt imports alike from the tree, a wheel and an editable install, and never as a top-level ``kernels``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "data")

WHERE = """
import importlib.util, json, os, specopt, specopt.kernels
from specopt.kernels import products
top_level = importlib.util.find_spec("kernels")
paths = [specopt.__file__, specopt.kernels.__file__, products.__file__, top_level and top_level.origin]
print(json.dumps([p and os.path.realpath(p) for p in paths]))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Standard output of a command that sees nothing of this process's Python paths."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | variables
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def where(python: str | Path, cwd: Path, **variables: str) -> list[Path | None]:
    """Files of specopt, specopt.kernels, specopt.kernels.products and the top-level kernels (or None)."""
    return [p and Path(p) for p in json.loads(run(python, "-c", WHERE, cwd=cwd, **variables))]


def files_in_tree(tree: Path) -> list[Path]:
    kernels = tree / "kernels"
    return [tree / "specopt/__init__.py", kernels / "__init__.py", kernels / "products/__init__.py"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the repository and finds nothing left there."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "specopt", symlinks=True, ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, tree, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def editable(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with an editable install of the tree."""
    home = tmp_path_factory.mktemp("editable")
    venv.create(home, symlinks=True)
    python = home / "bin/python"
    # torch and setuptools come from here; a path in a .pth file does not bring an editable install along.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(purelib, "parent.pth").write_text("\n".join(site.getsitepackages()))
    options = ["--no-build-isolation", "--no-deps", "--no-index"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "--editable", tree, cwd=home)
    return python


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_kernels_folder_is_specopt_kernels_when_imported_from_the_tree() -> None:
    assert (ROOT / "specopt/kernels").is_symlink()
    assert where(sys.executable, cwd=ROOT)[:3] == files_in_tree(ROOT)


def test_wheel_holds_every_module_and_no_top_level_kernels(tree: Path, wheel: Path) -> None:
    own = {p.relative_to(tree) for p in tree.glob("specopt/**/*.py")}
    linked = {Path("specopt") / p.relative_to(tree) for p in tree.glob("kernels/**/*.py")}
    assert names(wheel) == {p.as_posix() for p in own | linked} | {"specopt/py.typed"}


def test_sdist_builds_the_same_wheel_as_the_tree(tree: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, tree, cwd=tmp_path)
    assert list(tmp_path.glob("*.tar.gz"))
    assert names(next(tmp_path.glob("*.whl"))) == names(wheel)


def test_wheel_imports_from_elsewhere_without_a_top_level_kernels(installed: Path, tmp_path: Path) -> None:
    package = installed.resolve() / "specopt"
    files = [package / name for name in ("__init__.py", "kernels/__init__.py", "kernels/products/__init__.py")]
    *ours, top_level = where(sys.executable, cwd=tmp_path, PYTHONPATH=str(installed))
    assert ours == files
    assert top_level is None or not top_level.is_relative_to(installed.resolve())


def test_installed_wheel_does_not_disturb_an_import_in_the_tree(installed: Path) -> None:
    assert where(sys.executable, cwd=ROOT, PYTHONPATH=str(installed))[:3] == files_in_tree(ROOT)


def test_editable_install_imports_from_elsewhere_without_a_top_level_kernels(
    tree: Path, editable: Path, tmp_path: Path
) -> None:
    *ours, top_level = where(editable, cwd=tmp_path)
    assert ours == files_in_tree(tree.resolve())
    assert top_level is None or not top_level.is_relative_to(tree.resolve())


def test_editable_install_imports_in_its_own_tree(tree: Path, editable: Path) -> None:
    assert where(editable, cwd=tree)[:3] == files_in_tree(tree.resolve())


def test_kernels_import_where_triton_cannot_be_imported() -> None:
    code = "import sys; sys.modules['triton'] = None; import specopt.kernels as k; print(k.has_triton())"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "False"


def test_metadata_asks_for_python_3_10_and_for_triton_on_linux_only(installed: Path) -> None:
    (metadata,) = (d.metadata for d in importlib.metadata.distributions(path=[str(installed)]))
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("specopt", "0.1.0", ">=3.10")
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    for platform, triton in {"linux": {"triton"}, "darwin": set(), "win32": set()}.items():
        environment = {"sys_platform": platform, "extra": ""}
        core = {n.name for n in needs if n.marker is None or n.marker.evaluate(environment)}
        assert core == {"torch", "numpy"} | triton
