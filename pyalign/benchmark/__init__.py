"""Measuring: competitors interleaved in one run, beside the machine's own ceiling.

``timing`` holds the yardsticks; ``case`` what a case is, ``cases`` all of them, by system; ``peers`` how other packages
compute the same; ``measure`` one case's figures, ``results`` a run's, in JSON; ``report`` and ``plots`` show them,
``compare`` judges a run against an earlier one; ``fixture`` runs a case in pytest-benchmark. The command is
``pyalign bench``.
"""

from pyalign.benchmark.timing import (
    copy_function,
    figures,
    interleaved,
    kept_memory,
    peak_extra_memory,
    product_function,
    seconds,
)

__all__ = [
    "copy_function",
    "figures",
    "interleaved",
    "kept_memory",
    "peak_extra_memory",
    "product_function",
    "seconds",
]
