"""Rows from every kind of file and named set, their prompts, and the order of the questions."""

import json
import random
from datetime import datetime
from decimal import Decimal
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from runtime import data, rundir
from runtime.config import Config
from runtime.data import PAPER_SETS, chat_options, load_questions, load_rows, make_questions
from tasks import arithmetic
from tasks.verifier import Verifier
from tests.conftest import SHARED

ROWS = [
    {"problem": "1+1?", "answer": "2"},
    {"problem": "2+2?", "answer": 4.0},
    {"problem": "3+3?", "answer": ["6", "six"]},
    {"problem": "void", "answer": ""},
    {"problem": "none", "answer": None},
]
PAPER_COUNTS = dict(zip(PAPER_SETS, (30, 83, 500, 272, 675)))
needs_data = pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="the data sets are not beside this checkout"
)


def write(path, rows) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


# -------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".parquet"])
def test_all_formats_give_the_same_rows(tmp_path, kind):
    rows = ROWS if kind != ".parquet" else [ROWS[0], *ROWS[3:]]  # a column has one type there
    loaded, dropped = load_rows(write(tmp_path / f"a{kind}", rows))
    assert loaded == [(r["problem"], r["answer"]) for r in rows[:-2]] and dropped == 2


def test_parquets_lists_and_decimals(tmp_path):
    rows = [{"problem": p, "answer": Decimal(a)} for p, a in (("x", "2.50"), ("y", "3.00"))]
    assert load_rows(write(tmp_path / "a.parquet", rows)) == ([("x", "2.50"), ("y", "3.00")], 0)
    rows = [{"problem": "x", "answer": ["6", "six"]}]
    assert load_rows(write(tmp_path / "b.parquet", rows)) == ([("x", ["6", "six"])], 0)


def test_answers_stay_as_a_csv_file_has_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('problem,answer\n1+6?,007\n"2, or\n3?",1e3\nblank,\n')
    assert load_rows(str(path)) == ([("1+6?", "007"), ("2, or\n3?", "1e3")], 1)


@pytest.mark.parametrize(
    "address", ["https://host/x/a.jsonl?download=true", "hf://datasets/o/n@v/a"]
)
def test_a_file_may_be_on_the_net(address, tmp_path, monkeypatch):
    """The names are those of other sites; what answers is a local file."""
    local, asked = tmp_path / "a.jsonl", []
    write(local, ROWS)

    def hub(*place, **settings):
        asked.append((*place, settings["revision"]))
        return local

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: local.open("rb"))
    address += "/b.jsonl" * address.startswith("hf")
    assert load_rows(address)[0][0] == ("1+1?", "2")
    assert asked == [("o/n", "a/b.jsonl", "v")] * address.startswith("hf")
    with pytest.raises(ValueError, match="unknown kind '.html'"):
        load_rows("https://host/a.html")


def test_nested_columns_gsm8ks_answers_and_chats(tmp_path):
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 +2 ?"}]
    rows = [
        {"extra": {"q": "1+1?", "a.b": "So 1+1=2.\n#### 2"}, "x.y": "dotted"},
        {"extra": {"q": chat, "a.b": "#### 1,000"}},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert load_rows(path, "extra.q", "extra.a.b")[0] == [("1+1?", "2"), (chat, "1,000")]
    assert load_rows(path, "extra.q", "extra.a.b", need_ground_truth=False)[0][1][1] == "#### 1,000"
    with pytest.raises(ValueError, match="line 2: no field 'x.y' .it has extra.: name the right"):
        load_rows(path, "extra.q", "x.y")
    tokenizer = arithmetic.make_tokenizer()
    c = Config(prompt_template="{question} =1", max_prompt_tokens=50)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>"
    (one, two), _ = make_questions([("1 +1 ?", "2"), (chat, "4")], tokenizer, c)
    assert one.text == "1 +1 ?" and tokenizer.decode(one.prompt).endswith("? =1<think>")
    assert two.text == "2 +2 ?" and tokenizer.decode(two.prompt).endswith("?<think>")


def test_a_reward_functions_ground_truth_may_be_anything_that_parquet_holds(tmp_path):
    truths = [{"a": 1}, b"x", datetime(2024, 1, 2), [Decimal("2.50")]]
    for i, truth in enumerate(truths):
        path = write(tmp_path / f"{i}.parquet", [{"problem": "x", "answer": truth}])
        ((_, read),), _ = load_rows(path, need_ground_truth=False)
        assert read == (["2.50"] if i == 3 else truth) and rundir.digest(read)
        if i < 3:
            with pytest.raises(ValueError, match="row 1: 'answer' is"):
                load_rows(path)


def test_dropping_over_a_tenth_is_loud(tmp_path):
    rows = [{"problem": "1 +1 ?", "answer": "2"}] * 9
    long = {"problem": "1" + 20 * " +1" + " ?", "answer": "21"}
    for extra, loud in ([long], False), ([long, long], True), ([long, ROWS[-1]], True):
        path = write(tmp_path / "a.jsonl", [*rows, *extra])
        _, report = load_questions(path, arithmetic.make_tokenizer(), Config(), "train")
        assert report.startswith("WARNING") == loud and "9 questions" in report


def test_fields_can_be_mapped_and_a_byte_order_mark_is_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"q": "1+1?", "truth": "2"}'.encode("utf-8-sig"))
    assert load_rows(str(path), "q", "truth") == ([("1+1?", "2")], 0)


GOOD = '{"problem": "a", "answer": "1"}'


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.jsonl", GOOD + '\n{"problem": \n', ", line 2: not JSON"),
        ("a.json", '[\n{"problem": "a", \n"answer": }]', ", line 3: not JSON"),
        ("a.jsonl", GOOD + '\n{"question": "b", "answer": "1"}\n',
         ", line 2: no field 'problem' (it has question, answer): name the right fields with --qu"),
        ("a.jsonl", GOOD + '\n["b"]\n', ", line 2: expected an object"),
        ("a.json", GOOD, "expected a list"),
        ("a.json", '[{"problem": "  ", "answer": "1"}]', "row 1: 'problem' is not a text"),
        ("a.json", f'[{GOOD}, {{"problem": 7, "answer": "1"}}]', "row 2: 'problem' is not a text"),
        ("a.json", "[]", "no usable row"), ("a.jsonl", "", "no usable row"),
        ("a.jsonl", '{"problem": "a", "answer": ""}\n', "no usable row"),
        ("a.jsonl", '{"problem": "x", "answer": true}\n', "line 1: 'answer' is True, a bool: the"),
        ("a.jsonl", '{"problem": "x", "answer": {"a": 1}}\n', "'answer' is {'a': 1}, a dict"),
        ("a.jsonl", f'{GOOD}\n{{"problem": "x", "answer": NaN}}\n', "line 2: 'answer' is nan"),
        ("a.jsonl", '{"problem": "x", "answer": ["1", [2]]}\n', "'answer' is [2], a list"),
        ("a.jsonl", '{"problem": [{"role": "user"}], "answer": "1"}\n', "'problem' is not a text"),
        ("a.jsonl", '{"problem": [], "answer": "1"}\n', "'problem' is not a text"),
        ("a.csv", "problem,answer\n", "no usable row"),
        ("a.csv", "problem,answer\n1+1?,2\n1+2?,3,4\n", "row 2: not as many cells"),
        ("a.csv", "problem,answer\n1+1?\n", "row 1: not as many cells"),
        ("a.csv", 'problem,answer\n"1+1?,2\n', "no readable csv file"),
        ("a.txt", "1+1? 2\n", "unknown kind '.txt': use .json, .jsonl, .csv or .parquet"),
        ("a.jsonl", '{"problem": "\\ud800", "answer": "1"}\n', "line 1: half of a surrogate"),
        ("a.jsonl", '{"problem": "x", "answer": "\\udfff"}\n', "line 1: half of a surrogate"),
        ("a.json", "[" * 100_000, "from line 1: unreadable JSON (RecursionError"),
        ("a.jsonl", f'{GOOD}\n{{"problem": "x", "answer": {"9" * 5000}}}', "line 2: unreadable"),
        ("a.json", f'[{GOOD}, "é"]'.encode("latin-1"), "is not in UTF-8 (byte 35)"),
        ("a.jsonl", GOOD.encode("utf-16"), "is not in UTF-8"),
        ("a.parquet", "PAR1", "no readable parquet file"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_their_row(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as e:
        load_rows(str(path))
    text = str(e.value)
    assert text.startswith(str(path)) and complaint in text and "\n" not in text


def test_rows_without_a_ground_truth_are_kept_where_a_reward_function_needs_none(tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"problem": "no answer field"}])
    rows, dropped = load_rows(path, need_ground_truth=False)
    assert dropped == 0 and rows[3:] == [("void", ""), ("none", None), ("no answer field", None)]
    with pytest.raises(ValueError, match="line 6: no field 'answer'"):
        load_rows(path)


# --------------------------------------------------------------------------------- named sets


def offline(*_, **__):
    raise OSError("no route")


def test_a_missing_file_and_a_set_that_cannot_be_fetched_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match="nowhere.json is neither a file nor .*deepscaler, paper,"):
        load_rows("nowhere.json")
    with pytest.raises(
        ValueError, match="cannot fetch hf://.*deepscaler.json .*no route.*: check the"
    ):
        load_rows("deepscaler")
    with pytest.raises(ValueError, match=f"cannot fetch https.*aime.json.*no route.*{tmp_path}"):
        load_rows("paper/aime")


def test_the_hubs_set_is_read_by_its_own_fields(tmp_path, monkeypatch):
    path = write(tmp_path / "deepscaler.json", ROWS)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: path)
    assert load_rows("deepscaler", "question", "truth")[0][0] == ("1+1?", "2")


@needs_data
def test_the_paper_collection_is_fetched_once_and_checked(tmp_path, monkeypatch):
    """The download rehearsed: a local server has the authors' five files."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

    handler = partial(Handler, directory=str(SHARED / "data" / "test"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "PAPER_SETS_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert data.set_names(("paper", "miniature")) == [*PAPER_SETS, "miniature"]
        loaded = {name: load_rows(name) for name in data.set_names(("paper",))}
        assert load_rows("paper/aime") == loaded["paper/aime"]  # from the cache
        server.shutdown()
    assert len(asked) == 5
    assert {name: (len(rows), n) for name, (rows, n) in loaded.items()} == {
        name: (count, 0) for name, count in PAPER_COUNTS.items()
    }
    minerva = [truth for _, truth in loaded["paper/minerva"][0]]
    assert sum(isinstance(t, list) and len(t) > 1 for t in minerva) == 75
    (tmp_path / "anytime-reasoner" / "aime.json").write_text("[]")
    with pytest.raises(ValueError, match="aime.json is not the file .*: delete it"):
        load_rows("paper/aime")


@needs_data
@pytest.mark.parametrize("name, count, blank", [("aime", 975, 0), ("math", 7470, 4)])
def test_training_sets_load_with_their_counts(name, count, blank):
    rows, dropped = load_rows(str(SHARED / "data" / "train" / f"{name}.json"))
    assert (len(rows), dropped) == (count, blank)


@needs_data
@pytest.mark.parametrize("sample", [12, pytest.param(75, marks=pytest.mark.slow)])
def test_every_listed_answer_of_minerva_counts_alone(sample):
    """Each alternative verifies against the list; for 7 questions not against its sibling."""
    rows, _ = load_rows(str(SHARED / "data" / "test" / "minerva.json"))
    listed = random.Random(0).sample([truths for _, truths in rows if len(truths) > 1], sample)
    pairs = [(a, b) for truths in listed for a in truths for b in truths if a != b]
    with Verifier(2) as verifier:
        alone = verifier.score([(f"\\boxed{{{t}}}", truths) for truths in listed for t in truths])
        siblings = verifier.score([(f"\\boxed{{{a}}}", b) for a, b in pairs])
    assert set(alone) == {1.0}
    assert len({frozenset(p) for p, s in zip(pairs, siblings) if s == 0}) <= 7


# ------------------------------------------------------------------------------------- prompts


def test_prompts_follow_the_template_and_overlong_ones_are_counted():
    tokenizer = arithmetic.make_tokenizer()
    rows = [("1 +1 ?", "2"), ("1 +1 +2 +3 ?", "7"), ("2 +2 ?", "4")]
    questions, dropped = make_questions(rows, tokenizer, Config(max_prompt_tokens=4))
    assert dropped == 1 and [q.index for q in questions] == [0, 1]
    assert tokenizer.decode(questions[1].prompt) == "2 +2 ?<think>"
    assert questions[1].ground_truth == "4"
    braces = Config(prompt_template="{question} \\boxed{}", max_prompt_tokens=99)
    (boxed,), _ = make_questions([("{1} ?", "2")], tokenizer, braces)  # braces are left alone
    assert "\\boxed{" in tokenizer.decode(boxed.prompt)
    with pytest.raises(ValueError, match="has no {question}"):
        make_questions(rows, tokenizer, Config(prompt_template="{q} ?"))
    with pytest.raises(ValueError, match="all 3 prompts are longer than --max-prompt-tokens 2"):
        make_questions(rows, tokenizer, Config(max_prompt_tokens=2))


def test_system_prompt_and_chat_template_arguments_reach_the_template():
    """A template like Qwen3's: a system turn, and a switch that closes the thinking beforehand."""
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ' +1' if m.role == 'system' }}{{ m.content }}{% endfor %}"
        "<think>{% if enable_thinking is false %}</think>{% endif %}"
    )

    def prompt(*chat_template_args, system_prompt=""):
        c = Config(chat_template_args=chat_template_args, system_prompt=system_prompt)
        return tokenizer.decode(make_questions([("1 +2 ?", "3")], tokenizer, c)[0][0].prompt)

    assert prompt() == "1 +2 ?<think>"
    assert prompt("enable_thinking=true", system_prompt=" +5") == " +1 +51 +2 ?<think>"
    for false in ("false", "False"):  # the text "False" would be true
        with pytest.raises(ValueError, match="enable_thinking=true"):
            prompt(f"enable_thinking={false}")
    with pytest.raises(ValueError, match="write name=value"):
        prompt("enable_thinking")
    assert chat_options(("a=1", "b=x y", "c=true")) == {"a": 1, "b": "x y", "c": True}


def test_an_epoch_visits_every_question_once_and_the_next_in_another_order():
    tokenizer = arithmetic.make_tokenizer()
    questions, report = load_questions("miniature", tokenizer, Config(), "train")
    assert report.startswith(
        "miniature: 2048 questions (0 dropped without a ground truth, 0 longer"
    )
    assert len(load_questions("miniature", tokenizer, Config(), "test", limit=5)[0]) == 5

    def order(step, seed=3):
        return [q.index for q in data.questions_of_step(questions, step, 500, seed)]

    first = [i for step in range(4) for i in order(step)]  # 4 steps an epoch, 48 left over
    assert len(set(first)) == 2000 and order(4) != order(0)
    assert order(5) == order(5) != order(5, seed=4)
