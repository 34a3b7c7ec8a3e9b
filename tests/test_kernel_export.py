"""The project for Hugging Face's kernel hub: laid out by the rules its documentation states, and running on its own.

The rules: https://huggingface.co/docs/kernels/kernel-requirements and .../builder/writing-kernels, of August 2026.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from pyalign.kernels.export import PUBLIC, export, main

REPO_ID, NAME = "someone/pyalign-losses", "pyalign_losses"

# What kernel-builder generates beside the package's own files.
GENERATED_OPS = """
import torch

ops = getattr(torch.ops, "_{name}_cuda_{unique}")


def add_op_namespace_prefix(op_name):
    return "_{name}_cuda_{unique}::" + op_name
"""

# What kernels.get_kernel does with a built variant: a module of a unique name, from a place outside sys.path.
GET_KERNEL = """
import importlib.util, sys, types

def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

sys.modules["pyalign"] = None  # importing it raises
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "pyalign-losses"
    export(directory, repo_id=REPO_ID, version=3)
    return directory


@pytest.fixture(scope="module")
def package(project):
    return project / "torch-ext" / NAME


def modules(package):
    return {path: ast.parse(path.read_text(), feature_version=(3, 9)) for path in sorted(package.rglob("*.py"))}


def test_build_toml(project):
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    with (project / "build.toml").open("rb") as file:
        build = tomllib.load(file)
    assert build == {
        "general": {
            "name": "pyalign-losses",  # lower case and dashes: the repository's name, and with _ the module's
            "version": 3,
            "edition": 5,
            "license": "Apache-2.0",
            "backends": ["cuda", "rocm"],
            "hub": {"repo-id": REPO_ID},
        },
        "torch-noarch": {},
    }


def test_layout(project, package):
    assert {path.name for path in project.iterdir()} == {"build.toml", "flake.nix", "CARD.md", "tests", "torch-ext"}
    assert [path.name for path in (project / "torch-ext").iterdir()] == [NAME]
    assert (package / "__init__.py").is_file()
    assert not (package / NAME).exists()  # kernel-builder's layout check
    assert not (package / "_ops.py").exists()  # kernel-builder writes it
    assert {path.suffix for path in package.rglob("*") if path.is_file()} == {".py"}
    for folder in (path for path in package.rglob("*") if path.is_dir()):
        assert (folder / "__init__.py").is_file(), folder
    assert (project / "CARD.md").read_text().startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n")


class WithoutAnnotations(ast.NodeTransformer):
    def generic_visit(self, node):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(...))
        return super().generic_visit(node)


def test_everything_is_python_3_9(package):
    """The grammar is checked by the parser; what else pyalign uses of 3.10 is zip(strict=) and X | None."""
    for path, tree in modules(package).items():
        future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
        evaluated = WithoutAnnotations().visit(tree) if future else tree
        for node in ast.walk(evaluated):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":
                assert not node.keywords, f"{path}:{node.lineno}: zip(strict=)"
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
                operands = [ast.unparse(x) for x in (node.left, node.right)]
                assert not {"None", "int", "float", "str", "Tensor"} & set(operands), f"{path}:{node.lineno}"


def test_imports_are_relative_or_of_torch_triton_and_the_standard_library(package):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path, tree in modules(package).items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names = [ast.literal_eval(node.args[0])]
                if names[0].startswith("."):
                    assert ast.unparse(node.args[1]) == "__package__"
                    names = []
            for name in names:
                assert name.partition(".")[0] in allowed, f"{path}:{node.lineno}: {name}"


def test_ops_are_registered_in_the_generated_namespace(package):
    """torch.ops.<name> must be one build's own, so that two versions can be loaded at once."""
    registrations = 0
    for path, tree in modules(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"torch\.ops\.(?!aten\b)", ast.unparse(node)), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.library."):
                registrations += 1
                assert "add_op_namespace_prefix(" in ast.unparse(node.args[0]), f"{path}:{node.lineno}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"pyalign(::.*)?", node.value), f"{path}:{node.lineno}"
    assert registrations == 2


def test_the_public_interface_is_all_and_what_pyalign_offers(package):
    tree = ast.parse((package / "__init__.py").read_text())
    listed = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert listed == sorted(name for names in PUBLIC.values() for name in names)
    for module, names in PUBLIC.items():
        source = importlib.import_module(f"pyalign.{module}")
        for name in names:
            assert hasattr(source, name)


def test_nothing_is_exported_that_nothing_needs(package):
    names = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert not {x for x in names if re.search(r"native|scor|bradley|battle|cli|models|integrations|export", x)}


def built(package, directory, unique):
    """A build variant, as kernel-builder makes it: the package's files and its generated module."""
    variant = directory / unique / "torch-cuda"
    shutil.copytree(package, variant)
    (variant / "_ops.py").write_text(GENERATED_OPS.format(name=NAME, unique=unique))
    return variant


def run(code, *arguments, directory):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYALIGN_", "PYTHON"))}
    result = subprocess.run(
        [sys.executable, "-c", GET_KERNEL + code, *map(str, arguments)],
        cwd=directory, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_its_own_tests_pass_without_pyalign(project, package, tmp_path):
    """Every exported test runs the Triton kernels in the interpreter and compares with plain torch."""
    code = """
import pytest
kernels = types.ModuleType("kernels")
kernels.get_kernel = lambda repo_id, version: load(sys.argv[1], "built_kernel")
sys.modules["kernels"] = kernels
options = ["-q", "-p", "no:cacheprovider", "--rootdir", sys.argv[2], "-o", "markers=kernels_ci: in CI", "-W", "error"]
sys.exit(pytest.main([*options, "--strict-markers", sys.argv[2]]))
"""
    variant = built(package, tmp_path, "abc1234")
    output = run(code, variant, project / "tests", directory=tmp_path)
    assert re.search(r"^7 passed", output, re.MULTILINE), output


def test_two_versions_in_one_process(package, tmp_path):
    """Each with ops of its own; and without a GPU or an order for Triton, plain torch serves and says so."""
    code = """
import torch, warnings
first, second = load(sys.argv[1], "first"), load(sys.argv[2], "second")
x, y = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
values = []
for kernel in (first, second):
    with kernel.backend("triton"):
        values.append(kernel.distillation_loss(x, y))
assert torch.equal(*values)
namespaces = {x.partition("::")[0] for x in torch._C._dispatch_get_all_op_names()}
assert {"_pyalign_losses_cuda_one", "_pyalign_losses_cuda_two"} <= namespaces
assert "pyalign" not in namespaces
names = [name for name, module in sys.modules.items() if module is not None]
assert not [name for name in names if name.partition(".")[0] in ("pyalign", "pyalign_losses")]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first.distillation_loss(x, y).backward()
assert x.grad.abs().max() > 0
assert ["plain torch serves" in str(x.message) for x in caught] == [True], caught
"""
    run(code, built(package, tmp_path, "one"), built(package, tmp_path, "two"), directory=tmp_path)


def test_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"repo_id: got 'losses'; wanted OWNER/NAME"):
        export(tmp_path, repo_id="losses")
    with pytest.raises(ValueError, match=r"repo_id: got 'me/Losses_1'"):
        export(tmp_path, repo_id="me/Losses_1")
    with pytest.raises(ValueError, match=r"version: got -1; wanted an int >= 0"):
        export(tmp_path, repo_id=REPO_ID, version=-1)
    (tmp_path / "notes").touch()
    with pytest.raises(FileExistsError, match=r"is not empty"):
        export(tmp_path, repo_id=REPO_ID)
    with pytest.raises(SystemExit, match=r"export: repo_id: got 'losses'"):
        main([str(tmp_path), "--repo-id", "losses"])
    assert not capsys.readouterr().out


def test_the_command(tmp_path, capsys):
    main([str(tmp_path / "here"), "--repo-id", REPO_ID])
    assert "version = 0" in (tmp_path / "here" / "build.toml").read_text()
    assert re.fullmatch(r"\d+ files in .*here; build and upload them with kernel-builder\n", capsys.readouterr().out)
