"""Pretrained models in local directories: where they are, on what and in what they run, and which they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pyalign._optional import require
from pyalign._options import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")
_MIB = 1 << 20
_PROBE = "Human: What's 12 + 7?\n\nAssistant: It's 19, na\u00efve \u6570 \U0001f642.\n\tdef f(x):  return x**2\n"


def choose_device(name: str | torch.device) -> torch.device:
    """The device called ``name``, tried out; "auto" is cuda where there is one, else cpu."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ModuleNotFoundError) as error:  # what torch raises, by the kind of device
        reason = str(error).partition("\n")[0]
        raise OptionError("device", f"got {str(name)!r} ({reason}); wanted auto, cpu, cuda, cuda:1 ...") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; "auto" is bfloat16 where the hardware multiplies it, else float32."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise OptionError("dtype", f"got {name!r}; wanted auto, {' or '.join(DTYPES)}")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        info = Path("/proc/cpuinfo")
        flags = info.read_text().split() if device.type == "cpu" and info.exists() else []
        fast = "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if fast else torch.float32


class Pretrained(NamedTuple):
    model: Any  # transformers.PreTrainedModel, in eval mode
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    digest: str  # of the model, see model_digest


def load_pretrained(
    path: str | Path, auto_class: str, *, gguf_file: str | None, dtype: str, device: str | torch.device
) -> Pretrained:
    """The local model, read by transformers' class ``auto_class``, and its tokenizer; nothing is downloaded.

    Raises:
        OptionError: no such directory, no model in it, or one that can't be loaded; no such dtype or device.
        ModuleNotFoundError: transformers (for GGUF also gguf or accelerate) is missing; it names the extra.
    """
    transformers = require("transformers")
    directory, gguf_file = locate(Path(path), gguf_file)
    device = choose_device(device)
    torch_dtype = choose_dtype(dtype, device)
    arguments: dict[str, Any] = {"local_files_only": True}
    quantization: dict[str, Any] = {}
    if gguf_file is not None:
        require("gguf")
        require("accelerate")
        arguments["gguf_file"] = gguf_file
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Packed weights, the default of newer versions, can be neither trained nor saved.
        quantization["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **arguments)
        model, loaded = getattr(transformers, auto_class).from_pretrained(
            directory, dtype=torch_dtype, output_loading_info=True, **arguments, **quantization
        )
    except (OSError, ValueError, require("safetensors").SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OptionError("model", f"transformers can't load {path}: {reason:.300}") from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise OptionError(
            "model", f"{path} lacks {len(missing)} of its weights, the first is {missing[0]}; they would be random"
        )
    return Pretrained(model.to(device).eval(), tokenizer, model_digest(directory, gguf_file))


def locate(path: Path, gguf_file: str | None) -> tuple[Path, str | None]:
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if not path.is_dir():
        raise OptionError(
            "model", f"{path} is neither a directory nor a .gguf file; wanted a local model (nothing is downloaded)"
        )
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise OptionError("gguf_file", f"{path} holds no {gguf_file}")
        return path, gguf_file
    if (path / "config.json").exists():
        return path, None
    found = sorted(p.name for p in path.glob("*.gguf"))
    if len(found) != 1:
        which = f"several GGUF files ({', '.join(found)}): name one with --gguf-file" if found else "no GGUF file"
        raise OptionError("model", f"{path} holds no config.json and {which}")
    return path, found[0]


def model_digest(directory: Path, gguf_file: str | None) -> str:
    """sha256 of the configuration and the weights.

    Of a weight file larger than 64 MiB, 64 samples of 1 MiB at even distances count: fine-tuning changes them
    all, and a model of 100 GB takes a second.
    """
    digest = hashlib.sha256()
    if gguf_file is not None:
        files = [directory / gguf_file]
    else:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(config, sort_keys=True).encode())
        files = sorted(p for p in directory.iterdir() if p.suffix in _WEIGHTS)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= 64 * _MIB:
                digest.update(file.read())
            else:
                for i in range(64):
                    file.seek((size - _MIB) * i // 63)
                    digest.update(file.read(_MIB))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the vocabulary, the special tokens and the cut of a probe text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    parts = [vocabulary, sorted(tokenizer.all_special_ids), tokenizer(_PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def leading_bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of every text, if it does."""
    ids = tokenizer("x")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def is_plain_linear(head: nn.Linear) -> bool:
    """Whether nothing but ``features @ weight.T + bias`` happens in it: no subclass's forward, no hook, no
    parametrization."""
    state = vars(head)
    hooked = any(state.get(f"_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre"))
    return type(head) is nn.Linear and "forward" not in state and not hooked
