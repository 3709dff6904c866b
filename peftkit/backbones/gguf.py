"""Turn one GGUF file into an ordinary transformers folder in float32."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from peftkit.errors import FetchError
from peftkit.quiet import quiet_libraries


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of `gguf` into `folder` (config, safetensors, chat template)."""
    from safetensors import SafetensorError

    try:
        # transformers draws its conversion bar with tqdm itself, which only a redirected stderr silences
        with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
            model = load_gguf_model(gguf)
            _without_quantisation(model).save_pretrained(folder)
            load_gguf_tokenizer(gguf, model.config.max_position_embeddings).save_pretrained(folder)
        # safetensors writes for the owner alone; a cache may be shared.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    except (ImportError, RuntimeError, SafetensorError, ValueError) as error:
        raise FetchError(
            f"could not convert {gguf.name} to safetensors: {error}; "
            "check that the installed transformers and gguf packages belong together (`pip check`)"
        ) from error


def load_gguf_model(gguf: Path) -> Any:
    """The dense float32 model; refused when the file lacks a weight, which would be left random."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, loading = loaded
    if loading["missing_keys"]:
        raise ValueError(f"the file lacks {', '.join(sorted(loading['missing_keys']))}")
    return model


def _without_quantisation(model: Any) -> Any:
    """The same weights in a model that was never marked as quantised, which transformers agrees to save."""
    plain_config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain = type(model)(plain_config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def load_gguf_tokenizer(gguf: Path, longest: int) -> Any:
    """The tokenizer with the chat template; GGUF does not state its longest input, the model does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = longest
    return tokenizer
