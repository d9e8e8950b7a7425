"""The sdist and the wheel as a user gets them. Takes a minute or two: `pytest -m build`, run by .ci/run."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.build

SMOKE = """
import sys, pathlib
import hyperfast, torch
from hyperfast import _C
home = pathlib.Path(sys.argv[1]).resolve()
assert home in pathlib.Path(hyperfast.__file__).resolve().parents, hyperfast.__file__
assert home in pathlib.Path(_C.__file__).resolve().parents, _C.__file__
student = torch.randn(2, 8, 4, 4, requires_grad=True)
with hyperfast.use_backend("cpu"):
    hyperfast.functional.attention_transfer([student], [torch.randn(2, 16, 4, 4)]).sum().backward()
    theta = hyperfast.functional.generate(
        torch.rand(3), [torch.randn(5, 6)], [torch.zeros(5)], torch.randn(40, 5), torch.zeros(40)
    )
assert student.grad.norm() > 0 and theta.shape == (40,)
import hyperfast.kernels.triton
print("smoke ok")
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    finished = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def tracked_copy(root: Path, folder: Path) -> Path:
    """The sources alone: no build/, no module built in place."""
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", ".*", "build", "dist", "runs", "site", "results")
    shutil.copytree(root, folder, symlinks=True, ignore=skip)
    return folder


@pytest.fixture(scope="module")
def distributions(root, tmp_path_factory) -> dict[str, Path]:
    """Built in isolation, where there is no torch: the sdist from the tree, the wheel from the sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    source = tracked_copy(root, folder / "source")
    # One architecture: that all of them compile is the business of test_cuda_compiles.
    switches = {"HYPERFAST_REQUIRE_NATIVE": "1", "HYPERFAST_CUDA_ARCHS": "90", "PYTHONPATH": ""}
    run(sys.executable, "-m", "build", "--outdir", folder, source, cwd=folder, **switches)
    return {"sdist": next(folder.glob("*.tar.gz")), "wheel": next(folder.glob("*.whl"))}


def test_the_sdist_holds_every_source_once(root, distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert len(names) == len(set(names))
    sources = [
        str(f.relative_to(root)) for top in ("csrc", "kernels") for f in (root / top).rglob("*.*") if f.is_file()
    ]
    assert not {name for name in sources if not name.endswith((".pyc", ".so"))} - set(names)
    assert not [name for name in names if name.startswith("hyperfast/kernels")]
    assert "setup.py" in names and "hyperfast/_C.pyi" in names and "tests/packaging/test_wheel.py" in names


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    names = zipfile.ZipFile(distributions["wheel"]).namelist()
    assert len(names) == len(set(names))
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"hyperfast"}
    assert sum(name.startswith("hyperfast/_C.") and name.endswith(".so") for name in names) == 1
    assert {"hyperfast/py.typed", "hyperfast/_C.pyi", "hyperfast/kernels/triton/__init__.py"} <= set(names)
    assert not [name for name in names if "test" in name.split("/")[-1] or name.endswith((".cu", ".cpp", ".h"))]


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target]
    run(*pip, distributions["wheel"], cwd=target)
    return target


def test_the_installed_wheel_works_from_another_folder(installed, tmp_path):
    assert "smoke ok" in run(sys.executable, "-c", SMOKE, installed, cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_command_line_of_the_installed_wheel(installed, tmp_path):
    pytest.importorskip("tyro")
    shown = run(sys.executable, installed / "bin" / "hyperfast", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    for command in ("train", "distill", "export", "env"):
        assert command in shown


def test_the_native_module_links_nothing_unusual(distributions, tmp_path):
    if not shutil.which("readelf"):
        pytest.skip("there is no readelf on this machine")
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".so"))
        library = archive.extract(name, tmp_path)
    lines = run("readelf", "-d", library, cwd=tmp_path).splitlines()
    needed = [line.split("[")[1].rstrip("]") for line in lines if "NEEDED" in line]
    assert not [lib for lib in needed if lib.startswith(("libtorch", "libc10", "libcud", "libpython"))]


def test_turning_cuda_off_turns_it_off(root, tmp_path):
    """An object or module of an earlier configuration in the same tree is not taken up again."""
    source = tracked_copy(root, tmp_path / "source")
    found = {}
    # Without optimisation, since that is quicker.
    switches = {"HYPERFAST_CUDA_ARCHS": "90", "HYPERFAST_REQUIRE_NATIVE": "1", "HYPERFAST_DEBUG": "1"}
    for switch in ("auto", "0"):
        build = ("setup.py", "-q", "build_ext", "--inplace")
        run(sys.executable, *build, cwd=source, HYPERFAST_CUDA=switch, **switches)
        code = "from hyperfast import _C; print(_C.with_cuda)"
        found[switch] = run(sys.executable, "-c", code, cwd=source, PYTHONPATH=str(source)).strip()
    if found["auto"] == "False":
        pytest.skip("there is no nvcc on this machine")
    assert found == {"auto": "True", "0": "False"}
