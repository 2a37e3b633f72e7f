"""Everything here is broken on purpose: bad numbers, bad files, bad input, kills. What then?

`scripts/kill_anywhere.py` kills whole runs at every file operation; here each fault is alone.
"""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate
import train
from rollout import Rollout, Summary
from runtime import checkpoint, distributed, metrics, rundir, startup
from runtime.config import parse
from runtime.data import Question
from tasks import arithmetic
from tasks.verifier import FAILURES
from tests.conftest import ROOT, alone, run_script
from tests.end_to_end.test_train import SMALL, assert_equal_metrics, metrics_of


def arguments(model, out, *more) -> list[str]:
    return [str(a) for a in ("--model", model, "--output-dir", out, *SMALL, *more)]


@pytest.fixture(scope="module")
def whole(trained_model_path, tmp_path_factory):
    """A run of 4 steps that nobody disturbed, with checkpoints after steps 2 and 4."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    train.train(parse(arguments(trained_model_path, out, "--steps", 4, "--save-every", 2)))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def identity(run) -> dict:
    saved = json.loads((run / "checkpoints" / "step-00000002" / "run.json").read_text())
    return {k: v for k, v in saved.items() if k not in ("step", "trajectory", "files")}


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
    # An engine's bad number is not read again by the next start; a bad loss says nothing of them.
    kept = list(out.glob("rollouts/*"))
    assert len(kept) == (0 if kind.startswith("log-prob") else 1)


def test_after_a_number_of_bad_updates_the_run_stops_and_names_the_last_good_checkpoint(
    trained_model_path, tmp_path, monkeypatch
):
    poison(monkeypatch, "loss", always=True)
    out = tmp_path / "out"
    with pytest.raises(FloatingPointError, match="6 updates in a row.*step-00000002"):
        train.train(parse(arguments(trained_model_path, out, "--steps", 9, "--save-every", 2)))
    assert not (out / "model").exists() and len(metrics_of(out)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_with_a_bad_weight_is_saved(value, tiny_model_path, copy):
    distributed.start()
    model = distributed.load_policy(str(tiny_model_path), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        next(model.parameters())[0, 0] = value
    with pytest.raises(FloatingPointError, match="last good checkpoint: .*step-00000004"):
        checkpoint.save_checkpoint(copy, 6, {}, "", model, optimizer, 2)
    before = (copy / "model" / "model.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match="nothing was saved"):
        checkpoint.save_model(model, None, copy / "model")
    assert (copy / "model" / "model.safetensors").read_bytes() == before
    assert [p.name[-1] for p in checkpoint.checkpoints(copy)] == ["2", "4"]


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
    grades = dict.fromkeys(("graded", *FAILURES), 0)
    found = metrics.warnings(parse([]), m, [], [True], grades)
    assert [warning in text for text in found] == [True] * bool(warning)


# ------------------------------------------------------------------------- the run's directory


def test_a_second_run_in_the_directory_gets_one_line_and_code_2(tiny_model_path, tmp_path, capsys):
    args = arguments(tiny_model_path, tmp_path / "out")
    first = train.prepare(parse(args))
    with pytest.raises(SystemExit) as e, distributed.exit_on_bad_input():
        train.prepare(parse([*args, "--resume", "auto"]))
    line = capsys.readouterr().err.strip()
    assert e.value.code == 2 and line.startswith("error: ") and "\n" not in line
    assert f"in use by another run ({os.uname().nodename} pid {os.getpid()}" in line
    del first, e  # the kernel lets go
    train.prepare(parse(args))


def test_a_process_that_sees_another_directory_is_found(tmp_path, monkeypatch):
    rundir.enter(tmp_path / "a", "")
    monkeypatch.setattr(rundir, "rank", lambda: 1)  # of a machine whose tmp_path is its own
    for other in ("b", "a"):  # empty there, or with a lock of another start
        with pytest.raises(ValueError, match="not the one of the first process"):
            rundir.enter(tmp_path / other, "")


def damage(run, how: str):
    newest = run / "checkpoints" / "step-00000004"
    what, how = how.split()
    path = {"shard": newest / "__0_0.distcp", "meta": newest / ".metadata"}.get(
        what, newest / "run.json"
    )
    content = bytearray(path.read_bytes())
    if how == "gone":
        return path.unlink()
    if how == "flipped":
        content[len(content) // 2] ^= 1
    values = {"truncated": content[: len(content) // 2], "empty": b"", "list": b"[]"}
    path.write_bytes(values.get(how, content))


DAMAGES = [f"{w} {h}" for w in ("shard", "meta") for h in ("flipped", "truncated", "empty", "gone")]


@pytest.mark.parametrize("how", [*DAMAGES, "run empty", "run list", "run gone"])
def test_a_damaged_checkpoint_is_skipped_and_said(how, copy, capsys):
    damage(copy, how)
    (copy / "checkpoints" / "step-notes").mkdir()
    start = checkpoint.find(copy, "auto", identity(copy))
    text = capsys.readouterr().err
    assert start.checkpoint.name == "step-00000002" and start.step == 2
    assert "WARNING skipping" in text and "step-00000004: " in text
    assert "ignoring" in text and "step-notes" in text
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.find(copy, str(copy / "checkpoints" / "step-00000004"), identity(copy))
    rundir.begin(copy, start.checkpoint, start.step)  # out of the way of the next --resume auto
    assert [p.name for p in checkpoint.checkpoints(copy)] == ["step-00000002"]


def test_without_an_intact_checkpoint_nothing_is_overwritten(copy):
    for path in checkpoint.checkpoints(copy):
        (path / ".metadata").unlink()
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        checkpoint.find(copy, "auto", identity(copy))


def test_a_delete_or_a_replace_that_a_kill_interrupts_is_completed_at_the_next_start(
    copy, monkeypatch
):
    def killed(*_, **__):
        raise KeyboardInterrupt

    old = copy / "checkpoints" / "step-00000002"
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(shutil, "rmtree", killed)
        rundir.remove(old)
    assert [p.name[-1] for p in checkpoint.checkpoints(copy)] == ["4"]  # no half one by that name
    (copy / "model").rename(copy / "model.old")  # between the two renames of `replace`
    rundir.fresh(copy / "model.partial")
    (copy / "notes.old").write_text("not ours")
    rundir.sweep(copy)
    assert (copy / "model" / "config.json").exists() and (copy / "notes.old").exists()
    assert not [p for p in copy.rglob("*") if p.suffix in (".removed", ".partial")]


def test_what_a_kill_left_undeleted_goes_at_the_next_start(copy, trained_model_path):
    """Killed between a checkpoint's last rename and the deletion of what it makes needless."""
    (copy / "rollouts" / "step-00000003.json").write_text("")
    train.train(
        parse(
            [
                *arguments(trained_model_path, copy, "--steps", 4, "--save-every", 2),
                "--keep-checkpoints",
                "1",
                "--resume",
                "auto",
            ]
        )
    )
    assert [p.name for p in (copy / "checkpoints").iterdir()] == ["step-00000004"]
    assert not list((copy / "rollouts").iterdir())


def test_files_are_on_disk_before_they_get_their_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, type(tmp_path).rename
    monkeypatch.setattr(
        os, "fsync", lambda d: (done.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d))[1]
    )
    monkeypatch.setattr(
        type(tmp_path), "rename", lambda p, t: (done.append(f"rename {p}"), rename(p, t))[1]
    )
    rundir.write(tmp_path / "a", "text")
    (rundir.fresh(tmp_path / "b.partial") / "file").write_text("text")
    rundir.replace(tmp_path / "b.partial", tmp_path / "b")
    root = str(tmp_path)
    assert done == [
        f"{root}/a.partial", f"rename {root}/a.partial",
        f"{root}/b.partial/file", f"{root}/b.partial", f"rename {root}/b.partial",
    ]  # fmt: skip


def test_a_kill_while_the_logs_are_rewritten_loses_nothing(copy, monkeypatch):
    before = {n: (copy / n).read_bytes() for n in ("metrics.jsonl", "evals.jsonl")}
    newest = copy / "checkpoints" / "step-00000002"
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    for nth in (1, 2):  # before either rename
        renames, rename = [], type(copy).rename

        def killed(path, target, nth=nth, renames=renames, rename=rename):
            renames.append(path)
            if len(renames) == nth:
                raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(type(copy), "rename", killed)
            rundir.begin(copy, newest, 2)
        assert (copy / "evals.jsonl").read_bytes() == before["evals.jsonl"]
    assert (copy / "metrics.jsonl").read_bytes() == b"".join(
        before["metrics.jsonl"].splitlines(keepends=True)[:2]
    )


def test_bad_lines_and_stray_files_are_dropped_with_a_count(copy, capsys):
    good = (copy / "metrics.jsonl").read_bytes().splitlines()
    bad = [b"\xff\xfe", b'{"no": 1}', b"[1]", b'{"step": "x"}', b"", good[1][:40]]
    (copy / "metrics.jsonl").write_bytes(b"\n".join([*bad[:3], good[0], *bad[3:], good[1]]))
    (copy / "rollouts" / "step-x.json").write_text("")
    (copy / "rollouts" / "notes").write_text("")
    rundir.begin(copy, copy / "checkpoints" / "step-00000002", 2)
    assert [m["step"] for m in metrics_of(copy)] == [0, 1]
    assert "metrics.jsonl: dropped 6 line(s)" in capsys.readouterr().err
    rundir.drop_rollouts(copy, before=9)


# ------------------------------------------------------------------ rollouts and their trajectory


QUESTIONS = [Question(i, f"{i} +1 ?", "1", (i, 2)) for i in (7, 3)]


def sampled(shift: float = 0.0) -> list[Rollout]:
    return [
        Rollout(q, g, [1, 4], [-0.1 - shift, -1 / 3], "closed",
                [Summary(b, 0, b, [5], [6, 2], [-0.25, -1e-9], float(b)) for b in range(2)])
        for q in QUESTIONS for g in range(2)
    ]  # fmt: skip


def test_kept_rollouts_come_back_as_they_were(tmp_path):
    path = tmp_path / "rollouts" / "step-00000000.json"
    after = checkpoint.save_rollouts(path, "t", sampled())
    assert checkpoint.load_rollouts(path, "t", QUESTIONS, 2, 2) == (sampled(), after)
    assert after != checkpoint.save_rollouts(path, "t", sampled(shift=1e-9))


@pytest.mark.parametrize(
    "how", ["empty", "truncated", "flipped", "binary", "short", "list", "other questions", "pickle"]
)
def test_damaged_rollouts_are_sampled_again(how, tmp_path, capsys):
    path = tmp_path / "rollouts" / "step-00000000.json"
    checkpoint.save_rollouts(path, "t", sampled()[:3] if how == "short" else sampled())
    content = bytearray(path.read_bytes())
    content[-20] ^= 1 if how == "flipped" else 0
    values = {"empty": b"", "truncated": content[:-50], "binary": b"\xff\xfe\n\xff",
              "list": b"[]\n[]", "pickle": pickle.dumps(Planted(tmp_path / "planted"))}  # fmt: skip
    path.write_bytes(values.get(how, content))
    questions = QUESTIONS[::-1] if how == "other questions" else QUESTIONS
    assert checkpoint.load_rollouts(path, "t", questions, 2, 2) == (None, "")
    assert "are sampled again" in capsys.readouterr().err and not (tmp_path / "planted").exists()


def test_rollouts_of_an_abandoned_trajectory_are_not_trained_on(tmp_path, capsys):
    """Step 1's rollouts go on from step 0's: when those were sampled anew and came out otherwise,
    they belong to weights that are no more."""
    path = tmp_path / "rollouts" / "step-00000001.json"
    first = checkpoint.save_rollouts(path.with_name("step-00000000.json"), "t", sampled())
    checkpoint.save_rollouts(path, first, sampled())
    anew = checkpoint.save_rollouts(path.with_name("step-00000000.json"), "t", sampled(0.5))
    assert checkpoint.load_rollouts(path, first, QUESTIONS, 2, 2)[0]
    assert checkpoint.load_rollouts(path, anew, QUESTIONS, 2, 2) == (None, "")
    assert "of another trajectory" in capsys.readouterr().err


def test_an_older_checkpoint_sets_the_newer_aside_and_repeats_the_run(
    whole, copy, trained_model_path
):
    args = arguments(trained_model_path, copy, "--steps", 4, "--save-every", 2)
    train.train(parse([*args, "--resume", str(copy / "checkpoints" / "step-00000002")]))
    names = sorted(p.name for p in (copy / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000004.abandoned"]
    assert metrics_of(copy) == metrics_of(whole)  # to the bit
    one, two = (d / "model" / "model.safetensors" for d in (whole, copy))
    assert one.read_bytes() == two.read_bytes()


def test_without_checkpoints_only_the_newest_rollouts_are_kept(trained_model_path, tmp_path):
    out = tmp_path / "out"
    train.train(parse(arguments(trained_model_path, out, "--steps", 2, "--save-every", 0)))
    assert [p.name for p in (out / "rollouts").iterdir()] == ["step-00000001.json"]


# ------------------------------------------------------------------------- identity and history


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
    (path / ".metadata").write_text("")
    files = {".metadata": rundir.sha256(path / ".metadata")}
    (path / "run.json").write_text(
        json.dumps({"step": 1, "trajectory": "", "files": files, **run.identity})
    )
    del run
    assert train.prepare(parse(args)).first_step == 1
    write_rows(rows, 20)
    with pytest.raises(ValueError, match="of another run: data "):
        train.prepare(parse(args))
    write_rows(rows, 40)
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": 1}')
    with pytest.raises(ValueError, match="of another run: model_files "):
        train.prepare(parse(args))


def test_history_comes_along_and_is_compared_only_where_it_agrees(
    copy, trained_model_path, tmp_path, capsys
):
    args = arguments(trained_model_path, tmp_path / "new", "--steps", 4, "--save-every", 2)
    args[args.index("--eval-budgets") + 1] = "24"  # was 12 48
    (tmp_path / "new").mkdir()  # what a kill left of the first try
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    train.train(parse([*args, "--resume", str(copy / "checkpoints" / "step-00000002")]))
    lines = [json.loads(x) for x in (tmp_path / "new" / "evals.jsonl").read_text().splitlines()]
    assert [(e["step"], e["budgets"]) for e in lines] == [(0, [16, 64]), (4, [24, 64])]
    assert [m["step"] for m in metrics_of(tmp_path / "new")] == [0, 1, 2, 3]
    text = capsys.readouterr().out
    assert "evaluations before step 4 had other settings: not compared" in text
    assert json.loads((tmp_path / "new" / "eval.json").read_text())["before"]["step"] == 4


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


# -------------------------------------------------------------------- signals, ends, standstills


def test_sigterm_finishes_the_step_saves_and_goes_on_later(
    whole, trained_model_path, tmp_path, monkeypatch, capsys
):
    out, log = tmp_path / "out", train.log
    args = arguments(trained_model_path, out, "--steps", 4, "--save-every", 20)

    def warn_in_step_2(c, run, bar, verifier, step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        log(c, run, bar, verifier, step, *rest)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(train, "log", warn_in_step_2)
        train.train(parse(args))
    assert e.value.code == distributed.STOPPED == 143
    assert "stopped by SIGTERM before step 3: go on with --resume auto" in capsys.readouterr().err
    assert [p.name for p in checkpoint.checkpoints(out)] == ["step-00000003"]
    assert not (out / "model").exists()
    del e
    train.train(parse([*args, "--resume", "auto"]))
    assert_equal_metrics(metrics_of(whole), metrics_of(out), 0)


def test_a_second_sigterm_ends_at_once(monkeypatch):
    now, ended = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(distributed, "time", clock)
    monkeypatch.setattr(distributed.os, "kill", lambda pid, number: ended.append((pid, number)))
    distributed.note_sigterm()
    assert not distributed.asked_to_stop()
    signal.raise_signal(signal.SIGTERM)
    now[0] = 1.0  # torchrun passes on what its whole group got: the same signal
    signal.raise_signal(signal.SIGTERM)
    assert distributed.asked_to_stop() and not ended
    now[0] = 9.0
    signal.raise_signal(signal.SIGTERM)
    assert ended == [(os.getpid(), signal.SIGTERM)]
    distributed.stop()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


SCRIPT = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from runtime import distributed
def run():
    distributed.start()
    open(sys.argv[1] + f"/{{distributed.rank()}}", "w").write(str(os.getpid()))
    distributed.barrier()
    if sys.argv[2] == "raise" and distributed.rank() == 1:
        raise KeyError("on purpose")
    if sys.argv[2] == "sleep":
        time.sleep(200)
    distributed.barrier()
distributed.main(run)
"""


def test_workers_end_with_their_agent_and_an_exception_ends_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pids = tmp_path / "pids"
    pids.mkdir()
    start = time.time()
    text = run_script(script, pids, "raise", processes=2, expect=1)
    assert "KeyError: 'on purpose'" in text and time.time() - start < 60
    for path in pids.iterdir():
        path.unlink()
    agent = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script), str(pids), "sleep"], env=alone(), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len([p for p in pids.iterdir() if p.read_text()]) < 2 and time.time() - start < 100:
        time.sleep(0.05)
    workers = [int(p.read_text()) for p in pids.iterdir()]
    agent.kill()
    agent.wait()
    deadline = time.time() + 10
    while (left := [w for w in workers if is_alive(w)]) and time.time() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


def test_a_standstill_is_reported_with_its_place(monkeypatch, capfd):
    over = threading.Event()
    sleep = time.sleep

    def quick(_):
        sleep(0.01)
        if over.is_set():
            raise SystemExit

    monkeypatch.setattr(distributed, "time", SimpleNamespace(sleep=quick))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda _: sleep(1.5))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def until_over():
        with contextlib.suppress(SystemExit):
            distributed.report_standstill()

    threading.Thread(target=until_over, daemon=True).start()
    deadline = time.time() + 0.5
    while time.time() < deadline:  # at work, at another depth at each look: nothing to report
        fibonacci(12)
    assert "stood still" not in capfd.readouterr().err
    distributed.any_process(True)
    over.set()
    sleep(0.1)
    text = capfd.readouterr().err
    assert "has stood still for 10 min in any_process (distributed.py:" in text


# ------------------------------------------------------------------------------------------ trust


class Planted:
    """Executes code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_checkpoint_executes_nothing(copy, tmp_path, tiny_model_path):
    distributed.start()
    model = distributed.load_policy(str(tiny_model_path), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters())
    path = copy / "checkpoints" / "step-00000004"
    checkpoint.load_checkpoint(path, model, optimizer)  # the good one loads
    (path / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    with pytest.raises(ValueError, match="asks for posix.mkdir, which no checkpoint needs"):
        checkpoint.load_checkpoint(path, model, optimizer)
    torch.save(Planted(tmp_path / "planted"), tmp_path / "bytes")
    with pytest.raises(pickle.UnpicklingError), (tmp_path / "bytes").open("rb") as file:
        checkpoint._Planner().load_bytes(None, file)
    assert not (tmp_path / "planted").exists()


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
