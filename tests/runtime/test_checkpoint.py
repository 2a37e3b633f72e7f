"""Checkpoints and the run's directory: what is saved, damaged, killed half-way, and read again.

`scripts/kill_anywhere.py` kills whole runs at every file operation; here each fault is alone.
"""

import contextlib
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from runtime import checkpoint, distributed, rundir

IDENTITY = {"lr": 1, "data": "abc"}


def make_policy(path, updates: int = 2):
    """A model and its optimizer after some updates with random gradients, the same on any ranks."""
    distributed.start()
    model = distributed.load_policy(str(path), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(24).reshape(2, 12)
    for step in range(updates):
        model(tokens + step).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def full_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights and moments, copied and gathered from all shards."""
    tensors = checkpoint.training_state(model, optimizer).items()
    return {k: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for k, t in tensors}


def assert_same_bits(a: dict, b: dict):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def save(out, step, policy, keep=2):
    checkpoint.save_checkpoint(out, step, IDENTITY, *policy, keep)


def steps_in(out) -> list[int]:
    return [int(p.name[-8:]) for p in rundir.checkpoints(out)]


def write_logs(out, steps: int, end: str = ""):
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(steps))
    for name in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
        (out / name).write_text(lines + end)


@pytest.fixture(scope="module")
def policy(tiny_model_path):
    return make_policy(tiny_model_path)


@pytest.fixture
def out(policy, tmp_path) -> Path:
    """The directory of a run with checkpoints 2 and 4."""
    distributed.start()
    write_logs(tmp_path, 4)
    (tmp_path / "config.json").write_text("{}")
    for step in (2, 4):
        save(tmp_path, step, policy)
    return tmp_path


# ------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("saved_on, loaded_on", [(2, 1), (1, 2)])
def test_any_number_of_ranks_loads_what_another_saved_to_the_bit(
    saved_on, loaded_on, tiny_model_path, tmp_path, run_ranks
):
    write_logs(tmp_path, 1)

    def save_one(rank):
        policy = make_policy(tiny_model_path)
        save(tmp_path, 1, policy)
        state = full_state(*policy)
        if rank == 0:
            save_file(state, tmp_path / "before.safetensors")

    def load_one(rank):
        policy = make_policy(tiny_model_path, updates=1)
        checkpoint.load_checkpoint(tmp_path / "checkpoints" / "step-00000001", *policy)
        state = full_state(*policy)
        if rank == 0:
            save_file(state, tmp_path / "after.safetensors")

    run_ranks(save_one, saved_on)
    run_ranks(load_one, loaded_on)
    files = {p.name for p in (tmp_path / "checkpoints" / "step-00000001").iterdir()}
    shards = {f"shard-{i + 1:05d}-model-00001-of-00001.safetensors" for i in range(saved_on)}
    assert files == {"run.json"} | shards  # and nothing that could be a pickle
    before = load_file(tmp_path / "before.safetensors")
    assert_same_bits(before, load_file(tmp_path / "after.safetensors"))
    kinds = {name.split(".")[-1] for name in before if name.startswith("optimizer.")}
    assert kinds == {"exp_avg", "exp_avg_sq", "step"}


def test_loading_unpickles_nothing(policy, out, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    path = out / "checkpoints" / "step-00000004"
    (path / ".metadata").write_bytes(pickle.dumps(Path("planted")))  # where DCP's pickle would be
    before = full_state(*policy)
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with torch.no_grad():
        for tensor in checkpoint.training_state(*policy).values():
            tensor.add_(1)
    checkpoint.load_checkpoint(path, *policy)
    assert_same_bits(before, full_state(*policy))


def test_a_checkpoint_before_the_first_update_does_not_touch_the_optimizer(
    tiny_model_path, tmp_path
):
    """torch's get_state_dict would take a hidden step there, and advance AdamW's step counter."""
    write_logs(tmp_path, 0)
    saved = make_policy(tiny_model_path, updates=0)
    save(tmp_path, 0, saved)
    loaded = make_policy(tiny_model_path, updates=1)
    checkpoint.load_checkpoint(tmp_path / "checkpoints" / "step-00000000", *loaded)
    for model, optimizer in (saved, loaded):
        model(torch.arange(8)[None]).logits.square().mean().backward()
        optimizer.step()
    other = make_policy(tiny_model_path, updates=0)
    other[0](torch.arange(8)[None]).logits.square().mean().backward()
    other[1].step()
    assert_same_bits(full_state(*other), full_state(*saved))
    assert_same_bits(full_state(*other), full_state(*loaded))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["model.", "optimizer."])
def test_nothing_with_a_bad_number_is_saved(kind, value, out, tiny_model_path):
    policy = make_policy(tiny_model_path, updates=1)
    tensors = checkpoint.training_state(*policy)
    next(t for name, t in tensors.items() if name.startswith(kind)).view(-1)[0] = value
    with pytest.raises(FloatingPointError, match="last good checkpoint: .*step-00000004"):
        save(out, 6, policy)
    (out / "model").mkdir()
    if kind == "model.":
        with pytest.raises(FloatingPointError, match="nothing was saved"):
            checkpoint.save_model(policy[0], None, out / "model")
    assert list((out / "model").iterdir()) == [] and steps_in(out) == [2, 4]


# --------------------------------------------------------------------------- damaged, or killed


def damage(path: Path, kind: str):
    (shard,) = path.glob("*.safetensors")
    what, change = kind.split()
    target = shard if what == "shard" else path / "run.json"
    content = bytearray(target.read_bytes())
    if change == "gone":
        return target.unlink()
    if change == "added":
        return shutil.copy(shard, path / "shard-00002-model-00001-of-00001.safetensors")
    content[len(content) // 2] ^= 1
    values = {"flipped": content, "truncated": content[: len(content) // 2], "list": b"[]"}
    target.write_bytes(values.get(change, b""))


DAMAGES = ["shard flipped", "shard truncated", "shard gone", "shard added", "run empty", "run list"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped_said_and_replaced(kind, out, policy, capsys):
    newest = out / "checkpoints" / "step-00000004"
    damage(newest, kind)
    assert checkpoint.find(out, "auto", IDENTITY) == (newest.with_name("step-00000002"), 2)
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and f"WARNING skipping {newest}: " in text
    with pytest.raises(ValueError, match="no complete checkpoint .*step-00000004: "):
        checkpoint.find(out, str(newest), IDENTITY)
    rundir.begin(out, newest.with_name("step-00000002"), 2, keep=1)
    save(out, 3, policy, keep=1)
    assert steps_in(out) == [3, 4]  # a damaged one does not push out a good one
    assert checkpoint.find(out, "auto", IDENTITY)[1] == 3
    save(out, 4, policy, keep=1)
    assert steps_in(out) == [4] and checkpoint.find(out, "auto", IDENTITY) == (newest, 4)


def test_without_an_intact_checkpoint_the_run_does_not_start(out):
    for path in rundir.checkpoints(out):
        damage(path, "shard gone")
    with pytest.raises(ValueError, match="no complete checkpoint .*step-00000004.*step-00000002"):
        checkpoint.find(out, "auto", IDENTITY)


def test_a_checkpoint_that_a_kill_left_incomplete_is_none(out, policy, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    for name in ("write", "sync"):  # before run.json; before the first shard
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(checkpoint, name, killed)
            save(out, 6, policy)
        assert steps_in(out) == [2, 4] and checkpoint.find(out, "auto", IDENTITY)[1] == 4
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):  # in the middle of pruning
        m.setattr(shutil, "rmtree", killed)
        save(out, 6, policy, keep=2)
    assert steps_in(out) == [4, 6] and (out / "checkpoints" / "step-00000002").exists()
    (out / "checkpoints" / "step-00000008").mkdir()
    (out / "checkpoints" / "notes").mkdir()
    rundir.begin(out, out / "checkpoints" / "step-00000006", 6, keep=1)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["notes", "step-00000006"]


def test_everything_is_on_disk_before_what_completes_it(policy, out, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def logged_fsync(descriptor):
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_replace(source, target):
        done.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    save(out, 6, policy)
    path = out / "checkpoints" / "step-00000006"
    completed = done.index(("replace", str(path / "run.json")))
    first = [str(p) for p in (*path.glob("*.safetensors"), path, path / "run.json.tmp")]
    first += [str(out / name) for name in ("metrics.jsonl", "evals.jsonl")]
    assert len(first) == 5 and all(("fsync", name) in done[:completed] for name in first)
    assert ("fsync", str(path)) in done[completed:] and done[-1] == ("fsync", str(path.parent))


def test_the_model_is_replaced_whole(policy, out, tiny_model_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, synced = AutoTokenizer.from_pretrained(tiny_model_path), []
    (out / "model.tmp").mkdir()  # of a try that was killed
    (out / "model.tmp" / "stray").write_text("")
    (out / "model").mkdir()
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "sync", lambda p: synced.append(p.name))
        checkpoint.save_model(policy[0], tokenizer, out / "model")
    names = {p.name for p in (out / "model").iterdir()}
    assert "stray" not in names and names | {"model.tmp"} == set(synced)
    assert not (out / "model.tmp").exists()
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    assert_same_bits(saved.state_dict(), policy[0].state_dict())


# ----------------------------------------------------------------------- which checkpoint, whose


def test_another_run_or_an_older_checkpoint_is_refused_with_the_fix(out, tmp_path_factory):
    newest, older = out / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000002"
    for resume in ("auto", str(newest)):
        with pytest.raises(ValueError, match="of another run: lr 1 there, 2 here: match the flags"):
            checkpoint.find(out, resume, {**IDENTITY, "lr": 2})
    with pytest.raises(ValueError, match="newer than --resume .*: delete step-00000004, or"):
        checkpoint.find(out, str(older), IDENTITY)
    new = tmp_path_factory.mktemp("new")
    assert checkpoint.find(new, "auto", IDENTITY) == (None, 0)
    assert checkpoint.find(new, "", IDENTITY) == (None, 0)
    assert checkpoint.find(new, str(older), IDENTITY) == (older, 2)
    (new / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another run than --resume"):
        checkpoint.find(new, str(older), IDENTITY)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.find(tmp_path_factory.mktemp("empty"), "nowhere", IDENTITY)


def test_a_directory_has_one_run_until_that_ends(tmp_path, run_ranks, capsys):
    lock = rundir.enter(tmp_path, "")
    with pytest.raises(SystemExit) as e, distributed.exit_on_bad_input():
        rundir.enter(tmp_path, "auto")
    line = capsys.readouterr().err.strip()
    assert e.value.code == 2 and line.startswith("error: ") and "\n" not in line
    assert f"in use by another run ({os.uname().nodename} pid {os.getpid()} " in line
    lock.release()

    def killed(_):
        rundir.enter(tmp_path, "")
        os.kill(os.getpid(), signal.SIGKILL)

    run_ranks(killed, 1, codes=[-signal.SIGKILL])
    rundir.enter(tmp_path, "").release()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another run: continue it with --resume auto"):
        rundir.enter(tmp_path, "")
    rundir.enter(tmp_path, "auto")


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(_):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    with pytest.raises(ValueError, match=r"cannot be written or locked \(no flock here\)"):
        rundir.enter(tmp_path, "")


def test_a_process_that_sees_another_directory_is_found(tmp_path, monkeypatch):
    rundir.enter(tmp_path / "a", "")
    monkeypatch.setattr(rundir, "rank", lambda: 1)  # of a machine whose tmp_path is its own
    for other in ("b", "a"):  # empty there, or with the owner of another start
        with pytest.raises(ValueError, match="not the one of the first process"):
            rundir.enter(tmp_path / other, "")


# ---------------------------------------------------------------------------------------- logs


def test_logs_are_cut_at_the_first_step_and_bad_lines_dropped_with_a_count(out, capsys):
    write_logs(out, 4, end='{"step": 4, "torn')
    good = (out / "metrics.jsonl").read_bytes().splitlines()
    bad = [b"\xff\xfe", b'{"no": 1}', b"[1]", b'{"step": "x"}', b"", good[1][:4], b"[" * 100_000]
    (out / "metrics.jsonl").write_bytes(b"\n".join([*bad[:3], *good, *bad[3:]]))
    history = rundir.begin(out, out / "checkpoints" / "step-00000002", 2, keep=2)
    assert history == [{"step": step} for step in range(3)]  # its own step's evaluation came first
    assert "metrics.jsonl: dropped 8 line(s)" in capsys.readouterr().err
    kept = {p.name: [json.loads(x)["step"] for x in p.open()] for p in out.glob("*.jsonl")}
    assert kept == {"metrics.jsonl": [0, 1], "samples.jsonl": [0, 1], "evals.jsonl": [0, 1, 2]}


def test_the_history_comes_along_into_another_directory(out, tmp_path_factory):
    new = tmp_path_factory.mktemp("new")
    (new / "metrics.jsonl").write_text("")  # what a kill left of the first try
    history = rundir.begin(new, out / "checkpoints" / "step-00000002", 2, keep=2)
    assert [e["step"] for e in history] == [0, 1, 2]
    assert len((new / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_kill_while_the_logs_are_cut_loses_nothing(out, monkeypatch):
    first_two = b"".join((out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:2])
    evaluations = (out / "evals.jsonl").read_bytes()
    for allowed in (0, 1):  # of the renames, before the kill
        replace, renamed = os.replace, []

        def killed(source, target, allowed=allowed, replace=replace, renamed=renamed):
            if len(renamed) == allowed:
                raise KeyboardInterrupt
            renamed.append(target)
            replace(source, target)

        with monkeypatch.context() as m, contextlib.suppress(KeyboardInterrupt):
            m.setattr(os, "replace", killed)
            rundir.begin(out, out / "checkpoints" / "step-00000002", 2, keep=2)
            raise AssertionError("not killed")
        assert (out / "metrics.jsonl").read_bytes().startswith(first_two)
        assert (out / "evals.jsonl").read_bytes() == evaluations
    assert (out / "metrics.jsonl").read_bytes() == first_two


def test_a_changed_file_of_the_method_is_said_on_resume(tmp_path, monkeypatch, capsys):
    rundir.write_settings(tmp_path, {"seed": 3})
    rundir.write_settings(tmp_path, {"seed": 3})
    assert "WARNING" not in capsys.readouterr().err
    digest = rundir.file_digest
    changed = lambda path: digest(path) + "x" * (path.name == "brpo.py")  # noqa: E731
    monkeypatch.setattr(rundir, "file_digest", changed)
    rundir.write_settings(tmp_path, {"seed": 3})
    assert capsys.readouterr().err.startswith("WARNING brpo.py has changed since")
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
