"""Loggers beside metrics.jsonl, and output that reads well in a file."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

import train
from runtime.config import parse
from runtime.metrics import (
    Logger,
    Progress,
    flat,
    flops_utilization,
    multiplied_weights,
    require_logger,
    say,
)
from tasks import arithmetic

SMALL = (
    "--questions-per-step 2 --num-rollouts 2 --num-summaries 2 --steps 2 --save-every 0 "
    "--eval-questions 2 --eval-samples 1 --eval-budgets 16 64"
).split()


def test_flat():
    values = {"a": 1.5, "b": [1, None, 3.0], "c": {"d": {"e": [2]}}, "f": None, "g": "text"}
    assert flat(values) == {"a": 1.5, "b/1": 1, "b/3": 3.0, "c/d/e/1": 2}


def test_a_logger_that_is_not_installed_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        require_logger("wandb")
    require_logger("none")


@pytest.mark.parametrize(
    "gpu, share",
    [
        ("NVIDIA H100 80GB HBM3", 6e9 * 1e6 / (10 * 8 * 989e12)),
        ("NVIDIA H100 PCIe", 6e9 * 1e6 / (10 * 8 * 756e12)),
        ("NVIDIA A100-SXM4-80GB", 6e9 * 1e6 / (10 * 8 * 312e12)),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("", None),
    ],
)
def test_mfu_by_hand(gpu, share):
    """A billion weights, a million tokens in 10 s on 8 GPUs."""
    found = flops_utilization(10**9, 1e6, 10.0, 8, gpu)
    assert found == (share and pytest.approx(share))


def test_an_input_embedding_counts_for_mfu_where_the_head_is_the_same_matrix():
    counts = []
    for tied in (False, True):
        model = arithmetic.make_model(tie_word_embeddings=tied)
        layers = sum(p.numel() for p in model.model.layers.parameters())
        head = model.lm_head.weight.numel()
        counts.append(multiplied_weights(model))
        assert counts[-1] == layers + model.config.hidden_size + head  # with the last norm
    assert counts[0] == counts[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind, rank", [(Terminal, 0), (Terminal, 1), (io.StringIO, 0)])
def test_graded_summaries_are_counted_on_a_terminal_alone(kind, rank, monkeypatch):
    """Two processes: each grades half, and the first one speaks for both."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "stderr", stderr := kind())
    bars = Progress(parse(SMALL), steps=2, first_step=0)
    grade = bars.counting(lambda rollout, summary: (rollout, summary))
    assert [grade("r", i) for i in range(3)] == [("r", i) for i in range(3)]
    bars.graded.refresh()
    text = stderr.getvalue()
    bars.graded.reset()
    again = stderr.getvalue().removeprefix(text)
    bars.close()
    if rank == 0 and kind is Terminal:
        assert "6 summaries graded (a step has 32)" in text
        assert "0 summaries graded (a step has 32)" in again
    else:
        assert stderr.getvalue() == ""


class FakeWandb(SimpleNamespace):
    """What wandb is to us: init, which returns a run with log and finish."""

    __spec__ = "found"

    def init(self, project, name, dir, config):
        self.config, self.logged = config, []
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")


def test_wandb_gets_the_keys_of_metrics_jsonl_and_a_log_file_gets_no_bar(
    trained_model_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    args = ["--model", str(trained_model_path), "--output-dir", str(tmp_path), *SMALL]
    train.train(parse([*args, "--logger", "wandb"]))
    text = "".join(capsys.readouterr())
    assert "\r" not in text and "it/s" not in text and text.count("step    1  reward") == 1
    assert wandb.config["num_budgets"] == 4
    *logged, last = wandb.logged
    assert last == "finished" and [step for step, _ in logged] == [0, 0, 1, 2]
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for (_, values), line in zip(logged[1:3], metrics):
        assert values == {k: v for k, v in flat(line).items() if k != "step"}
        assert values["reward/4"] == line["reward"][3]
        # 2 questions × 2 rollouts × 4 budgets × 2 summaries
        sampled = 4 * line["thinking_tokens"] + 32 * line["summary_tokens"]
        assert line["sampled_tokens_per_second"] * line["time/sample"] == pytest.approx(sampled)
        trained = line["trained_tokens_per_second"] * line["time/update"]
        assert trained == pytest.approx(line["trained_tokens"]) and "mfu" not in line
        speed = f"tokens/s sampled {line['sampled_tokens_per_second']:,.0f} trained "
        assert speed in text
    for _, values in (logged[0], logged[3]):
        assert {"eval/accuracy/2", "eval/sets/miniature/final_accuracy"} <= values.keys()


def test_the_first_process_alone_logs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    monkeypatch.setenv("RANK", "1")
    logger = Logger("wandb", tmp_path, {})
    logger.log(0, {"loss": 1.0})
    logger.close()
    assert not hasattr(wandb, "config")


class FakeWriter:
    """TensorBoard's SummaryWriter, as far as it is used here."""

    def __init__(self, directory):
        self.directory, self.scalars, FakeWriter.made = directory, [], self

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)

    def close(self):
        self.scalars.append("closed")


def test_tensorboard_gets_the_numbers_and_nothing_else(tmp_path, monkeypatch):
    module = SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    logger = Logger("tensorboard", tmp_path, {})
    logger.log(3, {"step": 3, "loss": 0.5, "reward": [0.0, None, 0.25], "text": "no"})
    logger.close()
    assert FakeWriter.made.directory == str(tmp_path / "tensorboard")
    expected = [("loss", 0.5, 3), ("reward/1", 0.0, 3), ("reward/3", 0.25, 3), "closed"]
    assert FakeWriter.made.scalars == expected


def test_a_line_is_on_its_way_at_once(tmp_path, monkeypatch):
    """In a file as in a terminal: a process that ends without flushing has said it."""
    with (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        say("step 1")
        assert (tmp_path / "log").read_text() == "step 1\n"
        monkeypatch.undo()
