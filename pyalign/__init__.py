"""pyalign: the loss layer of alignment training.

Fused ranked-preference losses, logit-level KL distillation and batched pairwise scoring as C++, CUDA and Triton
kernels, after Askell et al. 2021, *A General Language Assistant as a Laboratory for Alignment* (arXiv 2112.00861).
"""

from pyalign import distill, nn
from pyalign._backends import backend
from pyalign._version import __version__
from pyalign.distill import TopKLogprobs, distillation_loss, topk_distillation_loss, topk_logprobs

__all__ = [
    "TopKLogprobs",
    "__version__",
    "backend",
    "distill",
    "distillation_loss",
    "nn",
    "topk_distillation_loss",
    "topk_logprobs",
]
