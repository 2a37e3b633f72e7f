"""The supervision in verifier.py: nothing hangs, a failure costs one grading and is counted, no
process outlives its parent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
from tasks import verifier as rules  # noqa: E402
from tasks.verifier import Verifier, failure_share, is_correct  # noqa: E402

STUCK = (
    r"\boxed{\int \frac{x^{50}+\sin^{20}(x)\cos^{31}(x)}{(x^7+x+1)^{9}} dx}",
    r"\int_0^1 x dx",
)  # minutes
GOOD, BAD = (r"\boxed{1+x}", "x+1"), (r"\boxed{2+x}", "x+1")


def fresh(k):
    """A pair that needs math-verify and that no cache has seen."""
    return rf"\boxed{{{k}+x}}", f"x+{k}"


def children(pid):
    """All living descendants of a process, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # it ended while we looked
                continue
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def alive(pids):
    def living(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    return [pid for pid in pids if living(pid)]


def gone(pids, seconds=8.0):
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pids)


def workers(verifier):
    return [process.pid for process in verifier._processes if process.poll() is None]


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def run(script, *args, cwd=ROOT, timeout=60, **kwargs):
    return subprocess.run(
        [sys.executable, str(script), *args],
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        **kwargs,
    )


@pytest.fixture
def verifier():
    with Verifier(num_workers=1, timeout=1.0) as verifier:
        yield verifier


# ------------------------------------------------------------------------- one failure, one counter


def test_plain_answers_start_no_process(verifier):
    assert verifier.score(
        [
            (r"\boxed{4}", 4),
            (r"\boxed{5}", 4),
            ("4", 4),
            (r"\boxed{1/2}", 0.5),
            (r"\boxed{\text{odd}}", "odd"),
        ]
    ) == [1, 0, 0, 1, 1]
    assert not verifier._processes and verifier.stats["graded"] == verifier.stats["fast"] == 5
    assert verifier.score([GOOD, BAD]) == [1, 0] and len(workers(verifier)) == 1
    assert verifier.stats["graded"] == 7 and verifier.stats["fast"] == 5


def test_submit_overlaps_and_equal_pairs_are_graded_once(verifier):
    start = time.perf_counter()
    futures = [verifier.submit(*STUCK) for _ in range(20)]
    assert time.perf_counter() - start < 0.5, "submit must not wait for the verdict"
    assert [future.result() for future in futures] == [0.0] * 20
    assert time.perf_counter() - start < 6, "twenty equal pairs, one timeout"
    assert verifier.stats["timeouts"] == 20, "each of them is a failed grading"


def test_a_stuck_worker_is_replaced_and_the_next_pair_is_graded_at_once(verifier):
    verifier.score([GOOD])
    before = workers(verifier)
    assert verifier.submit(*STUCK).result() == 0.0
    start = time.perf_counter()
    assert verifier.score([fresh(3)]) == [1.0]
    assert time.perf_counter() - start < 6.0, "a new process needs about 0.5 s"
    assert verifier.stats["timeouts"] == 1 and len(before) == 1 and before != workers(verifier)


def test_the_other_worker_goes_on():
    with Verifier(num_workers=2, timeout=60.0) as verifier:
        stuck = verifier.submit(*STUCK)
        assert verifier.score([fresh(k) for k in range(20)]) == [1.0] * 20
        assert not stuck.done()
    assert stuck.result(timeout=5) == 0.0 and verifier.stats["deaths"] == 1


def test_a_killed_worker_costs_one_grading(verifier):
    verifier.timeout = 30  # used when the processes start: the death must be noticed, not timed out
    verifier.score([GOOD])
    future = verifier.submit(*STUCK)
    time.sleep(0.5)
    (worker,) = workers(verifier)
    os.kill(worker, signal.SIGKILL)
    assert (
        future.result(timeout=5) == 0.0
        and verifier.stats["deaths"] == 1
        and verifier.stats["timeouts"] == 0
    )
    assert verifier.score([fresh(5)]) == [1.0]


def test_a_killed_idle_worker_costs_nothing(verifier):
    verifier.score([GOOD])
    os.kill(workers(verifier)[0], signal.SIGKILL)
    time.sleep(0.5)
    assert verifier.score([fresh(5), BAD]) == [1.0, 0.0] and failure_share(verifier.stats) == 0


def test_killed_workers_cost_the_pairs_they_had_and_no_other():
    with Verifier(num_workers=2, timeout=30) as verifier:
        also_stuck = STUCK[0].replace("50", "51"), STUCK[1]
        stuck = [verifier.submit(*STUCK), verifier.submit(*also_stuck)]
        queued = [verifier.submit(*fresh(k)) for k in range(4)]
        wait_for(lambda: len(workers(verifier)) == 2)
        time.sleep(2)  # both import math-verify, then work on what never ends
        for pid in workers(verifier):
            os.kill(pid, signal.SIGKILL)
        assert [f.result(timeout=20) for f in [*stuck, *queued]] == [0, 0, 1, 1, 1, 1]
        assert verifier.stats["timeouts"] == 0 and verifier.stats["deaths"] == 2


def test_a_grader_that_cannot_start_fails_loudly_and_without_hanging(monkeypatch, verifier):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert verifier.score([GOOD, BAD, (r"\boxed{4}", 4)]) == [0, 0, 1]
    assert (
        verifier.stats["deaths"] == 2 and failure_share(verifier.stats) > rules.LOUD_FAILURE_SHARE
    )


def test_counters(monkeypatch, verifier):
    verifier.timeout = 30  # on a busy machine the unparsable ground truth must not become a timeout
    assert verifier.score([(r"\boxed{4}", None), (r"\boxed{4}", ["", " "])]) == [0, 0]
    assert verifier.score([(r"\boxed{4x}", r"\frac{}{x}{{")]) == [0]
    monkeypatch.setattr(rules, "_equal", lambda *_: 1 / 0)
    assert verifier.score([(r"\boxed{7}", "8")]) == [0]
    assert {name: verifier.stats[name] for name in rules.FAILURES} == {
        "timeouts": 0,
        "deaths": 0,
        "exceptions": 1,
        "unparsable_ground_truths": 1,
        "invalid_ground_truths": 2,
    }
    assert verifier.stats["graded"] == 4 and failure_share(verifier.stats) == 1.0


def test_take_stats_returns_one_batch(verifier):
    verifier.score([(r"\boxed{4}", 4), (r"\boxed{4}", None)])
    first = verifier.take_stats()
    verifier.score([(r"\boxed{4}", 4)] * 3)
    second = verifier.take_stats()
    assert (first["graded"], first["invalid_ground_truths"], failure_share(first)) == (2, 1, 0.5)
    assert (second["graded"], second["invalid_ground_truths"], failure_share(second)) == (3, 0, 0.0)
    assert failure_share(verifier.take_stats()) == 0.0 and verifier.stats["graded"] == 5


def test_a_worker_has_a_memory_limit(tmp_path):
    script = tmp_path / "limit.py"
    script.write_text(
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
    result = run(script)
    assert (result.stdout, result.stderr) == ("limited", "")


def test_closed_and_pending(verifier):
    verifier.score([GOOD])
    processes, future = workers(verifier), verifier.submit(*STUCK)
    start = time.perf_counter()
    verifier.close()
    assert future.result(timeout=5) == 0.0 and time.perf_counter() - start < 5 and gone(processes)
    assert verifier.submit(r"\boxed{4}", 4).result() == 1.0, "the rules need no process"
    assert verifier.submit(*fresh(9)).result(timeout=5) == 0.0 and verifier.stats["deaths"] == 2


# ------------------------------------------------------------------------------------------
# hostile text


def test_hostile_strings():
    """Every call within 8 s, none raises, all processes together under 2 GiB, and the next ordinary
    pair is right at once."""
    path = SHARED / "verifier" / "hostile.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = [json.loads(line) for line in path.open()]
    with Verifier(num_workers=2) as verifier:
        verifier.score([GOOD])
        for number, row in enumerate(rows):
            start = time.perf_counter()
            score = verifier.submit(row["candidate"], row["gold"]).result()
            assert time.perf_counter() - start < 8, row["id"]
            assert row["expected"] in (None, score), row["id"]
            start = time.perf_counter()
            assert (
                verifier.score([fresh(100 + number)]) == [1.0] and time.perf_counter() - start < 4
            ), row["id"]
        status = [Path(f"/proc/{pid}/status").read_text() for pid in workers(verifier)]
        peak = sum(int(text.split("VmHWM:")[1].split()[0]) for text in status if "VmHWM:" in text)
        assert 0 < peak < 2 << 20, f"{peak} KiB"
    assert len(rows) > 40 and verifier.stats["exceptions"] == 0


def test_threads_share_is_correct():
    verdicts, hostile = {}, []

    def work(thread):
        for k in range(25):
            verdicts[thread, k] = (
                is_correct(*fresh(k % 7)),
                is_correct(rf"\boxed{{{k}+x}}", f"x+{k}+1"),
                is_correct(rf"\boxed{{{k}}}", k),
            )
        hostile.append(is_correct(r"\boxed{9^{9^{9^{9}}}}", "204"))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    [thread.start() for thread in threads], [thread.join(timeout=60) for thread in threads]
    assert (
        len(verdicts) == 200
        and set(verdicts.values()) == {(True, False, True)}
        and hostile == [False] * 8
    )


def test_counts_are_exact_under_threads(verifier):
    threads = [
        threading.Thread(
            target=lambda: verifier.score([(rf"\boxed{{{k}}}", k % 2) for k in range(500)])
        )
        for _ in range(8)
    ]
    [thread.start() for thread in threads], [thread.join(timeout=60) for thread in threads]
    assert verifier.stats["graded"] == verifier.stats["fast"] == 4000


# ------------------------------------------------------------ parents of every kind, and their ends


def script_with(tmp_path, body, head=""):
    script = tmp_path / "main.py"
    script.write_text(
        f"import os, signal, sys, time\n{head}\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        f"from tests.tasks.test_verifier import *\n" + textwrap.dedent(body)
    )
    return script


# The handler first: a shell starts background jobs, and so these tests, with SIGINT ignored.
CTRL_C = (
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"
)


@pytest.mark.parametrize(
    "ending, code, entered",
    [
        ("pass", 0, True),
        ("pass", 0, False),
        ("raise ValueError", 1, True),
        ("raise ValueError", 1, False),
        ("os._exit(4)", 4, False),
        (CTRL_C, -signal.SIGINT, True),
        (CTRL_C, -signal.SIGINT, False),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, True),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, False),
    ],
)
def test_no_process_outlives_the_parent(tmp_path, ending, code, entered):
    """With a worker stuck in C at that moment; with and without the context manager."""
    script = script_with(
        tmp_path,
        f"""
        verifier = Verifier(num_workers=2, timeout=60.0)
        verifier.score([GOOD])
        verifier.submit(*STUCK), verifier.submit(*fresh(0))
        time.sleep(0.3)
        print(*children(os.getpid()), flush=True)
        if {entered}:
            with verifier:
                {ending}
        else:
            {ending}
    """,
    )
    start = time.perf_counter()
    result = run(script)
    processes = [int(pid) for pid in result.stdout.split()]
    assert len(processes) == 2, (result.stdout, result.stderr)
    assert result.returncode == code and time.perf_counter() - start < 25
    assert gone(processes)
    assert "leaked" not in result.stderr


def test_the_parents_main_module_is_not_imported_again(tmp_path):
    """train.py imports torch at its top; a worker that did the same would need seconds and break
    its memory limit."""
    script = script_with(
        tmp_path,
        head="open('imported', 'a').write('x')\nimport torch\ntorch.ones(2).sum()",
        body="""
        with Verifier(num_workers=1, timeout=1.0) as verifier:
            assert verifier.score([GOOD, BAD]) == [1, 0]
            verifier.score([STUCK])
            start = time.perf_counter()
            assert verifier.score([fresh(3)]) == [1.0]
            print(time.perf_counter() - start)
            maps = [open(f"/proc/{pid}/maps").read() for pid in children(os.getpid())]
            print(sum("torch" in text for text in maps), len(maps))
    """,
    )
    result = run(script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    restart, with_torch, count = map(float, result.stdout.split())
    assert (tmp_path / "imported").read_text() == "x" and with_torch == 0 and count == 1
    assert restart < 6, "a restart takes about 0.5 s on a free core; machines are shared"


def test_two_ranks_under_torchrun(tmp_path):
    script = script_with(
        tmp_path,
        head="import torch\nimport torch.distributed as dist",
        body="""
        dist.init_process_group("gloo")
        with Verifier(num_workers=1, timeout=1.0) as verifier:
            scores = torch.tensor(verifier.score([GOOD, BAD, STUCK, fresh(dist.get_rank())]))
            dist.all_reduce(scores)
            # a file each: two ranks that print into one pipe may tear each other's lines
            with open(f"rank{dist.get_rank()}", "w") as file:
                print(scores.tolist(), verifier.stats["timeouts"], file=file)
        dist.destroy_process_group()
    """,
    )
    result = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        cwd=tmp_path,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [
        "[2.0, 0.0, 0.0, 2.0] 1\n"
    ] * 2


def test_a_forked_child_has_its_own_grader(verifier):
    """As in a DataLoader worker: the child must not write into its parent's pipe or wait for its
    parent's threads."""
    verifier.score([GOOD])
    is_correct(*GOOD)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        right = verifier.score([fresh(6), BAD]) == [1.0, 0.0] and is_correct(*fresh(7))
        verifier.close()
        rules._shared.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert verifier.score([fresh(8)]) == [1.0] and is_correct(*fresh(8))


def test_the_one_file_works_alone(tmp_path):
    """Copied into an empty folder, without torch being imported."""
    shutil.copy(ROOT / "tasks" / "verifier.py", tmp_path)
    (tmp_path / "use.py").write_text(
        textwrap.dedent(r"""
        import sys
        import verifier as rules
        assert rules.is_correct(r"\boxed{1+x}", "x+1")
        assert not rules.is_correct(r"\boxed{2+x}", "x+1")
        with rules.Verifier() as verifier:
            print(verifier.score([(r"\boxed{\frac{1}{2}}", 0.5), (r"\boxed{(x+1)^2}", "x^2+2x+1"),
            ("4", 4)]), "torch" in sys.modules)
    """)
    )
    result = run(
        "use.py",
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert result.stdout.strip() == "[1.0, 1.0, 0.0] False", result.stderr
