"""Models taken apart for scoring: a body whose hidden states only some rows of meet a head.

What a model does between its hidden states and its outputs, and whether it can read rows of several responses, is
tried out on a few tokens: what doesn't reproduce the model's own outputs isn't used.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyalign._models import is_plain_linear
from pyalign._options import JobError, OptionError
from pyalign.distill import topk_logprobs
from pyalign.logprob import linear_token_logprobs, sequence_logprobs, token_logprobs
from pyalign.pair_scorer.batches import BatchTensors, Sharing, collate, make_batches, tree_mask
from pyalign.pair_scorer.tokens import TokenGroup
from pyalign.scoring import reward_scores

# Relative to the largest value. A wrong mask, position or head is off by more; sums in another order aren't.
# (Models of float64 have parts that compute in float32.)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_GREEDY_ROWS = 512  # rows whose logits exist at a time


@dataclass
class _Body:
    """What computes hidden states (or, where a model can't be taken apart, its outputs)."""

    model: Any
    forward: Callable[..., Tensor]  # (B, L) and options -> (B, L, H)
    causal: bool  # no position reads a later one, so that padding on the right is never read

    def __post_init__(self) -> None:
        dynamic = any(_kind(rope) == "dynamic" for rope in _ropes(_config(self.model)))
        self._grows_beyond = _rope_limit(_config(self.model)) if dynamic else None

    def __call__(self, batch: BatchTensors) -> Tensor:
        if self._grows_beyond is not None and batch.input_ids.shape[1] > self._grows_beyond:
            # Dynamic positions stay those of the longest sequence so far until a short one comes.
            self.forward(batch.input_ids[:1, :1])
        if batch.segments is not None:
            mask = tree_mask(batch.segments, self.model.dtype)
            return self.forward(batch.input_ids, attention_mask=mask, position_ids=batch.positions)
        if self.causal:
            return self.forward(batch.input_ids)
        return self.forward(batch.input_ids, attention_mask=batch.mask.long())


@dataclass
class _Head:
    """logits = softcap(hidden @ weight.T + bias) / temperature"""

    weight: Tensor
    bias: Tensor | None
    temperature: float = 1.0
    softcap: float | None = None


@dataclass
class ScoringModel:
    """A model and how its sequences are read."""

    model: Any
    padding: int
    sharing: Sharing = field(default_factory=lambda: Sharing(False))
    notes: list[str] = field(default_factory=list)
    singly: bool = False  # it reads batches of one sequence alone
    counts = True  # its scores come from the tokens that count, not from the last one
    _body: _Body = field(init=False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context(self) -> int | None:
        """How many tokens the model reads at most, if it says so."""
        return _context(_config(self.model))

    def rows(self, batch: BatchTensors) -> Tensor:
        """What the head reads of the batch: (R, H), or (N, H) where scores come from last tokens."""
        where = batch.rows if self.counts else batch.last
        return self._body(batch).flatten(0, 1).index_select(0, where)

    @torch.inference_mode()
    def verify(self, group: TokenGroup) -> None:
        """Read ``group``, whose sequences share a row, in both ways.

        Raises:
            JobError: they differ.
        """
        both = [self._rows_in_order(group, sharing) for sharing in (self.sharing, Sharing(False, alone=0))]
        error, tolerance = _distance(*both), TOLERANCE[self.dtype]
        if not error <= tolerance:
            raise JobError(
                f"a prompt of {len(group.sequences)} responses, up to {max(map(len, group.sequences))} tokens, is read "
                f"in another way when they share it (off by {error:.1g} of the largest value, more than "
                f"{tolerance:.0e}); share_prefix=False (--no-share-prefix) reads each of them whole"
            )

    def _rows_in_order(self, group: TokenGroup, sharing: Sharing) -> Tensor:
        """The rows of the sequences of ``group``, one after the other."""
        found: dict[tuple[int, int], Tensor] = {}
        for batch in make_batches([group], 1 << 30, sharing):
            tensors = collate(batch, [group], padding=self.padding, count=self.counts).to(self.device)
            counts = [group.counts[m] if self.counts else 1 for _, m in batch.sequences]
            found |= zip(batch.sequences, self.rows(tensors).split(counts), strict=True)
        return torch.cat([found[key] for key in sorted(found)])


class CausalScorer(ScoringModel):
    """Log-probs of the tokens that count.

    Raises:
        OptionError: the model is no causal language model.
    """

    def __init__(self, model: Any, *, padding: int, share_prefix: bool):
        super().__init__(model, padding)
        probe = _Probe(model)
        module, forward, self._head = self._take_apart(probe)
        self._body = _Body(model, forward, causal=True)
        if not probe.is_causal(forward):
            raise OptionError(
                "model",
                f"{type(model).__name__} reads what comes after a token too; wanted a causal language model, "
                "or a reward model with score 'reward'",
            )
        self.sharing = (share_prefix and probe.sharing(self._body, module, self.notes)) or not_shared(model)

    def _take_apart(self, probe: _Probe) -> tuple[Any, Callable[..., Tensor], _Head | None]:
        model = probe.model
        body, linear = model.base_model, model.get_output_embeddings()
        if body is not model and linear is not None and is_plain_linear(linear):
            forward = _hidden_states(body)
            hidden = probe.try_out(forward)
            head = None if hidden is None else _find_head(linear, _config(model), hidden, probe.logits())
            if head is not None:
                return body, forward, head
        self.notes.append(
            f"the head of {type(model).__name__} could not be told apart from it: all rows of a batch go through it"
        )
        return model, _logits(model), None

    def token_logprobs(self, batch: BatchTensors) -> Tensor:
        """(R,) of the tokens that count."""
        return self._logprobs(self.rows(batch), batch.targets)

    def _logprobs(self, rows: Tensor, targets: Tensor) -> Tensor:
        head = self._head
        if head is None:
            return token_logprobs(rows, targets)
        return linear_token_logprobs(
            rows, head.weight, targets, bias=head.bias, temperature=head.temperature, softcap=head.softcap
        )

    def likelihoods(self, batch: BatchTensors, *, greedy: bool) -> Tensor:
        """(N, 1) log P(response), and, if it is asked for, (N, 2) with 1 where greedy decoding would have written it:
        each of its tokens has the highest logit, the lowest token among equal ones."""
        rows = self.rows(batch)
        logprobs = sequence_logprobs(self._logprobs(rows, batch.targets), offsets=batch.offsets)
        if not greedy:
            return logprobs[:, None]
        misses = torch.zeros(batch.targets.shape[0] + 1, dtype=torch.int64, device=rows.device)
        for first in range(0, rows.shape[0], _GREEDY_ROWS):
            part = slice(first, first + _GREEDY_ROWS)
            logits = rows[part]
            if self._head is not None:  # its softcap and temperature keep the order
                logits = nn.functional.linear(logits, self._head.weight, self._head.bias)
            missed = topk_logprobs(logits, 1).indices[:, 0] != batch.targets[part]
            misses[first + 1 : first + 1 + missed.shape[0]] = missed
        before = misses.cumsum(0)[batch.offsets]
        return torch.stack([logprobs, (before.diff() == 0).to(logprobs.dtype)], 1)


class RewardScorer(ScoringModel):
    """The output of a sequence-classification model, read at the last token where its head is a linear one.

    Args:
        label: which of its outputs; needed where there are several.

    Raises:
        OptionError: no such label.
    """

    counts = False

    def __init__(self, model: Any, *, padding: int, share_prefix: bool, label: int | None):
        super().__init__(model, padding)
        labels = int(model.config.num_labels)
        if label is None and labels != 1:
            raise OptionError("label", f"got None; wanted 0 to {labels - 1}, one of the model's {labels} outputs")
        if label is not None and not 0 <= label < labels:
            raise OptionError("label", f"got {label}; wanted 0 to {labels - 1}, the model's outputs")
        label = label or 0
        probe = _Probe(model)
        self._label, self._head = label, None
        forward = _hidden_states(model.base_model)
        hidden = probe.try_out(forward) if model.base_model is not model else None
        causal = hidden is not None and probe.is_causal(forward)
        if hidden is not None and causal:
            self._head = self._find_head(hidden, probe.logits())
        self._body = _Body(model, forward if self._head is not None else _logits(model), causal)
        if self._head is None:
            why = "is not a linear head at the last token" if causal else "reads sequences in both directions"
            self.notes.append(f"{type(model).__name__} {why}: sequences are read whole")
            self.singly = getattr(_config(model), "pad_token_id", None) is None
            self.sharing = not_shared(model)
        else:
            self.sharing = (
                probe.sharing(self._body, model.base_model, self.notes) if share_prefix else not_shared(model)
            )

    def _find_head(self, hidden: Tensor, outputs: Tensor) -> _Head | None:
        model = self.model
        in_body = {id(m) for m in model.base_model.modules()}
        for module in model.modules():
            if id(module) in in_body or not isinstance(module, nn.Linear) or not is_plain_linear(module):
                continue
            if (module.out_features, module.in_features) != (outputs.shape[-1], hidden.shape[-1]):
                continue
            weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()  # pyright: ignore[reportUnnecessaryComparison]
            if _distance(reward_scores(hidden, weight, head_bias=bias), outputs) <= TOLERANCE[hidden.dtype]:
                return _Head(weight[self._label], None if bias is None else bias[self._label])
        return None

    def scores(self, batch: BatchTensors) -> Tensor:
        """(N,) of the batch's sequences, on its device."""
        if self._head is None:
            outputs: Tensor = self.model(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits
            return outputs[:, self._label].to(torch.promote_types(outputs.dtype, torch.float32))
        rows = self.rows(batch)
        offsets = torch.arange(rows.shape[0] + 1, device=rows.device)
        return reward_scores(rows, self._head.weight, head_bias=self._head.bias, offsets=offsets)


def _config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _hidden_states(body: Any) -> Callable[..., Tensor]:
    options = _no_cache(body)

    def forward(input_ids: Tensor, **masks: Any) -> Tensor:
        return body(input_ids=input_ids, **options, **masks).last_hidden_state

    return forward


def _logits(model: Any) -> Callable[..., Tensor]:
    options = _no_cache(model)

    def forward(input_ids: Tensor, **masks: Any) -> Tensor:
        return model(input_ids=input_ids, **options, **masks).logits

    return forward


def _no_cache(module: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def _distance(x: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    x, wanted = x.double(), wanted.double()
    return float((x - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def _find_head(linear: nn.Linear, config: Any, hidden: Tensor, logits: Tensor) -> _Head | None:
    """What makes ``logits`` of ``hidden``: ``linear``, and perhaps a softcap and a scale."""
    with torch.inference_mode():
        plain = linear(hidden).double()
    for softcap in (None, getattr(config, "final_logit_softcapping", None)):
        capped = plain if softcap is None else softcap * torch.tanh(plain / softcap)
        # The scale has many names in configurations, and one value in the logits.
        fitted = float(capped.square().sum() / (capped * logits.double()).sum())
        for temperature in (1.0, fitted):
            if 0 < temperature < math.inf and _distance(capped / temperature, logits) <= TOLERANCE[hidden.dtype]:
                return _Head(linear.weight, linear.bias, temperature, softcap)
    return None


class _Probe:
    """A few random tokens on which a model is tried out."""

    def __init__(self, model: Any):
        self.model = model
        embeddings = model.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(embeddings.num_embeddings, (64,), generator=generator)
        padding = getattr(_config(model), "pad_token_id", None)
        self._ids: list[int] = [i for i in ids.tolist() if i != padding][:48]

    def _run(self, forward: Callable[..., Tensor], ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return forward(torch.tensor([ids], device=self.model.device))

    def logits(self) -> Tensor:
        return self._run(_logits(self.model), self._ids[:12])

    def try_out(self, forward: Callable[..., Tensor]) -> Tensor | None:
        """Hidden states, if ``forward`` has any."""
        try:
            return self._run(forward, self._ids[:12])
        except (AttributeError, TypeError, ValueError):  # no last_hidden_state; arguments of another kind
            return None

    def is_causal(self, forward: Callable[..., Tensor]) -> bool:
        one, other = (self._run(forward, ids)[:, :6] for ids in (self._ids[:12], self._ids[:6] + self._ids[12:18]))
        return _distance(one, other) <= TOLERANCE[one.dtype]

    def sharing(self, body: _Body, module: Any, notes: list[str]) -> Sharing:
        """Whether ``module``, run by ``body``, reads rows of several responses as it reads each of them whole."""
        config = _config(self.model)
        problem, longest = _attention_spans(config)
        if problem is None and config._attn_implementation not in ("sdpa", "eager"):
            problem = f"attention {config._attn_implementation!r} takes no mask of its own"
        if problem is None and not {"attention_mask", "position_ids"} <= set(
            inspect.signature(module.forward).parameters
        ):
            problem = "it takes no position_ids"
        if problem is None and not self._reads_rows(body):
            problem = "tried out, it reads such rows in another way"
        if problem is not None:
            notes.append(f"{type(self.model).__name__}: prompts are not shared by their responses, because {problem}")
            return not_shared(self.model)
        weights = sum(p.numel() for p in module.parameters()) - sum(
            m.weight.numel() for m in module.modules() if isinstance(m, nn.Embedding)
        )
        attention = 2 * config.num_hidden_layers * config.hidden_size / max(weights, 1)
        return Sharing(True, longest, _rope_limit(config), attention)

    def _reads_rows(self, body: _Body) -> bool:
        ids = self._ids
        groups = [
            TokenGroup([ids[:7] + ids[7:12], ids[:7] + ids[12:15], ids[:7] + ids[15:19]], [7, 7, 7]),
            TokenGroup([ids[20:23] + ids[23:25], ids[20:23] + ids[25:31]], [3, 3]),
        ]
        (batch,) = make_batches(groups, 1 << 20, Sharing(True))
        tensors = collate(batch, groups).to(self.model.device)
        try:
            with torch.inference_mode():
                rows = body(tensors).flatten(0, 1).index_select(0, tensors.rows)
        except Exception:  # whatever a model does that can't read them
            return False
        wholes = [
            self._run(body.forward, groups[g].sequences[m])[0, groups[g].starts[m] - 1 : -1] for g, m in batch.sequences
        ]
        return _distance(rows, torch.cat(wholes)) <= TOLERANCE[rows.dtype]


def _attention_spans(config: Any) -> tuple[str | None, int | None]:
    """Why no mask of ours can be laid over all layers, or else up to which length each token reads all before it."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds: set[str] = set(getattr(config, "layer_types", None) or ())
    others = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if others:
        return f"it has layers of {', '.join(sorted(others))}", None
    spans = [
        span
        for span, kind in ((window, "sliding_attention"), (chunk, "chunked_attention"))
        if span is not None and (not kinds or kind in kinds)
    ]
    return None, min(spans, default=None)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of rotary positions, of all layers or of each kind."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [rope, *(x for x in rope.values() if isinstance(x, dict))]


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))


def _rope_limit(config: Any) -> int | None:
    """Beyond which length rotary positions depend on the longest sequence of a batch."""
    limits: list[int] = []
    for rope in _ropes(config):
        if _kind(rope) == "dynamic":
            limits.append(config.max_position_embeddings)
        elif _kind(rope) == "longrope":
            name = "original_max_position_embeddings"
            limits.append(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings)
    return min(limits, default=None)


def _context(config: Any) -> int | None:
    """How many tokens a model reads at most, if it says so."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    factors = [rope["factor"] for rope in _ropes(config) if _kind(rope) == "dynamic"]
    return longest if longest is None else int(longest * max(factors, default=1))


def not_shared(model: Any) -> Sharing:
    return Sharing(False, alone=_rope_limit(_config(model)))
