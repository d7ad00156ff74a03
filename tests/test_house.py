"""The rules of the house that a script can hold: who may include whom, sizes, names, what C code must not call."""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = sorted((ROOT / "runtime").rglob("*.[ch]"))

# The layers of the runtime, top to bottom: a file includes its own header and headers of layers below its own. cpu/
# stands beside them and sees the seam only. A new file gets its place here.
LAYERS = [
    {"session"},
    {"engine", "sampler", "state"},
    {"kvimage"},
    {"kvcache", "model"},
    {"recipe", "arch", "tokenizer", "gguf_split"},
    {"gguf"},
    {"backend"},
    {"kvtype", "dtype"},
    {"sealed"},
    {"threads", "error", "hash", "unicode_tables", "iq_tables"},
    {"base"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PART_OF = {"kvencode": "kvtype", "kvtrellis": "kvtype", "kvpages": "kvcache"}  # headers of several files of one part
CPU_MAY = {"backend", "threads", "kvtype", "dtype", "iq_tables", "base"}
KVMIX_H_USERS = {"base", "session"}

# convert/ computes without the engine, but for the files that open or run a model
ENGINE_USERS = {"validate", "measured", "cache_norms"}
ENGINE_FREE = {"kvmix._cli", "kvmix._plot", "kvmix.errors"}

FILE_LINES = 700
FUNCTION_LINES = 80
FILE_LIMITS = {"kvmix.h": 349, "tokenizer.c": 1000, "unicode_tables.c": 10_000}  # tables are generated
LONG_FUNCTIONS = {"forward": 150}


def includes(path: Path) -> list[str]:
    found = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    return [PART_OF.get(Path(name).stem, Path(name).stem) for name in found]


def bad_edges(path: Path) -> Iterator[str]:
    own = PART_OF.get(path.stem, path.stem)
    in_cpu = path.parent.name == "cpu"
    if not in_cpu and own != "kvmix" and own not in LEVEL:
        yield f"{path.name} has no layer in LAYERS"
        return
    for other in includes(path):
        if other == own:
            continue
        if other == "kvmix":
            allowed = own in KVMIX_H_USERS
        elif in_cpu:
            allowed = other in CPU_MAY or (path.parent / f"{other}.h").exists()
        else:
            allowed = other in LEVEL and LEVEL[own] < LEVEL[other]
        if not allowed:
            yield f"{path.relative_to(ROOT)} includes {other}.h"


def test_includes_run_one_way() -> None:
    assert [edge for path in RUNTIME for edge in bad_edges(path)] == []


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"kvmix.{alias.name}" if node.module == "kvmix" else str(node.module) for alias in node.names)


def test_convert_needs_the_engine_in_few_places() -> None:
    files = [path for path in (ROOT / "convert").glob("*.py") if path.stem not in ENGINE_USERS]
    found = [
        f"{path.name} imports {name}"
        for path in files
        for name in imports(path)
        if name.partition(".")[0] == "kvmix" and name not in ENGINE_FREE
    ]
    assert len(files) > 5 and found == []


def tree(*suffixes: str) -> list[Path]:
    """The project's own files with one of the suffixes, whatever else lies in the folder (builds, environments)."""
    folders = ("runtime", "cuda", "py", "convert", "tests", "models", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def test_file_names_are_unique() -> None:
    ordinary = {"__init__.py", "__main__.py", "README.md", "CMakeLists.txt"}
    names = Counter(path.name for path in tree(".c", ".h", ".py", ".cu", ".cuh") if path.name not in ordinary)
    # a package's test oracle may carry the name of what it is the oracle of
    twice = [name for name, n in names.items() if n > 1 and not (ROOT / "tests" / "ref" / name).exists()]
    assert twice == []


def test_files_are_short() -> None:
    too_long = []
    for path in tree(".c", ".h", ".py", ".cu", ".cuh"):
        n_lines = path.read_text(encoding="utf-8").count("\n")
        if n_lines > FILE_LIMITS.get(path.name, FILE_LINES):
            too_long.append(f"{path.relative_to(ROOT)}: {n_lines}")
    assert too_long == []


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of each function: it starts at the line in column 0 whose brace opens and ends at a `}` there."""
    lines = text.splitlines()
    start = None
    for i, line in enumerate(lines):
        if re.match(r"[A-Za-z_]", line) and not lines[i - 1].endswith((",", "(")):
            start = i
        elif line.startswith("}") and start is not None:
            head = " ".join(lines[start : i + 1]).split("{")[0]
            name = re.search(r"(\w+)\s*\(", head)
            if name and "=" not in head:  # an initialized table
                yield name[1], i - start + 1
            start = None


def test_c_functions_are_short() -> None:
    too_long = []
    for path in tree(".c", ".h", ".cu", ".cuh"):
        for name, n_lines in c_functions(path.read_text(encoding="utf-8")):
            if n_lines >= LONG_FUNCTIONS.get(name, FUNCTION_LINES):
                too_long.append(f"{path.relative_to(ROOT)}: {name} has {n_lines} lines")
    assert too_long == []


def test_the_function_counter_counts() -> None:
    body = "    x = 1;\n" * 90
    text = f"static int short_one(void) {{ return 1; }}\n\nint long_one(int a,\n             int b) {{\n{body}}}\n"
    assert list(c_functions(text)) == [("long_one", 93)]


def test_python_functions_are_short() -> None:
    too_long = []
    for path in tree(".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                n_lines = node.end_lineno - node.lineno + 1
                if n_lines >= FUNCTION_LINES:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {n_lines} lines")
    assert too_long == []


def code_of(path: Path) -> str:
    """C text without comments and without the contents of string literals."""
    text = path.read_text(encoding="utf-8")
    pattern = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|/\*.*?\*/|//[^\n]*'
    return re.sub(pattern, lambda m: '""' if m[0][0] in "\"'" else " ", text, flags=re.DOTALL)


def test_the_runtime_does_not_print_exit_or_read_the_environment() -> None:
    banned = r"\b(printf|fprintf|vprintf|vfprintf|puts|fputs|putchar|perror|exit|_exit|abort|getenv|secure_getenv)\s*\("
    found = [f"{path.relative_to(ROOT)}: {m[1]}" for path in RUNTIME for m in re.finditer(banned, code_of(path))]
    assert found == []


def test_the_gguf_reader_allocates_through_checked_sizes() -> None:
    code = code_of(ROOT / "runtime" / "gguf.c")
    assert re.findall(r"\b(?:malloc|calloc|realloc|alloca)\s*\([^;]*", code) == []
    sizes = re.sub(r"\bsizeof\s*\*?", "", code)
    assert re.findall(r"\bkvm_alloc(?:_zero)?\s*\([^;]*[*+][^;]*;", sizes) == []


def test_no_path_of_a_machine() -> None:
    pattern = re.compile(rf"(?<![\w.~])/(work|root|mnt)/\w|{re.escape(str(ROOT))}/")
    suffixes = (".c", ".h", ".py", ".cu", ".cuh", ".md", ".toml", ".txt", ".json")
    files = [*tree(*suffixes), *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt")]
    found = [str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("command", [["ruff", "check", "py", "convert", "tests"], ["mypy"]], ids=["ruff", "mypy"])
def test_python_is_clean(command: list[str]) -> None:
    beside = Path(sys.executable).with_name(command[0])
    tool = str(beside) if beside.exists() else shutil.which(command[0])
    if tool is None:
        pytest.skip(f"{command[0]} is not installed")
    result = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
