"""Files of questions, pairs and last words: what is read of them, and which rows are refused."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
from scorer_support import write_rows  # noqa: E402

from pyalign._options import OptionError  # noqa: E402
from pyalign.evaluation import (  # noqa: E402
    LastWord,
    Question,
    choice_metrics,
    last_word_examples,
    read_last_words,
    read_multiple_choice,
    read_pairs,
)

ROW = {"context": "Q: 2 + 2 = ?\nA:", "choices": ["3", "4"], "label": 1}
SHARED = Path(os.environ.get("PYALIGN_EVALUATION_DATA", "../shared/data"))


def test_the_own_format_and_its_other_names(tmp_path: Path):
    rows = [ROW, {"question": "q ", "choices": ["a", " b", "c"], "answer": [0, 2], "subset": "s"}]
    expected = [
        Question(ROW["context"], ("3", "4"), (False, True), continuations=(" 3", " 4")),
        Question("q ", ("a", " b", "c"), (True, False, True), "s", ("a", " b", "c")),
    ]
    paths = [
        write_rows(tmp_path / "a.jsonl", rows),
        tmp_path / "a.jsonl.gz",
        tmp_path / "a.json",
        tmp_path / "a.parquet",
    ]
    paths[1].write_bytes(gzip.compress(paths[0].read_bytes()))
    paths[2].write_text(json.dumps(rows))
    column = [{**row, "answer": None, "label": None} | {"label": [1]} for row in rows[:1]]
    parquet.write_table(pyarrow.Table.from_pylist(column), paths[3])
    for path in paths[:3]:
        assert read_multiple_choice(path) == expected
    assert read_multiple_choice(paths[3]) == expected[:1]


def test_a_space_joins_unless_one_is_there():
    choices = ("a", " b", "\nc")
    targets = (True, False, False)
    assert Question("q:", choices, targets).continuations == (" a", " b", "\nc")
    assert Question("q: ", choices, targets).continuations == ("a", " b", "\nc")
    assert Question("", choices, targets).continuations == ("a", " b", "\nc")


def test_formats_are_put_around_question_and_choice(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [{**ROW, "context": "2 + {question}?"}])
    (found,) = read_multiple_choice(path, question_format="Human: {question}\n\nAssistant:", choice_format=" {choice}.")
    assert found.context == "Human: 2 + {question}?\n\nAssistant:"
    assert found.choices == ("3", "4")
    assert found.continuations == (" 3.", " 4.")


def test_subsets_come_from_a_field_or_the_files(tmp_path: Path):
    one = write_rows(tmp_path / "one.jsonl", [{**ROW, "kind": "k"}, {**ROW, "subset": "s", "kind": 7}])
    two = write_rows(tmp_path / "two.jsonl", [{**ROW, "kind": "k"}])
    assert [q.subset for q in read_multiple_choice(one)] == [None, "s"]
    assert [q.subset for q in read_multiple_choice([one, two])] == ["one", "s", "two"]
    assert [q.subset for q in read_multiple_choice([one, two], subset="kind")] == ["k", "7", "k"]
    with pytest.raises(OptionError, match=r"one\.jsonl:1: it has no 'topic'; wanted the subset of each row"):
        read_multiple_choice(one, subset="topic")


TASK = {
    "task_prefix": "Answer.\n",
    "example_input_prefix": "\nHuman: ",
    "example_output_prefix": "\nAssistant:",
    "append_choices_to_input": False,
    "examples": [{"input": "hi", "target_scores": {"hello": 1, "go away": 0, "hey": 0.5}}],
}


def test_big_bench_tasks(tmp_path: Path):
    path = tmp_path / "polite.json"
    path.write_text(json.dumps(TASK))
    (found,) = read_multiple_choice(path)
    assert found == Question(
        "Answer.\n\nHuman: hi\nAssistant:", ("hello", "go away", "hey"), (True, False, True), "polite"
    )
    (formatted,) = read_multiple_choice(path, question_format="<{question}>")
    assert formatted.context == "<hi>"


def test_big_bench_defaults_list_the_choices_so_that_their_order_tells_nothing(tmp_path: Path):
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"examples": [{"input": "hi", "target_scores": {"yes": 1, "no": 0}}]}))
    (found,) = read_multiple_choice(path)
    assert found.context == "\nQ: hi\n  choice: no\n  choice: yes\nA: "
    assert found.continuations == ("yes", "no")


BAD = [
    ("nonsense", "it is not JSON"),
    ("[1]", r"got \[1\]; wanted an object with context \(or question\), choices, label \(or answer\)"),
    ('{"context": "a", "choices": ["b", "c"]}', "got the fields context, choices; wanted context"),
    ('{"context": "a", "choices": "b", "label": 0}', "choices: got 'b'; wanted a list of texts"),
    ('{"context": "a", "choices": ["b", ""], "label": 0}', r"choices\[1\]: got ''; wanted a text"),
    ('{"context": "a", "choices": ["b", "b"], "label": 0}', "choices: got the same text twice; wanted different ones"),
    ('{"context": "a", "choices": ["b"], "label": 0}', "choices: got 1; wanted two or more"),
    ('{"context": 1, "choices": ["b", "c"], "label": 0}', "context: got 1; wanted a text"),
    ('{"context": "a", "choices": ["b", "c"], "label": 2}', "label: got 2; wanted an index from 0 to 1"),
    ('{"context": "a", "choices": ["b", "c"], "label": true}', "label: got True; wanted an index"),
    ('{"context": "a", "choices": ["b", "c"], "label": "b"}', "label: got 'b'; wanted an index"),
    ('{"context": "a", "choices": ["b", "c"], "label": [0, 1]}', "targets: got 2 right choices of 2; wanted some"),
    (
        '{"context": "a", "choices": ["b", "c"], "label": 0, "subset": "overall"}',
        "subset: got 'overall', which stands for all",
    ),
    (r'{"context": "a", "choices": ["\ud83d", "c"], "label": 0}', r"choices\[0\]: got half a character at 0"),
    (r'{"context": "\ud83d", "choices": ["b", "c"], "label": 0}', "context: got half a character at 0"),
]


def test_malformed_rows_are_listed_with_their_lines(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(ROW), *(line for line, _ in BAD)]))
    with pytest.raises(OptionError) as caught:
        read_multiple_choice(path)
    message = str(caught.value)
    assert f"{len(BAD)} of {len(BAD) + 1} rows are malformed:" in message
    for number, (_, problem) in enumerate(BAD, 2):
        assert re.search(rf"a\.jsonl:{number}: {problem}", message), (number, problem, message)


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ({"input": "hi", "target": "hello"}, "got an example without input and target_scores"),
        ({"input": "hi", "target_scores": {"a": "1", "b": 0}}, "target_scores: got '1' for 'a'; wanted a number"),
        ({"input": "hi", "target_scores": {"a": 0, "b": 0}}, "targets: got 0 right choices of 2; wanted some"),
        (7, "got an example without input and target_scores"),
    ],
)
def test_malformed_examples_are_listed(tmp_path: Path, example: Any, problem: str):
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"examples": [example]}))
    with pytest.raises(OptionError, match=f"task.json, example 0: {problem}"):
        read_multiple_choice(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question_format": "Human:"}, "question_format: got 'Human:'; wanted a text with {question} in it"),
        ({"choice_format": "x"}, "choice_format: got 'x'; wanted a text with {choice} in it"),
    ],
)
def test_formats_without_a_place_are_refused(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        read_multiple_choice(write_rows(tmp_path / "a.jsonl", [ROW]), **options)


def test_missing_and_empty_files(tmp_path: Path):
    with pytest.raises(OptionError, match=r"data: .*no\.jsonl is not a file"):
        read_multiple_choice(tmp_path / "no.jsonl")
    (tmp_path / "a.csv").touch()
    with pytest.raises(OptionError, match=r"data: got .*a\.csv; wanted \*\.jsonl"):
        read_multiple_choice(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(OptionError, match=r"data: .*a\.jsonl: no row in it"):
        read_multiple_choice(tmp_path / "a.jsonl")


# ---- Pairs ----


def test_pairs_begin_where_dialogues_differ(tmp_path: Path):
    turn = "\n\nAssistant:"
    rows = [
        {"chosen": f"\n\nHuman: hi{turn} hello", "rejected": f"\n\nHuman: hi{turn} go away", "kind": "a"},
        {"prompt": "q", "chosen": "yes", "rejected": " no", "kind": "b"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    one, other = read_pairs(path, subset="kind")
    assert one == Question(f"\n\nHuman: hi{turn}", (" hello", " go away"), (True, False), "a", (" hello", " go away"))
    assert other.continuations == ("yes", " no")  # as the file has them
    (formatted, _) = read_pairs(path, question_format="{question}!", choice_format="{choice}.")
    assert (formatted.context[-1], formatted.continuations) == ("!", (" hello.", " go away."))


def test_pairs_of_messages_and_other_rows_are_refused(tmp_path: Path):
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": [user], "chosen": [answer], "rejected": "no"}] * 2)
    with pytest.raises(OptionError, match="got text and messages"):
        read_pairs(path)
    path = write_rows(tmp_path / "b.jsonl", [{"prompt": [user], "chosen": [answer], "rejected": [answer]}])
    with pytest.raises(OptionError, match=r"row 0: got messages; wanted texts .pyalign score reads conversations"):
        read_pairs(path)
    path = write_rows(tmp_path / "c.jsonl", [{"prompt": "p", "responses": ["a"]}])
    with pytest.raises(OptionError, match="got rows with prompt, responses; wanted chosen and rejected"):
        read_pairs(path)


# ---- Last words ----


def test_last_words_keep_the_texts_own_space_and_leave_out_what_closes_it():
    texts = ["It was late, and he\n went  home.\u201d\n", "They don\u2019t", "one", "... 1, 2"]
    assert last_word_examples(texts, subset="s") == [
        LastWord("It was late, and he\n went", "  home", "s"),
        LastWord("They", " don\u2019t", "s"),
        LastWord("... 1,", " 2", "s"),
    ]
    assert last_word_examples("a well-known fact-check!") == [LastWord("a well-known", " fact-check")]


def test_last_words_behind_enough_and_not_too_many_others():
    text = "a b c d e\n\nf g\n\nh i j"
    assert last_word_examples(text) == [LastWord("a b c d e\n\nf g\n\nh i", " j")]
    pieces = last_word_examples(text, separator="\n\n", min_context_words=2)
    assert pieces == [LastWord("a b c d", " e"), LastWord("h i", " j")]
    assert last_word_examples(text, separator="\n\n", limit=2) == [LastWord("a b c d", " e"), LastWord("f", " g")]
    assert last_word_examples("a b c d e", max_context_words=2) == [LastWord("c d", " e")]


def test_last_words_of_files(tmp_path: Path):
    (tmp_path / "book.txt").write_text("one two three.\n\nfour five")
    write_rows(tmp_path / "rows.jsonl", [{"text": "six seven"}, {"text": "eight"}])
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(b"nine ten"))
    found = read_last_words([tmp_path / "book.txt", tmp_path / "rows.jsonl"], separator="\n\n")
    assert [(x.target, x.subset) for x in found] == [(" three", "book"), (" five", "book"), (" seven", "rows")]
    assert read_last_words(tmp_path / "book.txt.gz") == [LastWord("nine", " ten")]
    assert len(read_last_words([tmp_path / "book.txt", tmp_path / "rows.jsonl"], separator="\n\n", limit=2)) == 2
    with pytest.raises(OptionError, match="got none; wanted texts whose last word stands behind 5 or more others"):
        read_last_words(tmp_path / "rows.jsonl", min_context_words=5)
    with pytest.raises(OptionError, match=r"rows2.jsonl:1: got the fields body; wanted text"):
        read_last_words(write_rows(tmp_path / "rows2.jsonl", [{"body": "x"}]))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(OptionError, match=r"latin\.txt is not UTF-8"):
        read_last_words(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_context_words": 0}, "min_context_words: got 0; wanted an int >= 1"),
        ({"min_context_words": 3, "max_context_words": 2}, "max_context_words: got 2; wanted an int >= 3"),
        ({"limit": 0}, "limit: got 0; wanted an int >= 1"),
        ({"separator": ""}, "separator: got ''; wanted None or a text to cut at"),
    ],
)
def test_last_word_options_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        last_word_examples("a b c", **options)


# ---- Real files, where they are ----


def test_hhh_and_truthful_qa():
    paths = sorted((SHARED / "hhh_alignment").glob("*.json"))
    if not paths:
        pytest.skip(f"{SHARED}/hhh_alignment is not there; PYALIGN_EVALUATION_DATA names its directory")
    questions = read_multiple_choice(paths)
    names = [q.subset for q in questions]
    assert {name: names.count(name) for name in names} == {"harmless": 58, "helpful": 59, "honest": 61, "other": 43}
    assert all(len(q.choices) == 2 and q.context.startswith("\nHuman: ") for q in questions)
    assert all(q.continuations == tuple(" " + text for text in q.choices) for q in questions)
    # The length baseline that the paper's readers report counts ties as wrong.
    longer = [len(q.choices[q.targets.index(True)]) - len(q.choices[q.targets.index(False)]) for q in questions]
    assert (sum(d > 0 for d in longer), sum(d == 0 for d in longer)) == (139, 2)
    assert 139 / len(questions) == pytest.approx(0.629, abs=5e-4)
    metrics = choice_metrics([[len(choice) for choice in q.choices] for q in questions], [q.targets for q in questions])
    assert metrics["accuracy"].mean() == pytest.approx(140 / 221)
    truthful = read_multiple_choice(SHARED / "truthful_qa_mc.json")
    assert len(truthful) == 299
    assert all(sum(q.targets) == 1 for q in truthful)
    assert truthful[0].context.startswith("Q: What is human life expectancy")
    assert truthful[0].context.endswith("\n\nQ: What happens to you if you eat watermelon seeds?\nA: ")


def test_hh_rlhf():
    path = SHARED / "hh_rlhf_harmless_base_test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; PYALIGN_EVALUATION_DATA names its directory")
    questions = read_pairs(path)
    assert len(questions) == 2312
    assert all(q.context.endswith("\n\nAssistant:") and q.targets == (True, False) for q in questions)
    longer = [len(q.choices[0]) > len(q.choices[1]) for q in questions]
    assert sum(longer) / len(longer) == pytest.approx(0.443, abs=5e-3)
