import json

import pytest
from conftest import run_script
from transformers import AutoTokenizer

import evaluate
from data import Question
from evaluate import anytime_curve, draw_curves
from verifier import Verifier
from rollout import Output, Protocol


class CountingEngine:
    """Thinks ` =1 =2 =3 </think>` and boxes the last digit it can see: right (gold 3) only with three tokens of thinking or more."""

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
            tokens = self.encode(" =1 =2 =3</think>") if r.stream else self.encode(f"\\boxed{{{seen[-1]}}}<|end|>")
            yield Output(r.id, tokens, [0.0] * len(tokens), True)


def test_the_curve_by_hand(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    protocol = Protocol.of(tokenizer, 10)
    prompt = tuple(tokenizer.encode("1 +1 +1 ?<think>"))
    questions = [Question(0, "", "3", prompt), Question(1, "", "2", prompt)]        # the second is right only when cut at two tokens
    with Verifier(1) as verifier:
        curve = anytime_curve(CountingEngine(tokenizer), {"a": questions, "b": questions[:1]}, (1, 2, 3, 8), 2, protocol, tokenizer, verifier)
    assert curve["sets"]["a"]["accuracy"] == [0.0, 0.5, 0.5, 0.5]
    assert curve["sets"]["b"]["accuracy"] == [0.0, 0.0, 1.0, 1.0]
    assert curve["accuracy"] == [0.0, 0.25, 0.75, 0.75]                             # the mean of the sets' means
    assert curve["anytime_accuracy"] == pytest.approx(1.75 / 4) and curve["final_accuracy"] == 0.75
    assert curve["sets"]["a"]["stderr"] == pytest.approx([0.0, 0.5, 0.5, 0.5])      # sd 0.7071 of two questions, over √2
    assert curve["sets"]["a"]["thinking_tokens"] == 4 and curve["sets"]["a"]["closed"] == 1.0


def test_the_picture_has_every_curve(tmp_path):
    curve = {"budgets": [1, 2], "accuracy": [0.1, 0.9], "anytime_accuracy": 0.5, "sets": {"a": {"stderr": [0.1, 0.1]}}}
    draw_curves({"before": curve, "after": curve}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_several_models_with_any_budgets_on_a_file(trained_model_path, tiny_model_path, tmp_path):
    rows = [{"q": f"{d} +{n} *3 ?", "gold": (d + n) * 3 % 10} for d in range(10) for n in range(1, 5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main([str(trained_model_path), str(tiny_model_path), "--data", str(tmp_path / "questions.jsonl"), "--question-field", "q",
                   "--answer-field", "gold", "--budgets", "5", "17", "30", "--samples", "2", "--output-dir", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "eval.json").read_text())["models"]
    assert list(result) == [str(trained_model_path), str(tiny_model_path)]
    trained = result[str(trained_model_path)]
    assert trained["budgets"] == [5, 17, 30] and len(trained["accuracy"]) == 3
    assert trained["sets"][str(tmp_path / "questions.jsonl")]["questions"] == 40
    assert trained["anytime_accuracy"] > result[str(tiny_model_path)]["anytime_accuracy"] == 0.0       # a random model boxes nothing


def test_two_processes_measure_the_same_curve(trained_model_path, tmp_path):
    args = [trained_model_path, "--questions", 8, "--budgets", 12, 48]
    evaluate.main([*map(str, args), "--output-dir", str(tmp_path / "one")])
    run_script("evaluate.py", *args, "--output-dir", tmp_path / "two", processes=2)
    one, two = (json.loads((tmp_path / n / "eval.json").read_text()) for n in ("one", "two"))
    assert one == two and one["anytime_accuracy"] == pytest.approx(sum(one["accuracy"]) / 2)


@pytest.mark.parametrize("args, complaint", [
    (["nowhere"], "nowhere: no model directory"),
    (["MODEL", "--budgets", "9", "3"], "not increasing"),
    (["MODEL", "--budgets", "3", "900"], "context of 256"),
    (["MODEL", "--data", "nowhere.json"], "neither a file nor"),
])
def test_bad_input_ends_with_one_line(args, complaint, tiny_model_path, capsys):
    with pytest.raises(SystemExit) as e:
        evaluate.main([str(tiny_model_path) if a == "MODEL" else a for a in args])
    assert e.value.code == 2 and complaint in capsys.readouterr().err
