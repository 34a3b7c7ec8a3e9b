"""Losses over rows of logits that are split: every rank holds a slice of the vocabulary.

The engines' folds, merges and maps with the ranks in between. Each rank folds its slice, one collective of a few
numbers per row gathers the states, every rank merges them alike and maps its slice into its part of the gradient. So
losses are the same on all ranks, gradients are exact without a further collective, and what backward needs of the other
ranks is saved by forward. The merges, of numbers per row, are float64.

What passes between the ranks, per row:

- forward and reverse KL: each slice's two states, and its divergence of the two distributions that are conditional on
  the slice. With P_r, Q_r the masses of slice r, KL(p || q) = KL(P || Q) + sum_r P_r KL(p_r || q_r): no term is lost to
  cancellation, and one collective is enough.
- JSD and TVD: the states, and in a second collective the sums.
- top-k: the student's logits of the teacher's k entries, and the state of the rest. Then every rank has the k + 1
  categories of the row, and the engines' own loss over rows of k + 1 logits says the rest.
- log-probs and cross-entropy: the state, the target's log-prob, and what entropy and label smoothing ask for.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pyalign._backends import engine as distill_engine
from pyalign._ops_logprob import engine as logprob_engine
from pyalign._shards import ELSEWHERE, Shards, gather
from pyalign._types import LogprobResults, Options, Results, Tokens, accumulation_dtype
from pyalign.reference import distill as _reference

_IGNORED = ELSEWHERE + 1  # no number of an entry, in whose slice ever
_OUT_OF_RANGE = (1 << 63) - 1
_LOWEST = torch.finfo(torch.float32).min
_STATES, _SUMS = 5, 2


def saved_width(kind: str, k: int = 0, hard: bool = False) -> int:
    """Numbers per row that the forward pass saves for the gradient."""
    if kind == "topk_distill":
        return 4 + 2 * (k + hard)
    return _STATES + _SUMS if kind == "distill" else 3


def _merge(maxima: Tensor, sums: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax states (R, N) as one: max and sum (N,), and the log of each slice's share (R, N).

    A row that is -inf throughout has the sum NaN.
    """
    top = maxima.amax(0)
    at_top = sums * ((maxima - top) / temperature).exp()
    total = at_top.sum(0)
    total = torch.where(total > 0, total, math.nan)
    return top, total, (maxima - top) / temperature + sums.log() - total.log()


def _weighed(share: Tensor, x: Tensor) -> Tensor:
    """share * x, where a slice without a share weighs nothing whatever x is there."""
    return torch.where(share == 0, 0.0, share * x)


class SplitEngine:
    """The engine functions over this rank's slice, with the signatures of a backend's engine.

    Losses are per token (reduction "none"). A forward pass writes what its gradient will need into ``record`` (N, w),
    the rows of one call after those of the last; a later call reads them from ``saved`` and meets no other rank.
    """

    def __init__(self, backend: str, shards: Shards, *, record: Tensor | None = None, saved: Tensor | None = None):
        self.shards = shards
        self._distill, self._logprob = distill_engine(backend), logprob_engine(backend)
        self._wide = torch.float64 if backend == "cpu" else torch.float32
        self._record, self._saved, self._row = record, saved, 0

    def _rows(self, of: Tensor | None, count: int) -> Tensor | None:
        return None if of is None else of[self._row : self._row + count]

    def _keep(self, values: Tensor) -> None:
        to = self._rows(self._record, values.shape[0])
        if to is not None:
            to.copy_(values)

    # Targets and tokens

    def _targets(self, targets: Tensor, relevant: Tensor, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
        """(numbers in this slice for the kernels, safe numbers in the whole vocabulary, which are out of range)"""
        index, bad = _reference.checked_index("targets", targets, shards.vocab, relevant)
        local = torch.where(relevant, shards.local(index), _IGNORED)
        return torch.where(bad, _OUT_OF_RANGE, local), index, bad

    def _tokens(self, tokens: Tokens, count: int, shards: Shards, teacher_count: int, device: torch.device) -> Tokens:
        """The tokens as this slice's kernels know them: counted ones by mask alone, targets by local number."""
        assert tokens.reduction == "none"
        counted = _reference.counted_tokens(tokens, count, device)
        if tokens.teacher_rows is not None:
            _reference.checked_index("teacher_rows", tokens.teacher_rows, teacher_count, counted)
        targets = tokens.targets
        if targets is not None:
            targets, _, _ = self._targets(targets, counted & (targets != tokens.ignore_index), shards)
        return tokens._replace(mask=counted, labels=None, targets=targets, ignore_index=_IGNORED)

    def _at_targets(self, logits: Tensor, local: Tensor, vocab: int) -> Tensor:
        """(N,) float64 logits of targets in this slice, 0 for others, NaN for those out of range."""
        mine = (local >= 0) & (local < vocab)
        if not logits.shape[-1]:
            return torch.where(local == _OUT_OF_RANGE, math.nan, 0.0).double()
        place = torch.where(mine, local, 0).view(*logits.shape[:-1], 1)
        values = logits.gather(-1, place).reshape(-1).double()
        return torch.where(mine, values, torch.where(local == _OUT_OF_RANGE, math.nan, 0.0))

    # Distillation

    def distill(
        self,
        student: Tensor,
        teacher: Tensor,
        tokens: Tokens,
        options: Options,
        *,
        gradient: Tensor | None,
        want_loss: bool,
        want_metrics: bool,
    ) -> Results:
        shards, count = self.shards.cut(options.vocab), student.shape[:-1].numel()
        local = options._replace(vocab=shards.sizes[shards.rank])
        slices = self._tokens(tokens, count, shards, teacher.shape[:-1].numel(), student.device)
        results, saved = Results(None, None, None), self._rows(self._saved, count)
        if saved is None:
            results, saved = self._fold(student, teacher, slices, local, shards, want_metrics)
            self._keep(saved)
        if gradient is not None:
            states, sums = saved[:, :_STATES].contiguous(), saved[:, _STATES:].contiguous()
            if local.vocab:
                self._distill.distill(
                    student, teacher, slices, local, gradient=gradient, want_loss=False, want_metrics=False,
                    stage="map", states=states, sums=sums,
                )  # fmt: skip
            else:
                gradient.zero_()
        self._row += count
        return results

    def _fold(
        self, student: Tensor, teacher: Tensor, tokens: Tokens, options: Options, shards: Shards, want_metrics: bool
    ) -> tuple[Results, Tensor]:
        count, device, vocab = student.shape[:-1].numel(), student.device, options.vocab
        temperature, hard = options.temperature, options.hard_weight
        is_kl = options.divergence in ("forward_kl", "reverse_kl")

        # This slice
        states = torch.zeros(count, _STATES, dtype=torch.float64, device=device)
        within = torch.zeros(count, dtype=torch.float64, device=device)
        if vocab:
            folded = self._distill.distill(
                student, teacher, tokens, options, gradient=None, want_loss=is_kl, want_metrics=want_metrics,
                stage="fold", states=states,
            )  # fmt: skip
            within = folded.loss.double() if is_kl else within
        else:
            folded = Results(None, within, None)
            states[:, 0] = states[:, 2] = _LOWEST
        columns = [states, within[:, None]]
        if hard > 0:
            assert tokens.targets is not None
            columns.append(self._at_targets(student, tokens.targets, vocab)[:, None])
        if want_metrics:
            assert folded.entropy is not None
            leaders = (self._leader(student, vocab, shards), self._leader(teacher, vocab, shards))
            if tokens.teacher_rows is not None:
                leaders = (leaders[0], _pick(leaders[1], tokens.teacher_rows))
            columns += [folded.entropy.double()[:, None], torch.stack(leaders, -1)]

        # All slices
        everybody = gather(torch.cat(columns, -1), shards)
        student_max, student_sum, teacher_max, teacher_sum, hard_sum, within = everybody[..., :6].unbind(-1)
        s_top, s_total, log_q = _merge(student_max, student_sum, temperature)
        t_top, t_total, log_p = _merge(teacher_max, teacher_sum, temperature)
        hard_total = (hard_sum * (student_max - s_top).exp()).sum(0)
        merged = torch.stack([s_top, s_total, t_top, t_total, hard_total], -1)
        counted = tokens.mask
        assert counted is not None
        if is_kl:
            between = _reference.divergence(log_p.T, log_q.T, options.divergence, options.beta)
            weight, other = (log_p, log_q) if options.divergence == "forward_kl" else (log_q, log_p)
            share = torch.where(other == -math.inf, 0.0, weight.exp())  # else `between` is infinite
            loss = (between + _weighed(share, within).sum(0)).clamp(min=0.0)
            sums = torch.stack([loss, torch.zeros_like(loss)], -1)
        else:
            sums = torch.zeros(count, _SUMS, dtype=torch.float64, device=device)
            if vocab:
                self._distill.distill(
                    student, teacher, tokens, options, gradient=None, want_loss=False, want_metrics=False, stage="sum",
                    states=merged.contiguous(), sums=sums,
                )  # fmt: skip
            sums = gather(sums, shards).sum(0)
            loss = sums[:, 0]

        # The row's loss
        if options.temperature_squared:
            loss = loss * temperature**2
        if hard > 0:
            assert tokens.targets is not None
            surprise = (s_top - everybody[..., 6].sum(0)) + hard_total.log()
            loss = _mixed(loss, torch.where(tokens.targets == _IGNORED, 0.0, surprise), hard)
        if tokens.weight is not None:
            loss = loss * tokens.weight
        dtype = accumulation_dtype(student.dtype)
        loss = torch.where(counted, loss, 0.0).to(dtype)
        entropy = agreement = None
        if want_metrics:
            entropies, s_leader, t_leader = everybody[..., -3:].unbind(-1)
            entropy = _weighed(log_q.exp(), entropies - log_q).sum(0)
            entropy = torch.where(counted, entropy, 0.0).to(dtype)
            agreement = _first(student_max, s_leader) == _first(teacher_max, t_leader)
            agreement = agreement & counted & ~(s_total.isnan() | t_total.isnan())
        return Results(loss, entropy, agreement), torch.cat([merged, sums], -1)

    def _leader(self, logits: Tensor, vocab: int, shards: Shards) -> Tensor:
        """(N,) float64 numbers of the largest entries of this slice, of equals the first."""
        if not vocab:
            return torch.zeros(logits.shape[:-1].numel(), dtype=torch.float64, device=logits.device)
        return self._distill.topk(logits[..., :vocab], 1, 1.0)[1][:, 0].double() + shards.begin

    # Top-k

    def topk_distill(
        self,
        student: Tensor,
        logprobs: Tensor,
        indices: Tensor,
        residual: Tensor | None,
        tail: str,
        tokens: Tokens,
        options: Options,
        *,
        gradient: Tensor | None,
        want_loss: bool,
        want_metrics: bool,
    ) -> Results:
        shards, count = self.shards.cut(options.vocab), student.shape[:-1].numel()
        vocab, k = shards.sizes[shards.rank], indices.shape[-1]
        logprobs, indices = logprobs.reshape(-1, k), indices.reshape(-1, k)
        slices = self._tokens(tokens, count, shards, indices.shape[0], student.device)
        results, saved = Results(None, None, None), self._rows(self._saved, count)
        if saved is None:
            teacher = (logprobs, indices, residual, tail)
            results, saved = self._categorize(student, teacher, tokens, slices, options, shards, want_metrics)
            self._keep(saved)
        if gradient is not None:
            entries = (saved.shape[1] - 4) // 2
            factor = torch.ones(count, dtype=torch.float64, device=student.device)
            for x in (tokens.upstream, tokens.weight):
                factor = factor if x is None else factor * x
            exponentials = saved[:, :4].clone()
            exponentials[:, 0::2] *= factor[:, None]
            values = (saved[:, 4 : 4 + entries] * factor[:, None]).to(self._wide)
            index = saved[:, 4 + entries :].long() - shards.begin
            if vocab:
                self._distill.outside(
                    student, slices.mask, index.contiguous(), vocab, options.temperature,
                    exponentials=exponentials, values=values.contiguous(), gradient=gradient,
                )  # fmt: skip
            else:
                gradient.zero_()
        self._row += count
        return results

    def _categorize(
        self,
        student: Tensor,
        teacher: tuple[Tensor, Tensor, Tensor | None, str],
        tokens: Tokens,
        slices: Tokens,
        options: Options,
        shards: Shards,
        want_metrics: bool,
    ) -> tuple[Results, Tensor]:
        logprobs, indices, residual, tail = teacher
        count, k, device = student.shape[:-1].numel(), indices.shape[-1], student.device
        vocab, temperature, hard = shards.sizes[shards.rank], options.temperature, options.hard_weight
        counted = slices.mask
        assert counted is not None

        # The teacher's entries of each token, by ascending number
        bad = torch.zeros_like(counted)
        if tokens.teacher_rows is not None:
            row, bad = _reference.checked_index("teacher_rows", tokens.teacher_rows, indices.shape[0], counted)
            if indices.shape[0] == 0:
                logprobs, indices = logprobs.new_full((1, k), -math.inf), indices.new_full((1, k), -1)
                residual = None if residual is None else residual.new_zeros(1)
            logprobs, indices = logprobs[row], indices[row]
            residual = None if residual is None else residual.reshape(-1)[row]
        present = (indices != -1) & counted[:, None]
        known, bad_index = _reference.checked_index("teacher.indices", indices.long(), shards.vocab, present)
        bad = bad | bad_index.any(-1) | _reference.duplicates(known, present, shards.vocab)
        index, order = torch.where(present & ~bad_index, known, -1).sort(-1)
        log_p = torch.where(present, logprobs, -math.inf)
        top_entry = known.gather(-1, log_p.argmax(-1, keepdim=True)).squeeze(-1)
        log_p, present = log_p.gather(-1, order), index != -1
        if residual is None and tail == "bucket" and k >= shards.vocab:
            rest = _reference.log1mexp(torch.logsumexp(log_p.double(), -1))
            residual = torch.where(present.sum(-1) == shards.vocab, -math.inf, rest).to(log_p.dtype)

        # This slice
        local = index - shards.begin
        mine = present & (local >= 0) & (local < vocab)
        members = torch.full((count, k), -math.inf, dtype=torch.float64, device=device)
        states = torch.zeros(count, 3, dtype=torch.float64, device=device)
        states[:, 0] = _LOWEST
        if vocab:
            place = torch.where(mine, local, 0).view(*student.shape[:-1], k)
            members = torch.where(mine, student.gather(-1, place).reshape(count, k).double(), -math.inf)
            if tail != "renormalize" or hard > 0 or want_metrics:
                self._distill.outside(student, counted, local, vocab, temperature, states=states)
        columns = [states, members]
        if hard > 0:
            assert slices.targets is not None
            columns.append(self._at_targets(student, slices.targets, vocab)[:, None])
        if want_metrics:
            columns += [
                self._spread(student, counted, vocab, temperature),
                self._leader(student, vocab, shards)[:, None],
            ]

        # All slices: the row as k + 1 logits, relative to their largest
        everybody = gather(torch.cat(columns, -1), shards)
        rest_max, rest_sum, rest_at_one = everybody[..., :3].unbind(-1)
        members = everybody[..., 3 : 3 + k].amax(0)
        rest_top = rest_max.amax(0)
        rest_total = (rest_sum * ((rest_max - rest_top) / temperature).exp()).sum(0)
        top = torch.maximum(rest_top, members.amax(-1))
        above = (members - top[:, None]).masked_fill(~present, -math.inf)
        rest = (rest_top - top) + temperature * rest_total.log()
        small = torch.cat([above, rest[:, None]], -1).to(self._wide)
        slots = torch.where(present, torch.arange(k, device=device), -1)
        slope = torch.empty_like(small)
        outcome = self._distill.topk_distill(
            small, log_p.contiguous(), slots, residual, tail,
            Tokens(mask=counted, reduction="none"), options._replace(vocab=k + 1, hard_weight=0.0),
            gradient=slope, want_loss=True, want_metrics=False,
        )  # fmt: skip
        loss, slope = outcome.loss.double(), slope.double()

        # The gradient, for an upstream of 1: exponentials over the rest, values at the entries
        soft = 1.0 - hard
        a = torch.where(rest_total == 0, 0.0, soft * slope[:, k] / rest_total)
        b = torch.zeros_like(a)
        values = soft * slope[:, :k]
        if hard > 0:
            assert slices.targets is not None
            assert tokens.targets is not None
            has_target = slices.targets != _IGNORED
            logit = everybody[..., 3 + k].sum(0)
            at_one = above.exp().sum(-1) + (rest_at_one * (rest_max - top).exp()).sum(0)
            loss = _mixed(loss, torch.where(has_target, (top - logit) + at_one.log(), 0.0), hard)
            b = torch.where(has_target, hard / at_one, 0.0)
            is_target = present & (index == tokens.targets[:, None]) & has_target[:, None]
            values = _weighed(b[:, None], above.exp()) + values - hard * is_target.double()
            alone = has_target & ~is_target.any(-1)
            of_target = a * ((logit - rest_top) / temperature).exp() + b * (logit - top).exp() - hard
            index = torch.cat([index, torch.where(alone, tokens.targets, -1)[:, None]], -1)
            index, order = index.sort(-1)
            values = torch.cat([values, of_target[:, None]], -1).gather(-1, order)
        wrong = bad[:, None]
        exponentials = torch.stack([a, rest_top, b, top], -1).masked_fill(wrong, math.nan)
        saved = torch.cat([exponentials, values.masked_fill(wrong, math.nan), index.double()], -1)

        # The row's loss
        if tokens.weight is not None:
            loss = loss * tokens.weight
        dtype = accumulation_dtype(student.dtype)
        loss = torch.where(counted, loss.masked_fill(bad, math.nan), 0.0).to(dtype)
        entropy = agreement = None
        if want_metrics:
            maxima, sums, entropies, leaders = everybody[..., -4:].unbind(-1)
            _, total, log_q = _merge(maxima, sums, temperature)
            entropy = torch.where(counted, _weighed(log_q.exp(), entropies - log_q).sum(0), 0.0).to(dtype)
            agreement = (_first(maxima, leaders) == top_entry) & counted & ~total.isnan()
        return Results(loss, entropy, agreement), saved

    def _spread(
        self, logits: Tensor, counted: Tensor, vocab: int, temperature: float, want_entropy: bool = True
    ) -> Tensor:
        """(N, 3) float64: max, sum and entropy (NaN unless wanted) of this slice."""
        if not vocab:
            return _nothing(logits.shape[:-1].numel(), logits.device)
        targets = torch.where(counted, ELSEWHERE, _IGNORED)
        results, _ = self._logprob.logprob_slice(
            logits[..., :vocab], targets, _IGNORED, temperature, None, want_entropy, False
        )
        return results.state.double()

    def topk(self, logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The k best of every slice, of these the k best; what a slice left over and what this choice evicts is the
        residual."""
        count, device, dtype = logits.shape[:-1].numel(), logits.device, accumulation_dtype(logits.dtype)
        vocab, shards = logits.shape[-1], self.shards
        values = torch.full((count, k), -math.inf, dtype=torch.float64, device=device)
        indices = torch.zeros(count, k, dtype=torch.float64, device=device)
        rest = torch.full((count,), -math.inf, dtype=torch.float64, device=device)
        if vocab:
            own = min(k, vocab)
            _, index, residual = self._distill.topk(logits, own, temperature)
            values[:, :own] = logits.gather(-1, index.view(*logits.shape[:-1], own)).reshape(count, own)
            indices[:, :own] = index + shards.begin
            rest = residual.double()
        counted = torch.ones(count, dtype=torch.bool, device=device)
        spread = self._spread(logits, counted, vocab, temperature, want_entropy=False)
        everybody = gather(torch.cat([spread, rest[:, None], values, indices], -1), shards)
        top, total, share = _merge(everybody[..., 0], everybody[..., 1], temperature)
        candidates, numbers = everybody[..., 4:].transpose(0, 1).chunk(2, -1)  # (N, R, k)
        place = torch.arange(k, device=device)
        there = torch.stack([place < size for size in shards.sizes]).expand_as(candidates).flatten(1)
        log_q = (candidates.flatten(1) - top[:, None]) / temperature - total.log()[:, None]
        # Of equals the first: slices and what they hold stand in the order of their numbers. Fillers come last.
        order = torch.where(there, candidates.flatten(1), -math.inf).sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, (~there).gather(-1, order).to(torch.int8).sort(dim=-1, stable=True).indices)
        log_q, numbers = log_q.gather(-1, order), numbers.flatten(1).gather(-1, order)
        evicted = torch.where(there.gather(-1, order), log_q, -math.inf)[:, k:]
        left = torch.where(everybody[..., 1] == 0, -math.inf, everybody[..., 3] + share).T
        residual = torch.logsumexp(torch.cat([left, evicted], -1), -1)
        residual = torch.where(total.isnan(), math.nan, residual)
        return log_q[:, :k].to(dtype), numbers[:, :k].long(), residual.to(dtype)

    # Log-probs

    def _shares(
        self, logits: Tensor, targets: Tensor, index: Tensor, temperature: float, softcap: float | None,
        want_entropy: bool, want_above: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Of targets by number in this slice and in the whole vocabulary: everybody's columns (R, N, .), and of the
        merged row the state's max and sum, the log of each slice's share (R, N) and the target's log-prob (N,).

        Columns are max, sum, entropy, log-prob of the target in its slice (0 elsewhere) and, with ``want_above``, the
        sum over the slice of log-probs in it.
        """
        count, device, vocab = targets.shape[0], logits.device, logits.shape[-1]
        if vocab:
            results, above = self._logprob.logprob_slice(
                logits, targets, _IGNORED, temperature, softcap, want_entropy, want_above
            )
            assert results.state is not None
            state, reference = results.state.double(), results.logprob.double()
        else:
            state = _nothing(count, device)
            reference, above = torch.zeros(count, dtype=torch.float64, device=device), None
        nothing = state[:, 1] == 0  # all of the slice is -inf
        mine = (targets >= 0) & (targets < vocab) & ~nothing
        columns = [state, torch.where(mine, reference, 0.0)[:, None]]
        if want_above:
            whole = torch.zeros_like(reference) if above is None else above.double() + vocab * reference
            impossible = (reference == -math.inf) | nothing
            columns.append(torch.where(impossible & (vocab > 0), -math.inf, whole)[:, None])
        everybody = gather(torch.cat(columns, -1), self.shards)
        top, total, share = _merge(everybody[..., 0], everybody[..., 1], temperature)
        owner = torch.zeros_like(index)
        for end in itertools.accumulate(self.shards.sizes[:-1]):
            owner += index >= end
        logprob = everybody[..., 3].sum(0) + share.gather(0, owner[None])[0]
        logprob = logprob.masked_fill(targets == _OUT_OF_RANGE, math.nan)
        return everybody, top, total, share, torch.where(total.isnan(), math.nan, logprob)

    def logprob(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        temperature: float,
        softcap: float | None,
        want_entropy: bool,
        want_state: bool,
    ) -> LogprobResults:
        relevant = targets != ignore_index
        local, index, _ = self._targets(targets, relevant, self.shards)
        everybody, top, total, share, logprob = self._shares(
            logits, local, index, temperature, softcap, want_entropy, False
        )
        dtype = accumulation_dtype(logits.dtype)
        entropy = torch.full_like(top, math.nan)
        if want_entropy:
            entropy = _weighed(share.exp(), everybody[..., 2] - share).sum(0)
            entropy = torch.where(relevant, entropy.masked_fill(local == _OUT_OF_RANGE, math.nan), 0.0)
        self._keep(torch.stack([top, total, entropy], -1))
        self._row += targets.shape[0]
        logprob = torch.where(relevant, logprob, 0.0).to(dtype)
        return LogprobResults(logprob, entropy.to(dtype) if want_entropy else None, None)

    def logprob_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        temperature: float,
        softcap: float | None,
        state: Tensor | None,
        upstream_logprob: Tensor | None,
        upstream_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        saved = self._rows(self._saved, targets.shape[0])
        assert saved is not None
        if logits.shape[-1]:
            local, _, _ = self._targets(targets, targets != ignore_index, self.shards)
            state = saved.to(accumulation_dtype(logits.dtype)).contiguous()
            self._logprob.logprob_gradient(
                logits, local, _IGNORED, temperature, softcap, state, upstream_logprob, upstream_entropy, out
            )
        self._row += targets.shape[0]

    def cross_entropy(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        factor: Tensor | None,
        out: Tensor | None,
    ) -> Tensor | None:
        relevant = targets != ignore_index
        local, index, _ = self._targets(targets, relevant, self.shards)
        saved, loss = self._rows(self._saved, targets.shape[0]), None
        dtype = accumulation_dtype(logits.dtype)
        if saved is None:
            smooth = label_smoothing > 0
            everybody, top, total, share, logprob = self._shares(logits, local, index, 1.0, softcap, False, smooth)
            saved = torch.stack([top, total, torch.full_like(top, math.nan)], -1)
            self._keep(saved)
            loss = -(1.0 - label_smoothing) * logprob + z_loss * (top + total.log()) ** 2
            if smooth:
                total_log_q = everybody[..., 4].sum(0)
                for rank, size in enumerate(self.shards.sizes):
                    total_log_q = total_log_q + size * share[rank] if size else total_log_q
                mean = total_log_q / self.shards.vocab
                loss = loss - label_smoothing * mean
            loss = torch.where(logprob == -math.inf, math.inf, loss)
            loss = torch.where(relevant, loss, 0.0).to(dtype)
        if out is not None and logits.shape[-1]:
            self._logprob.cross_entropy_gradient(
                logits, local, _IGNORED, label_smoothing, z_loss, softcap, saved.to(dtype).contiguous(), factor,
                self.shards.vocab, out,
            )  # fmt: skip
        self._row += targets.shape[0]
        return loss


def _nothing(count: int, device: torch.device) -> Tensor:
    """(N, 3) float64 states of a slice without entries: max, sum and entropy."""
    states = torch.zeros(count, 3, dtype=torch.float64, device=device)
    states[:, 0] = _LOWEST
    return states


def _mixed(soft: Tensor, hard: Tensor, weight: float) -> Tensor:
    """(1 - h) soft + h hard"""
    return (1.0 - weight) * soft + weight * hard if weight < 1 else hard


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    return x[rows.clamp(0, max(x.shape[0] - 1, 0))] if x.shape[0] else x.new_zeros(rows.shape[0])


def _first(maxima: Tensor, leaders: Tensor) -> Tensor:
    """(N,) the number of a row's largest entry, of equals the first, from slices' maxima and leaders (R, N)."""
    return torch.where(maxima == maxima.amax(0), leaders, math.inf).amin(0)
