"""Prompts and responses into token sequences, which tokens count, and what is cut where they are too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from pyalign._models import leading_bos
from pyalign._options import OptionError, one_of

Message: TypeAlias = Mapping[str, Any]
Text: TypeAlias = "str | Sequence[Message]"

TOKENIZATIONS = ("together", "apart")
TRUNCATIONS = ("prompt", "drop")


class ResponseSet(NamedTuple):
    """A prompt and the responses to it, as texts or as lists of chat messages."""

    prompt: Text
    responses: Sequence[Text]


@dataclass
class TokenGroup:
    """The token sequences of one response set."""

    sequences: list[list[int]]  # prompt and response, one per response
    starts: list[int]  # where the tokens begin that count
    dropped: bool = False  # too long, and not to be scored

    @property
    def counts(self) -> list[int]:
        """How many tokens of each response count."""
        return [len(s) - start for s, start in zip(self.sequences, self.starts, strict=True)]


@dataclass
class Truncation:
    """What had to be cut, for the summary."""

    prompts: int = 0
    prompt_tokens: int = 0
    responses: int = 0
    response_tokens: int = 0
    dropped: int = 0

    def add(self, other: Truncation) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class TokenOptions:
    """How texts become tokens.

    Raises:
        OptionError: an option out of range.
    """

    tokenization: str = "together"
    append_eos: bool = False
    max_length: int | None = None
    truncation: str = "prompt"
    null_prompt: str = ""
    prefix: str = ""

    def __post_init__(self) -> None:
        one_of("tokenization", self.tokenization, TOKENIZATIONS)
        one_of("truncation", self.truncation, TRUNCATIONS)
        if self.max_length is not None and (isinstance(self.max_length, bool) or self.max_length < 2):
            raise OptionError("max_length", f"got {self.max_length}; wanted at least 2, or None")


@dataclass
class Encoded:
    """A window's response sets as tokens."""

    groups: list[TokenGroup]
    nulls: list[TokenGroup]  # the same responses after the null prompt; empty unless they are asked for
    truncation: Truncation = field(default_factory=Truncation)


class Encoder:
    """Tokenises response sets.

    "together": prompt + response is tokenised as one text, which is how a model has read its training texts. A response
    begins at the first token in which that differs from the tokens of the prompt alone: a token that spans the boundary
    counts as the response's. "apart": both are tokenised on their own and put one after the other; the boundary is
    where it was drawn, though no text the model has seen may be cut like that.

    Messages become text by the tokenizer's chat template, the prompt's with the opening of the assistant's turn. What
    the template puts behind the response (the end of the turn) is counted as the response's.

    The prefix is tokenised by itself and stands behind BOS in front of every prompt, the null prompt too, whose own
    tokens
    stay what they are without it: context distillation's teacher reads its prompt so.

    Args:
        specials: leave special tokens to the tokenizer, as reward models were trained, and read whole texts alone.
            Otherwise a text begins with the tokenizer's BOS if it is its habit, and where nothing stands in front of a
            response with BOS or, failing that, EOS, so that its first token has a probability.
    """

    def __init__(self, tokenizer: Any, options: TokenOptions, *, specials: bool):
        self.tokenizer = tokenizer
        self.options = options
        self.specials = specials
        if specials and options.tokenization == "apart":
            raise OptionError("tokenization", "got 'apart'; wanted 'together': a reward model reads one text")
        self._ids_of_specials: frozenset[int] = frozenset(tokenizer.all_special_ids)
        bos = leading_bos(tokenizer)
        prefix: list[int] = self._tokenize([options.prefix])[0] if options.prefix else []
        if prefix and specials:
            raise OptionError("prefix", "got a text; wanted none: a reward model reads prompts as it was trained to")
        self._prefixed = bool(prefix)
        self._lead = ([] if bos is None else [bos]) + prefix
        if options.max_length is not None and len(self._lead) >= options.max_length:
            given = f"got {len(self._lead)} tokens"
            raise OptionError("prefix", f"{given}; wanted fewer than {options.max_length}, which a sequence may have")
        self._eos: int | None = tokenizer.eos_token_id
        if options.append_eos and self._eos is None:
            raise OptionError("append_eos", "got True; wanted a tokenizer that has an end-of-sequence token")

    def encode(self, items: Sequence[ResponseSet], *, nulls: bool = False) -> Encoded:
        """All of ``items`` as tokens, in one call of the tokenizer."""
        texts: dict[bool, list[str]] = {False: [], True: []}  # written by a chat template, or not
        plans: list[tuple[bool, int, int]] = []  # the first of an item's texts, and how many responses
        for item in items:
            prompt, wholes, chat = self._texts(item)
            plans.append((chat, len(texts[chat]), len(wholes)))
            together = self.options.tokenization == "together"
            texts[chat] += [prompt, *(wholes if together else [whole[len(prompt) :] for whole in wholes])]
        ids = {chat: self._tokenize(texts[chat], self.specials and not chat) for chat in texts}
        result = Encoded([], [])
        lead = self._opening(self._tokenize([self.options.null_prompt])[0]) if nulls else []
        for chat, first, n in plans:
            group = self._group(ids[chat][first], ids[chat][first + 1 : first + 1 + n], chat)
            result.groups.append(group)
            result.truncation.add(self._truncate(group, len(lead)))
        if nulls:
            for group in result.groups:
                tails = [s[start:] for s, start in zip(group.sequences, group.starts, strict=True)]
                after = [lead + tail for tail in tails]
                result.nulls.append(TokenGroup(after, [len(lead)] * len(after), group.dropped))
        return result

    def _tokenize(self, texts: list[str], specials: bool = False) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=specials, verbose=False)["input_ids"] if texts else []

    def _opening(self, prompt: list[int], *, chat: bool = False) -> list[int]:
        """``prompt`` with what has to stand in front: at least one token, from which the next is predicted."""
        ids = prompt if chat else self._lead + prompt
        if ids:
            return ids
        bos = self.tokenizer.bos_token_id
        start = bos if bos is not None else self._eos
        if start is None:
            raise OptionError(
                "prompt",
                "got an empty one, and the tokenizer has neither a BOS nor an EOS token to begin with; wanted a text",
            )
        return [start]

    def _group(self, prompt: list[int], others: list[list[int]], chat: bool) -> TokenGroup:
        sequences: list[list[int]] = []
        starts: list[int] = []
        for ids in others:
            if self.specials:
                whole, start = ids, shared_length([prompt, ids])
            elif self.options.tokenization == "together":
                cut = shared_length([prompt, ids])
                opening = self._opening(ids[:cut], chat=chat)
                whole, start = opening + ids[cut:], len(opening)
            else:
                opening = self._opening(prompt, chat=chat)
                whole, start = opening + ids, len(opening)
            if self.options.append_eos and self._eos is not None and whole[-1:] != [self._eos]:
                whole = [*whole, self._eos]
            sequences.append(whole)
            starts.append(start)
        return TokenGroup(sequences, starts)

    def _texts(self, item: ResponseSet) -> tuple[str, list[str], bool]:
        """The prompt, prompt + response for every response, and whether a chat template has written them."""
        prompt, responses = item
        if isinstance(prompt, str) and all(isinstance(r, str) for r in responses):
            return prompt, [prompt + r for r in responses if isinstance(r, str)], False
        if self._prefixed:
            raise OptionError("prefix", "got a text, and prompts that are messages; wanted prompts that are texts")
        if not getattr(self.tokenizer, "chat_template", None):
            raise OptionError("prompt", "got messages, but the tokenizer has no chat template; wanted text")
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        wholes: list[str] = []
        for response in responses:
            after = (
                [{"role": "assistant", "content": response}]
                if isinstance(response, str)
                else [dict(m) for m in response]
            )
            wholes.append(self.tokenizer.apply_chat_template(before + after, tokenize=False))
        opening: str = self.tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        # Some templates rewrite earlier turns once there is an answer: what all texts share is the prompt.
        return opening[: shared_length([opening, *wholes])], wholes, True

    def _truncate(self, group: TokenGroup, null: int) -> Truncation:
        """Cut ``group`` to ``max_length``: the prompt from its beginning, the same for all responses, then their ends.

        A leading BOS (or [CLS]) stays, and so do the prefix and a closing special token. Responses also fit behind a
        null prompt of
        ``null`` tokens.
        """
        limit = self.options.max_length
        if limit is None or not group.sequences:
            return Truncation()
        if null >= limit:
            raise OptionError("null_prompt", f"got {null} tokens; wanted fewer than {limit}, which a sequence may have")
        over = max(map(len, group.sequences)) - limit
        if over <= 0 and max(group.counts) <= limit - null:
            return Truncation()
        if self.options.truncation == "drop":
            group.dropped = True
            return Truncation(dropped=1)
        first = group.sequences[0]
        special = 1 if first and first[0] in self._ids_of_specials else 0
        lead = len(self._lead) if self._prefixed else special
        # A response's first token needs one in front of it, unless it is the whole text that is scored.
        keep = lead if self.specials else max(lead, 1)
        cut = max(min(over, min(group.starts) - keep), 0)
        result = Truncation(prompts=int(cut > 0), prompt_tokens=cut)
        for i, sequence in enumerate(group.sequences):
            sequence = sequence[:lead] + sequence[lead + cut :]
            too_many = max(len(sequence) - limit, len(sequence) - (group.starts[i] - cut) - (limit - null))
            if too_many > 0:
                closing = sequence[-1:] if sequence[-1] in self._ids_of_specials else []
                sequence = sequence[: len(sequence) - too_many - len(closing)] + closing
                result.responses += 1
                result.response_tokens += too_many
            group.sequences[i] = sequence
            group.starts[i] = min(group.starts[i] - cut, len(sequence))
        return result


def shared_length(sequences: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    first, last = min(sequences), max(sequences)  # in lexicographic order: what these share, all share
    length = min(len(first), len(last))
    return next((i for i in range(length) if first[i] != last[i]), length)
