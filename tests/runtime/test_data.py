import json

import pytest
import transformers
from transformers import AutoTokenizer

from runtime import data
from runtime.data import (
    NAMED_SETS,
    PAPER_SETS,
    chat_options,
    load_questions,
    load_rows,
    make_questions,
    questions_of_step,
    set_names,
)
from runtime.models import check_attention, open_tokenizer
from tasks import arithmetic
from tests.conftest import SHARED

ROWS = [
    {"problem": "1+1?", "answer": "2"},
    {"problem": "2+2?", "answer": 4.0},
    {"problem": "3+3?", "answer": ["6", "six"]},
    {"problem": "void", "answer": ""},
    {"problem": "none", "answer": None},
]


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".parquet"])
def test_all_formats_give_the_same_rows(tmp_path, kind):
    rows = [
        {
            **r,
            "answer": r["answer"]
            if kind != ".parquet" or not isinstance(r["answer"], (float, list))
            else "x",
        }
        for r in ROWS
    ]
    loaded, dropped = load_rows(write(tmp_path / f"a{kind}", rows))
    assert loaded == [(r["problem"], r["answer"]) for r in rows[:3]] and dropped == 2


def test_fields_can_be_mapped(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "1+1?", "truth": "2"}])
    assert load_rows(path, "q", "truth") == ([("1+1?", "2")], 0)


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.jsonl", '{"problem": "a", "answer": "1"}\n{"problem": \n', "a.jsonl, line 2: not JSON"),
        ("a.json", '[\n{"problem": "a", \n"answer": }]', "a.json, line 3: not JSON"),
        (
            "a.jsonl",
            '{"problem": "a", "answer": "1"}\n{"question": "b", "answer": "1"}\n',
            "line 2: no field 'problem'.*--question-field",
        ),
        ("a.jsonl", '{"problem": "a", "answer": "1"}\n["b"]\n', "line 2: expected an object"),
        ("a.json", '{"problem": "a", "answer": "1"}', "expected a list"),
        (
            "a.json",
            '[{"problem": "a", "answer": "1"}, {"problem": "  ", "answer": "1"}]',
            "row 2: 'problem' is not a text",
        ),
        ("a.json", "[]", "no usable row"),
        ("a.jsonl", "", "no usable row"),
        ("a.jsonl", '{"problem": "a", "answer": ""}\n', "no usable row"),
        ("a.csv", "problem,answer\n", "unknown kind '.csv'"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load_rows(str(tmp_path / name))


def test_a_missing_file_is_named_and_a_named_set_offline_says_so(monkeypatch):
    with pytest.raises(ValueError, match="nowhere.json is neither a file nor"):
        load_rows("nowhere.json")
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for name in NAMED_SETS:
        with pytest.raises(ValueError, match="cannot fetch"):
            load_rows(name)


def test_prompts_follow_template_and_chat_template_and_overlong_ones_are_counted(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    questions, dropped = make_questions(
        [("1 +1 ?", "2"), ("1 +1 +2 +3 ?", "7"), ("2 +2 ?", "4")], tokenizer, "{question}", 4
    )
    assert dropped == 1 and [q.index for q in questions] == [0, 1]
    boxed, _ = make_questions(
        [("{1} ?", "2")], tokenizer, "{question} \\boxed{}", 99
    )  # braces are left alone
    assert "\\boxed{" in tokenizer.decode(boxed[0].prompt)
    assert (
        tokenizer.decode(questions[1].prompt) == "2 +2 ?<think>"
        and questions[1].ground_truth == "4"
    )
    with pytest.raises(ValueError, match="has no {question}"):
        make_questions([("1 +1 ?", "2")], tokenizer, "{q} ?", 9)
    with pytest.raises(ValueError, match="max_prompt_tokens = 2"):
        make_questions([("1 +1 ?", "2")], tokenizer, "{question}", 2)


def test_an_epoch_visits_every_question_once_and_the_next_in_another_order(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    questions, report = load_questions("miniature", tokenizer, "{question}", 12)
    assert report.startswith("miniature: 2048 questions (0 dropped")
    steps = [
        questions_of_step(questions, step, 500, seed=3) for step in range(8)
    ]  # 4 steps an epoch, 48 left over
    first = [q.index for s in steps[:4] for q in s]
    assert len(set(first)) == 2000
    assert [q.index for q in steps[4]] != [q.index for q in steps[0]]
    assert (
        steps[5]
        == questions_of_step(questions, 5, 500, seed=3)
        != questions_of_step(questions, 5, 500, seed=4)
    )


@pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="the data sets are not beside this checkout"
)
def test_the_papers_sets_load_with_their_counts():
    counts = {
        "test/aime": 30,
        "test/amc": 83,
        "test/math": 500,
        "test/minerva": 272,
        "test/olympiad_bench": 675,
        "train/aime": 975,
        "train/math": 7470,
    }
    for name, count in counts.items():
        rows, dropped = load_rows(str(SHARED / "data" / f"{name}.json"))
        assert (len(rows), dropped) == (count, 4 if name == "train/math" else 0)


PAPER_COUNTS = dict(zip(PAPER_SETS, (30, 83, 500, 272, 675)))


@pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="the data sets are not beside this checkout"
)
def test_the_paper_collection_is_fetched_once_and_checked(tmp_path, monkeypatch):
    """The download rehearsed: a local server has the authors' five files."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

    handler = partial(Handler, directory=str(SHARED / "data" / "test"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "PAPER_SETS_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert set_names(("paper", "miniature")) == [*PAPER_SETS, "miniature"]
        for name in set_names(("paper",)):
            for _ in range(2):  # the second time from the cache
                rows, dropped = load_rows(name)
                assert (len(rows), dropped) == (PAPER_COUNTS[name], 0)
        server.shutdown()
    assert len(asked) == 5
    minerva = [truth for _, truth in load_rows("paper/minerva")[0]]
    assert sum(isinstance(t, list) and len(t) > 1 for t in minerva) == 75
    (tmp_path / "anytime-reasoner" / "aime.json").write_text("[]")
    with pytest.raises(ValueError, match="aime.json is not the file .*: delete it"):
        load_rows("paper/aime")


def test_the_paper_collection_without_network_names_the_file_to_bring(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"cannot fetch https.*aime.json.*no route.*{tmp_path}"):
        load_rows("paper/aime")


@pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="the data sets are not beside this checkout"
)
def test_every_listed_answer_of_minerva_counts_alone():
    """Each alternative verifies against the list; for 6 questions not against its sibling."""
    from tasks.verifier import Verifier

    rows, _ = load_rows(str(SHARED / "data" / "test" / "minerva.json"))
    listed = [truths for _, truths in rows if len(truths) > 1]
    with Verifier(2) as verifier:
        alone = verifier.score([(f"\\boxed{{{t}}}", truths) for truths in listed for t in truths])
        pairs = [(a, b) for truths in listed for a in truths for b in truths if a != b]
        siblings = verifier.score([(f"\\boxed{{{a}}}", b) for a, b in pairs])
    assert set(alone) == {1.0}
    assert len({frozenset(p) for p, s in zip(pairs, siblings) if s == 0}) <= 6


def test_open_tokenizer_reads_the_context_and_refuses_a_missing_model(tiny_model_path):
    with pytest.raises(ValueError, match="--model nowhere"):
        open_tokenizer("nowhere")
    tokenizer, eos, context = open_tokenizer(str(tiny_model_path))
    assert eos == [tokenizer.eos_token_id] and context == 256


def test_rows_without_a_ground_truth_are_kept_where_a_reward_function_needs_none(tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"problem": "no answer field"}])
    rows, dropped = load_rows(path, need_ground_truth=False)
    assert dropped == 0 and rows[3:] == [("void", ""), ("none", None), ("no answer field", None)]
    with pytest.raises(ValueError, match="line 6: no field 'answer'"):
        load_rows(path)


def test_system_prompt_and_chat_template_arguments_reach_the_template():
    """A template like Qwen3's: a system turn, and a switch that closes the thinking beforehand."""
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ' +1' if m.role == 'system' }}{{ m.content }}{% endfor %}"
        "<think>{% if enable_thinking is false %}</think>{% endif %}"
    )
    rows = [("1 +2 ?", "3")]
    (plain,), _ = make_questions(rows, tokenizer, "{question}", 9)
    on = ("enable_thinking=true",)
    (system,), _ = make_questions(rows, tokenizer, "{question}", 9, " +5", on)
    texts = [tokenizer.decode(q.prompt) for q in (plain, system)]
    assert texts == ["1 +2 ?<think>", " +1 +51 +2 ?<think>"]
    with pytest.raises(ValueError, match="enable_thinking=true"):
        make_questions(rows, tokenizer, "{question}", 9, "", ("enable_thinking=false",))
    with pytest.raises(ValueError, match="write name=value"):
        make_questions(rows, tokenizer, "{question}", 9, "", ("enable_thinking",))
    assert chat_options(("a=1", "b=x y", "c=true")) == {"a": 1, "b": "x y", "c": True}


@pytest.mark.parametrize(
    "name, changes, refused",
    [
        ("Qwen2", {}, False),
        ("Qwen3", {}, False),
        ("Llama", {}, False),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}, True),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 8}, False),
        ("Mistral", {"sliding_window": 8}, True),
        ("Mistral", {"sliding_window": None}, False),
        ("Gemma3Text", {}, True),
    ],
)
def test_layers_that_do_not_see_the_whole_context_are_refused(
    tmp_path, name, changes, refused, capsys
):
    getattr(transformers, f"{name}Config")(num_hidden_layers=8, **changes).save_pretrained(tmp_path)
    if refused:
        with pytest.raises(ValueError, match="full attention alone"):
            check_attention(str(tmp_path))
    else:
        check_attention(str(tmp_path))
        assert ("WARNING" in capsys.readouterr().out) == (name == "Mistral")
