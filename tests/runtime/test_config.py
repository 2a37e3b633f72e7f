"""Settings: where a default comes from, what the paper's runs are, and what is refused."""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import pytest

from runtime.config import (
    EXPERIMENTS,
    MINIATURE_VOCABULARY,
    PRESETS,
    Config,
    Evaluation,
    batch_arithmetic,
    check,
    learning_rate,
    parse,
    parse_evaluation,
)
from tasks import arithmetic
from tests.conftest import ROOT, alone


def test_flags_win_over_the_experiment_and_the_experiment_over_the_preset():
    c = parse("--num-summaries 2 --experiment grpo-vr --preset paper-8k --seed=3".split())
    assert (c.preset, c.experiment, c.seed) == ("paper-8k", "grpo-vr", 3)
    assert (c.lr, c.baseline, c.train_summaries, c.num_summaries) == (1e-6, "brpo", "last", 2)
    assert c.output_dir == "runs/paper-8k-grpo-vr-num_summaries-2-seed3"
    assert parse(["--output_dir", "here"]).output_dir == "here"
    assert parse([]) == Config(output_dir="runs/miniature-ar-uniform-seed0")


def test_a_model_without_a_preset_is_trained_and_measured_by_small(tmp_path):
    """No size of the miniature suits another; a saved miniature is known by its vocabulary."""
    (saved := tmp_path / "model").mkdir()
    assert len(arithmetic.VOCABULARY) == MINIATURE_VOCABULARY
    (saved / "config.json").write_text(json.dumps({"vocab_size": MINIATURE_VOCABULARY}))
    assert parse(["--model", str(saved)]).preset == "miniature"
    assert parse_evaluation([str(saved)])[0].preset == "miniature"
    (saved / "config.json").write_text(json.dumps({"vocab_size": 49152}))
    engine = "vllm" if importlib.util.find_spec("vllm") else "plain"
    for model in (str(saved), "Qwen/Qwen3-0.6B"):
        c = parse(["--model", model])
        assert c.preset == "small" and c.budget_prior.budgets == (500, 1000, 1500, 2000)
        assert c.max_summary_tokens == 118 and c.max_prompt_tokens == 1024 and c.lr == 1e-6
        assert "\\boxed" in c.prompt_template and c.engine == engine
        cost = 64 * c.eval_samples * len(c.evaluation_budgets)
        assert c.eval_questions == 64 and cost == 64 * 4 * 8
        a, c = parse_evaluation([model, *"--data my.jsonl --budgets 250 500 1000 2000".split()])
        assert a.preset == "small" and c.eval_budgets == (250, 500, 1000, 2000)
    assert parse(["--preset", "miniature", "--model", "x/y"]).max_budget == 64


def test_the_directory_names_what_is_not_default():
    def name(flags):
        return parse(flags.split()).output_dir.removeprefix("runs/")

    assert name("--reward my_reward:even") == "miniature-ar-uniform-reward-my_reward-even-seed0"
    assert name("--steps 9 --eval-every 3 --resume auto") == "miniature-ar-uniform-steps-9-seed0"
    assert name("--model x/y --steps 9") == "small-ar-uniform-model-x-y-seed0"  # a constant rate
    assert (
        name("--preset paper-8k --seed 4 --budgets 8 9") == "paper-8k-ar-uniform-budgets-8-9-seed4"
    )
    long = name("--prompt-template " + 300 * "x")
    assert len(long) < 200 and long != name("--prompt-template " + 299 * "x")


def test_settings_are_json_and_come_back():
    for preset in PRESETS:
        c = parse(["--preset", preset, "--eval-budgets", "5", "9"])
        assert Config(**json.loads(json.dumps(asdict(c)))) == c


def test_the_papers_main_run_by_its_numbers():
    c = parse(["--preset", "paper-8k"])
    assert c.budget_prior.budgets == (2000, 4000, 6000, 8000)
    assert c.budget_prior.probs == (0.25,) * 4
    assert (c.questions_per_step, c.updates_per_step) == (64, 2)
    assert (c.num_rollouts, c.num_summaries, c.max_summary_tokens) == (8, 4, 118)
    assert (c.temperature, c.clip, c.decay, c.summary_weight) == (1.0, 0.2, 0.5, 1.0)
    assert (c.eval_temperature, c.eval_samples, c.eval_every) == (0.6, 32, 20)
    assert c.eval_data == ("paper/aime", "paper/amc")
    assert c.evaluation_budgets == tuple(range(250, 8001, 250))
    assert c.response_length == 10176 and c.denominator == 32 * 8 * 10176
    assert "512 thinking traces of up to 8000 tokens" in batch_arithmetic(c, 8)
    longer = parse(["--preset", "paper-16k"])
    changed = {k for k, v in asdict(c).items() if asdict(longer)[k] != v}
    assert changed == {"preset", "output_dir"} | set(
        "max_budget num_rollouts questions_per_step epochs save_every".split()
    )


def test_the_experiments_are_the_papers_table():
    assert {name: tuple(row.values()) for name, row in EXPERIMENTS.items()} == {
        "grpo": (1, "base", 1, "last", "group"),
        "ar-base": (4, "base", 4, "all", "brpo"),
        "ar-linear": (4, "linear", 4, "all", "brpo"),
        "ar-uniform": (4, "uniform", 4, "all", "brpo"),
        "grpo-linear": (4, "linear", 1, "last", "group"),
        "grpo-decouple": (4, "base", 4, "all", "group"),
        "grpo-vr": (4, "base", 1, "last", "brpo"),
        "grpo-vr-decouple": (4, "base", 4, "all", "brpo"),
    }
    for name, row in EXPERIMENTS.items():
        for preset in PRESETS:
            c = parse(["--preset", preset, "--experiment", name])
            check(c, world_size=8)
            assert {k: getattr(c, k) for k in row} == row


def test_budgets_and_probabilities_by_hand():
    c = parse("--budgets 8 20 48 --probs 0.2 0.3 0.5".split())
    assert c.budget_prior.budgets == (8, 20, 48) and c.budget_prior.probs == (0.2, 0.3, 0.5)
    assert parse("--budgets 8 24 --prior linear".split()).budget_prior.probs == (0.25, 0.75)
    assert c.summary_weight == pytest.approx(1 / 12)  # --summary-loss mean: 1/(M·A)


def test_what_depends_on_the_largest_budget_follows_it():
    c = parse("--preset paper-8k --max-budget 4000".split())
    assert c.response_length == 4000 + 17 * 128
    assert c.evaluation_budgets == tuple(range(125, 4001, 125))
    c = parse("--budgets 8 32 --num-eval-budgets 4".split())
    assert c.evaluation_budgets == (8, 16, 24, 32) and c.longest_thinking == 32
    assert parse("--eval-budgets 5 90".split()).longest_thinking == 90
    assert Config().response_length == 64 + 17 * 10
    assert Config(denominator_summary_tokens=20).response_length == 64 + 17 * 20


def test_the_learning_rate_falls_to_nothing_on_the_miniature_and_is_constant_in_the_paper():
    falling, constant = parse(["--lr", "0.4"]), parse(["--preset", "paper-8k", "--lr", "0.4"])
    rates = [learning_rate(falling, step, 4) for step in range(5)]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    assert {learning_rate(constant, step, 4) for step in range(5)} == {0.4}


def test_evaluation_shows_and_takes_the_presets_settings():
    a, c = parse_evaluation(["m", "n", "--preset", "paper-8k"])
    assert a.models == ("m", "n") and str(a.output) == "runs/evaluation/m-and-n"
    assert a.data == c.eval_data == ("paper",) and a.samples == c.eval_samples == 80
    assert a.temperature == c.eval_temperature == 0.6 and a.questions == c.eval_questions == 0
    assert a.budgets == c.evaluation_budgets == tuple(range(250, 8001, 250))
    assert c.max_summary_tokens == 118 and c.engine == "vllm"

    flags = "--budgets 3 9 --data a b --samples 8 --questions 5 --temperature 0 --seed 7 " \
        "--engine plain --prompt-template {question}! --system-prompt s --chat-template-args a=1 " \
        "--max-prompt-tokens 9 --question-field q --answer-field w --reward f:g"  # fmt: skip
    _, c = parse_evaluation(["m", "--preset", "paper-8k", *flags.split()])
    assert c == replace(
        Config(**PRESETS["paper-8k"]), preset="paper-8k", eval_budgets=(3, 9), eval_samples=8,
        eval_data=("a", "b"), eval_questions=5, eval_temperature=0, seed=7, engine="plain",
        prompt_template="{question}!", system_prompt="s", chat_template_args=("a=1",),
        max_prompt_tokens=9, question_field="q", answer_field="w", reward="f:g",
    )  # fmt: skip


@pytest.mark.parametrize("cls, read", [(Config, parse), (Evaluation, parse_evaluation)])
def test_help_explains_every_flag_with_its_own_default(cls, read, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as e:
        read(["--preset", "paper-8k", "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    text = " ".join(lines).partition("--help")[2]
    assert e.value.code == 0 and "----" not in text  # headings of sections are no help texts
    helps = []
    for name in (f.name for f in fields(cls) if f.name != "models"):
        _, found, rest = text.partition(f"--{name.replace('_', '-')} ")
        assert found, name
        helps.append(rest.partition(" (default: ")[0].split("  ")[-1])
    assert len(set(helps)) == len(helps) and all(h.strip() for h in helps), helps
    assert "8000" in text  # of the preset


# ------------------------------------------------------------------------------------- bad input

# By kind: below, above, nan, infinity, wrong type, a value of a list, an empty list, unknown.
# fmt: off
BAD_FLAGS = [
    ("--seed -1", ["seed", "-1", "greater than or equal to 0"]),
    ("--lr 0", ["lr", "0", "greater than 0"]),
    ("--weight-decay -1", ["weight_decay", "-1", "greater than or equal to 0"]),
    ("--max_budget=0", ["max_budget", "0", "greater than or equal to 1"]),
    ("--decay 1.5", ["decay", "1.5", "less than or equal to 1"]),
    ("--steps 3000000000", ["steps", "3000000000", "less than 2147483648"]),
    ("--seed 9223372036854775808", ["seed", "9223372036854775808"]),
    *((f"--{name} {value}", [name.replace("-", "_"), value, "finite number"])
      for name in ("lr", "temperature", "eval-temperature", "sampler-cap", "max-grad-norm", "clip",
                   "decay", "weight-decay", "kv-cache-gb", "reward-timeout")
      for value in ("nan", "inf")),
    ("--lr fast", ["--lr", "fast"]), ("--steps 1.5", ["--steps", "1.5"]),
    ("--betas 0.9 1", ["betas.1", "1.0", "less than 1"]), ("--betas 0.9", ["--betas"]),
    ("--betas -0.1 0.9", ["betas.0", "-0.1"]), ("--probs nan 1", ["probs", "nan", "finite number"]),
    ("--budgets 4 0 9", ["budgets.1", "0", "greater than or equal to 1"]),
    ("--budgets 4 x", ["--budgets", "'x'"]),
    *((f"--{name} {following}", [name.replace("-", "_"), "at least 1 item"])
      for name in ("budgets", "probs", "eval-budgets", "eval-data")
      for following in ("", "--seed 1")),
    ("--experiment ppo", ["--experiment", "ppo"]), ("--preset x", ["--preset", "'x'"]),
    ("--bogus 1", ["--bogus"]),
]
BAD_FLAGS_OF_EVALUATION = [
    ("", ["models", "at least 1 item"]), ("m --budgets", ["budgets", "at least 1 item"]),
    ("m --data --seed 1", ["data", "at least 1 item"]), ("m --samples -3", ["samples", "-3"]),
    ("m --samples 0", ["samples", "0"]), ("m --summaries 0", ["summaries", "0"]),
    ("m --questions -5", ["questions", "-5"]),
    ("m --temperature nan", ["temperature", "nan", "finite number"]),
    ("m --temperature -1", ["temperature", "-1"]), ("m --seed -1", ["seed", "-1"]),
    ("m --max-prompt-tokens 0", ["max_prompt_tokens", "0"]), ("m --lr 1", ["--lr"]),
]
# fmt: on


@pytest.mark.parametrize(
    "read, flags, words",
    [(parse, *case) for case in BAD_FLAGS]
    + [(parse_evaluation, *case) for case in BAD_FLAGS_OF_EVALUATION],
)
def test_a_bad_flag_ends_with_code_2_and_names_flag_value_and_bound(
    read, flags, words, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as e:
        read(flags.split())
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert e.value.code == 2 and all(word in error for word in words), error
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")  # the other processes are silent
    with pytest.raises(SystemExit) as e:
        read(flags.split())
    assert e.value.code == 2 and capsys.readouterr() == ("", "")


def test_every_number_among_the_settings_has_a_range():
    """Also for settings that are made in code, or changed by `replace`."""
    settings = asdict(Config(budgets=(1,), probs=(1.0,), eval_budgets=(1,)))
    wrong = {k: -1 for k, v in settings.items() if isinstance(v, (int, float))}
    lists = {k: v for k, v in settings.items() if isinstance(v, tuple) and v}
    wrong |= {k: (-1,) * len(v) for k, v in lists.items() if not isinstance(v[0], str)}
    assert len(wrong) > 30
    wrong |= {"eval_data": (), "model": None, "bogus": 1}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            Config(**{name: value})
        with pytest.raises((ValueError, TypeError), match=name):  # of an unknown name, TypeError
            replace(Config(), **{name: value})


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(budgets=(12, 12)), "not increasing"),
        (dict(probs=(0.5, 0.5, 0.5, 0.5)), "sum to 2"),
        (dict(num_budgets=5), "even budgets"),
        (dict(num_rollouts=1), "--num-rollouts must be at least 2"),
        (dict(num_rollouts=1, baseline="group"), "--num-rollouts must be at least 2"),
        (dict(num_rollouts=1, baseline="none", num_summaries=1), "--num-rollouts must be at least"),
        (dict(num_eval_budgets=65), "--num-eval-budgets 65: only 64 tokens"),
        (dict(eval_budgets=(12, 6)), "not increasing"),
        (dict(updates_per_step=3), "--updates-per-step 3"),
        (dict(tensor_parallel_size=2), "needs --engine vllm"),
        (dict(tensor_parallel_size=4, engine="vllm"), "2 processes do not form groups"),
        (dict(questions_per_step=15, updates_per_step=1), "does not divide over 2"),
    ],
)
def test_settings_that_do_not_fit_together_are_one_line(change, complaint):
    with pytest.raises(ValueError, match=complaint) as e:
        check(Config(**change), world_size=2)
    assert "\n" not in str(e.value)
    check(Config(num_rollouts=1, baseline="progress"), world_size=2)  # summaries suffice


def test_a_model_that_train_makes_cannot_be_evaluated():
    from runtime.startup import prepare_evaluation

    with pytest.raises(ValueError, match="train.py makes"):
        prepare_evaluation(*parse_evaluation(["miniature"]))


def test_a_bad_flag_costs_no_import_of_torch():
    code = "import sys; from runtime.config import parse; parse(['--lr', '0'])"
    code = f"import sys\ntry: exec({code!r})\nfinally: print('torch' in sys.modules)"
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=alone()
    )
    assert done.returncode == 2 and done.stdout == "False\n" and time.time() - start < 10
