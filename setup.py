"""Builds the two extension files by driving CMake. Everything static is in pyproject.toml.

Never imports torch: the extension uses LibTorch's stable ABI, so the headers of any torch >= 2.11
will do, and they are found as files. That is what lets `pip install .` build in an isolated
environment against the torch that is installed.

Environment: MARLIN_BUILD (auto | cuda | cpu), MARLIN_TORCH_DIR, CUDA_HOME, TORCH_CUDA_ARCH_LIST,
MAX_JOBS, NVCC_THREADS, CMAKE_ARGS, CMAKE_BUILD_TYPE.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build" / "cmake"
TORCH_REQUIREMENT = "torch>=2.11"
GIB_PER_JOB = 3  # what one nvcc may take


def find_torch() -> Path | None:
    """The directory of the torch package, or None.

    In an isolated build `find_spec` sees only the build's own packages, but sysconfig still names
    the directories of the interpreter that marlin is being installed for.
    """
    if given := os.environ.get("MARLIN_TORCH_DIR"):
        return Path(given)
    spec = importlib.util.find_spec("torch")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    roots = [
        sysconfig.get_path("platlib"),
        sysconfig.get_path("purelib"),
        site.getusersitepackages(),
        sysconfig.get_path("platlib", vars=base),
    ]
    places += [Path(root) / "torch" for root in roots]
    return next((place for place in places if (place / "version.py").is_file()), None)


def parallel_jobs() -> int:
    """MAX_JOBS, else one job per core as far as memory goes."""
    if given := os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL"):
        return max(1, int(given))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gib / GIB_PER_JOB)))


def run(*command: str | Path) -> None:
    """Run a command; where it fails its own message is the last thing to be seen."""
    sys.stdout.flush()
    if status := subprocess.run(command).returncode:
        raise SystemExit(status)


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package: the source's for an editable install."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "marlin"
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("marlin: cmake >= 3.25 not found on PATH: pip install cmake")
        self.configure(cmake)
        run(cmake, "--build", BUILD_DIR)
        run(cmake, "--install", BUILD_DIR, "--prefix", package)

    def configure(self, cmake: str) -> None:
        # These may differ from one isolated build to the next without changing what is built.
        places = [f"-DPython_EXECUTABLE={sys.executable}"]
        if torch := find_torch():
            places.append(f"-DMARLIN_TORCH_DIR={torch}")
        if pybind11 := importlib.util.find_spec("pybind11"):
            path = Path(str(pybind11.origin)).parent / "share" / "cmake" / "pybind11"
            places.append(f"-Dpybind11_DIR={path}")
        generator = []
        if ninja := shutil.which("ninja"):
            generator = ["-G", "Ninja"]
            places.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        choices = [
            f"-DMARLIN_BUILD={os.environ.get('MARLIN_BUILD', 'auto')}",
            f"-DMARLIN_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
            f"-DMARLIN_NVCC_THREADS={os.environ.get('NVCC_THREADS', '')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        self.forget_other_configuration([*generator, *choices])
        os.environ["CMAKE_BUILD_PARALLEL_LEVEL"] = str(parallel_jobs())
        run(cmake, "-S", ROOT, "-B", BUILD_DIR, *generator, *places, *choices)

    def forget_other_configuration(self, choices: list[str]) -> None:
        """Drop CMake's cache, but no object file, when what it remembers was chosen differently."""
        names = ["CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME"]
        settings = [f"{name}={os.environ.get(name, '')}" for name in names]
        wanted = "\n".join([*choices, *settings, f"nvcc={shutil.which('nvcc')}"])
        record = BUILD_DIR / "configured-with.txt"
        if not record.is_file() or record.read_text() != wanted:
            (BUILD_DIR / "CMakeCache.txt").unlink(missing_ok=True)
            for compilers in BUILD_DIR.glob("CMakeFiles/[0-9]*"):
                shutil.rmtree(compilers)
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        record.write_text(wanted)


class CleanBuild(build):
    """Starts from an empty build/lib, so that no file deleted from the source gets into a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("marlin._ops", sources=[], py_limited_api=True),
            Extension("marlin._inspect", sources=[]),
        ],
        cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
        # Only when no torch is to be found does pip fetch one, for its headers.
        setup_requires=[] if find_torch() else [TORCH_REQUIREMENT],
    )
