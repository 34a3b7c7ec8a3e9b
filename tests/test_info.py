"""``pyalign info`` says what was built and which backend each op would run."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyalign import _C, _explain, _info, _ops, backend
from pyalign._version import __version__
from pyalign.benchmark.cases import all_cases
from pyalign.cli import build_app


def test_report_is_plain_json():
    info = _info.collect()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == __version__
    assert info["torch"] == torch.__version__
    assert info["native"]["cpu_isa"] in info["native"]["cpu_isas"]
    assert info["native"]["cuda_archs"] == _C.build_info()["cuda_archs"]


def test_every_op_names_its_backend_and_why():
    ops = _info.collect()["ops"]
    assert set(ops) == set(_ops.OPS)
    assert all(choice["backend"] and choice["reason"] for devices in ops.values() for choice in devices.values())
    assert ops["distillation_loss"]["cpu"]["backend"] == "cpu"


def test_forced_backend_is_reported():
    with backend("reference"):
        choice = _info.collect()["ops"]["distillation_loss"]["cpu"]
    assert choice == {"backend": "reference", "reason": "forced by pyalign.backend"}


def test_forced_backend_that_cannot_serve_is_reported_not_raised():
    with backend("cuda"):
        info = _info.collect()
    assert info["ops"]["distillation_loss"]["cpu"]["backend"] is None
    assert "distillation_loss on cpu" in _info.render(info)


def test_native_module_that_cannot_load_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pyalign._backends.native", lambda: (None, "pyalign._C can't be imported (no such file)"))
    text = _info.render(_info.collect())
    assert "pyalign._C can't be imported (no such file)" in text
    assert "distillation_loss on cpu" in text


def test_text_names_every_fact():
    text = _info.render(_info.collect())
    for fact in (__version__, torch.__version__, _C.cpu.isa(), _C.build_info()["compiler"], *_ops.OPS):
        assert fact in text


HIDE = """
import sys
sys.modules["typer"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "typer" else found(name, package)
sys.argv = ["pyalign", *{arguments!r}]
from pyalign.cli import main
main()
"""


def run(*arguments: str, without_typer: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyalign.cli", *arguments]
    if without_typer:
        command = [sys.executable, "-c", HIDE.format(arguments=list(arguments))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("without_typer", [False, True])
def test_command_works_with_and_without_the_cli_extra(without_typer: bool):
    text, as_json = (
        run("info", without_typer=without_typer),
        run("info", "--json", without_typer=without_typer),
    )
    assert text.returncode == as_json.returncode == 0, text.stderr + as_json.stderr
    assert text.stdout.startswith("pyalign")
    assert json.loads(as_json.stdout)["version"] == __version__


def test_a_command_without_its_extra_names_the_extra():
    result = run("distill", "--help", without_typer=True)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("pip install 'pyalign[cli]'")


@pytest.mark.parametrize("arguments", [["info", "--op", "dpo_loss"], ["info", "--help"]])
def test_more_than_the_report_needs_the_extra(arguments: list[str]):
    result = run(*arguments, without_typer=True)
    assert result.returncode == 1
    assert "pyalign[cli]" in result.stderr


# --op

ENGINES = {  # on a CPU, forward and backward
    "distillation_loss": ["distill", "scale"],
    "topk_distillation_loss": ["topk_distill", "scale"],
    "topk_logprobs": ["topk"],
    "linear_distillation_loss": ["distill", "scale"],
    "linear_topk_distillation_loss": ["topk_distill", "scale"],
    "linear_token_logprobs": ["logprob"],
    "linear_cross_entropy": ["logprob", "scale"],
    "token_logprobs": ["logprob"],
    "pairwise_preference_loss": ["pair_loss", "score_gradient"],
    "ranked_preference_loss": ["ranked_loss", "score_gradient"],
    "binary_discrimination_loss": ["pair_loss", "score_gradient"],
    "dpo_loss": ["pair_loss", "score_gradient"],
    "reward_scores": ["reward_scores"],
    "win_probabilities": ["score_groups"],
    "expected_win_rates": ["score_groups"],
    "best_of_n": ["score_groups"],
    "preference_metrics": ["preference_metrics"],
}
SMALL = {
    **dict.fromkeys(["rows", "pairs", "samples", "tokens", "groups", "sequences"], 2),
    "vocab": 128,
    "hidden": 16,
    "size": 4,
}


def explained(op: str) -> dict[str, Any]:
    case = next(x for x in all_cases(torch.device("cpu")) if x.op == op)
    sizes = [f"{name}={min(size, SMALL.get(name, size))}" for name, size in case.shape.items()]
    return _explain.explain(op, sizes, None, "cpu")


@pytest.mark.parametrize("op", _ops.OPS)
def test_what_an_op_runs(op: str):
    report = explained(op)
    assert (report["op"], report["choice"], report["device"]) == (op, "cpu", "cpu")
    ours = [x["name"] for x in report["backends"]["cpu"]["runs"] if x["name"].startswith("pyalign::cpu::")]
    assert ours == [f"pyalign::cpu::{name}" for name in ENGINES[op]]
    reference = [x["name"] for x in report["backends"]["reference"]["runs"]]
    assert reference
    assert not any(name.startswith("pyalign") for name in reference)
    assert report["backends"]["cuda"] == {"refusal": "the tensors are on cpu"}
    text = _explain.render(report)
    assert report["case"] in text
    assert f"    {ours[0]}  calls" in text


def test_products_are_shown_and_what_they_are_made_of_is_not():
    runs = {x["name"]: x["calls"] for x in explained("linear_cross_entropy")["backends"]["cpu"]["runs"]}
    assert runs["aten::mm"] == 3
    assert not {"aten::empty", "aten::matmul", "pyalign::linear_cross_entropy"} & set(runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_kernels_are_those_that_run():
    report = _explain.explain("distillation_loss", ["rows=64", "vocab=32000"], "bfloat16", "cuda")
    for name in ("cuda", "triton"):
        runs = report["backends"][name].get("runs", [])
        assert runs or "refusal" in report["backends"][name]
        assert all({"grid", "block", "registers"} <= set(x) for x in runs if not x["name"].startswith("Mem"))


def test_kernels_of_a_gpu_trace():
    def event(name: str, category: str, at: float, **arguments: object) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": at, "dur": 5.0, "args": {"stream": 7, **arguments}}

    ours = (
        "void pyalign::cuda::(anonymous namespace)::distill_clusters<__nv_bfloat16, __nv_bfloat16,"
        " pyalign::v1::ForwardKL<float, true> >(pyalign::cuda::DistillParams, int, int)"
    )
    how = {"grid": [264, 1, 1], "block": [256, 1, 1], "shared memory": 101376, "registers per thread": 128}
    events = [
        event("aten::mm", "cpu_op", 1.0),
        event("Memset (Device)", "gpu_memset", 30.0, bytes=4),
        event(ours, "kernel", 20.0, **how, **{"est. achieved occupancy %": 25}),
    ]
    found = _explain.kernels(events)
    assert found == [
        {
            "name": "distill_clusters<bfloat16, bfloat16, ForwardKL<float, true> >",
            "grid": [264, 1, 1],
            "block": [256, 1, 1],
            "shared bytes": 101376,
            "registers": 128,
            "occupancy %": 25,
        },
        {"name": "Memset (Device)"},
    ]
    report = {"case": "c", "device": "cuda", "choice": "cuda", "reason": "r", "backends": {"cuda": {"runs": found}}}
    assert "grid 264 x 1 x 1, block 256 x 1 x 1, shared bytes 101376" in _explain.render(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "kl"], "--op: got 'kl'; wanted one of distillation_loss, "),
        (["--op", "dpo_loss", "--shape", "rows=5"], "--shape: got 'rows=5'; wanted some of pairs=4096"),
        (["--op", "dpo_loss", "--shape", "pairs=0"], "--shape: got 'pairs=0'; wanted"),
        (["--op", "dpo_loss", "--dtype", "int8"], "--dtype: got 'int8'; wanted one of float32"),
        (["--op", "dpo_loss", "--device", "qpu"], "--device: got 'qpu'"),
        (["--dtype", "float32"], "--dtype: it is for --op alone"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str):
    result = CliRunner().invoke(build_app(), ["info", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


def test_the_command_prints_what_runs():
    command = ["info", "--op", "dpo_loss", "--shape", "pairs=8", "--dtype", "bfloat16", "--device", "cpu"]
    result = CliRunner().invoke(build_app(), command)
    assert result.exit_code == 0
    assert result.stdout.startswith("dpo_loss/8/bfloat16/backward on cpu: cpu (default on cpu)")
    report = json.loads(CliRunner().invoke(build_app(), [*command, "--json"]).stdout)
    assert {"name": "pyalign::cpu::pair_loss", "calls": 1} in report["backends"]["cpu"]["runs"]
