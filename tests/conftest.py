"""Fixtures of the suite: the C tests' executables, and data that a test skips without.

`--full` also runs the tests marked `full`, the long suites.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long suites too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="a long suite: run with --full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)


def tool(name: str) -> str:
    """A build tool of this Python's environment, which need not be on the PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.fail(f"{name} is missing: python -m pip install '.[test]' brings it")
    return found


def run_build(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{result.stdout}{result.stderr}", pytrace=False)


@pytest.fixture(scope="session")
def c_build() -> Path:
    """The folder of the C tests' executables, built under AddressSanitizer and UBSan."""
    folder = ROOT / "build" / "asan"
    options = ["-DKVMIX_SANITIZE=ON", "-DKVMIX_TESTS=ON", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run_build([tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *options])
    run_build([tool("cmake"), "--build", str(folder)])
    return folder / "tests" / "c"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Texts, vocabularies and measurements that lie beside the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside the repository")
    return folder


@pytest.fixture(scope="session")
def judges() -> Path:
    """The folder of the real models that quality is measured on: kvmix's cache folder."""
    from kvmix import catalog

    folder = catalog.cache_dir()
    if not any(folder.glob("*.gguf")):
        pytest.skip(f"no real models in {folder}: KVMIX_CACHE names another folder")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, where a chat has fetched it before."""
    from kvmix import catalog

    entries, default = catalog.load()
    path = catalog.cache_dir() / entries[default].file
    if not path.is_file():
        pytest.skip(f"the default model is not in {path.parent}: python -m kvmix.chat fetches it")
    return path
