"""Plain torch implementations of every op: the oracle of the tests, and the fallback for devices with no kernel.

They run in any floating dtype, float64 included, are differentiated by autograd (twice, if need be), and take the
same arguments as the kernels' engines. ``PYALIGN_BACKEND=reference`` rules the kernels out when debugging.
"""

from pyalign.reference import distill, linear, logprob, ranking, scoring

__all__ = ["distill", "linear", "logprob", "ranking", "scoring"]
