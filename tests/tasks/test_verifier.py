"""The processes behind verifier.py: nothing hangs, a failure costs one grading and is counted, and
no process outlives its parent."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tasks import verifier as rules
from tasks.verifier import FAILURES, Verifier, is_correct
from tests.conftest import ROOT, SHARED

# Minutes, in C: a power of a power of a power of a number.
STUCK = r"\boxed{((((x+2)^{99}+1)^{99}+1)^{99}+1)^{99}}", "x"
ALSO_STUCK = STUCK[0].replace("x+2", "x+3"), STUCK[1]
GOOD, BAD = (r"\boxed{1+x}", "x+1"), (r"\boxed{2+x}", "x+1")


def fresh(k):
    """A pair that needs math-verify and that no cache has seen."""
    return rf"\boxed{{{k}+x}}", f"x+{k}"


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def all_gone(pids):
    return wait_for(lambda: not any(map(is_alive, pids)))


def workers(grader):
    return [*grader._pool._pool_manager.worker_manager.workers] if grader._pool else []


def failures(stats):
    return sum(stats[name] for name in FAILURES)


def run(script, cwd):
    """Run a script that finds the project only if it asks for it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=cwd, env=env, timeout=60, capture_output=True, text=True)


@pytest.fixture
def verifier():
    with Verifier(num_workers=1, timeout=1.0) as verifier:
        yield verifier


# ------------------------------------------------------------------------- one failure, one counter


def test_plain_answers_start_no_process(verifier):
    plain = [(r"\boxed{4}", 4), (r"\boxed{5}", 4), ("4", 4), (r"\boxed{1/2}", 0.5)]
    assert verifier.score([*plain, (r"\boxed{\text{odd}}", "odd")]) == [1, 0, 0, 1, 1]
    assert not workers(verifier) and verifier.stats["graded"] == 5
    assert verifier.score([GOOD, BAD]) == [1, 0] and len(workers(verifier)) == 1
    assert verifier.stats["graded"] == 7 and not failures(verifier.stats)


def test_equal_pairs_are_graded_once_and_a_stuck_worker_is_replaced(verifier):
    verifier.score([GOOD])
    before, start = workers(verifier), time.perf_counter()
    futures = [verifier.submit(*STUCK) for _ in range(20)]
    assert time.perf_counter() - start < 0.5, "submit must not wait for the verdict"
    assert [future.result() for future in futures] == [0.0] * 20
    assert time.perf_counter() - start < 6, "twenty equal pairs, one timeout"
    assert verifier.stats["timeouts"] == 20, "each of them is a failed grading"
    start = time.perf_counter()
    assert verifier.score([fresh(3)]) == [1.0]
    assert time.perf_counter() - start < 6.0, "a new process needs about 0.5 s"
    assert len(before) == 1 and before != workers(verifier)


def test_the_other_worker_goes_on_and_closing_ends_what_is_pending():
    verifier = Verifier(num_workers=2, timeout=60.0)
    stuck = verifier.submit(*STUCK)
    assert verifier.score([fresh(k) for k in range(20)]) == [1.0] * 20
    assert not stuck.done()
    processes, start = workers(verifier), time.perf_counter()
    verifier.close()
    assert stuck.result(timeout=5) == 0.0 and verifier.stats["deaths"] == 1
    assert time.perf_counter() - start < 5 and len(processes) == 2 and all_gone(processes)
    assert verifier.submit(r"\boxed{4}", 4).result() == 1.0, "the rules need no process"
    assert verifier.submit(*fresh(20)).result(timeout=5) == 0.0 and verifier.stats["deaths"] == 2


@pytest.mark.slow
def test_killed_workers_cost_the_pairs_they_had_and_no_other():
    """If one held the pool's lock, the others wait a minute for it, and then get a new pool."""
    with Verifier(num_workers=2, timeout=30) as verifier:  # deaths must be noticed, not timed out
        stuck = [verifier.submit(*pair) for pair in (STUCK, ALSO_STUCK)]
        queued = [verifier.submit(*fresh(k)) for k in range(4)]
        assert wait_for(lambda: len(workers(verifier)) == 2)
        time.sleep(3)  # both import math-verify, then work on what never ends
        for pid in workers(verifier):
            os.kill(pid, signal.SIGKILL)
        assert [f.result(timeout=100) for f in [*stuck, *queued]] == [0, 0, 1, 1, 1, 1]
        for pid in (idle := workers(verifier)):
            os.kill(pid, signal.SIGKILL)
        assert len(idle) == 2 and all_gone(idle)
        verifier.score([fresh(5)])  # if it held the pool's lock, this pair is lost as well
        assert verifier.score([fresh(6), BAD]) == [1.0, 0.0]
        assert failures(verifier.stats) in (2, 3)


def test_every_failure_has_its_counter_and_every_batch_its_own(verifier):
    assert verifier.score([(r"\boxed{4}", None), (r"\boxed{4}", ["", " "])]) == [0, 0]
    first = verifier.take_stats()
    assert {k: v for k, v in first.items() if v} == {"graded": 2, "invalid_ground_truths": 2}
    assert rules._grade((None,), "4") == "exceptions", "a fault in the rules is a counted 0"
    verifier.score([(r"\boxed{4}", 4)] * 3 + [(r"\boxed{5}", [])])
    second = verifier.take_stats()
    assert {k: v for k, v in second.items() if v} == {"graded": 4, "invalid_ground_truths": 1}
    assert not any(verifier.take_stats().values()) and verifier.stats["graded"] == 6


def test_a_worker_has_a_memory_limit(tmp_path):
    (tmp_path / "limit.py").write_text(
        textwrap.dedent(f"""
        import mmap, os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from tasks import verifier as rules
        out = os.dup(1)
        mmap.mmap(-1, 3 << 30).close()      # this machine would give it
        rules._limit_worker()
        try:
            bytearray(3 << 30)
        except MemoryError:
            os.write(out, b"limited")
        os.write(2, b"and silent")
    """)
    )
    result = run("limit.py", tmp_path)
    assert (result.stdout, result.stderr) == ("limited", "")


# ------------------------------------------------------------------------------------ hostile text


@pytest.mark.parametrize("count", [12, pytest.param(None, marks=pytest.mark.slow)])
def test_hostile_strings(count):
    """Every call within 8 s, none raises, all processes together under 2 GiB, and the next ordinary
    pair is right at once."""
    path = SHARED / "verifier" / "hostile.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = [json.loads(line) for line in path.open()]
    assert len(rows) > 40
    random.Random(0).shuffle(rows)
    with Verifier(num_workers=2) as verifier:
        verifier.score([GOOD])
        for number, row in enumerate(rows[:count]):
            start = time.perf_counter()
            score = verifier.submit(row["candidate"], row["gold"]).result()
            assert time.perf_counter() - start < 8, row["id"]
            assert row["expected"] in (None, score), row["id"]
            start = time.perf_counter()
            assert verifier.score([fresh(100 + number)]) == [1.0], row["id"]
            assert time.perf_counter() - start < 4, row["id"]
        status = [Path(f"/proc/{pid}/status").read_text() for pid in workers(verifier)]
        peak = sum(int(text.split("VmHWM:")[1].split()[0]) for text in status if "VmHWM:" in text)
        assert 0 < peak < 2 << 20, f"{peak} KiB"
        assert verifier.stats["exceptions"] == 0


def test_threads_share_a_grader(verifier):
    """Eight threads grade through is_correct, whose grader is one for all, and through `verifier`,
    whose counts stay exact."""
    verdicts, hostile = {}, []

    def work(thread):
        for k in range(25):
            verdicts[thread, k] = (
                is_correct(*fresh(k % 7)),
                is_correct(rf"\boxed{{{k}+x}}", f"x+{k}+1"),
                is_correct(rf"\boxed{{{k}}}", k),
            )
        hostile.append(is_correct(r"\boxed{9^{9^{9^{9}}}}", "204"))
        verifier.score([(rf"\boxed{{{k}}}", k % 2) for k in range(500)])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    [thread.start() for thread in threads], [thread.join(timeout=60) for thread in threads]
    assert len(verdicts) == 200 and set(verdicts.values()) == {(True, False, True)}
    assert hostile == [False] * 8
    assert verifier.stats["graded"] == 4000


# ------------------------------------------------------------ parents of every kind, and their ends

# The handler first: a shell starts background jobs, and so these tests, with SIGINT ignored.
CTRL_C = (
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"
)
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# What happens, the exit code, and whether it happens within `with verifier`.
QUICK_ENDS = [("raise ValueError", 1, True), ("pass", 0, False), (KILL, -signal.SIGKILL, True)]
OTHER_ENDS = [
    ("pass", 0, True),
    ("raise ValueError", 1, False),
    ("os._exit(4)", 4, False),
    (CTRL_C, -signal.SIGINT, False),
    ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, False),
]


@pytest.mark.parametrize(
    "ending, code, entered",
    [
        *QUICK_ENDS,
        (CTRL_C, -signal.SIGINT, True),
        *(pytest.param(*end, marks=pytest.mark.slow) for end in OTHER_ENDS),
    ],
)
def test_no_process_outlives_the_parent(tmp_path, ending, code, entered):
    """With one of the verifier's workers stuck in C at that moment, the other idle, and a reward
    function that never returns."""
    (tmp_path / "endless.py").write_text(
        "def f(summary, ground_truth, question):\n    while True: pass"
    )
    (tmp_path / "main.py").write_text(
        textwrap.dedent(f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from tasks.reward_function import RewardFunction
        from tasks.verifier import Verifier
        verifier, reward = Verifier(2, timeout=60.0), RewardFunction("endless:f", 1, 60.0)
        reward.submit("", None, "")
        verifier.score([{GOOD!r}])
        verifier.submit(*{STUCK!r}), verifier.submit(*{fresh(0)!r})
        time.sleep(0.3)
        pools = [grader._pool._pool_manager.worker_manager for grader in (verifier, reward)]
        print(*[pid for pool in pools for pid in pool.workers], flush=True)
        if {entered}:
            with verifier, reward:
                {ending}
        else:
            {ending}
    """)
    )
    start = time.perf_counter()
    result = run("main.py", tmp_path)
    processes = [int(pid) for pid in result.stdout.split()]
    assert len(processes) == 3, (result.stdout, result.stderr)
    assert result.returncode == code and time.perf_counter() - start < 25
    assert all_gone(processes)
    if "kill" not in ending and "_exit" not in ending:  # after those, loky's tracker says so
        assert "leaked" not in result.stderr


def test_forked_processes_have_graders_of_their_own(verifier):
    """As ranks or DataLoader workers: a child must not write into its parent's pipes or wait for
    its parent's threads. Two children and the parent grade at the same time."""
    verifier.timeout = 3.0  # three processes on what may be one core
    verifier.score([GOOD])
    is_correct(*GOOD)
    children = [os.fork()]
    if children[0]:
        children.append(os.fork())
    if children[-1] == 0:
        right = False
        try:
            signal.alarm(60)
            scores = verifier.score([GOOD, BAD, STUCK, fresh(len(children))])
            right = scores == [1, 0, 0, 1] and verifier.stats["timeouts"] == 1
            right = right and is_correct(*fresh(7))
            verifier.close()
            rules._shared().close()
        finally:
            os._exit(0 if right else 1)
    assert verifier.score([fresh(8)]) == [1.0] and is_correct(*fresh(8))
    ends = [os.waitpid(child, 0)[1] for child in children]
    assert [os.waitstatus_to_exitcode(end) for end in ends] == [0, 0]
    assert verifier.stats["timeouts"] == 0


def test_the_one_file_works_alone_and_never_imports_the_main_module_again(tmp_path):
    """In an empty folder. train.py imports torch at its top: a worker that did the same would need
    seconds and break its memory limit."""
    shutil.copy(ROOT / "tasks" / "verifier.py", tmp_path)
    (tmp_path / "use.py").write_text(
        textwrap.dedent(r"""
        import sys
        import verifier as rules
        open("imported", "a").write("x")
        assert rules.is_correct(r"\boxed{1+x}", "x+1")
        assert not rules.is_correct(r"\boxed{2+x}", "x+1")
        with rules.Verifier() as verifier:
            print(verifier.score([(r"\boxed{\frac{1}{2}}", 0.5), (r"\boxed{(x+1)^2}", "x^2+2x+1"),
            ("4", 4)]), "torch" in sys.modules)
            pid = [*verifier._pool._pool_manager.worker_manager.workers][0]
            maps = open(f"/proc/{pid}/maps").read()
            print("python" in maps, "torch" in maps)
    """)
    )
    result = run("use.py", tmp_path)
    assert result.stdout.split("\n")[:2] == ["[1.0, 1.0, 0.0] False", "True False"], result.stderr
    assert (tmp_path / "imported").read_text() == "x"
