from dataclasses import fields

import pytest

from runtime.config import (
    EXPERIMENTS,
    PRESETS,
    Config,
    batch_arithmetic,
    check,
    learning_rate,
    parse,
)


def test_flags_win_over_the_experiment_and_the_experiment_over_the_preset():
    c = parse(
        ["--preset", "paper-8k", "--experiment", "grpo-vr", "--num-summaries", "2", "--seed=3"]
    )
    assert (c.lr, c.baseline, c.train_summaries, c.num_summaries, c.seed) == (
        1e-6,
        "brpo",
        "last",
        2,
        3,
    )
    assert c.output_dir == "runs/paper-8k-grpo-vr-seed3"
    assert parse([]).experiment == "ar-uniform" and parse([]).preset == "miniature"


@pytest.mark.parametrize("args", [["--bogus", "1"], ["--experiment", "ppo"], ["--lr", "fast"]])
def test_unknown_flags_and_values_end_with_code_2(args, capsys):
    with pytest.raises(SystemExit) as e:
        parse(args)
    assert e.value.code == 2


def test_the_papers_main_run_by_its_numbers():
    c = parse(["--preset", "paper-8k"])
    assert (
        c.budget_prior.budgets == (2000, 4000, 6000, 8000) and c.budget_prior.probs == (0.25,) * 4
    )
    assert (c.questions_per_step, c.updates_per_step, c.num_rollouts, c.num_summaries) == (
        64,
        2,
        8,
        4,
    )
    assert (c.temperature, c.clip, c.decay, c.eval_temperature, len(c.evaluation_budgets)) == (
        1.0,
        0.2,
        0.5,
        0.6,
        32,
    )
    assert (
        c.response_length == 10176 and c.denominator == 32 * 8 * 10176 and c.summary_weight == 1.0
    )
    assert "512 thinking traces of up to 8000 tokens" in batch_arithmetic(c, 8)
    for preset in ("paper-8k", "paper-16k"):
        c = parse(["--preset", preset])
        assert (c.eval_samples, c.eval_every) == (32, 20)
        assert c.eval_data == ("paper/aime", "paper/amc")


def test_the_experiments_are_the_papers_table():
    table = {name: tuple(e.values()) for name, e in EXPERIMENTS.items()}
    assert len(table) == 8
    assert table["grpo"] == (1, "base", 1, "last", "group")
    assert table["grpo-linear"] == (4, "linear", 1, "last", "group")
    assert table["grpo-decouple"] == (4, "base", 4, "all", "group")
    assert table["grpo-vr"] == (4, "base", 1, "last", "brpo")
    assert table["grpo-vr-decouple"] == table["ar-base"] == (4, "base", 4, "all", "brpo")
    for name in EXPERIMENTS:
        for preset in PRESETS:
            check(parse(["--preset", preset, "--experiment", name]), world_size=8)


def test_explicit_budgets_and_probabilities():
    c = parse(["--budgets", "8", "20", "48", "--probs", "0.2", "0.3", "0.5"])
    assert c.budget_prior.budgets == (8, 20, 48) and c.budget_prior.probs == (0.2, 0.3, 0.5)
    assert parse(["--budgets", "8", "24", "--prior", "linear"]).budget_prior.probs == (0.25, 0.75)
    assert c.summary_weight == pytest.approx(1 / 12)  # --summary-loss mean: 1/(M·A)


def test_what_depends_on_the_largest_budget_follows_it():
    c = parse(["--preset", "paper-8k", "--max-budget", "4000"])
    assert c.response_length == 4000 + 17 * 128 and c.longest_sequence == 1024 + 4000 + 128
    assert c.evaluation_budgets == tuple(range(125, 4001, 125))
    assert parse(["--budgets", "8", "32", "--num-eval-budgets", "4"]).evaluation_budgets == (
        8,
        16,
        24,
        32,
    )
    assert (c.max_summary_tokens, c.summary_room) == (118, 128)  # generated; with the appended text
    assert Config().response_length == 64 + 17 * 10
    assert parse(["--max-response-length", "99"]).response_length == 99
    assert parse(["--eval-budgets", "5", "90"]).longest_sequence == 12 + 90 + 3 + 7


def test_help_lists_every_flag_in_groups(capsys):
    with pytest.raises(SystemExit) as e:
        parse(["--preset", "paper-8k", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "(default: 8000)" in text.replace(
        "│ │ ", ""
    )  # the defaults shown are the preset's
    for group in ("kind", "method", "optimisation", "model-and-data", "engine-and-memory", "run"):
        assert f"{group} options" in text
    assert all("--" + f.name.replace("_", "-") in text for f in fields(Config))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(budgets=(12, 12)), "not increasing"),
        (dict(probs=(0.5, 0.5, 0.5, 0.5)), "sum to 2"),
        (dict(num_rollouts=1), "--num-rollouts must be at least 2"),
        (
            dict(num_rollouts=1, baseline="progress", num_summaries=1),
            "--num-rollouts must be at least 2",
        ),
        (dict(num_budgets=5), "even budgets"),
        (dict(updates_per_step=3), "--updates-per-step 3"),
        (dict(eval_budgets=(12, 6)), "not increasing"),
        (dict(tensor_parallel_size=2), "needs --engine vllm"),
        (dict(tensor_parallel_size=4, engine="vllm"), "2 processes do not form groups"),
        (dict(questions_per_step=15, updates_per_step=1), "does not divide over 2"),
        (dict(lr=0.0), "--lr 0.0: must be above 0"),
        (dict(seed=-1), "--seed -1"),
        (dict(max_response_length=40), "--max-response-length 40"),
    ],
)
def test_bad_settings_name_the_flag(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        check(Config(**change), world_size=2)


def test_the_learning_rate_falls_to_nothing_on_the_miniature_and_is_constant_in_the_paper():
    falling, constant = parse(["--lr", "0.4"]), parse(["--preset", "paper-8k", "--lr", "0.4"])
    rates = [learning_rate(falling, step, 4) for step in range(5)]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    assert {learning_rate(constant, step, 4) for step in range(5)} == {0.4}
