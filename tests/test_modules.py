"""The shape of the project: modules that can be copied alone, and a README whose table is true."""

import ast
import importlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = sorted(p.stem for p in ROOT.glob("*.py"))


def imports_of_ours(path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return {n.split(".")[0] for n in names} & set(MODULES)


@pytest.mark.parametrize("module", ["budgets", "rewards", "verifier", "brpo", "tree"])
def test_a_core_module_works_alone_in_an_empty_folder(module, tmp_path):
    assert imports_of_ours(ROOT / f"{module}.py") == set()
    shutil.copy(ROOT / f"{module}.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_imports_only_point_towards_the_entry_points():
    """The method's modules never import the loop, and no two modules import each other."""
    arrows = {m: imports_of_ours(ROOT / f"{m}.py") for m in MODULES}
    assert not any("train" in targets for targets in arrows.values())
    done: list[str] = []
    while len(done) < len(MODULES):
        ready = [m for m in MODULES if m not in done and arrows[m] <= set(done)]
        assert ready, f"modules import each other: {sorted(set(MODULES) - set(done))}"
        done += ready


def table_rows() -> list[tuple[str, str, str]]:
    """(equation, function, test) of the README's paper-to-code table."""
    text = (ROOT / "README.md").read_text().split("<!-- paper to code -->")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.strip().splitlines()[2:]]
    return [(r[0], r[1].strip("`"), r[2].strip("`")) for r in rows]


def test_every_row_of_the_paper_to_code_table_exists():
    rows = table_rows()
    assert len(rows) >= 12
    for equation, function, test in rows:
        module, name = function.split(".", 1)
        target = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
        assert target.__doc__ and len(equation) > 3
        file, case = test.split("::")
        assert f"def {case}(" in (ROOT / "tests" / file).read_text(), test


def test_every_metric_is_in_the_readmes_glossary():
    """The keys that train.py writes and the keys that the README explains are the same."""
    source = (ROOT / "train.py").read_text()
    written = set(re.findall(r'"(\w+)": ', source.split("metrics = {")[1].split("\n    }\n")[0]))
    explained = set(re.findall(r"^\| `([\w/]+)`", (ROOT / "README.md").read_text().split("<!-- metrics -->")[1], flags=re.M))
    assert written <= explained, written - explained


def test_no_line_of_a_module_is_unreadably_long():
    for path in ROOT.glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 125, f"{path.name}:{number} has {len(line)} characters"
