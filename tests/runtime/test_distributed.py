"""Processes among others: signals, standstills, and ends that leave nobody waiting."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

from runtime import distributed
from scripts import ranks
from tests.conftest import ROOT, alone


def test_a_second_sigterm_ends_at_once(monkeypatch):
    now, ended = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(distributed, "time", clock)
    monkeypatch.setattr(distributed.os, "kill", lambda pid, number: ended.append((pid, number)))
    distributed.note_sigterm()
    assert not distributed.asked_to_stop()
    signal.raise_signal(signal.SIGTERM)
    now[0] = 1.0  # torchrun forwards what its whole group received: the same signal
    signal.raise_signal(signal.SIGTERM)
    assert distributed.asked_to_stop() and not ended
    now[0] = 9.0
    signal.raise_signal(signal.SIGTERM)
    assert ended == [(os.getpid(), signal.SIGTERM)]
    distributed.stop()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_one_rank_asked_to_stop_or_wrong_is_all_of_them(run_ranks):
    def run(rank):
        distributed.start()
        distributed.note_sigterm()
        assert not distributed.asked_to_stop()
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        assert distributed.asked_to_stop()
        assert distributed.broadcast(f"from {rank}") == "from 0"
        assert distributed.gather([rank, -rank]) == [0, 0, 1, -1]
        assert not distributed.all_finite(1.0, [{"loss": float("nan") if rank else 0.0}])
        with distributed.exit_on_bad_input(), distributed.together():
            if rank == 1:
                raise ValueError("one line")

    text = run_ranks(run, codes=[2, 2])
    assert text.count("error: one line\n") == 1


def test_an_exception_on_one_rank_ends_all(run_ranks):
    def run(rank):
        distributed.start()
        if rank == 1:
            raise KeyError("on purpose")
        distributed.barrier()

    def main(rank):
        try:
            distributed.main(lambda: run(rank))
        finally:
            print("a normal exit, which may wait for the others")

    start = time.monotonic()
    text = run_ranks(main, codes=[1, 1])
    assert "KeyError: 'on purpose'" in text and "a normal exit" not in text
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "interrupted: train.py goes on with --resume auto"),
        (OSError(errno.ENOSPC, "No space left"), 1, "the disk is full: free some space"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "what read the output is gone"),
    ],
)
def test_what_ends_a_long_run_is_one_line(error, code, line, run_ranks):
    def run(rank):
        with distributed.exit_on_bad_input():  # while loading, or afterwards
            raise error

    text = run_ranks(lambda _: distributed.main(lambda: run(0)), 1, codes=[code])
    assert line in text and text.count("\n") == 1


@pytest.mark.parametrize("name", distributed.LAUNCHER)
def test_half_of_a_launchers_variables_are_refused(name, monkeypatch, capsys):
    for other in distributed.LAUNCHER:
        monkeypatch.delenv(other, raising=False)
    distributed.check_machine()
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit), distributed.exit_on_bad_input():
        distributed.check_machine()
    assert re.match(
        f"error: {name} in the environment, without .*torchrun", capsys.readouterr().err
    )


def test_a_shell_that_cannot_show_greek_and_a_notebooks_backend_do_no_harm(tmp_path):
    code = (
        "from runtime import distributed, plots\n"
        "distributed.main(lambda: (print('λ · é'), plots.pyplot().plot([1])))"
    )
    settings = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    settings["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    done = subprocess.run(
        [sys.executable, "-c", code], env=alone() | settings, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.decode() == "λ · é\n", done.stderr


def test_workers_die_with_their_agent(tmp_path):
    """The agent is a fork that starts ranks as torchrun does; SIGKILL leaves it no time to."""

    def sleep(rank):
        def run():
            (tmp_path / f"{rank}.tmp").write_text(str(os.getpid()))
            (tmp_path / f"{rank}.tmp").rename(tmp_path / f"{rank}.pid")
            time.sleep(100)

        distributed.main(run)

    if not (agent := os.fork()):
        ranks.run_ranks(sleep, 2, tmp_path / "output.txt")
        os._exit(0)
    assert wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 60)
    workers = [int(p.read_text()) for p in tmp_path.glob("*.pid")]
    assert all(map(is_alive, workers))
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    died = wait_until(lambda: not any(map(is_alive, workers)), 10)
    for pid in filter(is_alive, workers):
        os.kill(pid, signal.SIGKILL)
    assert died


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return reached


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_standstill_is_reported_with_its_place(monkeypatch, capfd):
    monkeypatch.setattr(distributed, "STANDSTILL_MINUTES", 0.8 / 60)
    monkeypatch.setattr(distributed.dist, "all_gather_object", lambda *_: time.sleep(1.2))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    try:
        for _ in range(10):  # at work: nothing to report
            distributed.expect_progress()
            time.sleep(0.1)
        assert capfd.readouterr().err == ""
        with pytest.raises(TypeError):  # nothing was gathered
            distributed.any_process(True)
    finally:
        distributed.stop()
    text = capfd.readouterr().err
    assert "Timeout (0:00:00.800000)!" in text and "in any_process\n" in text
    time.sleep(0.9)
    assert capfd.readouterr().err == ""  # the run has ended


@pytest.mark.parametrize("hidden, asked", [(64, [1]), (256, [])])
def test_only_a_tiny_model_is_held_to_one_cpu_thread(tmp_path, monkeypatch, hidden, asked):
    """Otherwise torch's choice stands."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": 99}
    Qwen2Config(**sizes, num_hidden_layers=2).save_pretrained(tmp_path)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    distributed.limit_threads(str(tmp_path))
    assert threads == asked
