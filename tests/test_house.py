"""The shape of the project: modules that can be copied alone, and documents that are true."""

import ast
import pkgutil
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from runtime.config import Config, Evaluation
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/*.md")))]
METHOD = ("budgets", "rewards", "brpo", "packing")
# Imports point down these layers, or stay inside one.
LAYERS = [set(METHOD), {"rollout", "tasks"}, {"runtime"}, {"evaluate"}, {"train"}]


def sources() -> list[Path]:
    """Every module of the project that is not a script or a test."""
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py"), *ROOT.glob("runtime/*.py")])


def name_of(path: Path) -> str:
    """`brpo`, `runtime.config`; of a package's __init__.py, the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of_ours(path: Path) -> set[str]:
    """The modules of the project that a file imports, wherever in it the import stands."""
    ours, found = {name_of(p) for p in sources()}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return (found & ours) - {"tasks", "runtime"}


def layer(name: str) -> int:
    (number,) = (i for i, members in enumerate(LAYERS) if name.split(".")[0] in members)
    return number


@pytest.mark.parametrize("module", [*METHOD, "tasks/verifier"])
def test_a_core_module_works_alone_in_an_empty_folder(module, tmp_path):
    assert imports_of_ours(ROOT / f"{module}.py") == set()
    shutil.copy(ROOT / f"{module}.py", tmp_path)
    done = run_python(f"import {Path(module).name}", tmp_path)
    assert done.returncode == 0, done.stderr


def run_python(code: str, folder):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_imports_point_down_and_never_in_a_circle():
    arrows = {name_of(p): imports_of_ours(p) for p in sources()}
    assert [(a, b) for a, targets in arrows.items() for b in targets if layer(a) < layer(b)] == []
    done: set[str] = set()
    while len(done) < len(arrows):
        ready = {m for m, targets in arrows.items() if m not in done and targets <= done}
        assert ready, f"modules import each other: {sorted(set(arrows) - done)}"
        done |= ready


def test_few_arrows_are_seen_from_the_top_level():
    """The seven files and the two packages: who imports whom."""
    arrows = set()
    for path in sources():
        here = name_of(path).split(".")[0]
        arrows |= {(here, other.split(".")[0]) for other in imports_of_ours(path)} - {(here, here)}
    assert len(arrows) <= 16, sorted(arrows)


def table_rows() -> list[tuple[str, str, str]]:
    """(equation, function, test) of the README's paper-to-code table."""
    text = README.split("<!-- paper to code -->")[1].split("\n\n")[0]
    lines = text.strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [(r[0], r[1].strip("`"), r[2].strip("`")) for r in rows]


def test_every_row_of_the_paper_to_code_table_exists():
    rows = table_rows()
    assert len(rows) >= 12
    for equation, function, test in rows:
        target = pkgutil.resolve_name(function)
        assert target.__doc__ and len(equation) > 3
        assert_test_exists(test)


def assert_test_exists(name: str):
    file, case = name.split("::")
    (path,) = (ROOT / "tests").rglob(file)
    assert f"def {case}(" in path.read_text(), name


def test_every_row_about_models_and_surroundings_names_its_test():
    rows = (ROOT / "docs" / "models.md").read_text().split("<!-- tests -->")[1]
    names = re.findall(r" \| `(\S+::\w+)` \|$", rows, re.M)
    assert len(names) == sum(line.startswith("| ") for line in rows.splitlines()) - 2 > 25
    for name in names:
        assert_test_exists(name)


def test_the_file_map_names_every_file_once():
    block = README.split("## The files, in reading order")[1].split("```")[1]
    named = [line.split()[0] for line in block.strip().splitlines()]
    files = [*sources(), *ROOT.glob("scripts/*.py")]
    files = sorted(p for p in files if p.name != "__init__.py")
    assert sorted(p for name in named for p in ROOT.glob(name)) == files


def snippets(document: str) -> list[str]:
    """The commands of a document's bash blocks, and whatever else stands in backticks."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("&&", "\n").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return [line.split("#")[0] for line in lines] + re.findall(r"`([^`]+)`", prose)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_and_link_of_a_document_exists(document):
    """Paths in backticks are from the project's root (tests: from anywhere below tests/), links
    from the document. What stands below runs/ is made by a run."""
    for snippet in snippets(document):
        for path in re.findall(r"[\w./*-]+\.(?:py|md|png|txt)\b", snippet):
            exists = any(ROOT.glob(path)) or any((ROOT / "tests").rglob(path))
            assert exists or path.startswith("runs/"), snippet
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / document).read_text()):
        assert "://" in link or ((ROOT / document).parent / link).exists(), link


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@cache
def flags_of(script: str) -> set[str]:
    """The flags of a script: fields of what tyro or runtime.config parses in it, and argparse's."""
    source = (ROOT / script).read_text()
    names = {"--help", *re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source)}
    for function, settings in (("parse", Config), ("parse_evaluation", Evaluation)):
        if re.search(rf"\b{function}\(", source):
            names |= {as_flag(field.name) for field in fields(settings)}
    parsed = re.findall(r"tyro\.cli\((\w+)", source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in parsed:
            names |= {as_flag(x.target.id) for x in node.body if isinstance(x, ast.AnnAssign)}
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_of_a_document_exists(document):
    """What precedes a script is torchrun's; a flag without a command may be any script's."""
    from torch.distributed.run import get_args_parser

    torchrun = {name for action in get_args_parser()._actions for name in action.option_strings}
    scripts = ["train.py", "evaluate.py", *(f"scripts/{p.name}" for p in ROOT.glob("scripts/*.py"))]
    anywhere = set().union(*map(flags_of, scripts))
    for snippet in snippets(document):
        script = next((s for s in scripts if re.search(rf"(?<!\S){s}\b", snippet)), "")
        before, _, after = snippet.partition(script) if script else ("", "", snippet)
        known = flags_of(script) if script else torchrun if "torchrun" in snippet else anywhere
        for names, allowed in ((before, torchrun), (after, known)):
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z_-]*", names)) - allowed
            assert not unknown, f"{snippet}: {unknown}"


def test_the_readme_shows_the_study_as_it_was_written():
    rows = README.split("## Results")[1].split("\n\n")[1].splitlines()
    assert len(rows) == 5 and set(rows) <= set((ROOT / "docs/study.md").read_text().splitlines())


# What is appended to each of the README's examples, to see that it did what it says.
CHECKS = {
    "brpo rewards": """
from types import SimpleNamespace as Settings
settings = Settings(budgets=[2, 5, 6], probs=[0.2, 0.3, 0.5], num_summaries=2)
lengths, width = {"q7/0": 3, "q7/1": 6, "q3/0": 1, "q3/1": 5}, 8
uids = [t + end for t in lengths for end in ("", *(f"/{j}/{a}" for j in range(3) for a in (0, 1)))]
uids = [uids[i] for i in torch.randperm(len(uids))]
mask = torch.stack([(torch.arange(width) < lengths.get(uid, 4)) for uid in uids]).long()
right = {uid: float(torch.rand(()) < 0.5) for uid in uids if uid not in lengths}
scores = torch.zeros(len(uids), width)
scores[:, 3] = torch.tensor([right.get(uid, 0.0) for uid in uids])
found, _ = brpo_advantage(scores, mask, uids, settings)

def mean(values):
    return sum(values) / len(values)

def r(trace, j):
    return mean([right[f"{trace}/{j}/{a}"] for a in (0, 1)])

def R(trace, j):
    return sum(settings.probs[k] * r(trace, k) for k in range(j, 3))

for row, uid in enumerate(uids):        # the equations once more, row by row
    trace = "/".join(uid.split("/")[:2])
    cuts = [min(b, lengths[trace]) for b in settings.budgets]
    for t in range(width):
        expected = 0.0
        if uid in lengths and t < lengths[trace]:
            j = sum(t >= b for b in settings.budgets)
            decayed = [(0.5 ** (j - k), r(trace, k)) for k in range(j)]
            v1 = sum(w * x for w, x in decayed) / sum(w for w, _ in decayed) if j else 0.0
            v2 = mean([R(other, j) for other in lengths if other[:2] == trace[:2]])
            share = settings.budgets[j - 1] / 6 if j else 0.0
            v1 *= sum(settings.probs[j:])
            expected = R(trace, j) - share * v1 - (1 - share) * v2
        elif uid not in lengths and t < 4:
            same = [k for k in range(3) if cuts[k] == cuts[int(uid.split("/")[2])]]
            expected = (right[uid] - mean([r(trace, k) for k in same])) / 6
        assert abs(found[row, t].item() - expected) < 1e-6, (uid, t)

def refused(change):                    # nothing is mixed in silence
    kept = [(i, change(uid)) for i, uid in enumerate(uids) if change(uid)]
    rows, names = zip(*kept)
    try:
        brpo_advantage(scores[list(rows)], mask[list(rows)], names, settings)
    except ValueError as error:
        return "G traces of every question" in str(error)

assert refused(lambda uid: uid.replace("q3/1", "q7/2"))                # groups of 3 and 1
assert refused(lambda uid: uid.replace("q3/1/2/1", "q3/0/2/2"))        # 5 and 7 summaries
assert refused(lambda uid: uid if uid != "q7/0/1/1" else None)         # one is missing
""",
    "packing": """
import torch
text = tree.prompt + thinking + close + late.summary       # the longest branch as a sequence
logits = model(torch.tensor([text])).logits[0].log_softmax(-1)
start = len(text) - len(late.summary)
plain = [logits[t - 1, text[t]].item() for t in range(start, len(text))]
assert max(abs(a - b) for a, b in zip(plain, logp[-len(plain):].tolist())) < 1e-4
assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
""",
    "verifier": r"""
texts = [r"so</think>\boxed{\frac12}", r"</think>\boxed{3}", r"\boxed{4}", r"\boxed{4}</think>"]
assert accuracy_reward(texts, ["0.5", "4", "4", "4"]) == [1.0, 0.0, 0.0, 0.0]
parts = [{"type": "text", "text": "so</thi"}, {"type": "text", "text": r"nk>\boxed{x+1}"}]
chats = [[{"role": "assistant", "content": content}] for content in (r"</think>\boxed{x+1}", parts)]
assert accuracy_reward(chats, ground_truth=["1+x", "1+x"], prompts=["?", "?"]) == [1.0, 1.0]
verifier.close()
""",
}


@pytest.mark.parametrize("modules", CHECKS)
def test_an_example_of_the_readme_runs_beside_the_copied_files(modules, tmp_path, tiny_model_path):
    code = example(modules)
    assert 5 <= len(code.strip().splitlines()) <= 25
    for module in modules.split():
        (path,) = (p for p in sources() if p.stem == module)
        shutil.copy(path, tmp_path)
    # A random tiny model stands in for the one on the hub; verl is in tests/peers.
    code = code.replace("Qwen/Qwen3-0.6B", str(tiny_model_path))
    verl = "from verl.trainer.ppo.core_algos import register_adv_est"
    code = code.replace(verl, "register_adv_est = lambda name: lambda function: function")
    done = run_python(code + CHECKS[modules], tmp_path)
    assert done.returncode == 0, done.stderr


def example(name: str) -> str:
    return README.split(f"<!-- example: {name} -->\n```python\n")[1].split("```")[0]


def test_no_function_but_the_loop_is_longer_than_60_lines():
    lengths = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{name_of(path)}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert lengths.pop("train.train") <= 65
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
