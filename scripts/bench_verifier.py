"""The verifier beside plain math-verify, and what each rewriting rule of it pays.

    python scripts/bench_verifier.py               # accuracy on the labelled pairs, pairs/s
    python scripts/bench_verifier.py --ablation    # verdicts moved by leaving one rule out

Plain math-verify runs in this process, on the whole summary, with its own 5 s alarms, as in a
trainer that calls it directly. The pairs are collected from the test suites of public graders and
from attacks on this one; with the ground truths of public datasets they lie beside the repository,
in ../shared/verifier and ../shared/data, because their licences differ. Without them this script
has nothing to measure; JSON lines of {gold, candidate, expected, scope} in those places replace
them, and `python -m pytest tests/tasks` checks the conventions without any.
"""

import argparse
import functools
import json
import logging
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from tasks import verifier as rules
from tests.tasks import test_verifier_rules as cases

SHARED = ROOT.parent / "shared"


def rows(name):
    path = SHARED / "verifier" / name
    if not path.exists():
        raise SystemExit(f"{path} is not here: see the top of {__file__}")
    return [json.loads(line) for line in path.open()]


def plain_math_verify(summary, truth):
    from math_verify import parse, verify

    texts = [str(text) for text in (truth if isinstance(truth, list) else [truth])]
    return float(
        any(
            verify(parse(text if "$" in text or "\\boxed" in text else f"${text}$"), parse(summary))
            for text in texts
        )
    )


def print_accuracy():
    pairs = rows("pairs.jsonl") + [{**row, "scope": "attack"} for row in rows("attack.jsonl")]
    with rules.Verifier() as verifier:
        ours = verifier.score([(row["candidate"], row["gold"]) for row in pairs])
    plain = [plain_math_verify(row["candidate"], row["gold"]) for row in pairs]
    print("| pairs | number | ours % | false + | false - | math-verify % | false + | false - |")
    print("|---|---|---|---|---|---|---|---|")
    for scope in Counter(row["scope"] for row in pairs):
        cells = [scope, sum(row["scope"] == scope for row in pairs)]
        for scores in (ours, plain):
            missed = Counter(
                row["expected"]
                for row, score in zip(pairs, scores)
                if row["scope"] == scope and score != row["expected"]
            )
            cells += [f"{100 - 100 * missed.total() / cells[1]:.1f}", missed[0], missed[1]]
        print("|", " | ".join(map(str, cells)), "|")


def ablation_sets(count):
    """name -> [(summary, ground truth, expected)]"""
    truths = cases.distinct(cases.dataset_truths())
    random.Random(3).shuffle(truths)
    named = {
        "labelled": [
            (row["candidate"], row["gold"], row["expected"])
            for row in rows("pairs.jsonl") + rows("attack.jsonl")
            if row.get("scope") not in ("nobox", "contested")
        ],
        "conventions": [(cases.boxed(box), truth, right) for _, truth, box, right in cases.CASES],
        "itself": [(cases.boxed(cases.plain_text(truth)), truth, 1) for truth in truths],
    }
    for name, generate in (("rewrites", cases.rewrites), ("outputs", cases.model_outputs)):
        named[name] = [
            (cases.boxed(text), truth, 1)
            for truth in truths[:count]
            for _, text in generate(cases.plain_text(truth))
            if text
        ]
    named["mutations"] = [
        (cases.boxed(text), truth, 0) for truth in truths[:count] for text in cases.mutations(truth)
    ]
    return named


def verdicts(pairs):
    boxes = [rules.normalise(rules.extract_answer(summary) or "") for summary, _, _ in pairs]
    truths = [rules._alternatives(truth) for _, truth, _ in pairs]
    return [any(rules._equal(t, box) for t in ts) for ts, box in zip(truths, boxes)]


def print_ablation(count):
    rules._math_verify = functools.cache(rules._math_verify)  # most questions stay the same
    named = ablation_sets(count)
    before = {name: verdicts(pairs) for name, pairs in named.items()}
    print("Verdicts moved by leaving out: right to wrong (newly rewarded) / wrong to right\n")
    print("| left out |", " | ".join(f"{name}, {len(named[name])}" for name in named), "|")
    print("|---" * (len(named) + 1) + "|")
    wrong = [sum(v != p[2] for v, p in zip(before[name], named[name])) for name in named]
    print("| nothing: verdicts that miss |", " | ".join(map(str, wrong)), "|")
    everything = rules._REWRITES
    for one in everything:
        rules._REWRITES = [other for other in everything if other is not one]
        cells = []
        for name, pairs in named.items():
            scores = zip(pairs, verdicts(pairs), before[name])
            moved = [(pair[2], score == pair[2]) for pair, score, old in scores if score != old]
            worse = [expected for expected, better in moved if not better]
            cell = f"{len(worse)} ({worse.count(0)}) / {len(moved) - len(worse)}"
            cells.append(cell if moved else "")
        label = one[0].pattern[:48].replace("|", "\\|")
        print(f"| `{label}` |", " | ".join(cells), "|", flush=True)


def speed_pairs(count, share):
    """Half of the ground truths are no plain numbers, twice their share in the data."""
    truths, hostile = cases.distinct(cases.dataset_truths()), rows("hostile.jsonl")
    hard = [truth for truth in truths if not rules.plain_number(rules._alternatives(truth)[0])]
    generator, pairs = random.Random(0), []
    for number in range(count):
        truth = generator.choice(hard if number % 2 else truths)
        box = cases.plain_text(truth if number % 4 < 2 else generator.choice(truths))
        pairs.append((cases.boxed(box), truth))
        if share and number % round(1 / share) == 0:
            row = hostile[number % len(hostile)]  # the number makes it new to the cache
            pairs[-1] = row["candidate"], [row["gold"], str(10**12 + number)]
    return pairs


def print_speed(count):
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {count} pairs, 2 workers")
    print("| grader | hostile | pairs | pairs/s | timeouts |\n|---|---|---|---|---|")
    for share in (0.0, 0.1):
        pairs = speed_pairs(count, share)
        with rules.Verifier(2) as verifier:
            verifier.score([(r"\boxed{x+1}", "1+x")])  # start the processes before the clock
            start = time.perf_counter()
            verifier.score(pairs)
            rate, stats = count / (time.perf_counter() - start), verifier.stats
        print(f"| ours | {share:.0%} | {count} | {rate:.0f} | {stats['timeouts']} |", flush=True)
        start, times = time.perf_counter(), []
        while sum(times) < 20 and len(times) < count:
            plain_math_verify(*pairs[len(times)])
            times.append(time.perf_counter() - start - sum(times))
        print(
            f"| plain math-verify | {share:.0%} | {len(times)} | {len(times) / sum(times):.0f} "
            f"| {sum(seconds > 4 for seconds in times)} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ablation", action="store_true", help="instead of accuracy and speed")
    parser.add_argument("--count", type=int, default=600, help="of ground truths, or of pairs")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if args.ablation:
        print_ablation(args.count)
    else:
        print_accuracy()
        print_speed(args.count)


if __name__ == "__main__":
    main()
