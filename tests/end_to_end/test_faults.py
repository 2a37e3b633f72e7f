"""Runs that are broken on purpose: bad numbers, bad files, bad input."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

import evaluate
import train
from runtime import metrics, startup
from runtime.config import parse
from tasks import arithmetic
from tasks.verifier import FAILURES
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
        ({"reward": [0.0, 0.0], "step": 1}, "the policy has collapsed"),
        ({"reward": [0.0, 0.0]}, "in samples.jsonl with --answer-field answer"),
        ({"sampler_gap": 0.4}, "sampler_gap 0.4 is above 0.1: trainer and sampler"),
    ],
)
def test_a_destroyed_policy_is_loud(change, warning):
    m = {"kl": 0.01, "clip_share": 0.0, "grad_norm": [0.1], "reward": [0.1, 0.0], "step": 0}
    m |= {"sampler_gap": 0.02, **change}
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


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/out"])
def test_an_output_directory_that_cannot_be(where, tmp_path, tiny_model_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        train.train(parse(arguments(tiny_model_path, tmp_path / where)))
    assert e.value.code == 2 and "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        evaluate.main([str(tiny_model_path), "--output-dir", str(tmp_path / where)])
    assert e.value.code == 2 and "cannot be written" in capsys.readouterr().err
