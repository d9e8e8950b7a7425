"""The rules of the house that can be read off the sources: who imports whom, docstrings, sizes, nothing forgotten."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hyperfast"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if "kernels" not in file.parts[len(PACKAGE.parts) :])
FILES += sorted((ROOT / "kernels").rglob("*.py"))
OPERATIONS = sorted(file.stem for file in (PACKAGE / "ops").glob("[a-z]*.py"))

MIDDLE = {"nn", "optim", "losses", "surgery", "models", "data", "analysis"}
# Part of the package -> parts of it that it may import. Nothing imports a part that stands below it in this list.
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "backends": set(),
    "reference": set(),
    "kernels": set(),
    "_C": set(),
    "ops": {"kernels", "_C", "reference", "backends"},
    "functional": {"ops", "reference", "backends"},
    "models": set(),
    "data": set(),
    "surgery": {"functional"},
    "losses": {"functional", "surgery"},
    "nn": {"functional", "surgery", "version"},
    "optim": {"functional", "nn"},
    "analysis": {"functional", "reference", "surgery", "losses", "nn"},
    "env_report": {"ops", "backends", "version"},
    "__init__": {"functional", "backends", "version", *MIDDLE},
    "recipes": {"__init__", "functional", "version", "env_report", *MIDDLE},
    "cli": {"__init__", "functional", "version", "backends", "env_report", "recipes", *MIDDLE},
    "__main__": {"cli"},
}
# Where it matters what else is imported, the standard library apart.
OUTSIDE = {
    "reference": {"torch"},
    "kernels": {"torch", "triton"},
    "models": {"torch", "safetensors"},
    "data": {"torch", "numpy", "sklearn", "PIL"},
}


def part_of(file: Path) -> str:
    """The part a file belongs to: a package of hyperfast, or one of its modules."""
    if file.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import in full"
            module = node.module or ""
            # `from hyperfast import losses` imports a part, `from hyperfast.losses import X` a name of one.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "hyperfast" else [module]
            yield from ((node.lineno, name) for name in names)


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_every_part_has_a_place():
    assert {part_of(file) for file in FILES} <= set(MAY_IMPORT)


def test_the_order_has_no_way_back():
    seen: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= seen, f"{part} may import what stands below it in the list"
        seen.add(part)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_follow_the_direction(file):
    part = part_of(file)
    wrong = []
    for line, imported in imports(file):
        top, *rest = imported.split(".")
        if top == "hyperfast":
            # `import hyperfast` is its __init__, which stands over everything but recipes and the command line.
            target = rest[0] if rest else "__init__"
            if target != part and target not in MAY_IMPORT[part]:
                wrong.append(f"line {line}: {part} may not import {imported}")
        elif top == "kernels":
            wrong.append(f"line {line}: import hyperfast.kernels; the top-level name belongs to another package")
        elif part in OUTSIDE and top not in OUTSIDE[part] | set(sys.stdlib_module_names):
            wrong.append(f"line {line}: {part} may not import {imported}")
    assert not wrong


def test_sources_and_tests_leave_the_top_level_name_kernels_alone():
    files = [file for top in ("tests", "bench") for file in (ROOT / top).rglob("*.py")]
    assert not [name(f) for f in files if any(i.split(".")[0] == "kernels" for _, i in imports_anywhere(f))]


def imports_anywhere(file: Path) -> Iterator[tuple[int, str]]:
    """As `imports`, for files that may import relatively."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


def is_kernel(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """A `@triton.jit` function is Triton's, and called by its launcher alone."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_everything_public_has_a_docstring(file):
    tree = ast.parse(file.read_text(), str(file))
    assert ast.get_docstring(tree) or not tree.body, "the module says nothing about itself"
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not is_kernel(node)
        and not ast.get_docstring(node)
    ]
    assert not silent


def test_no_file_grows_beyond_what_one_reads_in_a_sitting():
    files = [*FILES, *(file for suffix in ("h", "cuh", "cpp", "cu") for file in (ROOT / "csrc").rglob(f"*.{suffix}"))]
    lines = {name(file): file.read_text().count("\n") for file in files}
    assert not {file: count for file, count in lines.items() if count > 500}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_complete(operation):
    """One operation: one file in ops/, one in reference/, its CPU launcher, its tests and its bench entry.

    What has a CUDA launcher too shares its body with it.
    """
    shared = [f"common/{operation}.h"] if (ROOT / "csrc" / "cuda" / f"{operation}.cu").exists() else []
    for expected in (
        PACKAGE / "reference" / f"{operation}.py",
        ROOT / "csrc" / "include" / "hyperfast" / f"{operation}.h",
        *(ROOT / "csrc" / body for body in shared),
        ROOT / "csrc" / "cpu" / f"{operation}.cpp",
        ROOT / "tests" / "ops" / f"test_{operation}.py",
        ROOT / "bench" / "operations" / f"{operation}.py",
    ):
        assert expected.exists(), f"{name(expected)} is missing"
    assert re.search(rf'^NAMES \+?= .*"{operation}"', (ROOT / "bench" / "registry.py").read_text(), re.M)


def test_every_switch_is_in_the_table():
    """docs/environment.md lists the HYPERFAST_* variables that the sources read, no more and no less."""
    files = [*FILES, ROOT / "setup.py", *(ROOT / "bench").rglob("*.py")]
    files += [file for suffix in ("h", "cuh", "cpp", "cu") for file in (ROOT / "csrc").rglob(f"*.{suffix}")]
    pattern = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\(|environ\.setdefault\()\s*['"](HYPERFAST_\w+)""")
    read = {variable for file in files for variable in pattern.findall(file.read_text())}
    listed = set(re.findall(r"^\| `(HYPERFAST_\w+)`", (ROOT / "docs" / "environment.md").read_text(), re.M))
    assert read and read == listed


def test_the_package_prints_nothing():
    talkative = {"cli", "recipes", "env_report"}
    found = [
        f"{name(file)}:{node.lineno}"
        for file in FILES
        if part_of(file) not in talkative
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found


def test_no_exception_is_swallowed_unseen():
    bare = [
        f"{name(file)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bare
