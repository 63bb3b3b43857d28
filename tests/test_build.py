"""The surface of the build: what it finds, what it refuses and in which words. Compiles nothing."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import marlin

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(str(marlin.__file__)).parent

needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and c++"
)


@pytest.fixture
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("marlin_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(path: Path, version: str, *, headers: bool = True) -> Path:
    """As much of a torch package as configuring looks at."""
    files = ["include/torch/csrc/stable/library.h", "lib/libtorch.so", "lib/libtorch_cpu.so"]
    for name in files if headers else files[1:]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    (path / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = None\n")
    return path


def configure(
    tmp_path: Path, torch: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    places = ["-S", ROOT, "-B", tmp_path / "build", f"-DMARLIN_TORCH_DIR={torch}"]
    return subprocess.run(
        ["cmake", *places, "-DMARLIN_BUILD_PYTHON=OFF", *arguments],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def words(text: str) -> str:
    """CMake wraps its error messages; compare them without."""
    return " ".join(text.split())


class TestPackage:
    def test_version_is_written_once(self) -> None:
        text = (ROOT / "pyproject.toml").read_text()
        assert re.findall(r'^version = "(.*)"', text, re.M) == [metadata.version("marlin")]

    def test_typing_files_are_installed(self) -> None:
        assert (PACKAGE / "py.typed").is_file()
        assert (PACKAGE / "_inspect.pyi").is_file()

    def test_cpp_files_are_installed(self) -> None:
        assert (PACKAGE / "include/marlin/marlin.h").is_file()
        assert (PACKAGE / "lib/libmarlin_kernels.a").is_file()
        assert (PACKAGE / "share/cmake/marlin/marlinConfig.cmake").is_file()

    @pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
    def test_library_needs_torch_but_neither_python_nor_cuda(self) -> None:
        dynamic = subprocess.run(
            ["readelf", "-d", PACKAGE / "_ops.abi3.so"], check=True, text=True, capture_output=True
        ).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        assert "libtorch.so" in needed
        assert not [name for name in needed if "python" in name or "cuda" in name]
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic

    def test_pinned_tools_agree(self) -> None:
        project = (ROOT / "pyproject.toml").read_text()
        hooks = (ROOT / ".pre-commit-config.yaml").read_text()
        for tool, repository in [
            ("ruff", "ruff-pre-commit"),
            ("clang-format", "mirrors-clang-format"),
        ]:
            pinned = re.search(rf'"{tool}==(.*)"', project)
            hook = re.search(rf"/{repository}\n\s+rev: v(.*)", hooks)
            assert pinned is not None
            assert hook is not None
            assert pinned[1] == hook[1], tool


class TestSetup:
    def test_never_imports_torch(self) -> None:
        tree = ast.parse((ROOT / "setup.py").read_text())
        imported = [
            n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names
        ]
        imported += [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert not [name for name in imported if name.split(".")[0] == "torch"]

    def test_finds_the_torch_that_is_installed(
        self, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        monkeypatch.delenv("MARLIN_TORCH_DIR", raising=False)
        assert setup_py.find_torch() == Path(torch.__file__).parent

    def test_takes_the_torch_it_is_given(
        self, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("MARLIN_TORCH_DIR", str(tmp_path))
        assert setup_py.find_torch() == tmp_path

    def test_jobs(self, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MAX_JOBS", "3")
        assert setup_py.parallel_jobs() == 3
        monkeypatch.delenv("MAX_JOBS")
        monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
        assert 1 <= setup_py.parallel_jobs() <= (os.cpu_count() or 1)


@needs_cmake
class TestConfigure:
    def test_old_torch_is_refused(self, tmp_path: Path) -> None:
        torch = fake_torch(tmp_path / "torch", "2.10.1+cpu")
        result = configure(tmp_path, torch, MARLIN_BUILD="cpu")
        assert result.returncode != 0
        assert f"Found torch 2.10.1+cpu at {torch}; marlin needs torch >= 2.11." in words(
            result.stdout
        )
        assert "pip install 'torch>=2.11'" in words(result.stdout)

    def test_torch_without_headers_is_refused(self, tmp_path: Path) -> None:
        torch = fake_torch(tmp_path / "torch", "2.11.0", headers=False)
        result = configure(tmp_path, torch, MARLIN_BUILD="cpu")
        assert result.returncode != 0
        assert "lacks include/torch/csrc/stable/library.h" in words(result.stdout)

    def test_unknown_build_is_refused(self, tmp_path: Path) -> None:
        torch = fake_torch(tmp_path / "torch", "2.11.0")
        result = configure(tmp_path, torch, MARLIN_BUILD="gpu")
        assert result.returncode != 0
        assert "MARLIN_BUILD is 'gpu'; it must be auto, cuda or cpu." in words(result.stdout)

    def test_no_nvcc_builds_for_the_cpu_and_says_so_once(self, tmp_path: Path) -> None:
        torch = fake_torch(tmp_path / "torch", "2.12.0")
        result = configure(tmp_path, torch, MARLIN_BUILD="auto", CUDA_HOME="/nowhere", CUDACXX="")
        assert result.returncode == 0, result.stdout
        said = [line for line in result.stdout.splitlines() if "CPU ops only" in line]
        assert len(said) == 1
        assert "nvcc not found in CUDA_HOME='/nowhere'" in said[0]
        assert "install the CUDA toolkit" in said[0]

    def test_cuda_on_demand_needs_nvcc(self, tmp_path: Path) -> None:
        torch = fake_torch(tmp_path / "torch", "2.11.0")
        result = configure(tmp_path, torch, MARLIN_BUILD="cuda", CUDA_HOME="/nowhere", CUDACXX="")
        assert result.returncode != 0
        assert "MARLIN_BUILD=cuda, but nvcc not found in CUDA_HOME='/nowhere'" in words(
            result.stdout
        )

    @pytest.mark.parametrize(
        ("torch_list", "built"),
        [
            ("", "80-real 86-real 89-real 90a-real 80-virtual"),
            ("8.0;9.0a+PTX", "80-real 90a-real 90-virtual"),
            ("7.5 8.0, 8.6 9.0", "80-real 86-real 90a-real"),
        ],
    )
    def test_architectures(self, tmp_path: Path, torch_list: str, built: str) -> None:
        torch = fake_torch(tmp_path / "torch", "2.11.0")
        result = configure(tmp_path, torch, MARLIN_BUILD="auto", TORCH_CUDA_ARCH_LIST=torch_list)
        if "CPU ops only" in result.stdout:
            pytest.skip("needs nvcc")
        assert result.returncode == 0, result.stdout
        assert re.search(rf"CUDA +\S+ \(.*\) for {re.escape(built)}$", result.stdout, re.M)

    @pytest.mark.parametrize(
        ("torch_list", "message"),
        [
            ("Hopper", "TORCH_CUDA_ARCH_LIST holds 'Hopper'"),
            ("7.0 7.5", "names no GPU that marlin supports"),
        ],
    )
    def test_bad_architectures_are_refused(
        self, tmp_path: Path, torch_list: str, message: str
    ) -> None:
        torch = fake_torch(tmp_path / "torch", "2.11.0")
        result = configure(tmp_path, torch, MARLIN_BUILD="auto", TORCH_CUDA_ARCH_LIST=torch_list)
        if "CPU ops only" in result.stdout:
            pytest.skip("needs nvcc")
        assert result.returncode != 0
        assert message in words(result.stdout)
