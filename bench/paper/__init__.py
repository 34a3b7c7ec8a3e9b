"""The experiments of Askell et al. 2021 (arXiv 2112.00861) in miniature, with pyalign's public API.

``python -m bench.paper`` from the root of the checkout runs them and writes a report; ``--help`` lists options.

============== ==================================================================================================
``experiment`` what an experiment is: its units of work, how one is run, its section of the report; the registry
``runs``       units as JSON files under their configuration's key, so that a killed run goes on; worker processes
``tasks``      sources of sequences whose probabilities are known, and what makes a sequence good or right
``model``      the transformer
``training``   one optimiser loop, the losses and scores that all experiments share
``objectives`` 1: imitation, binary discrimination and ranked preference modelling over model sizes
``pmp``        2: preference model pre-training before little fine-tuning data
``context``    3: context distillation
``statistics`` means with intervals over seeds
``report``     sections, tables and plots as one Markdown page
============== ==================================================================================================
"""
