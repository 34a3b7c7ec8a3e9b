"""``PairScorer`` against a plain loop over sequences: every score, on models of many kinds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

transformers = pytest.importorskip("transformers")
from scorer_support import CAUSAL, flat, make_bert, make_items, make_model, make_tokenizer, token_logprobs  # noqa: E402

from pyalign import PairScorer  # noqa: E402
from pyalign._options import JobError, OptionError  # noqa: E402
from pyalign.pair_scorer import models, scorer  # noqa: E402
from pyalign.pair_scorer.batches import Sharing, make_batches  # noqa: E402
from pyalign.pair_scorer.prefetch import prefetched  # noqa: E402
from pyalign.pair_scorer.tokens import Encoder, ResponseSet, TokenGroup, TokenOptions  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_thread")

ITEMS = make_items()
NULL = "Assistant:"


def loop(model: Any, tokenizer: Any, items: list[ResponseSet], score: str, reference: Any = None) -> torch.Tensor:
    """The scores of ``items`` one sequence at a time; single bytes, so no token spans a boundary."""
    results: list[float] = []
    for prompt, responses in items:
        before = tokenizer(prompt)["input_ids"]
        for response in responses:
            ids = before + tokenizer(response, add_special_tokens=False)["input_ids"]
            logprobs = token_logprobs(model, ids, len(before))
            value = logprobs.mean() if score == "mean_logprob" else logprobs.sum()
            if score == "information":
                null = tokenizer(NULL)["input_ids"]
                value -= token_logprobs(model, null + ids[len(before) :], len(null)).sum()
            if score == "dpo":
                value = 0.3 * (value - token_logprobs(reference, ids, len(before)).sum())
            results.append(float(value))
    return torch.tensor(results, dtype=torch.float64)


def options_of(score: str, reference: Any) -> dict[str, Any]:
    return {"information": {"null_prompt": NULL}, "dpo": {"reference": reference, "beta": 0.3}}.get(score, {})


# ---- Scores ----


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("score", ["mean_logprob", "sum_logprob", "information", "dpo"])
def test_scores_are_those_of_a_loop_over_sequences(score: str, bos: bool):
    model, tokenizer, reference = make_model("llama").double(), make_tokenizer(bos=bos), make_model("llama", seed=1)
    reference = reference.double()
    found = PairScorer(model, tokenizer, score=score, **options_of(score, reference))
    assert found.shares_prefix
    assert found.notes == []
    expected = loop(model, tokenizer, ITEMS, score, reference)
    torch.testing.assert_close(flat(found(ITEMS)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_kind_of_model_gives_its_own_scores(name: str):
    """Some sequences are longer than the windows of 24 tokens and the 24 from which on dynamic positions change."""
    model, tokenizer = make_model(name).double(), make_tokenizer()
    found = PairScorer(model, tokenizer, score="sum_logprob")
    assert found.shares_prefix == CAUSAL[name][2]
    assert bool(found.notes) != found.shares_prefix
    items = [ResponseSet("", (" ab", " abc", "d")), *ITEMS]
    got = flat(found(items))
    expected = loop(model, make_tokenizer(bos=True), items[:1], "sum_logprob")
    expected = torch.cat([expected, loop(model, tokenizer, ITEMS, "sum_logprob")])
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)  # rotary angles are float32, and per length
    assert not any("head" in note for note in found.notes)


def test_float32_agrees_to_1e_5():
    model, tokenizer = make_model("llama"), make_tokenizer()
    exact = loop(make_model("llama").double(), tokenizer, ITEMS, "mean_logprob")
    for share_prefix in (True, False):
        got = flat(PairScorer(model, tokenizer, share_prefix=share_prefix)(ITEMS))
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=0)


def test_a_head_that_cannot_be_told_apart_is_run_whole():
    class Odd(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x[..., :1] ** 2 * torch.linspace(0, 1, self.out_features, dtype=x.dtype)

    model, tokenizer = make_model("llama").double(), make_tokenizer()
    odd = Odd(32, 270, bias=False).double()
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    found = PairScorer(model, tokenizer)
    assert "could not be told apart" in found.notes[0]
    torch.testing.assert_close(flat(found(ITEMS)), loop(model, tokenizer, ITEMS, "mean_logprob"), rtol=1e-9, atol=0)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rewards_are_the_models_outputs(name: str, labels: int):
    model = make_model(name, head="ForSequenceClassification", num_labels=labels).double()
    tokenizer = make_tokenizer(bos=True)
    label = None if labels == 1 else 2
    found = PairScorer(model, tokenizer, label=label)
    assert (found.score, found.shares_prefix, found.notes) == ("reward", True, [])
    texts = [prompt + response for prompt, responses in ITEMS for response in responses]
    with torch.no_grad():
        expected = [
            model(input_ids=tokenizer(t, return_tensors="pt")["input_ids"]).logits[0, label or 0] for t in texts
        ]
    torch.testing.assert_close(flat(found(ITEMS)), torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_a_model_that_reads_both_ways_reads_whole_sequences():
    model, tokenizer = make_bert().double(), make_tokenizer()
    found = PairScorer(model, tokenizer)
    assert not found.shares_prefix
    assert "both directions" in found.notes[0]
    texts = [prompt + response for prompt, responses in ITEMS for response in responses]
    with torch.no_grad():
        expected = [model(input_ids=tokenizer(t, return_tensors="pt")["input_ids"]).logits[0, 0] for t in texts]
    torch.testing.assert_close(flat(found(ITEMS)), torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_pairs_come_as_two_tensors():
    model, tokenizer = make_model("llama").double(), make_tokenizer()
    prompts, one, other = ["ab", "c"], [" d", " efg"], [" g", " hijk"]
    chosen, rejected = PairScorer(model, tokenizer).score_pairs(prompts, one, other)
    for found, responses in ((chosen, one), (rejected, other)):
        items = [ResponseSet(p, (r,)) for p, r in zip(prompts, responses, strict=True)]
        torch.testing.assert_close(found, loop(model, tokenizer, items, "mean_logprob"), rtol=1e-9, atol=0)


# ---- Batches ----


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(("token_budget", "window"), [(1, 1), (64, 5), (300, 100), (1 << 20, 3)])
def test_order_and_scores_stay_whatever_the_batches(token_budget: int, window: int, share_prefix: bool):
    model, tokenizer = make_model("llama").double(), make_tokenizer()
    expected = flat(PairScorer(model, tokenizer, share_prefix=False)(ITEMS))
    options = {"token_budget": token_budget, "window": window, "share_prefix": share_prefix}
    results = list(PairScorer(model, tokenizer, **options).stream(iter(ITEMS)))
    assert [len(r.scores) for r in results] == [len(item.responses) for item in ITEMS]
    assert [r.tokens for r in results] == [tuple(map(len, item.responses)) for item in ITEMS]
    torch.testing.assert_close(flat(results), expected, rtol=1e-9, atol=1e-9)


sequences = st.lists(st.integers(0, 1), min_size=1, max_size=12)
group_lists = st.lists(st.lists(sequences, min_size=1, max_size=5), max_size=12)


@hypothesis.given(group_lists, st.integers(1, 60), st.booleans(), st.none() | st.integers(1, 8), st.floats(0, 0.2))
def test_batches_hold_every_sequence_once_and_keep_the_budget(
    groups: list[list[list[int]]], budget: int, allowed: bool, longest: int | None, attention: float
):
    tokens = [TokenGroup(g, [0] * len(g)) for g in groups]
    batches = make_batches(tokens, budget, Sharing(allowed, longest, None, attention))
    found = [key for batch in batches for key in batch.sequences]
    assert sorted(found) == [(g, m) for g, members in enumerate(groups) for m in range(len(members))]
    for batch in batches:
        assert len(batch.rows) == 1 or batch.tokens <= budget
        assert [row.length for row in batch.rows] == sorted((row.length for row in batch.rows), reverse=True)
        tree = any(len(row.members) > 1 for row in batch.rows)
        assert allowed or not tree
        for row in batch.rows:
            members = [groups[row.group][m] for m in row.members]
            assert all(m[: row.shared] == members[0][: row.shared] for m in members)
            assert row.length == row.shared + sum(len(m) - row.shared for m in members)
            assert not tree or longest is None or max(map(len, members)) <= longest


def test_attention_across_responses_is_weighed_against_the_prompt():
    """Two responses of 1,000 tokens that share but one are two rows where attention costs something."""
    group = TokenGroup([[0] + [1] * 999, [0] + [2] * 999], [1, 1])
    rows = [len(b.rows) for b in make_batches([group], 1 << 20, Sharing(True, attention=1e-4))]
    assert rows == [2]
    assert len(make_batches([group], 1 << 20, Sharing(True))[0].rows) == 1


def test_only_tokens_that_count_meet_the_head_and_the_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = make_model("llama"), make_tokenizer()
    found = PairScorer(model, tokenizer)
    head, read = models.linear_token_logprobs, []
    monkeypatch.setattr(
        models, "linear_token_logprobs", lambda hidden, *a, **kw: read.append(len(hidden)) or head(hidden, *a, **kw)
    )
    monkeypatch.setattr(found, "_verify", lambda *_: None)  # which reads a group once more
    items = [ResponseSet("a long prompt " * 3, ("yes", "no", "perhaps"))]
    copies = []
    monkeypatch.setattr(scorer, "_Copy", lambda x: copies.append(x) or Copy(x))
    Copy = type(
        "Copy", (), {"ready": True, "__init__": lambda s, x: setattr(s, "x", x), "read": lambda s: s.x.tolist()}
    )
    found(items)
    assert read == [3 + 2 + 7]
    assert len(copies) == 1
    assert found.prepare(items).counts == (3 * 42 + 12, 42 + 12, 0, 12)


def test_rows_that_are_read_in_another_way_are_noticed(monkeypatch: pytest.MonkeyPatch):
    def everything(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        length = segments.shape[1]
        mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)
        return mask.expand(len(segments), 1, length, length)

    model, tokenizer = make_model("llama"), make_tokenizer()
    monkeypatch.setattr(models, "tree_mask", everything)
    found = PairScorer(model, tokenizer)
    assert not found.shares_prefix
    assert "tried out, it reads such rows in another way" in found.notes[0]
    monkeypatch.setattr(models._Probe, "_reads_rows", lambda *_: True)
    with pytest.raises(JobError, match=r"is read in another way when they share it .*--no-share-prefix"):
        PairScorer(model, tokenizer)(ITEMS)


def test_windows_that_no_configuration_tells_of_are_noticed():
    """GPT-Neo's local layers count the tokens of a row, which makes a difference in long rows alone."""
    config = transformers.GPTNeoConfig(
        vocab_size=270, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=48, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer = transformers.GPTNeoForCausalLM(config).double(), make_tokenizer()
    found = PairScorer(model, tokenizer)
    assert found.shares_prefix
    items = [ResponseSet("a" * 10, ("b" * 5, "c" * 6)), ResponseSet("ab" * 14, ("b" * 18, "c" * 18))]
    expected = loop(model, tokenizer, items, "mean_logprob")
    torch.testing.assert_close(flat(found(items[:1])), expected[:2], rtol=1e-6, atol=0)
    with pytest.raises(JobError, match="is read in another way"):
        found(items[1:])


def test_attention_that_takes_no_mask_is_not_given_one():
    model = make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    notes: list[str] = []
    body = models._Body(model, models._hidden_states(model.model), causal=True)
    assert not models._Probe(model).sharing(body, model.model, notes).allowed
    assert "takes no mask of its own" in notes[0]


# ---- Tokens ----


def test_a_token_across_the_boundary_is_the_responses():
    """With the merge "b c", "ab" + "cd" is a, bc, d: together the response begins at bc, apart at c."""
    tokenizer = make_tokenizer(merges=("b c",))
    model = make_model("llama").double()
    ids = {c: tokenizer(c)["input_ids"][0] for c in ("a", "b", "c", "d", "bc")}
    together = token_logprobs(model, [ids["a"], ids["bc"], ids["d"]], 1).sum()
    apart = token_logprobs(model, [ids["a"], ids["b"], ids["c"], ids["d"]], 2).sum()
    for tokenization, expected, count in (("together", together, 2), ("apart", apart, 2)):
        found = PairScorer(model, tokenizer, score="sum_logprob", tokenization=tokenization)
        (result,) = found([("ab", ["cd"])])
        assert result.tokens == (count,)
        assert result.scores[0] == pytest.approx(float(expected), rel=1e-9)
    # Beside another response the prompt's tokens may differ, and scores don't.
    (result,) = PairScorer(model, tokenizer, score="sum_logprob")([("ab", ["cd", "d"])])
    assert result.scores[0] == pytest.approx(float(together), rel=1e-9)


def test_eos_counts_as_the_last_token():
    model, tokenizer = make_model("llama").double(), make_tokenizer()
    (result,) = PairScorer(model, tokenizer, score="sum_logprob", append_eos=True)([("ab", ["c", ""])])
    ids = tokenizer("abc")["input_ids"] + [1]
    assert result.tokens == (2, 1)
    assert result.scores[0] == pytest.approx(float(token_logprobs(model, ids, 2).sum()), rel=1e-9)


def test_an_empty_response_has_no_mean_and_the_sum_of_nothing():
    model, tokenizer = make_model("llama"), make_tokenizer()
    (mean,) = PairScorer(model, tokenizer)([("ab", ["", "c"])])
    assert math.isnan(mean.scores[0])
    assert not math.isnan(mean.scores[1])
    (total,) = PairScorer(model, tokenizer, score="sum_logprob")([("ab", ["", "c"])])
    assert total.scores[0] == 0.0


def test_messages_are_written_by_the_chat_template():
    model, tokenizer = make_model("llama").double(), make_tokenizer()
    found = PairScorer(model, tokenizer, score="sum_logprob")
    user, answer = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}]
    texts = found([(user, [answer]), (user, ["yo"]), ("hi", [answer])])
    ids = tokenizer("<user>hi</s><assistant>yo</s>", add_special_tokens=False)["input_ids"]
    start = len(tokenizer("<user>hi</s><assistant>", add_special_tokens=False)["input_ids"])
    expected = float(token_logprobs(model, ids, start).sum())
    assert [t.scores[0] for t in texts] == pytest.approx([expected] * 3, rel=1e-9)
    tokenizer.chat_template = None
    with pytest.raises(OptionError, match="no chat template"):
        found([(user, ["yo"])])


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_are_cut_from_the_left_then_responses_from_the_right(bos: bool):
    tokenizer = make_tokenizer(bos=bos)
    encoder = Encoder(tokenizer, TokenOptions(max_length=8), specials=False)
    found = encoder.encode([ResponseSet("abcdef", ("xyz", "x")), ResponseSet("ab", ("0123456789",))])
    texts = [[tokenizer.decode(s) for s in group.sequences] for group in found.groups]
    if bos:  # which stays in front, and lets a response without a prompt be scored
        assert texts == [["<s>cdefxyz", "<s>cdefx"], ["<s>0123456"]]
        cut = {"prompts": 2, "prompt_tokens": 4, "responses": 1, "response_tokens": 3, "dropped": 0}
    else:
        assert texts == [["bcdefxyz", "bcdefx"], ["b0123456"]]
        cut = {"prompts": 2, "prompt_tokens": 2, "responses": 1, "response_tokens": 3, "dropped": 0}
    assert vars(found.truncation) == cut
    assert [group.counts for group in found.groups] == [[3, 1], [7]]


def test_responses_fit_behind_the_null_prompt_too():
    encoder = Encoder(make_tokenizer(), TokenOptions(max_length=8, null_prompt="null"), specials=False)
    found = encoder.encode([ResponseSet("a", ("012345", "0"))], nulls=True)
    decode = encoder.tokenizer.decode
    assert [decode(s) for s in found.groups[0].sequences] == ["a0123", "a0"]
    assert [decode(s) for s in found.nulls[0].sequences] == ["null0123", "null0"]
    assert found.nulls[0].starts == [4, 4]
    encoder = Encoder(make_tokenizer(), TokenOptions(max_length=4, null_prompt="null"), specials=False)
    with pytest.raises(OptionError, match="null_prompt: got 4 tokens; wanted fewer than 4"):
        encoder.encode([ResponseSet("a", ("0",))], nulls=True)


def test_what_is_too_long_may_be_dropped():
    model, tokenizer = make_model("llama"), make_tokenizer()
    found = PairScorer(model, tokenizer, max_length=8, truncation="drop")
    items = [ResponseSet("abcdef", ("xyz", "x")), ResponseSet("ab", ("c", "d"))]
    dropped, kept = found(items)
    assert all(map(math.isnan, dropped.scores))
    assert kept.scores == pytest.approx(PairScorer(model, tokenizer)(items)[1].scores, rel=1e-5)
    assert found.prepare(items).truncation.dropped == 1


def test_a_reward_models_text_keeps_its_end():
    tokenizer = make_tokenizer(bos=True)
    encoder = Encoder(tokenizer, TokenOptions(max_length=6, append_eos=True), specials=True)
    found = encoder.encode([ResponseSet("abcdef", ("xy", "0123456"))])
    assert [tokenizer.decode(s) for s in found.groups[0].sequences] == ["<s>xy</s>", "<s>0123</s>"]


def test_what_the_model_reads_is_the_longest_by_default():
    found = PairScorer(make_model("llama", max_position_embeddings=16), make_tokenizer())
    assert found.options.max_length == 16
    assert (
        found.prepare([ResponseSet("a" * 30, ("b",))]).groups[0].sequences[0][-1]
        == found.tokenizer("b")["input_ids"][0]
    )


# ---- What it refuses ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "logprob"}, "score: got 'logprob'; wanted one of auto, mean_logprob, sum_logprob, information"),
        ({"score": "dpo"}, "reference: got none; wanted the reference model"),
        ({"beta": 0.1}, "beta: got 0.1; wanted none with score 'mean_logprob', it is of 'dpo' alone"),
        ({"null_prompt": ""}, "null_prompt: got ''; wanted none with score"),
        ({"label": 0}, "label: got 0; wanted none"),
        ({"token_budget": 0}, "token_budget: got 0; wanted at least 1"),
        ({"window": 0}, "window: got 0; wanted at least 1"),
        ({"prefetch": 0}, "prefetch: got 0; wanted at least 1"),
        ({"max_length": 1}, "max_length: got 1; wanted at least 2"),
        ({"max_length": 1000}, "max_length: got 1000; wanted at most 256, what the model reads"),
        ({"truncation": "right"}, "truncation: got 'right'; wanted one of prompt, drop"),
        ({"tokenization": "none"}, "tokenization: got 'none'; wanted one of together, apart"),
        ({"dtype": "float32"}, "dtype: got 'float32'; wanted None: the model given is loaded already"),
        ({"device": "cpu"}, "device: got 'cpu'; wanted None"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        PairScorer(make_model("llama"), make_tokenizer(), **options)


def test_models_are_refused_that_cannot_give_the_score():
    tokenizer = make_tokenizer()
    with pytest.raises(OptionError, match="tokenizer: got None; wanted that of the loaded model"):
        PairScorer(make_model("llama"))
    three = make_model("llama", head="ForSequenceClassification", num_labels=3)
    with pytest.raises(OptionError, match="label: got None; wanted 0 to 2, one of the model's 3 outputs"):
        PairScorer(three, tokenizer)
    with pytest.raises(OptionError, match="label: got 3; wanted 0 to 2"):
        PairScorer(three, tokenizer, label=3)
    with pytest.raises(OptionError, match="tokenization: got 'apart'; wanted 'together'"):
        PairScorer(three, tokenizer, label=0, tokenization="apart")
    config = transformers.BertConfig(
        vocab_size=270, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8
    )
    with pytest.raises(OptionError, match="reads what comes after a token too; wanted a causal language model"):
        PairScorer(transformers.BertForMaskedLM(config), tokenizer)
    with pytest.raises(OptionError, match="model: nowhere is neither a directory nor a"):
        PairScorer("nowhere")
    with pytest.raises(ValueError, match="got 1 prompts, 2 chosen, 1 rejected; wanted as many of each"):
        PairScorer(make_model("llama"), tokenizer).score_pairs(["a"], ["b", "c"], ["d"])


# ---- The background thread ----


def test_work_is_prepared_ahead_and_no_further():
    made: list[int] = []

    def work() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    items = prefetched(work(), 3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3, 4]  # one taken, three ready, one in hand
    assert [next(items) for _ in range(99)] == list(range(1, 100))
    assert list(items) == []


def test_errors_of_the_thread_are_raised_where_its_work_is_taken():
    def work() -> Iterator[int]:
        yield 1
        raise KeyError("tokenizer")

    items = prefetched(work(), 2)
    assert next(items) == 1
    with pytest.raises(KeyError, match="tokenizer"):
        next(items)


def test_the_thread_ends_with_its_reader():
    before = threading.active_count()
    items = prefetched(iter(range(1000)), 1)
    assert next(items) == 0
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
