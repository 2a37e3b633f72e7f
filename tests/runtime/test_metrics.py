"""Loggers beside metrics.jsonl, and output that reads well in a file."""

import json
import subprocess
import sys

import pytest

import train
from runtime.config import parse
from runtime.metrics import flat, require_logger
from tests.conftest import ROOT, run_script
from tests.end_to_end.test_train import SMALL

# What wandb is to us: init, a run with log and finish, Image.
FAKE_WANDB = """
import json, pathlib
class Image(str): pass
class Run:
    def __init__(self, directory): self.file = open(directory + "/fake.jsonl", "a")
    def log(self, values, step):
        images = [k for k, v in values.items() if isinstance(v, Image) and pathlib.Path(v).exists()]
        values = {k: v for k, v in values.items() if k not in images}
        self.file.write(json.dumps({"step": step, "values": values, "images": images}) + "\\n")
    def finish(self): self.file.write('"finished"\\n'); self.file.close()
def init(project, name, dir, config): assert config["num_budgets"] == 4; return Run(dir)
"""


def test_flat():
    values = {"a": 1.5, "b": [1, None, 3.0], "c": {"d": {"e": [2]}}, "f": None, "g": "text"}
    assert flat(values) == {"a": 1.5, "b/1": 1, "b/3": 3.0, "c/d/e/1": 2}


def test_a_logger_that_is_not_installed_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        require_logger("wandb")
    require_logger("none")


def arguments(model, out, log) -> list[str]:
    return [
        "--model",
        str(model),
        "--steps",
        "2",
        "--save-every",
        "0",
        "--output-dir",
        str(out),
        "--logger",
        log,
        *SMALL,
    ]


def test_wandb_gets_the_keys_of_metrics_jsonl_and_a_log_file_gets_no_bar(
    trained_model_path, tmp_path, monkeypatch
):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    text = run_script("train.py", *arguments(trained_model_path, out, "wandb"), processes=2)
    assert "\r" not in text and "it/s" not in text and text.count("step    1  reward") == 1
    *logged, last = map(json.loads, (out / "fake.jsonl").read_text().splitlines())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert last == "finished" and [entry["step"] for entry in logged] == [0, 0, 1, 2]
    for entry, line in zip(logged[1:3], metrics):
        assert entry["values"] == {k: v for k, v in flat(line).items() if k != "step"}
        assert entry["values"]["reward/4"] == line["reward"][3] and not entry["images"]
    for entry in (logged[0], logged[3]):
        assert entry["images"] == ["anytime_curve"] and "eval/accuracy/2" in entry["values"]
        assert "eval/sets/miniature/final_accuracy" in entry["values"]


def test_tensorboard(trained_model_path, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.train(parse(arguments(trained_model_path, tmp_path / "out", "tensorboard")))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").open()]
    assert {"loss", "reward/4", "variance/residual/brpo/1"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (m["step"], pytest.approx(m["loss"])) for m in metrics
    ]
    assert [e.step for e in events.Images("anytime_curve")] == [0, 2]


def test_a_line_is_on_its_way_at_once():
    """Behind a pipe as in a terminal: a process that ends without flushing has said it."""
    code = "import os, metrics; metrics.say('step 1'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "step 1\n", done.stderr
