"""The house keeps its shape: who may import whom, how long a file may be, what an import may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "pipeline", "jobs")
# What may not be imported where, besides the packages above one's own in the order of PACKAGES.
FORBIDDEN = {
    "model": {"ray", "yaml", "typer", "fsspec", "pyarrow", "pandas", "duckdb", "webdataset"},
    "pipeline": {"ray", "yaml", "typer"},
    "jobs": set(),
}
MAX_LINES = 400


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


ALL_SOURCES = [path for package in PACKAGES for path in sources(package)]


def relative(path):
    return str(path.relative_to(ROOT))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            yield node.module


@pytest.mark.parametrize("path", ALL_SOURCES, ids=relative)
def test_imports_point_one_way(path):
    package = relative(path).split("/")[0]
    above = set(PACKAGES[PACKAGES.index(package) + 1 :])
    roots = {name.split(".")[0] for name in imported_modules(path)}
    wrong = roots & (above | FORBIDDEN[package] | {"tests"})
    assert not wrong, f"{relative(path)} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", ALL_SOURCES, ids=relative)
def test_no_file_outgrows_its_name(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines; split it by what it does"


@pytest.mark.parametrize("path", sources("model") + sources("pipeline"), ids=relative)
def test_environment_and_argv_are_read_only_in_jobs(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            read = f"{node.value.id}.{node.attr}"
            assert read not in {"os.environ", "os.getenv", "sys.argv"}, f"{relative(path)}: {read}"


@pytest.mark.parametrize("path", [p for p in ALL_SOURCES if p.name == "__init__.py"], ids=relative)
def test_package_files_hold_a_docstring_only(path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_there_is_no_drawer_for_odds_and_ends():
    names = {path.stem for path in ALL_SOURCES}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def test_every_module_imports_in_silence_and_without_the_network():
    modules = [relative(p)[:-3].replace("/", ".").removesuffix(".__init__") for p in ALL_SOURCES]
    program = f"""
import importlib, socket

def refuse(*args, **kwargs):
    raise AssertionError(f"an import opened a connection: {{args}}")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_line_starts_without_torch():
    program = "import sys, jobs.cli; print({'torch', 'ray', 'transformers'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_readmes_tree_is_the_tree():
    text = (ROOT / "README.md").read_text()
    block = text.split("## The tree")[1].split("```")[1]
    folders, listed = [], []
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            listed.append("".join(folders) + name)
    assert sorted(listed) == sorted(
        relative(path) for path in ALL_SOURCES if path.name != "__init__.py"
    )
