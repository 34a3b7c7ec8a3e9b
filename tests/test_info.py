"""``pyalign info`` says what was built and which backend each op would run."""

import json
import subprocess
import sys

import pytest
import torch

from pyalign import _C, _info, _ops, backend
from pyalign._version import __version__


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
