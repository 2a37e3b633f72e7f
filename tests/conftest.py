"""Shared pieces: a random tiny model, and a fake engine whose every token is known beforehand."""

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime import distributed
from scripts import ranks
from scripts.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
# Not importorskip: importing vLLM takes seconds, at every collection of the tests.
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory) -> Path:
    """The miniature's architecture and tokenizer with random weights: enough wherever learning is
    not the point."""
    from tasks import arithmetic

    path = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    model = arithmetic.make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # a near-uniform start would hide mistakes
    model.save_pretrained(path)
    arithmetic.make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def trained_model_path(tmp_path_factory) -> Path:
    """A base after a few seconds of warm start: poor at arithmetic, but it answers in the right
    form, so rewards vary."""
    from tasks import arithmetic

    path = tmp_path_factory.mktemp("trained") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(arithmetic.WARM_START, "steps", 100)
        patch.setitem(arithmetic.WARM_START, "batch", 32)
        arithmetic._write_base(path, seed=0)
    return path


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory):
    """Run function(rank) on forked ranks; returns what they printed, and checks their exit codes.

    Much faster than run_script: a rank need not import torch. The group of processes that a test
    has opened here is closed, since it does not survive the fork.
    """

    def run(function, world: int = 2, codes: list[int] | None = None, timeout: float = 120.0):
        distributed.stop()
        output = tmp_path_factory.mktemp("ranks") / "output.txt"
        found = ranks.run_ranks(function, world, output, timeout)
        text = output.read_text()
        assert found == (codes or [0] * world), f"exit codes {found}:\n{text[-4000:]}"
        return text

    return run


def run_script(
    script: str, *args, processes: int = 0, expect: int = 0, cwd=None, timeout: int = 240
) -> str:
    """Run one of the project's scripts as a user would, under torchrun when `processes` is given;
    returns its output."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        start += [f"--master_port={free_port()}"]
    done = subprocess.run(
        [*start, str(ROOT / script), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        timeout=timeout,
        env=alone(),
    )
    assert done.returncode == expect or (expect and done.returncode), (
        f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout + done.stderr


@contextmanager
def world_of_one():
    """Joined to a group of one process; its variables are gone afterwards, so that they reach no
    other test's processes."""
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (values | {"MASTER_PORT": free_port()}).items():
            patch.setenv(name, str(value))
        distributed.start()
        yield
        distributed.stop()


def alone() -> dict:
    """The environment without what a run inside this process has left in it."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in left}


def finish(engine, requests) -> dict[str, tuple[list[int], list[float]]]:
    """{request id: (tokens, log-probs)}; nothing may follow an output that says it is the last."""
    sampled, finished = {r.id: ([], []) for r in requests}, set()
    for r in requests:
        engine.add(r)
    while engine.has_work():
        for out in engine.step():
            assert out.id not in finished and len(out.tokens) == len(out.logp)
            sampled[out.id][0].extend(out.tokens)
            sampled[out.id][1].extend(out.logp)
            finished |= {out.id} if out.finished else set()
    assert finished == set(sampled) and engine.step() == []
    return sampled


class TwoPhases:
    """An engine that reports no thinking trace before all of them have ended, so that all summaries
    are asked for then.

    What sample_rollouts is compared with: the same requests and seeds, at another time.
    """

    def __init__(self, engine):
        self.engine, self.traces, self.running = engine, {}, set()

    def add(self, request):
        if request.stream:
            self.running.add(request.id)
        self.engine.add(request)

    def has_work(self):
        return self.engine.has_work()

    def step(self):
        ready = []
        for out in self.engine.step():
            if out.id not in self.running:
                ready.append(out)
                continue
            trace = self.traces.setdefault(out.id, replace(out, tokens=[], logp=[]))
            trace.tokens += out.tokens
            trace.logp += out.logp
            if out.finished:
                trace.finished = True
                self.running.discard(out.id)
        if not self.running:
            ready += self.traces.values()
            self.traces = {}
        return ready
