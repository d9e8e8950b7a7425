"""What pyproject.toml cannot say: the native module `hyperfast._C` and the mapping of kernels/ to hyperfast.kernels.

Build configuration, all by environment variables:

    HYPERFAST_CUDA             auto (default: when nvcc is found), 0 or 1 (an error when it is not)
    HYPERFAST_CUDA_ARCHS       "80;90;100"; PTX of the last one is added for newer GPUs
    HYPERFAST_REQUIRE_NATIVE   1: a failed native build is an error, not a pure Python install
    HYPERFAST_DEBUG            1: -O0 -g, symbols kept
    MAX_JOBS                   parallel compilations

No GPU is looked for and torch is not needed: the module takes pointers as integers, so that one build serves every
version of torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
DEBUG = os.environ.get("HYPERFAST_DEBUG") == "1"
REQUIRE_NATIVE = os.environ.get("HYPERFAST_REQUIRE_NATIVE") == "1"
CUDA = os.environ.get("HYPERFAST_CUDA", "auto")
CUDA_ARCHS = os.environ.get("HYPERFAST_CUDA_ARCHS", "80;90;100").split(";")
PACKAGES = [
    "hyperfast",
    "hyperfast.analysis",
    "hyperfast.cli",
    "hyperfast.data",
    "hyperfast.functional",
    "hyperfast.kernels",
    "hyperfast.kernels.triton",
    "hyperfast.losses",
    "hyperfast.models",
    "hyperfast.nn",
    "hyperfast.ops",
    "hyperfast.optim",
    "hyperfast.recipes",
    "hyperfast.reference",
    "hyperfast.surgery",
]

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
# The processor's kernels are compiled once per instruction set; the module picks one when it is loaded.
INSTRUCTION_SETS = (
    {
        "baseline": ["-msse2"],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
    }
    if platform.machine() in ("x86_64", "AMD64")
    else {"baseline": []}
)


def find_nvcc() -> Path | None:
    """The CUDA compiler, or None where there is none or it is not wanted."""
    if CUDA not in ("auto", "0", "1"):
        raise SystemExit(f"HYPERFAST_CUDA={CUDA!r}; use auto, 0 or 1")
    if CUDA == "0":
        return None
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and Path(home, "bin", "nvcc").exists():
            return Path(home, "bin", "nvcc")
    if found := shutil.which("nvcc"):
        return Path(found)
    if CUDA == "1":
        raise SystemExit("HYPERFAST_CUDA=1 but nvcc was not found; set CUDA_HOME or put nvcc on the PATH")
    return None


def cuda_libraries(nvcc: Path) -> list[str]:
    """Folders with cudart_static. nvcc is asked for its home: what is on the PATH may be a wrapper script."""
    dry_run = subprocess.run([nvcc, "-v", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in dry_run.splitlines() if "TOP=" in line]
    home = Path(tops[0]).resolve() if tops else nvcc.resolve().parents[1]
    return [str(home / folder) for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]


def optimisation() -> list[str]:
    # -fno-math-errno and -fno-trapping-math let loops vectorise; they change no result.
    return ["-O0", "-g"] if DEBUG else ["-O3", "-fno-math-errno", "-fno-trapping-math"]


def cxx_flags() -> list[str]:
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    return ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wno-psabi", *optimisation(), *includes]


def nvcc_flags() -> list[str]:
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "--extended-lambda"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", *(["-O0", "-g"] if DEBUG else ["-O3"])]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
    return [*flags, f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}"]


NVCC = find_nvcc()
BINDINGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp"))
CPU_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu")) if NVCC else []


def native_objects() -> list[tuple[str, str, str, list[str]]]:
    """Every object file of the module: its name, the rule that makes it, its source and the flags."""
    defines = [f"-DHYPERFAST_WITH_CUDA={int(NVCC is not None)}", f"-DHYPERFAST_CUDA_ARCHS='\"{';'.join(CUDA_ARCHS)}\"'"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = [(f"{Path(s).stem}.o", "cxx", s, [*cxx_flags(), *python, *defines]) for s in BINDINGS]
    objects += [
        (f"{Path(s).stem}.{isa}.o", "cxx", s, [*cxx_flags(), *machine, f"-DHYPERFAST_ISA={isa}"])
        for s in CPU_SOURCES
        for isa, machine in INSTRUCTION_SETS.items()
    ]
    return objects + [(f"{Path(s).stem}.cu.o", "nvcc", s, nvcc_flags()) for s in CUDA_SOURCES]


def build_key() -> str:
    """Names the configuration: objects of one never end up in a module of another."""
    parts = [sys.version, os.environ.get("CXX", "c++"), str(NVCC), *cxx_flags(), *(nvcc_flags() if NVCC else [])]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


class BuildNative(build_ext):
    """Compiles with ninja what setuptools cannot (one source per instruction set, CUDA), then lets it link."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # setuptools reuses objects and even the linked module whatever the switches were; an editable install would
        # build in a temporary folder every time. A folder per configuration in the tree does neither.
        self.build_temp = str(ROOT / "build" / f"native-{build_key()}")
        self.force = True

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = native_objects()
        (folder / "build.ninja").write_text(self._ninja_file(objects))
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        try:
            subprocess.check_call([*ninja, "-C", str(folder), *jobs])
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the native module hyperfast._C was not built: {error}") from error
        ext.sources = []
        ext.extra_objects = [str(folder / name) for name, *_ in objects]
        super().build_extension(ext)
        print(f"hyperfast._C: {', '.join(INSTRUCTION_SETS)}; CUDA {';'.join(CUDA_ARCHS) if NVCC else 'off'}")

    @staticmethod
    def _ninja_file(objects: list[tuple[str, str, str, list[str]]]) -> str:
        lines = [f"cxx = {os.environ.get('CXX', 'c++')}", f"nvcc = {NVCC}"]
        # What ptxas says of registers and spills stays beside the object, for a test.
        logged = " > $out.log 2>&1 || { cat $out.log; exit 1; }"
        for rule, more, end in (("cxx", "", ""), ("nvcc", " -Xptxas=-v", logged)):
            lines += [f"rule {rule}", f"  command = ${rule}{more} $flags -MD -MF $out.d -c $in -o $out{end}"]
            lines += ["  depfile = $out.d", "  deps = gcc", "  description = $out"]
        for name, rule, source, flags in objects:
            lines += [f"build {name}: {rule} {ROOT / source}", f"  flags = {' '.join(flags)}"]
        return "\n".join(lines) + "\n"


setup(
    packages=PACKAGES,
    package_dir={"hyperfast": "hyperfast", "hyperfast.kernels": "kernels"},
    package_data={"hyperfast": ["py.typed", "_C.pyi"]},
    ext_modules=[
        Extension(
            "hyperfast._C",
            [*BINDINGS, *CPU_SOURCES, *CUDA_SOURCES],
            language="c++",
            extra_link_args=["-fopenmp", *([] if DEBUG else ["-s"])],
            library_dirs=cuda_libraries(NVCC) if NVCC else [],
            libraries=["cudart_static", "dl", "rt", "pthread"] if NVCC else [],
            optional=not REQUIRE_NATIVE,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
