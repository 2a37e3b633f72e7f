"""Pairs graded per second, and how often right: our verifier beside plain math-verify with its own 5 s alarms.

    python benchmarks/bench_verifier.py                  # 2 workers, 1000 real pairs, one hostile string in ten
    python benchmarks/bench_verifier.py --seconds 60     # more time for plain math-verify

The ordinary pairs are a dataset gold with its own text, a rewrite that keeps the meaning, or another gold (wrong). The
hostile ones are ../shared/verifier/hostile.jsonl, in turn, each made distinct so that our cache does not answer it. Plain math-verify
runs in this process, as a trainer that calls it directly would, on the same pairs in the same order until its time is up.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
from rewards import Verifier, _golds, is_valid_gold, plain_number  # noqa: E402


def ordinary_pairs(generator, count):
    """(summary, ground_truth, expected). Half of the golds are no plain numbers, twice their share in the data."""
    rows = [row for path in sorted((SHARED / "data").glob("*/*.json")) for row in json.loads(path.read_text())]
    golds = [row["answer"] if "answer" in row else row["final_answer"] for row in rows]
    golds = [gold for gold in golds if is_valid_gold(gold)]
    hard = [gold for gold in golds if not plain_number(_golds(gold)[0])]
    pairs = []
    for number in range(count):
        pool = hard if number % 2 else golds
        gold, other = generator.choice(pool), generator.choice(pool)
        text = _golds(gold)[0]
        if number % 4 < 2:
            pairs.append((text, gold, 1))
        elif number % 8 < 4 and not any(mark in text for mark in ("=", ",", "<", ">", r"\le", r"\ge", r"\in", r"\text", r"\begin", "_")):
            pairs.append((f"x = {text}" if plain_number(text) or len(text) == 1 else f"({text}) + 0", gold, 1))
        else:
            pairs.append((_golds(other)[0], gold, int(_golds(other)[0] == text)))
    return [(f"**Final Answer**\n\\boxed{{{answer}}}", gold, expected) for answer, gold, expected in pairs]


def with_hostile(pairs, share, generator):
    rows = [json.loads(line) for line in (SHARED / "verifier" / "hostile.jsonl").open()]
    generator.shuffle(rows)
    mixed, used = [], 0
    for number, pair in enumerate(pairs):
        if share and number % round(1 / share) == 0:
            row = rows[used % len(rows)]
            mixed.append((row["candidate"], row["gold"], row["expected"]))
            used += 1
        else:
            mixed.append(pair)
    return mixed


def run_ours(pairs, workers):
    with Verifier(num_workers=workers) as verifier:
        verifier.score([(r"\boxed{x+1}", "1+x")])           # start the processes before the clock
        verifier.take_stats()
        start = time.perf_counter()
        # a second alternative keeps a hostile pair as it is, but distinct: the cache must not answer it
        golds = [[gold, str(10**12 + number)] if expected != 1 and not isinstance(gold, list) else gold
                 for number, (_, gold, expected) in enumerate(pairs)]
        scores = verifier.score([(summary, gold) for (summary, _, _), gold in zip(pairs, golds)])
        return scores, time.perf_counter() - start, verifier.take_stats()


def run_plain(pairs, seconds):
    import logging

    from math_verify import parse, verify
    logging.disable(logging.CRITICAL)
    scores, start, slow = [], time.perf_counter(), 0
    for summary, gold, _ in pairs:
        began = time.perf_counter()
        if began - start > seconds:
            break
        right = False
        for alternative in gold if isinstance(gold, list) else [gold]:
            text = alternative if isinstance(alternative, str) and "$" in alternative else f"${alternative}$"
            right = right or verify(parse(text), parse(summary))
        scores.append(float(right))
        slow += time.perf_counter() - began > 4
    return scores, time.perf_counter() - start, slow


def accuracy(scores, pairs):
    known = [(score, expected) for score, (_, _, expected) in zip(scores, pairs) if expected is not None]
    return sum(score == expected for score, expected in known) / max(len(known), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="time for plain math-verify in each row")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (SHARED / "data").exists():
        sys.exit(f"{SHARED} with data/ and verifier/ is needed")
    print(f"{os.cpu_count()} cores, {args.workers} workers, {args.pairs} pairs, seed {args.seed}, load {os.getloadavg()[0]:.1f}")
    print(f"{'grader':24}{'hostile':>8}{'pairs':>7}{'seconds':>9}{'pairs/s':>9}{'right %':>9}  notes")
    for share in (0.0, 0.1):
        generator = random.Random(args.seed)
        pairs = with_hostile(ordinary_pairs(generator, args.pairs), share, generator)
        scores, seconds, stats = run_ours(pairs, args.workers)
        notes = ", ".join(f"{name} {count}" for name, count in stats.items() if count and name != "graded")
        print(f"{'ours':24}{share:8.0%}{len(scores):7}{seconds:9.1f}{len(scores) / seconds:9.1f}{100 * accuracy(scores, pairs):9.1f}  {notes}")
        scores, seconds, slow = run_plain(pairs, args.seconds)
        print(f"{'plain math-verify':24}{share:8.0%}{len(scores):7}{seconds:9.1f}{len(scores) / seconds:9.1f}{100 * accuracy(scores, pairs):9.1f}"
              f"  {slow} took over 4 s", flush=True)


if __name__ == "__main__":
    main()
