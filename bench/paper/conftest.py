"""``pytest bench`` collects benchmarks; the experiments are none, and tests/test_paper.py tests them."""

collect_ignore_glob = ["*.py"]
