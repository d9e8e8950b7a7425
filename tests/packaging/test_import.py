"""What importing does, and above all what it does not do."""

import ast
import os
import subprocess
import sys

import pytest


def run(code: str, **variables: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_import_is_lean():
    heavy = ["triton", "tyro", "rich", "matplotlib", "sklearn", "tensorboard", "PIL", "onnx"]
    # What torch itself imports is not ours to blame.
    loaded = run(
        "import sys, torch; before = set(sys.modules); import hyperfast\n"
        "print(*(set(sys.modules) - before), int(torch.cuda.is_initialized()))"
    ).split()
    assert not [name for name in loaded if name.split(".")[0] in heavy]
    assert loaded[-1] == "0", "importing hyperfast initialised CUDA"


def test_import_writes_nothing():
    assert run("import hyperfast", PYTHONWARNINGS="error::UserWarning:hyperfast") == ""


@pytest.fixture(scope="module")
def native():
    return pytest.importorskip("hyperfast._C", reason="the native module was not built")


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("hyperfast._C", {path!r})
_C = importlib.util.module_from_spec(spec); spec.loader.exec_module(_C)
"""


def test_native_module_needs_neither_torch_nor_a_driver(native):
    code = LOAD.format(path=native.__file__) + "print('torch' in sys.modules, _C.with_cuda, _C.instruction_set())"
    torch_loaded, with_cuda, instruction_set = run(code, CUDA_VISIBLE_DEVICES="").split()
    assert torch_loaded == "False" and with_cuda == str(native.with_cuda)
    assert instruction_set in ("baseline", "avx2", "avx512", "avx512bf16")


def test_the_instruction_set_can_be_narrowed(native):
    code = LOAD.format(path=native.__file__) + "print(_C.instruction_set())"
    assert run(code, HYPERFAST_INSTRUCTION_SET="baseline") == "baseline"


def test_the_stub_says_what_the_module_has(root, native):
    stub = ast.parse((root / "hyperfast" / "_C.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    names = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    if not native.with_cuda:
        names = {name for name in names if not name.endswith("_cuda")}
    names |= {name for name in classes if not name.startswith("_")}  # what classes have in common is the stub's own
    names |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert names == {name for name in dir(native) if not name.startswith("_")}
    for name in names & classes.keys():
        parts = [classes[name], *(classes[base.id] for base in classes[name].bases if base.id[0] == "_")]
        items = [item for part in parts for item in part.body]
        members = {item.name for item in items if isinstance(item, ast.FunctionDef)} - {"__init__"}
        members |= {item.target.id for item in items if isinstance(item, ast.AnnAssign)}
        assert members == {item for item in vars(getattr(native, name)) if not item.startswith("_")}, name