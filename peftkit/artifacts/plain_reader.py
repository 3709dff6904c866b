"""A merged model read back from disk by a process of its own, as plain transformers.

`python -m peftkit.artifacts.plain_reader` reads one request a line from its input, and writes one answer a line. What
it computes with is what anybody computes with who has transformers alone: neither peft nor anything that trains is
imported, and each answer says so. peftkit's tasks turn rows into token ids, with the tokenizer that lies in the folder,
and logits into scores.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from peftkit.artifacts.manifest import read_saved_config
from peftkit.artifacts.probe import ask, digests, encoded_probe, examples_sha256
from peftkit.backbones.load import Head
from peftkit.data.files import Rows
from peftkit.errors import PeftkitError, first_line
from peftkit.quiet import quiet_libraries

FORBIDDEN = ("peft", "peftkit.training", "peftkit.artifacts.merge")
AMISS = ("missing_keys", "unexpected_keys", "mismatched_keys")
LOGITS = "logits.safetensors"


def main() -> None:
    """Answer requests until the input ends."""
    # what libraries print must not come between the answers
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            print(json.dumps(_answered(json.loads(line))), file=answers, flush=True)


def _answered(request: dict[str, Any]) -> dict[str, Any]:
    try:
        found = described(Path(request["folder"]), request["model_class"], request["dtype"], request["weights"])
        if request["probe"]:
            found |= _asked(found.pop("model"), found.pop("tokenizer"), request)
    except PeftkitError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever a damaged folder makes of transformers, it is one that cannot be shipped
        return {"error": f"{type(error).__name__}: {first_line(error)}"}
    imported = sorted(name for name in FORBIDDEN if name in sys.modules)
    return {name: value for name, value in found.items() if name not in ("model", "tokenizer")} | {"imported": imported}


def described(folder: Path, model_class: str, dtype: str, weights: bool) -> dict[str, Any]:
    """What a folder holds to somebody who loads it with transformers; `model` and `tokenizer` are these themselves.

    Args:
        dtype: what tensors are cast to before they are hashed.
        weights: load and hash them too; otherwise `model` is None, and nothing is said of them.
    """
    import transformers

    with quiet_libraries():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    found: dict[str, Any] = {
        "files": sorted(file.name for file in folder.iterdir()),
        "config": config.to_dict(),
        "dtype": str(config.dtype).removeprefix("torch."),
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "model": None,
        "tokenizer": tokenizer,
    }
    generation = folder / "generation_config.json"
    if generation.is_file():
        found["generation"] = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True).to_dict()
    packed = getattr(config, "quantization_config", None) is not None
    return found | (_with_weights(folder, model_class, dtype, packed) if weights else {})


def _with_weights(folder: Path, model_class: str, dtype: str, packed: bool) -> dict[str, Any]:
    import torch
    import transformers

    # what is packed goes to a GPU if it is left to itself
    place: dict[str, Any] = {"device_map": {"": "cpu"}} if packed else {}
    with quiet_libraries():
        model, info = getattr(transformers, model_class).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **place
        )
    return {
        "model": model,
        "class": type(model).__name__,
        "amiss": {
            name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        },
        # before anything is computed: bitsandbytes then packs some weights in another way
        "tensors": digests(model, None if packed else getattr(torch, dtype)),
        "tied": is_tied(model),
    }


def is_tied(model: Any) -> bool:
    """Whether the output of a language model is the matrix of its word embeddings."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _asked(model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Score of the model on the probe; the logits go into a file in the request's folder."""
    import torch
    from safetensors.torch import save_file

    probe = request["probe"]
    run, rows = read_saved_config(Path(probe["run"])), json.loads(Path(probe["rows"]).read_text(encoding="utf-8"))
    split, scored = encoded_probe(run, Rows(**rows), Head.from_dict(probe["head"]), tokenizer)
    answers = ask(model, run, split, scored, probe["examples"])
    kept = answers.logits[: probe["examples"]]
    flat = torch.cat([one.flatten() for one in kept]) if kept else torch.zeros(0)
    save_file({"logits": flat}, Path(probe["answers"]) / LOGITS)
    return {
        "examples": examples_sha256(split),
        "shapes": [list(one.shape) for one in kept],
        "score": answers.score,
    }


if __name__ == "__main__":
    main()
