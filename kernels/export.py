"""The losses and their Triton kernels as a project for Hugging Face's kernel hub.

    python -m pyalign.kernels.export DIRECTORY --repo-id OWNER/pyalign-losses

lays out what ``kernel-builder`` builds and uploads: ``build.toml`` (a ``torch-noarch`` kernel, edition 5),
``flake.nix``, ``CARD.md``, ``tests/`` and ``torch-ext/pyalign_losses/``. The last is made from pyalign's own modules:
the losses over logits, hidden states, scores and log-probs, and all that they import. Its rules are those of
https://huggingface.co/docs/kernels/kernel-requirements:

- imports of itself are relative, others are of torch, triton or the standard library;
- ops are registered in the namespace that kernel-builder's generated ``_ops.py`` names, so that two versions can be
  loaded at once (pyalign's own ``_ops.py`` goes by another name there);
- it runs on Python 3.9: where pyalign asks ``zip`` for equal lengths, it doesn't.

The compiled kernels are left out: a GPU gets Triton's, anything else plain torch.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PUBLIC", "export"]

PUBLIC = {
    "_backends": ("backend",),
    "distill": (
        "DistillationMetrics",
        "TopKLogprobs",
        "distillation_loss",
        "linear_distillation_loss",
        "linear_topk_distillation_loss",
        "topk_distillation_loss",
        "topk_logprobs",
    ),
    "distributed": ("VocabularyShards",),
    "logprob": ("linear_cross_entropy", "linear_token_logprobs", "sequence_logprobs", "token_logprobs"),
    "ranking": (
        "LabelledOutput",
        "PreferenceOutput",
        "binary_discrimination_loss",
        "cpo_loss",
        "dpo_loss",
        "kto_loss",
        "orpo_loss",
        "pairwise_preference_loss",
        "ranked_preference_loss",
        "simpo_loss",
    ),
}
"""What the exported package offers, by the module that it comes from."""

_PACKAGE = "pyalign"
_RENAMED = {"_ops": "_loss_ops"}  # kernel-builder generates a module _ops
_COMPILED = re.compile(r"_C|_native(_\w+)?")
_OPS_MODULE = "_ops"

_BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cuda", "rocm"]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""

_FLAKE = """\
{
  description = "Flake for the kernel NAME";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

_CARD = """\
---
library_name: kernels
license: apache-2.0
---

# {name}

Losses of alignment training in Triton: KL, reverse KL, Jensen-Shannon and total variation distillation from logits or
hidden states and from stored top-k log-probs; token log-probs and cross-entropy; preference losses over pairs, rankings
and sequence log-probs (DPO and its kin). Each reads every operand once, computes its gradient on the way, and waits for
no host. Made from pyalign {source_version}; its docstrings say what each computes.

```python
from kernels import get_kernel

losses = get_kernel("{repo_id}", version={version})
loss = losses.distillation_loss(student_logits, teacher_logits, labels=labels)
loss.backward()
```

Available functions: {functions}.
"""

_TEST = '''\
"""The kernels against plain torch, values and gradients."""

import kernels
import pytest
import torch

losses = kernels.get_kernel("{repo_id}", version={version})
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU: with TRITON_INTERPRET=1


def compare(ours, theirs, x):
    """Values and gradients, through the Triton kernels."""
    first, second = x.clone().requires_grad_(), x.double().requires_grad_()
    with losses.backend("triton"):
        value = ours(first)
    expected = theirs(second)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(first.grad.double(), second.grad, rtol=1e-4, atol=1e-6)


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.kernels_ci
def test_distillation_loss():
    student, teacher = numbers(3, 5, 99, seed=1), numbers(3, 5, 99, seed=2)

    def theirs(x):
        p, q = torch.log_softmax(teacher.double() / 2, -1), torch.log_softmax(x / 2, -1)
        return (p.exp() * (p - q)).sum(-1).mean()

    compare(lambda x: losses.distillation_loss(x, teacher, temperature=2.0), theirs, student)


@pytest.mark.kernels_ci
def test_topk_distillation_loss():
    student, teacher = numbers(4, 99, seed=1), numbers(4, 99, seed=2)
    with losses.backend("triton"):
        stored = losses.topk_logprobs(teacher, k=7)

    def theirs(x):
        p, q = torch.softmax(teacher.double(), -1), torch.softmax(x, -1)
        rest = torch.ones_like(p).scatter(-1, stored.indices, 0.0)
        p, q = (torch.cat([y.gather(-1, stored.indices), (y * rest).sum(-1, keepdim=True)], -1) for y in (p, q))
        return (p * (p / q).log()).sum(-1).mean()

    compare(lambda x: losses.topk_distillation_loss(x, stored), theirs, student)


@pytest.mark.kernels_ci
def test_token_logprobs():
    logits, targets = numbers(2, 5, 99, seed=1), torch.arange(10, device=DEVICE).view(2, 5)

    def theirs(x):
        return torch.log_softmax(x, -1).gather(-1, targets[..., None]).squeeze(-1)

    compare(lambda x: losses.token_logprobs(x, targets), theirs, logits)


@pytest.mark.kernels_ci
def test_linear_cross_entropy():
    hidden, weight = numbers(6, 32, seed=1), numbers(99, 32, seed=2)
    targets = torch.tensor([0, 5, -100, 98, 7, 7], device=DEVICE)

    def theirs(x):
        return torch.nn.functional.cross_entropy(x @ weight.double().T, targets)

    compare(lambda x: losses.linear_cross_entropy(x, weight, targets), theirs, hidden)


@pytest.mark.kernels_ci
def test_pairwise_preference_loss():
    chosen, rejected = numbers(9, seed=1), numbers(9, seed=2)

    def theirs(x):
        return torch.nn.functional.softplus(rejected.double() - x).mean()

    compare(lambda x: losses.pairwise_preference_loss(x, rejected), theirs, chosen)


@pytest.mark.kernels_ci
def test_ranked_preference_loss():
    scores, ranks = numbers(3, 4, seed=1), torch.tensor([0, 1, 2, 3], device=DEVICE).expand(3, 4).contiguous()

    def theirs(x):
        return torch.stack([x[:, i:].logsumexp(-1) - x[:, i] for i in range(4)]).sum(0).mean()

    compare(lambda x: losses.ranked_preference_loss(x, ranks, method="plackett_luce"), theirs, scores)


@pytest.mark.kernels_ci
def test_dpo_loss():
    chosen, rejected = numbers(9, seed=1), numbers(9, seed=2)

    def theirs(x):
        return torch.nn.functional.softplus(-0.1 * (x - rejected.double())).mean()

    compare(lambda x: losses.dpo_loss(x, rejected, beta=0.1).loss, theirs, chosen)
'''


class _Edit(NamedTuple):
    """Source lines are counted from 1, columns from 0 in UTF-8 bytes, as ast counts them."""

    line: int
    column: int
    end_line: int
    end_column: int
    text: str


def _edit(node: ast.expr | ast.stmt, text: str) -> _Edit:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return _Edit(node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, text)


def _applied(source: str, edits: list[_Edit]) -> str:
    lines = source.encode().splitlines(keepends=True)
    for edit in sorted(edits, reverse=True):
        before, after = lines[edit.line - 1][: edit.column], lines[edit.end_line - 1][edit.end_column :]
        lines[edit.line - 1 : edit.end_line] = [before + edit.text.encode() + after]
    return b"".join(lines).decode()


def _source(module: str) -> Path | None:
    """The file of a module of pyalign; None for a name that is no module."""
    spec = importlib.util.find_spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _exported_name(module: str) -> str:
    """The module's name relative to the package, as it is exported: ``_loss_ops`` for ``pyalign._ops``."""
    name = module.removeprefix(f"{_PACKAGE}.")
    return _RENAMED.get(name, name)


class _Module:
    """A module of pyalign: what it imports of pyalign, and its text as it is exported."""

    def __init__(self, name: str) -> None:
        path = _source(name)
        assert path is not None
        self.name = name
        self._source = path.read_text(encoding="utf-8")
        self._dots = "." * name.count(".")  # of a relative import that starts at the package
        self._edits: list[_Edit] = []
        self._from_ops: set[str] = set()  # names needed of the generated module
        self.imports: set[str] = set()
        tree = ast.parse(self._source, filename=str(path))
        for node in ast.walk(tree):
            self._visit(node)
        if self._from_ops:
            ours = (x for x in tree.body if isinstance(x, ast.ImportFrom) and (x.module or "").startswith(_PACKAGE))
            first = next(ours)
            names = ", ".join(sorted(self._from_ops))
            text = f"from {self._dots}{_OPS_MODULE} import {names}\n"
            self._edits.append(_Edit(first.lineno, 0, first.lineno, 0, text))

    def text(self) -> str:
        return _applied(self._source, self._edits)

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names = [x.name for x in node.names if x.name.partition(".")[0] == _PACKAGE]
            if names:
                raise RuntimeError(f"{self.name}, line {node.lineno}: import {names[0]} can't be made relative")
        elif isinstance(node, ast.ImportFrom):
            self._import_from(node)
        elif isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == f"torch.ops.{_PACKAGE}":
            self._edits.append(_edit(node, "ops"))
            self._from_ops.add("ops")
        elif isinstance(node, ast.JoinedStr):
            match node.values:
                case [ast.Constant(value="pyalign::"), ast.FormattedValue(value=name)]:
                    self._edits.append(_edit(node, f"add_op_namespace_prefix({ast.unparse(name)})"))
                    self._from_ops.add("add_op_namespace_prefix")
                case _:
                    pass

    def _import_from(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.name.split(".")[: -node.level]
            base = ".".join([*parents, *([base] if base else [])])
        if base.partition(".")[0] != _PACKAGE:
            return
        submodules = {x.name: f"{base}.{x.name}" for x in node.names}
        submodules = {name: module for name, module in submodules.items() if _is_module(base, module)}
        self.imports.update(submodules.values())
        if len(submodules) < len(node.names):
            self.imports.add(base)
        if node.level:
            return  # relative within the package of kernels, which is exported as it is
        aliases = []
        for alias in node.names:
            renamed = _RENAMED.get(alias.name, alias.name) if alias.name in submodules else alias.name
            bound = alias.asname or alias.name
            aliases.append(renamed if renamed == bound else f"{renamed} as {bound}")
        within = "" if base == _PACKAGE else _exported_name(base)
        self._edits.append(_edit(node, f"from {self._dots}{within} import {', '.join(aliases)}"))

    def _call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if called == "importlib.import_module" and isinstance(node.args[0], ast.Constant):
            module = str(node.args[0].value)
            if module.partition(".")[0] == _PACKAGE:
                self._edits.append(_edit(node.args[0], f'"{self._dots}{_exported_name(module)}", __package__'))
                if not _COMPILED.fullmatch(_exported_name(module)):
                    self.imports.add(module)
        elif called == "torch.library.Library":
            self._edits.append(_edit(node.args[0], 'add_op_namespace_prefix("").partition("::")[0]'))
            self._from_ops.add("add_op_namespace_prefix")
        elif called == "zip":
            for keyword in node.keywords:
                last = node.args[-1]
                assert keyword.arg == "strict"
                assert last.end_lineno is not None
                assert last.end_col_offset is not None
                assert keyword.value.end_lineno is not None
                assert keyword.value.end_col_offset is not None
                end = keyword.value.end_lineno, keyword.value.end_col_offset
                self._edits.append(_Edit(last.end_lineno, last.end_col_offset, *end, ""))


def _is_module(base: str, name: str) -> bool:
    """Whether ``name`` is a module of the package ``base``, and not something that ``base`` holds."""
    path = _source(base)
    return path is not None and path.name == "__init__.py" and _source(name) is not None


def _needed() -> Iterator[_Module]:
    """The modules of the public names, and all that they import of pyalign."""
    wanted = [f"{_PACKAGE}.{name}" for name in PUBLIC]
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            module = _Module(name)
            wanted += module.imports
            yield module


def _init(name: str) -> str:
    lines = [f'"""{name}: losses of alignment training in Triton, exported from pyalign."""\n\n']
    lines += [f"from .{module} import {', '.join(names)}\n" for module, names in PUBLIC.items()]
    public = sorted(name for names in PUBLIC.values() for name in names)
    return "".join([*lines, "\n__all__ = [\n", *(f'    "{name}",\n' for name in public), "]\n"])


def export(directory: str | Path, *, repo_id: str, version: int = 0) -> list[Path]:
    """Lays the kernel project out in ``directory``.

    Args:
        directory: is made; it may exist if it is empty.
        repo_id: OWNER/NAME of the kernel on the hub; NAME is the kernel's, such as ``pyalign-losses``.
        version: the kernel's version on the hub, >= 0; 0 says by convention that the interface may still change.

    Returns:
        The files written.

    Raises:
        ValueError: a name that the hub doesn't take, a negative version.
        FileExistsError: the directory holds something.
    """
    owner, _, name = repo_id.partition("/")
    if not owner or not re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", name):
        raise ValueError(f"repo_id: got {repo_id!r}; wanted OWNER/NAME, NAME of lower-case letters, digits and dashes")
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ValueError(f"version: got {version!r}; wanted an int >= 0")
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    from pyalign._version import __version__

    module_name = name.replace("-", "_")
    package = Path("torch-ext", module_name)
    functions = sorted(x for names in PUBLIC.values() for x in names if x[0].islower())
    values = {
        "name": name, "repo_id": repo_id, "version": version, "source_version": __version__,
        "functions": ", ".join(f"`{x}`" for x in functions),
    }  # fmt: skip
    files = {
        Path("build.toml"): _BUILD.format(**values),
        Path("flake.nix"): _FLAKE.replace("NAME", name),
        Path("CARD.md"): _CARD.format(**values),
        Path("tests", "__init__.py"): "",
        Path("tests", f"test_{module_name}.py"): _TEST.format(**values),
        package / "__init__.py": _init(name),
    }
    for module in _needed():
        path = package / f"{_exported_name(module.name).replace('.', '/')}.py"
        files[path] = module.text()
        if path.parent != package:
            files[path.parent / "__init__.py"] = ""
    for path, text in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text, encoding="utf-8")
    return [directory / path for path in files]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pyalign.kernels.export", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("directory", help="where the project is laid out; made, or empty")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="the kernel's place on the hub")
    parser.add_argument("--kernel-version", type=int, default=0, help="its version there (default: 0, not settled yet)")
    options = parser.parse_args(arguments)
    try:
        files = export(options.directory, repo_id=options.repo_id, version=options.kernel_version)
    except (ValueError, OSError) as error:
        sys.exit(f"export: {error}")
    print(f"{len(files)} files in {options.directory}; build and upload them with kernel-builder")


if __name__ == "__main__":
    main()
