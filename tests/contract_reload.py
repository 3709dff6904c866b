"""A fresh process that loads saved adapters: one request a line on stdin, one answer a line on stdout."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

HEAD_SEED = 2
"""Not the seed that trained models start from: a head that was not saved computes something else."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The logits of the adapter that `request` names, over the untouched checkpoint."""
    from architectures import backbone_of, evaluated
    from pydantic import TypeAdapter

    from peftkit.backbones.quantization import AnyQuantization
    from peftkit.methods import AnyMethod

    method = TypeAdapter(AnyMethod).validate_json(json.dumps(request["method"]), strict=True)
    quantization = TypeAdapter(AnyQuantization | None).validate_python(request["quantization"])
    backbone = backbone_of(Path(request["checkpoint"]), request["model_class"], HEAD_SEED, quantization)
    model = method.load(backbone, Path(request["folder"]))
    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if training:
        return {"error": f"loaded for inference, yet trains {training[:3]}"}
    return {"logits": evaluated(model, request["model_class"]).tolist()}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer until there are no more requests."""
    for line in requests:
        try:
            found = answer(json.loads(line))
        except Exception:  # every failure belongs to the test that asked
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    serve(sys.stdin, replies)
