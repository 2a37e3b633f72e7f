"""Measuring: the curve by hand, an interruption, the trainer's own numbers, one question."""

import io
import json
import re
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import safetensors.torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import evaluate
import train
from evaluate import EVALUATION, anytime_curve
from rollout import Markers, Output, Sampling, make_grader, sample_rollouts
from runtime.config import parse
from runtime.curves import STOPPED
from runtime.data import PAPER_SETS, Question
from runtime.engines import PlainEngine
from runtime.watch import ask
from tasks.verifier import Verifier
from tests.conftest import ROOT, SHARED
from tests.end_to_end.test_families import TINY
from tests.runtime.test_tokenizers import r1_tokenizer


class CountingEngine:
    """Thinks ` =1 =2 =3 </think>` and boxes the last digit it can see: right (ground truth 3) only
    with three tokens of thinking or more."""

    def __init__(self, tokenizer):
        self.encode, self.queue = lambda text: tokenizer.encode(text, add_special_tokens=False), []
        self.digits = {self.encode(f" ={d}")[0]: d for d in range(10)}

    def add(self, request):
        self.queue.append(request)

    def has_work(self):
        return bool(self.queue)

    def step(self):
        requests, self.queue = self.queue, []
        for r in requests:
            seen = [self.digits[i] for i in r.prompt if i in self.digits]
            tokens = (
                self.encode(" =1 =2 =3</think>")
                if r.stream
                else self.encode(f"\\boxed{{{seen[-1]}}}<|end|>")
            )
            yield Output(r.id, tokens, [0.0] * len(tokens), True)


def test_the_curve_by_hand(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    markers = Markers.from_tokenizer(tokenizer, 7)
    prompt = tuple(tokenizer.encode("1 +1 +1 ?<think>"))
    # The second is right only when cut at two tokens.
    questions = [Question(0, "", "3", prompt), Question(1, "", "2", prompt)]
    sets, sampling = {"a": questions, "b": questions[:1]}, Sampling((1, 2, 3, 8), 2, 1, 1.0, (0,))
    with Verifier(1) as verifier:
        grade = make_grader(verifier, tokenizer, markers)
        opened = SimpleNamespace(tokenizer=tokenizer, markers=markers, grade=grade)
        curve = anytime_curve(CountingEngine(tokenizer), sets, sampling, opened)
    assert curve["sets"]["a"]["accuracy"] == [0.0, 0.5, 0.5, 0.5]
    assert curve["sets"]["b"]["accuracy"] == [0.0, 0.0, 1.0, 1.0]
    assert curve["accuracy"] == [0.0, 0.25, 0.75, 0.75]  # the mean of the sets' means
    assert curve["anytime_accuracy"] == pytest.approx(1.75 / 4) and curve["final_accuracy"] == 0.75
    # Two questions, one right: their resampled mean is 0, 1/2 or 1, with standard deviation 0.354.
    assert curve["sets"]["a"]["stderr"] == pytest.approx([0.0, 0.354, 0.354, 0.354], abs=0.03)
    assert curve["sets"]["a"]["overthinking"] == 0.5  # the second question, from budget 3 on
    cuts = curve["example"]["cuts"]
    assert [cut["thinking"] for cut in cuts] == [" =1", " =2", " =3", "</think>"]
    assert [cut["score"] for cut in cuts] == [0.0, 0.0, 1.0, 1.0]
    assert curve["sets"]["a"]["thinking_tokens"] == 4 and curve["sets"]["a"]["closed"] == 1.0
    # It answers 1, 2, 3 within the trace and 3 at its end: never twice the same before that.
    summary = len(tokenizer.encode("\\boxed{3}<|end|>", add_special_tokens=False))
    expected = {0: (0.5, 4, 4 + summary), 1: (0, 1, 1 + summary)}
    expected |= dict.fromkeys((2, 3), (0.5, 4, 4 + 4 * summary))
    stops = zip(*(curve["sets"]["a"][name] for name in STOPPED))
    assert dict(zip(curve["stopping"]["patience"], stops)) == expected
    assert curve["stopped_difference"] == [0, -0.75, 0, 0]


def test_several_models_with_any_budgets_on_a_file(trained_model_path, tiny_model_path, tmp_path):
    rows = [
        {"q": f"{d} +{n} *3 ?", "truth": (d + n) * 3 % 10} for d in range(10) for n in range(1, 5)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--question-field q --answer-field truth --budgets 5 17 30 --samples 2".split()
    flags += ["--data", str(tmp_path / "questions.jsonl"), "--output-dir", str(tmp_path / "out")]
    evaluate.main([str(trained_model_path), str(tiny_model_path), *flags])
    result = eval_json(tmp_path / "out")
    rise = result["paired_differences"]["to"][str(tiny_model_path)]["mean"]["anytime_accuracy"]
    result = result["models"]
    assert list(result) == [str(trained_model_path), str(tiny_model_path)]
    trained = result[str(trained_model_path)]
    assert trained["budgets"] == [5, 17, 30] and len(trained["accuracy"]) == 3
    assert trained["sets"][str(tmp_path / "questions.jsonl")]["questions"] == 40
    assert (
        trained["anytime_accuracy"] > result[str(tiny_model_path)]["anytime_accuracy"] == 0.0
    )  # a random model boxes nothing
    assert rise["difference"] == pytest.approx(-trained["anytime_accuracy"])
    assert rise["stderr"] == pytest.approx(trained["errors"]["anytime_accuracy"])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Paired differences" in text and f"{rise['difference']:+.3f}" in text
    assert (tmp_path / "out" / "anytime_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert trained["variance"] is None  # 7.5 is no budget
    assert trained["stopped_accuracy"][0] == trained["final_accuracy"]  # to the end, A = 1
    assert trained["stopped_thinking_tokens"][0] == trained["thinking_tokens"]
    first = sorted((tmp_path / "out" / "records").iterdir(), key=lambda p: p.stat().st_mtime)[0]
    kept = [r for file in first.glob("*/*.json") for r in json.loads(file.read_text())]
    saved = 0
    for r in kept:  # patience 1 and two budgets within a trace: at the first boxed answer
        cuts = [b for (a,), b in zip(r["answers"], (5, 17)) if a and b < r["thinking_tokens"]]
        saved += r["thinking_tokens"] - min(cuts, default=r["thinking_tokens"])
    found = trained["thinking_tokens"] - trained["stopped_thinking_tokens"][1]
    assert len(kept) == 80 and found == pytest.approx(saved / 80) and found > 0
    assert f"| to the end | {trained['final_accuracy']:.3f} ± " in text


def eval_json(directory) -> dict:
    return json.loads((directory / "eval.json").read_text())


def test_two_processes_measure_the_same_curve(trained_model_path, tmp_path, run_ranks):
    args = [str(trained_model_path), *"--questions 8 --budgets 12 48 --output-dir".split()]
    evaluate.main([*args, str(tmp_path / "one")])
    run_ranks(lambda rank: evaluate.main([*args, str(tmp_path / "two")]), 2)
    one, two = eval_json(tmp_path / "one"), eval_json(tmp_path / "two")
    assert one == two and one["anytime_accuracy"] == pytest.approx(sum(one["accuracy"]) / 2)


def test_an_interrupted_evaluation_goes_on_from_its_records(
    trained_model_path, tmp_path, monkeypatch
):
    args = [str(trained_model_path), *"--questions 8 --samples 2 --output-dir".split()]
    monkeypatch.setattr(evaluate, "TRACES_PER_CHUNK", 4)  # two questions
    evaluate.main([*args, str(tmp_path / "unbroken")])
    out, write = tmp_path / "broken", evaluate.write_records

    def write_two(folder, records):
        if len(list(out.rglob("from-question-*.json"))) == 2:
            raise KeyboardInterrupt
        write(folder, records)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "write_records", write_two)
        evaluate.main([*args, str(out)])
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("from-question-*.json")}
    assert len(kept) == 2 and not (out / "eval.json").exists()
    evaluate.main([*args, str(out)])
    assert eval_json(tmp_path / "unbroken") == eval_json(out)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())  # not sampled again
    assert len(list(out.rglob("from-question-*.json"))) == 4


def test_records_belong_to_one_model_and_one_setting(trained_model_path, tmp_path):
    """Another seed, or other weights under the same name, and nothing kept is used."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(trained_model_path, model)
    args = [str(model), "--output-dir", str(out), *"--questions 2 --samples 1".split()]

    def folders():
        return len(list((out / "records").iterdir()))

    for _ in range(2):
        evaluate.main(args)
        assert folders() == 1
    evaluate.main([*args, "--seed", "1"])
    assert folders() == 2
    weights = safetensors.torch.load_file(model / "model.safetensors")
    next(iter(weights.values())).mul_(1.001)
    safetensors.torch.save_file(weights, model / "model.safetensors", {"format": "pt"})
    evaluate.main(args)
    assert folders() == 3


def test_a_saved_model_evaluates_to_the_trainers_own_numbers(trained_model_path, tmp_path, capsys):
    flags = "--eval-questions 8 --eval-samples 2 --eval-budgets 12 24 36 48 --questions-per-step 4"
    flags += " --num-rollouts 4 --steps 1 --seed 3 --output-dir"
    run = tmp_path / "run"
    train.train(parse(["--model", str(trained_model_path), *flags.split(), str(run)]))
    trainers = eval_json(run)
    text = capsys.readouterr().out
    assert "before training" in text and "after training" in text
    assert trainers["example"]["question"] in text
    samples = [json.loads(line) for line in (run / "samples.jsonl").open()]
    assert len(samples) == 2 and [cut["budget"] for cut in samples[0]["cuts"]] == [16, 32, 48, 64]
    assert samples[0]["question"] != samples[1]["question"]
    flags = "--questions 8 --samples 2 --seed 3 --budgets 12 24 36 48"
    evaluate.main([str(run / "model"), *flags.split()])
    ours = eval_json(run / "evaluation")
    assert {k: trainers[k] for k in ours} == ours  # the picture's and the table's numbers, all
    accuracy = " ".join(f"{x:.3f}" for x in ours["accuracy"])
    text += capsys.readouterr().out  # as a log file has it
    assert all(len(x) <= 100 or str(tmp_path) in x for x in text.splitlines()), text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert f"run {accuracy} {ours['anytime_accuracy']:.3f}" in lines
    check_glossary(run)


def keys_of(value) -> set[str]:
    """All keys of a JSON value, at any depth, but not the names of sets."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if not isinstance(value, dict):
        return set()
    named = {"sets", "data"} & value.keys()
    inner = [x for k in named for x in value[k].values()] + [value[k] for k in value.keys() - named]
    return set(value) | keys_of(inner)


def check_glossary(run):
    """What a run has written and what docs/metrics.md explains are the same keys, file by file."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    elsewhere = {"models", "paired_differences", "from", "to", "difference"}
    elsewhere |= {"peak_memory_gb", "mfu"}  # on GPUs
    explained = {}
    for file in ("metrics.jsonl", "samples.jsonl", "eval.json"):
        table = text.split(f"| key in `{file}` |")[1].split("\n\n")[0]
        explained[file] = set(re.findall(r"^\| `([^`]+)`", table, re.M))
    explained["eval.json"] |= explained["samples.jsonl"]  # of its example
    explained["evals.jsonl"] = explained["eval.json"] - {"before"}
    for file, patterns in explained.items():
        text = (run / file).read_text()
        written = keys_of(
            [json.loads(x) for x in (text.splitlines() if file[-1] == "l" else [text])]
        )
        missing = {k for k in written if not any(fnmatch(k, p) for p in patterns)}
        unused = {p for p in patterns if not any(fnmatch(k, p) for k in written)} - elsewhere
        assert len(written) > 8 and not missing and not unused, (file, missing, unused)


@pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="the data sets are not beside this checkout"
)
def test_the_papers_sets_are_five_panels_and_five_rows(tmp_path, monkeypatch):
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **TINY | {"max_position_embeddings": 2048},
            vocab_size=9 + len(tokenizer := r1_tokenizer()),
        )
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    cache = tmp_path / "anytime-reasoner"
    cache.symlink_to(SHARED / "data" / "test")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = "--data paper --questions 2 --samples 1 --budgets 12 24 --max-prompt-tokens 1500"
    flags += " --prompt-template {question} --output-dir"
    evaluate.main([str(tmp_path / "model"), *flags.split(), str(tmp_path / "out")])
    assert list(eval_json(tmp_path / "out")["sets"]) == list(PAPER_SETS)
    table = (tmp_path / "out" / "table.md").read_text().split("\n\n")[0].splitlines()
    assert [line.split(" | ")[1] for line in table[2:]] == ["mean", *PAPER_SETS]


@pytest.mark.parametrize("budgets", [(3, 5, 12), (12, 24, 48)])
def test_ask_prints_each_answer_at_its_budget(budgets, trained_model_path):
    tokenizer = AutoTokenizer.from_pretrained(trained_model_path)
    markers = Markers.from_tokenizer(tokenizer, 7)
    prompt = tuple(tokenizer.encode("2 +3 *7 ?<think>"))
    question, opened = Question(0, "2 +3 *7 ?", "", prompt), SimpleNamespace()
    opened.tokenizer, opened.markers = tokenizer, markers
    sampling = Sampling(budgets, 1, 1, 1.0, (0, EVALUATION, 0))
    engine, out, lengths = PlainEngine(str(trained_model_path)), io.StringIO(), []
    (r,) = sample_rollouts(engine, [question], sampling, markers)
    step = engine.step

    def watched_step():
        lengths.append(len(out.getvalue()))
        return step()

    engine.step = watched_step
    ask(engine, question, sampling, opened, out=out)
    assert len(set(lengths)) > len(r.thinking) / 2  # printed as it comes
    text, start = out.getvalue(), 0
    for b, s in zip(budgets, r.summaries):
        end = text.index(f"after {b} tokens", start)
        assert tokenizer.decode(r.thinking[: s.cut][-2:]) in text[start:end] or s.cut < b
        start = end
    printed = "".join(line for line in text.split("\n")[1:] if not line.startswith("    after"))
    assert printed == tokenizer.decode(r.thinking)


class SteadyEngine(CountingEngine):
    """Thinks ` =1 =2 =2 =2 ...`, a token a step; boxes the last digit it can see."""

    sampled = 0

    def step(self):
        (thinking,) = [r for r in self.queue if r.stream]
        summaries, self.queue = [r for r in self.queue if not r.stream], [thinking]
        self.sampled += 1
        tokens = self.encode(" =1" if self.sampled == 1 else " =2")
        outputs = [Output(thinking.id, tokens, [0.0], self.sampled == thinking.max_tokens)]
        for r in summaries:
            seen = [self.digits[i] for i in r.prompt if i in self.digits]
            tokens = self.encode(f"\\boxed{{{seen[-1]}}}<|end|>")
            outputs.append(Output(r.id, tokens, [0.0] * len(tokens), True))
        return outputs


@pytest.mark.parametrize("patience, budget", [(1, 1), (2, 3), (3, 4)])
def test_ask_stops_once_the_answer_has_stayed_the_same(patience, budget, tiny_model_path):
    """It answers 1, 2, 2, 2; two draws each."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    opened = SimpleNamespace(tokenizer=tokenizer, markers=Markers.from_tokenizer(tokenizer, 7))
    question = Question(0, "2 +0 ?", "", tuple(tokenizer.encode("+ ?<think>")))
    engine, out = SteadyEngine(tokenizer), io.StringIO()
    ask(engine, question, Sampling((1, 2, 3, 4, 64), 1, 2, 1.0, (0,)), opened, "", patience, out)
    lines = [line for line in out.getvalue().splitlines() if "after" in line or "stopped" in line]
    assert (
        lines[-2].endswith(f"after {budget} tokens: {min(budget, 2)}") and len(lines) == budget + 1
    )
    assert engine.sampled == budget + 1  # the answer came a step later
    assert (
        f"{patience} budgets in a row" in lines[-1] and f"Saved {64 - budget - 1} of" in lines[-1]
    )


def test_ask_on_the_command_line(trained_model_path, capsys):
    evaluate.main([str(trained_model_path), "--ask", "2 +3 *7 ?", "--budgets", "6", "12"])
    text = capsys.readouterr().out
    assert "2 +3 *7 ?" in text and "after 6 tokens" in text and "after 12 tokens" in text


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["nowhere"], "nowhere: no model directory"),
        (["MODEL", "--budgets", "9", "3"], "not increasing"),
        (["MODEL", "--budgets", "3", "900"], "context of 256"),
        (["MODEL", "--data", "nowhere.json"], "neither a file nor"),
        (["MODEL", "--ask", "1 +1 ?", "--prompt-template", "why"], "has no {question}"),
    ],
)
def test_bad_input_ends_with_one_line(args, complaint, tiny_model_path, capsys):
    with pytest.raises(SystemExit) as e:
        evaluate.main([str(tiny_model_path) if a == "MODEL" else a for a in args])
    assert e.value.code == 2 and complaint in capsys.readouterr().err
