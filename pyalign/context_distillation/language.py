"""A causal language model from a local directory, with its tokenizer, its identity and its head apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyalign._optional import require
from pyalign.context_distillation import JobError
from pyalign.context_distillation.options import OptionError
from pyalign.distill import TopKLogprobs, linear_topk_distillation_loss, topk_distillation_loss
from pyalign.teacher_store import Identity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")
_MIB = 1 << 20
CHUNK = 1024  # rows whose logits exist at a time
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


@dataclass
class CausalLM:
    """A language model taken apart at its last hidden states: only the rows that count meet the head.

    ``head(features(input_ids))`` are the model's logits, soft caps and scales included.
    """

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    path: str
    identity: Identity
    bos: int | None  # what the tokenizer puts in front of every text, if it does
    body: Callable[..., Any] | None  # None: the features are the logits
    head: Callable[[Tensor], Tensor]  # (T, H) -> (T, V)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        return self.identity.vocab_size

    @property
    def context(self) -> int | None:
        """How many tokens the model reads at most, if it says so."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, with no special token added."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def features(self, input_ids: Tensor, cache: Any = None) -> Tensor:
        """input_ids (B, L), read after what ``cache`` holds (and added to it) -> (B, L, H).

        Sequences are padded on the right, so under the causal mask no position that counts sees padding.
        """
        arguments = {"input_ids": input_ids, "past_key_values": cache, "use_cache": cache is not None}
        if self.body is None:
            return self.model(**arguments).logits
        return self.body(**arguments).last_hidden_state

    def rows(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        """Features (T, H) at the flat positions ``rows`` (T,) of ``input_ids`` (B, L)."""
        return self.features(input_ids).flatten(0, 1).index_select(0, rows)

    def topk_loss(self, features: Tensor, teacher: TopKLogprobs, **options: Any) -> Tensor:
        """``topk_distillation_loss(head(features), teacher)``, features (T, H); a plain linear head never makes logits
        of all of them."""
        head = self.head
        if self.body is not None and isinstance(head, nn.Linear) and _is_plain(head):
            return linear_topk_distillation_loss(features, head.weight, teacher, student_bias=head.bias, **options)
        return topk_distillation_loss(head(features), teacher, **options)

    def layers(self) -> nn.ModuleList:
        """The decoder's layers: the longest list of modules in the model."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise JobError(
                f"{type(self.model).__name__} has no list of layers; train the whole model (no --last-layers)"
            )
        return max(lists, key=len)

    def learned_positions(self) -> bool:
        """Whether absolute positions are learned, so that a prompt in front shifts what the model reads."""
        name = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")
        return any(isinstance(m, nn.Embedding) and name.search(n) for n, m in self.model.named_modules())


def _is_plain(head: nn.Linear) -> bool:
    """Whether nothing but ``features @ weight.T + bias`` happens in it: no subclass's forward, no hook, no
    parametrization."""
    state = vars(head)
    hooked = any(state.get(f"_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre"))
    return type(head) is nn.Linear and "forward" not in state and not hooked


def head_chunks(head: Callable[[Tensor], Tensor], features: Tensor, rows: int = CHUNK) -> Iterator[Tensor]:
    """Logits of ``features`` (T, H), at most ``rows`` of them at a time."""
    for chunk in features.split(rows):
        yield head(chunk)


def load(
    path: str | Path, *, gguf_file: str | None = None, dtype: str = "auto", device: str | torch.device = "cpu"
) -> CausalLM:
    """Load a local Hugging Face model directory, or the GGUF file in it, which is dequantised.

    Args:
        path: the directory, or a ``.gguf`` file.
        gguf_file: the GGUF file's name in the directory; needed only where it holds several, or a config.json.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the device multiplies it in hardware, else float32.
        device: where the model goes; "auto" is cuda where there is one, else cpu.

    Raises:
        OptionError: no such directory, no model in it, or one that can't be loaded; no such dtype or device.
        ModuleNotFoundError: transformers (for GGUF also gguf or accelerate) is missing; it names the extra.
    """
    transformers = require("transformers")
    directory, gguf_file = _locate(Path(path), gguf_file)
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
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
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
    model = model.to(device).eval()
    body, head, vocab_size = _split_head(model)
    identity = Identity(_model_digest(directory, gguf_file), _tokenizer_digest(tokenizer), vocab_size)
    ids = tokenizer("x")["input_ids"]
    bos = tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None
    return CausalLM(model, tokenizer, str(path), identity, bos, body, head)


def _locate(path: Path, gguf_file: str | None) -> tuple[Path, str | None]:
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


def _split_head(model: Any) -> tuple[Callable[..., Any] | None, Callable[[Tensor], Tensor], int]:
    """Body, head and vocabulary: apart if head(body(x)) are the model's logits to the bit on a probe, else whole."""
    probe = torch.arange(4, device=model.device)[None]
    with torch.inference_mode():
        logits = model(input_ids=probe, use_cache=False).logits
        body, head = model.base_model, model.get_output_embeddings()
        if body is not model and head is not None:
            hidden = getattr(body(input_ids=probe, use_cache=False), "last_hidden_state", None)
            if hidden is not None and torch.equal(head(hidden), logits):
                return body, head, logits.shape[-1]
    return None, nn.Identity(), logits.shape[-1]


def _model_digest(directory: Path, gguf_file: str | None) -> str:
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


def _tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the vocabulary, the special tokens and the cut of a probe text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    parts = [vocabulary, sorted(tokenizer.all_special_ids), tokenizer(_PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
