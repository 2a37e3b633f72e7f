"""Runs that are broken on purpose: bad numbers, bad files, bad input."""

import json
import shutil
import time
from dataclasses import fields
from decimal import Decimal

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import train
from runtime import data, metrics, models, startup
from runtime.config import RANGES, Config, check, parse
from tasks import arithmetic
from tasks.verifier import FAILURES
from tests.conftest import ROOT
from tests.end_to_end.test_train import SMALL, metrics_of


def arguments(model, out, *more) -> list[str]:
    return [str(a) for a in ("--model", model, "--output-dir", out, *SMALL, *more)]


# ----------------------------------------------------------------------------------- bad numbers


def poison(monkeypatch, kind: str, always: bool = False):
    """Put one nan or infinity (or one in every update) into a run's loss, gradient or log-probs."""
    calls, policy_loss, sample = [], train.brpo.policy_loss, train.sample_rollouts

    def bad_loss(*args):
        loss, sums = policy_loss(*args)
        calls.append(1)
        if always or len(calls) == 1:
            if kind == "gradient":
                loss.register_hook(lambda g: g * float("inf"))
            else:
                loss = loss * float("nan")
        return loss, sums

    def bad_logp(*args):
        rollouts = sample(*args)
        calls.append(1)
        if len(calls) == 1:
            rollouts[0].logp[0] = float(kind.split()[1])
        return rollouts

    if kind in ("loss", "gradient"):
        monkeypatch.setattr(train.brpo, "policy_loss", bad_loss)
    else:
        monkeypatch.setattr(train, "sample_rollouts", bad_logp)


@pytest.mark.parametrize("kind", ["loss", "gradient", "log-prob nan", "log-prob -inf"])
def test_an_update_with_a_bad_number_is_skipped_counted_and_named(
    kind, trained_model_path, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, kind)
    out = tmp_path / "out"
    train.train(parse(arguments(trained_model_path, out, "--steps", 1, "--save-every", 0)))
    assert [m["skipped_updates"] for m in metrics_of(out)] == [1]
    text = capsys.readouterr().out
    assert "WARNING step 0: update 0 had a nan or an infinity" in text and "Questions: [" in text
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    base = AutoModelForCausalLM.from_pretrained(trained_model_path)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any((p != q).any() for p, q in zip(model.parameters(), base.parameters()))


def test_after_a_number_of_bad_updates_the_run_stops_and_names_the_last_good_checkpoint(
    trained_model_path, tmp_path, monkeypatch
):
    poison(monkeypatch, "loss", always=True)
    out = tmp_path / "out"
    with pytest.raises(FloatingPointError, match="6 updates in a row.*step-00000002"):
        train.train(parse(arguments(trained_model_path, out, "--steps", 9, "--save-every", 2)))
    assert not (out / "model").exists() and len(metrics_of(out)) == 3


@pytest.mark.parametrize(
    "change, warning",
    [
        ({}, ""),
        ({"kl": 0.6}, "kl 0.6 is above 0.5"),
        ({"clip_share": 0.7}, "clip_share 0.7 is above"),
        ({"grad_norm": [0.1, 1e30]}, "norm 1e+30 was clipped to 1.0"),
        ({"grad_norm": [float("inf"), float("nan")], "kl": float("nan")}, ""),
        ({"reward": [0.0, 0.0]}, "no summary was right"),
    ],
)
def test_a_destroyed_policy_is_loud(change, warning):
    m = {"kl": 0.01, "clip_share": 0.0, "grad_norm": [0.1], "reward": [0.1, 0.0], **change}
    m |= {f"verifier/{kind}": 0 for kind in ("graded", *FAILURES)}
    step = metrics.Step(0, [], None, None, [metrics.Update([], 0.1, applied=True)], None)
    found = metrics.warnings(parse([]), m, step)
    assert [warning in text for text in found] == [True] * bool(warning)


# ------------------------------------------------------------------------------------- identity


def write_rows(path, count: int):
    rows = [{"problem": f"{i % 10} +{i % 5 + 1} ?", "answer": str(i % 7)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_edited_reward_function_is_another_run(trained_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    identities = []
    for score in (0.5, 0.5, 1.0):
        (tmp_path / "mine.py").write_text(f"def f(summary, truth, question): return {score}")
        args = arguments(trained_model_path, tmp_path / "out", "--reward", "mine:f")
        identities.append(train.prepare(parse(args)).identity)
    assert identities[0] == identities[1]
    assert [k for k in identities[0] if identities[0][k] != identities[2][k]] == ["reward_file"]


def test_changed_data_and_a_changed_model_are_another_run(trained_model_path, tmp_path):
    model = shutil.copytree(trained_model_path, tmp_path / "model")
    write_rows(rows := tmp_path / "rows.jsonl", 40)
    args = arguments(model, tmp_path / "out", "--train-data", rows, "--resume", "auto")
    run = train.prepare(parse(args))
    path = tmp_path / "out" / "checkpoints" / "step-00000001"
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"step": 1, "files": {}, **run.identity}))
    run.close()
    assert train.prepare(parse(args)).first_step == 1
    write_rows(rows, 20)
    with pytest.raises(ValueError, match="of another run: data "):
        train.prepare(parse(args))
    write_rows(rows, 40)
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": 1}')
    with pytest.raises(ValueError, match="of another run: model_files "):
        train.prepare(parse(args))


def test_a_refusal_while_loading_leaves_the_directory_free(tiny_model_path, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no memory for it")

    args = arguments(tiny_model_path, tmp_path / "out", "--steps", 1)
    with monkeypatch.context() as m:
        m.setattr(startup, "make_engine", refuse)
        with pytest.raises(SystemExit) as e:
            train.train(parse(args))
        assert e.value.code == 2
        del e
    train.prepare(parse(args))


def test_two_first_runs_on_a_cold_cache_both_get_the_base(tmp_path, monkeypatch):
    def write_while_another_does(path, seed):
        for p in (path, arithmetic.base_path(tmp_path, seed)):
            p.mkdir()
            (p / "config.json").write_text("{}")

    monkeypatch.setattr(arithmetic, "_write_base", write_while_another_does)
    path = arithmetic.load_or_write_base(tmp_path, 0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------------ trust


def test_code_of_a_model_directory_is_not_run(tiny_model_path, tmp_path):
    model = shutil.copytree(tiny_model_path, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'planted')!r})")
    with pytest.raises(ValueError, match="--model"):
        models.open_tokenizer(str(model), 40)
    assert not (tmp_path / "planted").exists()
    for path in ROOT.glob("*.py"):
        calls = path.read_text().split("from_pretrained(")[1:]
        assert all("trust_remote_code=False" in c[:160] for c in calls if "save_" not in c), path


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--betas 0.9 1", "--betas 1.0"), ("--betas -0.1 0.9", "--betas -0.1"),
        ("--weight-decay nan", "--weight-decay nan"), ("--weight-decay -1", "--weight-decay -1"),
        ("--seed 1180591620717411303424", "--seed 11805"), ("--seed -1", "--seed -1"),
        ("--lr inf", "--lr inf"), ("--lr nan", "--lr nan"), ("--lr 0", "--lr 0"),
        ("--temperature inf", "--temperature inf"), ("--temperature nan", "--temperature nan"),
        ("--eval-temperature inf", "--eval-temperature"), ("--sampler-cap inf", "--sampler-cap"),
        ("--sampler-cap nan", "--sampler-cap nan"), ("--max-grad-norm nan", "--max-grad-norm"),
        ("--clip inf", "--clip inf"), ("--decay nan", "--decay nan"), ("--decay 1.5", "--decay"),
        ("--kv-cache-gb nan", "--kv-cache-gb"), ("--probs nan 1 1 1", "--probs nan"),
        ("--max-budget 0", "--max-budget 0"), ("--steps 3000000000", "--steps 3000000000"),
        ("--eval-budgets", "--eval-budgets has no value"), ("--eval-data", "--eval-data has no"),
        ("--eval_budgets --seed 1", "--eval_budgets has no value"),
    ],
)  # fmt: skip
def test_bad_flags(flags, complaint, capsys):
    with pytest.raises((ValueError, SystemExit)) as e:
        check(parse(flags.split()))
    text = capsys.readouterr().err if isinstance(e.value, SystemExit) else str(e.value)
    assert complaint in text and "\n" not in text.strip()
    assert isinstance(e.value, ValueError) or e.value.code == 2


def test_every_number_among_the_flags_has_a_range():
    def is_number(value) -> bool:
        values = value if isinstance(value, tuple) else (value,)
        return any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)

    assert {f.name for f in fields(Config) if is_number(getattr(Config(), f.name))} <= set(RANGES)


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/out"])
def test_an_output_directory_that_cannot_be(where, tmp_path, tiny_model_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        train.train(parse(arguments(tiny_model_path, tmp_path / where)))
    assert e.value.code == 2 and "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        evaluate.main([str(tiny_model_path), "--output-dir", str(tmp_path / where)])
    assert e.value.code == 2 and "cannot be written" in capsys.readouterr().err


def break_model(model, how: str):
    weights, settings = model / "model.safetensors", json.loads((model / "config.json").read_text())
    if how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "layer missing":
        (model / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 4,
                                                       "layer_types": None}))  # fmt: skip
    elif how == "vocabulary":
        (model / "config.json").write_text(json.dumps({**settings, "vocab_size": 999}))
    elif how == "small vocabulary":
        (model / "config.json").write_text(json.dumps({**settings, "vocab_size": 20}))
    elif how in ("bert", "t5"):
        AutoConfig.for_model(how).save_pretrained(model)
    elif how == "tokenizer":
        (model / "tokenizer.json").write_text('{"version": ')
    elif how == "template":
        (model / "chat_template.jinja").write_text("{% if %}")
    elif how == "config":
        (model / "config.json").write_text("[")


@pytest.mark.parametrize(
    "how, complaint",
    [
        ("no weights", "has no *.safetensors file"), ("truncated", "truncated or damaged"),
        ("layer missing", "weights are missing or have another shape"),
        ("vocabulary", "have another shape"), ("small vocabulary", "weights only 20"),
        ("bert", "is a bert: use a decoder-only"), ("t5", "is a t5: use a decoder-only"),
        ("tokenizer", "no model directory or hub name that can be read"),
        ("template", "chat template"), ("config", "can be read"),
    ],
)  # fmt: skip
def test_a_bad_model_directory(how, complaint, tiny_model_path, tmp_path, capsys):
    model = shutil.copytree(tiny_model_path, tmp_path / "model")
    break_model(model, how)
    start = time.time()
    with pytest.raises(SystemExit) as e:
        train.train(parse(arguments(model, tmp_path / "out")))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and error.startswith("error: ") and complaint in error
    assert str(model) in error and time.time() - start < 10


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.jsonl", b'{"problem": "\\ud800", "answer": "1"}\n', "line 1: half of a surrogate"),
        ("a.jsonl", b'{"problem": "x", "answer": "\\udfff"}\n', "line 1: half of a surrogate"),
        ("a.json", b"[" * 100_000, "cannot be read as JSON"),
        ("a.json", '[{"problem": "é", "answer": "1"}]'.encode("latin-1"), "is not in UTF-8"),
        ("a.jsonl", '{"problem": "x", "answer": "1"}'.encode("utf-16"), "is not in UTF-8"),
        ("a.jsonl", b'{"problem": "x", "answer": ' + b"9" * 5000 + b"}", "line 1 on: cannot"),
        ("a.jsonl", b'{"problem": "x", "answer": true}\n', "no usable row"),
        ("a.parquet", b"PAR1", "no readable parquet file"),
    ],
)
def test_bad_data_files_are_named(name, content, complaint, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as e:
        data.load_rows(str(tmp_path / name))
    assert str(tmp_path / name) in str(e.value) and complaint in str(e.value)
    assert "\n" not in str(e.value)


def test_a_byte_order_mark_and_decimals_are_fine(tmp_path):
    row = '{"problem": "x", "answer": "1"}'
    (tmp_path / "a.jsonl").write_bytes(row.encode("utf-8-sig"))
    assert data.load_rows(str(tmp_path / "a.jsonl")) == ([("x", "1")], 0)
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    rows = [{"problem": p, "answer": Decimal(a)} for p, a in (("x", "2.50"), ("y", "3.00"))]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    assert data.load_rows(str(tmp_path / "a.parquet")) == ([("x", "2.50"), ("y", "3.00")], 0)


@pytest.mark.parametrize(
    "args, complaint",
    [
        ([], "name one or more"), (["miniature"], "train.py makes"),
        (["MODEL", "--samples", "-1"], "--samples -1"), (["MODEL", "--seed", "-1"], "--seed -1"),
        (["MODEL", "--questions", "-5"], "--questions -5"),
        (["MODEL", "--temperature", "nan"], "temperature nan"),
        (["MODEL", "--budgets"], "--budgets has no value"), (["MODEL", "--data"], "--data has no"),
    ],
)  # fmt: skip
def test_bad_arguments_of_evaluate(args, complaint, tiny_model_path, capsys):
    with pytest.raises(SystemExit) as e:
        evaluate.main([str(tiny_model_path) if a == "MODEL" else a for a in args])
    line = capsys.readouterr().err.strip()
    assert e.value.code == 2 and complaint in line and "\n" not in line


def test_an_unreachable_hub_is_one_line_in_seconds(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    start = time.time()
    with pytest.raises(ValueError, match="^--model org/name: no model directory or hub name"):
        models.open_tokenizer("org/name", 40)
    with pytest.raises(ValueError, match="cannot fetch"):
        data.load_rows("deepscaler")
    assert time.time() - start < 10 and constants.HF_HUB_OFFLINE
