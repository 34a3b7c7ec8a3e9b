"""Scores of responses to prompts: the library behind ``pyalign score``.

=============== =========================================================================================
``scorer``      ``PairScorer``: a model and a tokenizer, from prompts and responses to scores
``tokens``      texts and chats into token sequences; what counts, what is cut
``batches``     sequences into rows that share a prompt, rows into batches of like lengths
``models``      body and head of a model, tried out against the model itself
``prefetch``    a background thread that prepares batches
``records``     JSONL, Parquet and BIG-bench files into prompts and responses
``job``         a file scored by one or several processes, resumable at every batch
``output``      the job's file of rows and what stands beside it
``summary``     accuracy, calibration and the length baseline of what was scored
=============== =========================================================================================
"""

from pyalign.pair_scorer.scorer import PairScorer, ScoredResponses
from pyalign.pair_scorer.tokens import ResponseSet

__all__ = ["PairScorer", "ResponseSet", "ScoredResponses"]
