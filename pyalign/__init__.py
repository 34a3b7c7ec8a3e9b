"""pyalign: the loss layer of alignment training.

Fused ranked-preference losses, logit-level KL distillation and batched pairwise scoring as C++, CUDA and Triton
kernels, after Askell et al. 2021, *A General Language Assistant as a Laboratory for Alignment* (arXiv 2112.00861).
"""

from pyalign import distill, distributed, logprob, nn, ranking, scoring
from pyalign._backends import backend
from pyalign._version import __version__
from pyalign.distill import (
    ContextDistillationCollator,
    TopKLogprobs,
    distillation_loss,
    linear_distillation_loss,
    linear_topk_distillation_loss,
    topk_distillation_loss,
    topk_logprobs,
)
from pyalign.logprob import linear_cross_entropy, linear_token_logprobs, sequence_logprobs, token_logprobs
from pyalign.ranking import (
    PreferenceOutput,
    binary_discrimination_loss,
    cpo_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    pairwise_preference_loss,
    ranked_preference_loss,
    simpo_loss,
)
from pyalign.scoring import (
    BradleyTerryFit,
    PairScorer,
    best_of_n,
    bradley_terry,
    expected_win_rates,
    preference_metrics,
    reward_scores,
    win_probabilities,
)

__all__ = [
    "BradleyTerryFit",
    "ContextDistillationCollator",
    "PairScorer",
    "PreferenceOutput",
    "TopKLogprobs",
    "__version__",
    "backend",
    "best_of_n",
    "binary_discrimination_loss",
    "bradley_terry",
    "cpo_loss",
    "distill",
    "distillation_loss",
    "distributed",
    "dpo_loss",
    "expected_win_rates",
    "kto_loss",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_token_logprobs",
    "linear_topk_distillation_loss",
    "logprob",
    "nn",
    "orpo_loss",
    "pairwise_preference_loss",
    "preference_metrics",
    "ranked_preference_loss",
    "ranking",
    "reward_scores",
    "scoring",
    "sequence_logprobs",
    "simpo_loss",
    "token_logprobs",
    "topk_distillation_loss",
    "topk_logprobs",
    "win_probabilities",
]
