"""Adapters to transformers' Trainer (5.0 and later): what a model learns, computed by pyalign's kernels.

==================================  =======================================================================
seam                                adapter
==================================  =======================================================================
``Trainer(compute_loss_func=)``     :func:`causal_lm_loss_func`: cross-entropy from the model's logits
``model.loss_function = ``          :func:`causal_lm_loss`: the same in the model's forward, with or without a Trainer
``Trainer.compute_loss``            :class:`LinearCrossEntropyMixin`: the same straight from hidden states
``Trainer.compute_loss``            :class:`DistillationMixin`: a teacher's distribution instead of the data's tokens
``Trainer.compute_loss``            :class:`RankingMixin`: pairs or K-wise rankings for a reward model
==================================  =======================================================================

A mixin stands in front of the Trainer: ``class Distiller(DistillationMixin, Trainer): ...``. It counts what the loss is
a mean over (tokens, pairs, groups) across all micro-batches of a step and, with ``average_tokens_across_devices``,
across all processes, so that gradient accumulation and data parallelism give the gradient of the one big batch. Labels
are shifted here: position i of the logits predicts label i + 1.

Mixins refuse what they don't know: DataParallel in one process (start one process per GPU), tensor, context and
sequence parallelism, Liger's fused losses, and ``compute_metrics``, for which there are no logits to be kept.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pyalign import _checks
from pyalign._models import is_plain_linear
from pyalign._types import DIVERGENCES
from pyalign.distill import distillation_loss, linear_distillation_loss
from pyalign.logprob import linear_cross_entropy, token_logprobs
from pyalign.ranking import pairs_of_ranks, ranked_preference_loss

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # transformers is imported by whoever has a Trainer to mix this into

__all__ = [
    "DistillationMixin",
    "LinearCrossEntropyMixin",
    "RankingCollator",
    "RankingMixin",
    "causal_lm_loss",
    "causal_lm_loss_func",
]

_IGNORED = -100  # transformers' label of tokens that don't count


# ---- Cross-entropy from logits ----


def _shifted(labels: Tensor, ignore_index: int = _IGNORED) -> Tensor:
    """(..., S) labels to (..., S) targets: position i holds label i + 1, the last one nothing that counts.

    So the logits needn't be cut (their last row isn't read), and nothing of their size is copied.
    """
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _divided(total: Tensor, num_items: int | Tensor | None, counted: Tensor) -> Tensor:
    """``total`` over ``num_items``, or over the number of True in ``counted``; nothing over nothing is 0."""
    if num_items is None:
        return total / counted.sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            given = f"shape {tuple(num_items.shape)}"
            _checks.refuse("num_items_in_batch", given, "one number: DataParallel in one process is not supported")
        return total / num_items.to(total.device).reshape(())
    return total / num_items


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = _IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Next-token cross-entropy with the signature of transformers' ``ForCausalLMLoss``::

        model.loss_function = causal_lm_loss

    sum over counted tokens of -log softmax(logits)[label] / num_items_in_batch, or their mean. Logits are read in their
    own dtype and accumulated in float32: no float32 copy of them is made.

    Args:
        logits: (B, S, V) float32, bfloat16, float16 or float64.
        labels: (B, S) integer, not shifted: position i predicts label i + 1.
        vocab_size: V.
        num_items_in_batch: what the sum is divided by; None: the number of counted tokens (the mean of nothing is 0).
        ignore_index: the label of tokens that don't count.
        shift_labels: (B, S) labels that are shifted already, instead of ``labels``.
        kwargs: what else the model was called with, which is no concern of the loss.

    Returns:
        () float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: logits of another vocabulary, no labels, or arguments that
            :func:`pyalign.logprob.token_logprobs` refuses.
    """
    _checks.floating("logits", logits, 2)
    if logits.shape[-1] != vocab_size:
        _checks.refuse("logits", f"a vocabulary of {logits.shape[-1]}", f"vocab_size, {vocab_size}")
    if shift_labels is None:
        if labels is None:
            _checks.refuse("labels", None, "the token ids to predict, or shift_labels=")
        shift_labels = _shifted(labels, ignore_index)
    targets = shift_labels.to(logits.device)
    total = -token_logprobs(logits, targets, ignore_index=ignore_index).sum()
    return _divided(total, num_items_in_batch, targets != ignore_index)


def causal_lm_loss_func(outputs: Any, labels: Tensor | None, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """:func:`causal_lm_loss` of a model's outputs, as the Trainer calls it::

        Trainer(model, args, compute_loss_func=causal_lm_loss_func, ...)

    With a ``compute_loss_func`` the Trainer leaves out ``label_smoothing_factor`` and a mixture of experts' own
    auxiliary loss; :class:`LinearCrossEntropyMixin` smooths.

    Args:
        outputs: the model's, with ``logits`` (B, S, V).
        labels: (B, S) integer, not shifted, -100 where a token doesn't count.
        num_items_in_batch: what the sum is divided by; None: the number of counted tokens.

    Returns:
        () float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: as :func:`causal_lm_loss`; outputs without logits (a fused loss took them).
    """
    logits = _logits(outputs)
    return causal_lm_loss(logits, labels, logits.shape[-1], num_items_in_batch)


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        given = f"{type(outputs).__name__} without logits"
        _checks.refuse("outputs", given, "a model's outputs with logits; a fused loss such as Liger's leaves none")
    return logits


# ---- The head, apart from its model ----


class _Head(NamedTuple):
    """A linear head: its logits are softcap(hidden @ weight.T + bias)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None


_MARK = 1.0  # what a model must not change on its way from the head to ``outputs.logits``


@contextlib.contextmanager
def _in_place_of_head(model: Any, function: Callable[[Tensor, _Head], Tensor]) -> Generator[None]:
    """Within it, the model's head gives ``function(hidden, head)`` in place of logits.

    So what needs the hidden states and the head is computed inside the model's own forward: under DDP, autocast and
    gradient checkpointing it is where the logits would be. A final soft cap is told to the function and left out by the
    model. The result travels in ``outputs.logits`` beside a mark, by which :func:`_from_head` sees whether anything
    else is done to logits.
    """
    name = type(model).__name__
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not is_plain_linear(head):
        wanted = "an nn.Linear without hooks, adapters or parametrizations (or the loss from logits)"
        _checks.refuse("model", f"{name} with the head {type(head).__name__}", wanted)
    config = model.config.get_text_config()
    softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(hidden: Tensor) -> Tensor:
        result = function(hidden, _Head(head.weight, head.bias, softcap))
        return torch.stack([result, torch.full_like(result, _MARK)]).reshape(1, 1, 2)  # as (B, S, V)

    vars(head)["forward"] = forward
    if softcap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        del vars(head)["forward"]
        if softcap is not None:
            config.final_logit_softcapping = softcap


def _from_head(outputs: Any, model: Any, check: bool) -> Tensor:
    """What the function of :func:`_in_place_of_head` gave; ``check`` looks at the mark, and waits for a GPU."""
    logits = _logits(outputs)
    if logits.numel() != 2 or (check and float(logits.detach().flatten()[1]) != _MARK):
        raise ValueError(
            f"model: {type(model).__name__} changes its logits after the head (a scale, for instance), which the loss "
            "from hidden states doesn't know; wanted logits = softcap(head(hidden)), or the loss from logits"
        )
    return logits.flatten()[0]


# ---- Trainers ----


class _CountedLoss(_Trainer):
    """A Trainer whose loss is a sum over items, divided by their number in all the batches of a step.

    The Trainer itself counts ``labels`` alone, and only where a batch has them.
    """

    loss_is_scaled_for_ga = True  # in all of a step's batches; see also the end of __init__
    _columns: tuple[str, ...] = ()  # of a dataset, besides what the model takes: for the collator

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        given = {
            "compute_loss_func": (self.compute_loss_func, "the mixin's own loss alone"),
            "compute_metrics": (self.compute_metrics, "no metrics of logits, which aren't kept"),
            "use_liger_kernel": (self.args.use_liger_kernel, "Liger's kernels off: they replace the model's loss"),
        }
        for name, (value, wanted) in given.items():
            if value:
                _checks.refuse(name, value, f"{name} unset: {wanted}")
        if self.args.n_gpu > 1:
            _checks.refuse("args", f"{self.args.n_gpu} GPUs in one process", "one process per GPU (torchrun)")
        for kind in ("tp", "cp", "sp"):
            size = getattr(self, f"get_{kind}_size")()
            if size > 1:
                _checks.refuse("args", f"{kind} parallelism of {size}", "data parallelism alone")
        self.model_accepts_loss_kwargs = True  # what tells the first releases of transformers 5 the same

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        """() int64, the number of items in a batch."""
        raise NotImplementedError

    def _loss(self, model: Any, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        """The sum of the batch's losses over ``num_items`` (or its mean), and the model's outputs, if it has any."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = torch.stack([self._count(batch).to(device) for batch in batches]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts: Any = self.accelerator.gather(count)
            count = counts.sum()
        return batches, count.clamp(min=1)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = self._loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # by which data parallelism divides the gradient
        if not return_outputs:
            return loss
        if outputs is None:
            _checks.refuse("return_outputs", True, "False: the loss from hidden states makes no logits to return")
        return loss, outputs

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The loss alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach().mean(), None, None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *(name for name in self._columns if name not in columns)]

    def _unwrapped(self, model: Any) -> Any:
        """The causal language model under data parallelism and adapters."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _check_hidden_states(self) -> None:
        """Refuses, before a run, where a head can't be taken out of its model."""
        for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
            if getattr(self, name):
                _checks.refuse("args", f"{name}, which shards the head", "DDP or one process (or the loss from logits)")
        if self.args.torch_compile:
            _checks.refuse("torch_compile", True, "False: the loss from hidden states replaces the head at every step")


def _labels_and_targets(inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """(B, S) shifted labels, and what the model takes."""
    inputs = dict(inputs)
    labels, shift_labels = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shift_labels is None:
        if labels is None:
            _checks.refuse("inputs", ", ".join(inputs), "labels, or shift_labels, among them")
        shift_labels = _shifted(labels)
    return shift_labels, inputs


class LinearCrossEntropyMixin(_CountedLoss):
    """A Trainer of causal language models whose cross-entropy is computed straight from hidden states::

        class LinearTrainer(LinearCrossEntropyMixin, Trainer): ...

        LinearTrainer(model, args, train_dataset=dataset).train()

    The loss is :func:`causal_lm_loss`, by :func:`pyalign.logprob.linear_cross_entropy`: logits of tokens x vocabulary
    are never held, in training or evaluation. ``label_smoothing_factor`` smooths as the Trainer's own smoother does.
    A final soft cap (Gemma) is known; models that scale their logits (Cohere, Granite) are noticed at the first step
    and refused, and so are heads that are no plain ``nn.Linear``, auxiliary losses of experts, FSDP, DeepSpeed and
    ``torch_compile``.

    Batches: ``labels`` (B, S), not shifted, or ``shift_labels`` (B, S), and what the model takes.

    Raises:
        ValueError: something it refuses; see also the module.
    """

    _columns = ("shift_labels",)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._check_hidden_states()
        self._head_is_known = False

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        return (_labels_and_targets(dict(batch))[0] != _IGNORED).sum()

    def _loss(self, model: Any, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        targets, inputs = _labels_and_targets(inputs)
        unwrapped = self._unwrapped(model)
        if getattr(unwrapped.config.get_text_config(), "output_router_logits", False):
            _checks.refuse("output_router_logits", True, "False: the auxiliary loss of experts isn't added")

        def loss(hidden: Tensor, head: _Head) -> Tensor:
            return linear_cross_entropy(
                hidden,
                head.weight,
                targets.to(hidden.device),
                bias=head.bias,
                softcap=head.softcap,
                label_smoothing=self.args.label_smoothing_factor,
                num_items=num_items,
            )

        with _in_place_of_head(unwrapped, loss):
            outputs = model(**inputs)
        value = _from_head(outputs, unwrapped, not self._head_is_known)
        self._head_is_known = True
        return value, None


class DistillationMixin(_CountedLoss):
    """A Trainer whose causal language model learns a teacher's distribution::

        class Distiller(DistillationMixin, Trainer): ...

        Distiller(model, args, teacher_model=teacher, train_dataset=dataset, data_collator=collate).train()

    The loss is :func:`pyalign.distill.distillation_loss` over the tokens that count, or, with ``from_hidden_states``,
    :func:`pyalign.distill.linear_distillation_loss`, with which neither side's logits are ever held (heads, soft caps
    and what is refused are as in :class:`LinearCrossEntropyMixin`, for student and teacher).

    Batches, told apart by their fields:

    - those of :class:`pyalign.ContextDistillationCollator`, whose teacher reads another prompt: ``teacher_input_ids``,
      ``teacher_attention_mask``, ``teacher_rows``, ``targets``, which are not shifted, and what the student takes
    - others: student and teacher read the same; ``labels`` (B, S), not shifted, say which tokens count (position i
      counts where label i + 1 is not -100) and are the targets of the hard term; or ``shift_labels`` (B, S)

    Args:
        teacher_model: a causal language model, on whatever device; it goes to the student's, into eval mode, and its
            gradient isn't computed. It is no part of checkpoints.
        divergence, beta, temperature, temperature_squared, hard_weight, vocab_size: as in
            :func:`pyalign.distill.distillation_loss`.
        from_hidden_states: compute the loss straight from hidden states.
        args, kwargs: the Trainer's own.

    Raises:
        ValueError, TypeError: an option or a batch of the wrong kind; something it refuses, see the module.
    """

    _columns = ("prompt_ids", "teacher_prompt_ids", "shift_labels")

    def __init__(
        self,
        *args: Any,
        teacher_model: Any,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        hard_weight: float = 0.0,
        vocab_size: int | None = None,
        from_hidden_states: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        _checks.one_of("divergence", divergence, DIVERGENCES)
        if not isinstance(teacher_model, nn.Module):
            _checks.refuse("teacher_model", type(teacher_model).__name__, "a model", TypeError)
        if self.args.label_smoothing_factor:
            given = self.args.label_smoothing_factor
            _checks.refuse("label_smoothing_factor", given, "0: the hard term of a distillation isn't smoothed")
        if from_hidden_states:
            self._check_hidden_states()
        self.from_hidden_states = from_hidden_states
        self.teacher_model = teacher_model.to(self.args.device).eval()
        self._heads_are_known = False
        self._options: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "temperature_squared": temperature_squared,
            "hard_weight": hard_weight,
            "vocab_size": vocab_size,
        }

    def _split(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What the student reads, what the teacher reads, and what says which tokens count."""
        if "teacher_input_ids" not in batch:
            targets, inputs = _labels_and_targets(dict(batch))
            return inputs, inputs, {"labels": targets, "targets": targets}
        student, tokens = dict(batch), {}
        for name in ("teacher_rows", "targets"):
            if name not in student:
                _checks.refuse("inputs", ", ".join(student), f"{name} among them, as ContextDistillationCollator makes")
            tokens[name] = student.pop(name)
        teacher = {
            name.removeprefix("teacher_"): student.pop(name) for name in list(student) if name.startswith("teacher_")
        }
        return student, teacher, tokens

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        tokens = self._split(batch)[2]
        return (tokens["teacher_rows"] >= 0 if "teacher_rows" in tokens else tokens["labels"] != _IGNORED).sum()

    def _loss(self, model: Any, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        student, teacher, tokens = self._split(inputs)
        options: dict[str, Any] = {**self._options, **tokens, "num_items": num_items}
        if not self.from_hidden_states:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = _logits(self.teacher_model(**teacher))
            outputs = model(**student)
            return distillation_loss(_logits(outputs), teacher_logits, **options), outputs

        found: list[tuple[Tensor, _Head]] = []
        check = not self._heads_are_known

        def keep(hidden: Tensor, head: _Head) -> Tensor:
            found.append((hidden, head))
            return hidden.new_zeros((), dtype=torch.float32)

        unwrapped_teacher = self._unwrapped(self.teacher_model)
        with torch.no_grad(), self.accelerator.autocast(), _in_place_of_head(unwrapped_teacher, keep):
            _from_head(self.teacher_model(**teacher), unwrapped_teacher, check)
        ((teacher_hidden, teacher_head),) = found

        def loss(hidden: Tensor, head: _Head) -> Tensor:
            return linear_distillation_loss(
                hidden,
                head.weight,
                teacher_hidden,
                teacher_head.weight,
                student_bias=head.bias,
                teacher_bias=teacher_head.bias,
                student_softcap=head.softcap,
                teacher_softcap=teacher_head.softcap,
                **options,
            )

        unwrapped = self._unwrapped(model)
        with _in_place_of_head(unwrapped, loss):
            outputs = model(**student)
        value = _from_head(outputs, unwrapped, check)
        self._heads_are_known = True
        return value, None


# ---- Rankings ----


class RankingCollator:
    """Makes batches of ranked groups of responses for :class:`RankingMixin`.

    An example is a mapping with ``responses``, the token ids of K sequences (each a prompt with its response, K may
    differ between examples), and perhaps ``ranks``, K integers: 0 is best, equal ranks tie, a negative one is absent.
    Without them the first response is best, and so on; a pair is ``[chosen, rejected]``.

    Args:
        pad_token_id: what fills up the shorter sequences.
        padding_side: "right" or "left".
        max_length: tokens of a sequence at most: the beginning of a longer one is left out.

    Returns a dict of int64 tensors: ``input_ids``, ``attention_mask`` (N, S), ``ranks`` (N,), ``group_offsets``
    (G + 1,).

    Raises:
        ValueError, TypeError: an argument or an example of the wrong kind.
    """

    def __init__(self, *, pad_token_id: int, padding_side: str = "right", max_length: int | None = None):
        _checks.one_of("padding_side", padding_side, ("right", "left"))
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int):
            _checks.refuse("pad_token_id", repr(pad_token_id), "a token id", TypeError)
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            _checks.refuse("max_length", repr(max_length), "None or an int >= 1")
        self.pad_token_id, self.padding_side, self.max_length = pad_token_id, padding_side, max_length

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sequences: list[Tensor] = []
        ranks: list[int] = []
        offsets = [0]
        for number, example in enumerate(examples):
            if "responses" not in example:
                _checks.refuse(f"example {number}: fields", ", ".join(example), "responses, and perhaps ranks")
            responses = [torch.as_tensor(ids, dtype=torch.int64) for ids in example["responses"]]
            given = [int(rank) for rank in example.get("ranks", range(len(responses)))]
            if len(given) != len(responses):
                _checks.refuse(f"example {number}: ranks", f"{len(given)} ranks", f"{len(responses)}, one per response")
            for ids in responses:
                if ids.dim() != 1 or len(ids) == 0:
                    _checks.refuse(
                        f"example {number}: responses", f"shape {tuple(ids.shape)}", "token ids, (L,), L > 0"
                    )
            sequences += responses if self.max_length is None else [ids[-self.max_length :] for ids in responses]
            ranks += given
            offsets.append(len(ranks))
        longest = max((len(ids) for ids in sequences), default=0)
        input_ids = torch.full((len(sequences), longest), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(sequences):
            at = slice(0, len(ids)) if self.padding_side == "right" else slice(longest - len(ids), longest)
            input_ids[row, at], mask[row, at] = ids, 1
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "ranks": torch.tensor(ranks, dtype=torch.int64),
            "group_offsets": torch.tensor(offsets, dtype=torch.int64),
        }


class RankingMixin(_CountedLoss):
    """A Trainer of reward models (``AutoModelForSequenceClassification`` with one label) on pairs or rankings::

        class RewardTrainer(RankingMixin, Trainer): ...

        collate = RankingCollator(pad_token_id=tokenizer.pad_token_id)
        RewardTrainer(model, args, train_dataset=dataset, data_collator=collate).train()

    The loss is :func:`pyalign.ranking.ranked_preference_loss` of the model's scores (N, 1) over the groups of a batch;
    a group of two is a pair, with the loss of Askell et al. 2021 (arXiv 2112.00861), Eq. 3.1.

    Batches: ``ranks`` (N,) and ``group_offsets`` (G + 1,), as :class:`RankingCollator` makes them, and what the model
    takes.

    Args:
        method, margin, scale, label_smoothing, ties, group_reduction: as in
            :func:`pyalign.ranking.ranked_preference_loss`. A step's loss is a mean over pairs, or over groups.
        args, kwargs: the Trainer's own.

    Raises:
        ValueError, TypeError: an option, a batch or a model's output of the wrong kind; see also the module.
    """

    _columns = ("responses", "ranks", "group_offsets")

    def __init__(
        self,
        *args: Any,
        method: str = "pairwise",
        margin: float | None = None,
        scale: float = 1.0,
        label_smoothing: float = 0.0,
        ties: str = "breslow",
        group_reduction: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            given = self.args.label_smoothing_factor
            _checks.refuse("label_smoothing_factor", given, "0, and label_smoothing= of the mixin")
        _checks.one_of("method", method, ("pairwise", "plackett_luce"))
        self._over_pairs = method == "pairwise" and group_reduction in (None, "pairs")
        self._options: dict[str, Any] = {
            "method": method,
            "margin": margin,
            "scale": scale,
            "label_smoothing": label_smoothing,
            "ties": ties,
            "group_reduction": group_reduction,
        }
        ranked_preference_loss(torch.zeros(1, 2), torch.arange(2)[None], **self._options)  # refuses wrong options

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        for name in ("ranks", "group_offsets"):
            if name not in batch:
                _checks.refuse("inputs", ", ".join(batch), f"{name} among them, as RankingCollator makes them")
        ranks, offsets = batch["ranks"].tolist(), batch["group_offsets"].tolist()
        pairs = [len(pairs_of_ranks(ranks[begin:end])) for begin, end in itertools.pairwise(offsets)]
        return torch.tensor(sum(pairs) if self._over_pairs else sum(count > 0 for count in pairs))

    def _loss(self, model: Any, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        inputs = dict(inputs)
        ranks, offsets = inputs.pop("ranks"), inputs.pop("group_offsets")
        outputs = model(**inputs)
        logits = _logits(outputs)
        if logits.shape != (len(ranks), 1):
            wanted = f"({len(ranks)}, 1): one score per response (num_labels=1)"
            _checks.refuse("outputs", f"logits of shape {tuple(logits.shape)}", wanted)
        return ranked_preference_loss(logits[:, 0], ranks, offsets, num_items=num_items, **self._options), outputs
