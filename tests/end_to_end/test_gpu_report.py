"""scripts/gpu_report.py on a CPU: every part measures, and the report says which one did not."""

import re
from dataclasses import replace

import pytest

from runtime import distributed
from scripts import gpu_report
from scripts.gpu_report import PARTS, Arguments
from tests.end_to_end.test_preflight import PARTS as CHECKS

pytestmark = pytest.mark.slow
# What each part measures, of which the rest of its line is a number.
MEASURED = {
    "update": ["4 trees", "log-probs of these", "one update on these"],
    "packing": [
        "2 traces with all summaries, packed trees",
        "2 traces with all summaries, separate",
    ],
    "kernel": ["forward and backward, 2 layers", "log-probs of 256 tokens with gradients, eager"],
    "sampling": ["sampling by transformers, 4 traces of 64", "sampler gap", "weight sync"],
    "preflight": [f"preflight: {check}" for check in CHECKS],
    "step": ["the second step of 16 traces, budget 48", "its sampler gap"],
}


@pytest.mark.parametrize("part", MEASURED)
def test_a_part_measures_what_it_names(part, tmp_path):
    a = Arguments(tiny=True, repeats=1, results=tmp_path)
    rows = PARTS[part](a, distributed.start())
    for what in MEASURED[part]:
        found = [measured for name, measured in rows if name.startswith(what)]
        assert found and all(re.search(r"\d", measured) for measured in found), (what, rows)
    if part == "preflight":
        verdicts = [m for name, m in rows if name.split(": ", 1)[1].startswith(tuple(CHECKS))]
        assert len(verdicts) == len(CHECKS) and all(m.endswith(" ok") for m in verdicts)


def test_the_report_keeps_other_parts_and_says_why_one_did_not_run(tmp_path, monkeypatch):
    a = Arguments(("correctness",), tiny=True, output=tmp_path / "gpu.md", results=tmp_path)
    gpu_report.main(a)
    gap = re.search(r"\| mean difference of log-probs, .* \| (\S+) \|", a.output.read_text())
    assert 0 <= float(gap[1]) < 1e-5

    failing = tmp_path / "failing.py"
    failing.write_text("raise RuntimeError('no kernel for this GPU')")
    monkeypatch.setattr(gpu_report, "__file__", str(failing))
    gpu_report.main(replace(a, parts=("kernel",)))
    text = a.output.read_text()
    assert "| did not run | RuntimeError: no kernel for this GPU |" in text
    assert gap[0] in text and "`python scripts/gpu_report.py --tiny`" in text
