"""Context distillation of a causal language model: the library behind ``pyalign distill``.

The teacher is the model with a prompt C in front, the student the same model without it; training lowers
KL(p(X|C) || p(X)) over texts X until the prompt is no longer needed (Askell et al. 2021, arXiv 2112.00861,
section 2.4).

=============== =========================================================================================
``language``    load a model directory or GGUF file; its identity; features and head apart
``texts``       text and question-and-answer files into token sequences, split into training and held out
``collect``     the prompted model over the sequences, into a ``pyalign.teacher_store``
``train``       the unprompted model on the store, with checkpoints
``evaluate``    divergences from the prompted model, and samples
``loss_cost``   time and memory of the loss, pyalign's beside plain torch's
``report``      the above as Markdown and a curve
=============== =========================================================================================
"""

from pyalign._options import JobError

__all__ = ["JobError"]
