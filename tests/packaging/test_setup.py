"""setup.py: what is packaged, and the switches of the build."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hyperfast


def test_every_package_of_the_tree_is_listed(root, load_setup):
    _, given = load_setup(HYPERFAST_CUDA="0")
    in_tree = {
        str(file.parent.relative_to(root)).replace("/", ".") for file in (root / "hyperfast").rglob("__init__.py")
    } | {
        "hyperfast." + str(file.parent.relative_to(root)).replace("/", ".")
        for file in (root / "kernels").rglob("__init__.py")
    }
    assert set(given["packages"]) == in_tree
    assert given["package_dir"]["hyperfast.kernels"] == "kernels"


def test_every_folder_with_code_is_a_package(root):
    folders = {file.parent for top in ("hyperfast", "kernels") for file in (root / top).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_kernels_are_reached_by_a_relative_link(root):
    link = root / "hyperfast" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"


def test_typed_and_stubbed(root, load_setup):
    _, given = load_setup(HYPERFAST_CUDA="0")
    for name in given["package_data"]["hyperfast"]:
        assert (root / "hyperfast" / name).exists()
    assert "py.typed" in given["package_data"]["hyperfast"]


def test_the_version_stands_in_one_place(root):
    project = (root / "pyproject.toml").read_text()
    assert re.search(r'^version = \{ attr = "hyperfast\.version\.__version__" \}', project, re.M)
    written = [file for file in (root / "hyperfast").glob("*.py") if re.search(r'__version__ = "', file.read_text())]
    assert written == [root / "hyperfast" / "version.py"]
    assert hyperfast.__version__ in (root / "CHANGELOG.md").read_text()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # built in place, not installed
        assert importlib.metadata.version("hyperfast") == hyperfast.__version__


def test_every_configuration_has_a_build_folder_of_its_own(load_setup):
    configurations = [
        {"HYPERFAST_CUDA": "0"},
        {"HYPERFAST_CUDA": "0", "HYPERFAST_DEBUG": "1"},
        {"HYPERFAST_CUDA": "0", "CXX": "clang++"},
    ]
    keys = [load_setup(**configuration)[0].build_key() for configuration in configurations]
    assert len(set(keys)) == len(keys)
    assert load_setup(**configurations[0])[0].build_key() == keys[0]


def test_cuda_and_its_architectures_are_part_of_the_build_folder(load_setup, tmp_path):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    without = load_setup(HYPERFAST_CUDA="0")[0]
    with_cuda = load_setup(HYPERFAST_CUDA="1", CUDA_HOME=str(tmp_path))[0]
    one_arch = load_setup(HYPERFAST_CUDA="1", CUDA_HOME=str(tmp_path), HYPERFAST_CUDA_ARCHS="90")[0]
    assert len({module.build_key() for module in (without, with_cuda, one_arch)}) == 3
    assert compiler == one_arch.NVCC
    assert "-gencode=arch=compute_90,code=sm_90" in one_arch.nvcc_flags()
    assert "-gencode=arch=compute_90,code=compute_90" in one_arch.nvcc_flags()
    assert not [flag for flag in with_cuda.nvcc_flags() + with_cuda.cxx_flags() if "fast" in flag and "math" in flag]


def test_cuda_asked_for_without_a_compiler_is_an_error(load_setup, monkeypatch):
    module, _ = load_setup(HYPERFAST_CUDA="0")
    monkeypatch.setattr(module, "CUDA", "1")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.Path, "exists", lambda path: False)
    with pytest.raises(SystemExit, match="HYPERFAST_CUDA=1 but nvcc was not found; set CUDA_HOME"):
        module.find_nvcc()
    monkeypatch.setattr(module, "CUDA", "auto")
    assert module.find_nvcc() is None


def test_an_unknown_switch_is_an_error(load_setup):
    with pytest.raises(SystemExit, match="HYPERFAST_CUDA='yes'; use auto, 0 or 1"):
        load_setup(HYPERFAST_CUDA="yes")


@pytest.mark.parametrize("required", ["0", "1"])
def test_a_broken_compiler(root, tmp_path, required):
    """A user gets the pure Python package and a warning; with HYPERFAST_REQUIRE_NATIVE=1 it is an error."""
    pytest.importorskip("pybind11")
    for name in ("csrc", "kernels"):
        shutil.copytree(root / name, tmp_path / name)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / "hyperfast").mkdir()
    for name in ("__init__.py", "version.py"):
        shutil.copy(root / "hyperfast" / name, tmp_path / "hyperfast")
    switches = {"CXX": "false", "HYPERFAST_CUDA": "0", "HYPERFAST_REQUIRE_NATIVE": required}
    finished = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=tmp_path,
        env=os.environ | switches,
        capture_output=True,
        text=True,
    )
    assert "the native module hyperfast._C was not built" in finished.stdout + finished.stderr
    assert (finished.returncode != 0) == (required == "1")
    assert not list(Path(tmp_path, "out").rglob("_C*.so"))
