"""Your own reward in the math verifier's place: --reward module:function

    def function(summary: str, ground_truth, question: str) -> float:       # in [0, 1]

`summary` is all that the policy wrote behind the answer header (the verifier reads its first
paragraph only), without end-of-text; a summary that breaks the format rule, one </think>, scores 0
unasked. `ground_truth` is the row's, as JSON has it, or None. The function may return a future.

It runs where grading runs, while the engine samples on: in processes of its own, started with exec
(no copy of a process with CUDA and threads) and without this project's imports. A call that takes
longer than `timeout` is killed with its process. That, a death, an exception and a value outside
[0, 1] score 0 and are counted as the verifier counts its failures; the first is printed.
"""

import importlib
import inspect
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

START_TIMEOUT = 300.0           # seconds for importing the module, which may load a judge's weights


class RewardFunction:
    """`submit` summaries as they arrive; one thread and one process per worker grade them."""

    def __init__(self, name: str, num_workers: int = 2, timeout: float = 10.0):
        from verifier import FAILURES  # not in the workers, which run this file as a script

        self.name, self.timeout = name, timeout
        self.stats = dict.fromkeys(("graded", "fast", *FAILURES), 0)
        self._taken, self._complained = dict(self.stats), False
        self._tasks, self._lock, self._processes = queue.SimpleQueue(), threading.Lock(), []
        for _ in range(num_workers):
            threading.Thread(target=self._work, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def submit(self, summary: str, ground_truth, question: str) -> Future:
        """A future of a score in [0, 1] that never raises."""
        future = Future()
        self._tasks.put((future, json.dumps([summary, ground_truth, question], default=str)))
        return future

    def take_stats(self) -> dict[str, int]:
        """The counters since the last call: one batch, for the training log."""
        with self._lock:
            fresh = {name: count - self._taken[name] for name, count in self.stats.items()}
            self._taken = dict(self.stats)
        return fresh

    def close(self):
        """Stop the processes; to be called when no score is awaited."""
        with self._lock:
            for process in self._processes:
                process.kill()

    def _work(self):
        process = None
        while True:
            future, task = self._tasks.get()
            if process is None:
                process, _ = self._start()
            reply, late = ask(process, task, self.timeout)
            if not reply:
                process.kill()
                process = None
            self._finish(future, reply, late)

    def _start(self):
        process, reply = start(self.name)
        with self._lock:
            self._processes = [p for p in self._processes if p.poll() is None] + [process]
        return process, reply

    def _finish(self, future: Future, reply: dict, late: bool):
        error = reply.get("error") or (f"no answer within {self.timeout} s" if late else
                                       "its process died" if not reply else None)
        with self._lock:
            self.stats["graded"] += 1
            if error:
                self.stats["exceptions" if reply else "timeouts" if late else "deaths"] += 1
            first = bool(error) and not self._complained
            self._complained |= first
        if first:
            print(f"WARNING --reward {self.name}: {error}. Such summaries score 0 and are counted; "
                  "further ones are not printed", file=sys.stderr, flush=True)
        future.set_result(reply.get("score", 0.0))


def start(name: str):
    """(a process that has imported the function, its first reply)"""
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), name], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               start_new_session=True)      # Ctrl-C is for the parent
    reply, _ = ask(process, "", START_TIMEOUT)
    return process, reply


def ask(process, line: str, timeout: float) -> tuple[dict, bool]:
    """(reply to a line, or {} if the process is gone; was it killed for being late?)"""
    late = []
    timer = threading.Timer(timeout, lambda: (late.append(True), process.kill()))
    timer.start()
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
    except OSError:         # its end of the pipe is closed
        reply = ""
    timer.cancel()
    timer.join()            # a timer that has already fired kills this process, not the next one
    return json.loads(reply) if reply and not late else {}, bool(late)


def make_verifier(c):
    """What grades, by the flag --reward: the math verifier, or a function."""
    from verifier import Verifier

    if c.reward == "math":
        return Verifier(c.verifier_workers)
    return RewardFunction(c.reward, c.verifier_workers, c.reward_timeout)


def reward_source(name: str) -> str:
    """The name and, where it is a file in the current directory, the text of the function's module:
    scores that are kept are of this text."""
    path = Path(name.partition(":")[0].replace(".", "/") + ".py")
    return name + (path.read_text() if path.is_file() else "")


def require_reward(name: str):
    """ValueError where the function cannot be found, imported or called with three arguments."""
    if name == "math":
        return
    process, reply = start(name)
    process.kill()
    if "error" in reply or not reply:
        raise ValueError(f"--reward {name}: {reply.get('error', 'importing it ends the process')}. "
                         "It wants module:function, the module in the current directory or "
                         "installed, and function(summary, ground_truth, question)")


def serve(name: str):
    """A worker: a line comes, a line goes, until the parent is gone."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)                                           # what the function prints is no reply
    if sys.platform == "linux":
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: go with the parent
    sys.path.insert(0, os.getcwd())
    function = None
    for line in sys.stdin:
        try:
            if function is None:
                module, _, attribute = name.partition(":")
                function = getattr(importlib.import_module(module), attribute)
                inspect.signature(function).bind("", None, "")
                reply = {"score": 0.0}
            else:
                score = function(*json.loads(line))
                score = float(score.result() if hasattr(score, "result") else score)
                if not 0 <= score <= 1:
                    raise ValueError(f"it returned {score}, which is not in [0, 1]")
                reply = {"score": score}
        except Exception as e:
            reply = {"error": f"{type(e).__name__}: {e}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
