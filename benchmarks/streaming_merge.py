"""What a streamed merge of a model with three billion parameters takes: peak memory, time, and bytes on the disk.

    OMP_NUM_THREADS=1 python -m benchmarks.streaming_merge --scratch <folder with 14 GB free>

A checkpoint of Llama 3.2 3B's shapes with random weights in bfloat16 (tied embeddings, files of 1 GB), and a LoRA of
rank 16 on every linear layer of its blocks with random numbers for what would have been trained. The merge and its
proof run in a process of their own, whose peak is the system's figure (`ru_maxrss`, the process that reads back
included). Checkpoint, run and merged model are removed afterwards.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.made_runs import make_run
from benchmarks.tiny_bert import SPECIAL, save_bert_tokenizer
from peftkit.artifacts.checkpoints import Checkpoint, write_file
from peftkit.backbones.load import Head
from peftkit.config import Run
from peftkit.environment import describe

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "streaming_merge.json"
SHAPE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
SHARD_BYTES = 10**9
MERGE = """
import json, sys
from pathlib import Path
from peftkit.artifacts.settings import MergeSettings
from peftkit.artifacts.streamed import merge_streamed

run, target, shard_bytes = sys.argv[1:]
report = merge_streamed(Path(run), Path(target), MergeSettings(shard_bytes=int(shard_bytes)))
print(json.dumps(report.as_dict()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="FOLDER")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--prepare", action="store_true", help="make the checkpoint and the run, and leave the rest")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    scratch, shape = options.scratch / "peftkit-streaming-merge", SHAPE | {"num_hidden_layers": options.layers}
    if not (scratch / "run" / "manifest.json").is_file():
        prepare(scratch, shape)
    if options.prepare:
        return
    figures = measured(scratch)
    shutil.rmtree(scratch)
    document = {
        "command": " ".join(["python -m benchmarks.streaming_merge", *sys.argv[1:]]),
        "environment": describe(),
        "shape": SHAPE,
        "figures": figures,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def prepare(scratch: Path, shape: dict[str, Any]) -> None:
    """Make the checkpoint and the run."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    write_checkpoint(scratch / "backbone", shape)
    run = Run(
        backbone={"name": str(scratch / "backbone"), "dtype": "bfloat16"},
        task={"kind": "completion", "max_length": 32},
        method={"kind": "lora", "rank": 16, "alpha": 32, "targets": "all"},
        training={"learning_rate": 1e-4, "max_steps": 1},
        output={"folder": str(scratch / "run")},
    )
    make_run(run, Head("AutoModelForCausalLM"), scratch / "run", spread=0.01, without_weights=True)


def measured(scratch: Path) -> dict[str, Any]:
    """The figures of one merge."""
    start = time.perf_counter()
    arguments = [str(scratch / "run"), str(scratch / "merged"), str(SHARD_BYTES)]
    done = subprocess.run(
        [sys.executable, "-c", MERGE, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    seconds = time.perf_counter() - start
    report = json.loads(done.stdout)
    files = sorted((scratch / "merged").glob("*.safetensors"))
    adapter = (scratch / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    largest = max(file.stat().st_size for file in files)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    held = Checkpoint(files).entries.values()
    return {
        "parameters": sum(math.prod(entry.shape) for entry in held),
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
        "largest_file_bytes": largest,
        "adapter_bytes": adapter,
        "peak_bytes": peak,
        "allowed_peak_bytes": largest + adapter + 2**30,
        "seconds_with_proof": round(seconds, 1),
        "layers": report["layers"],
        "layer_difference": report["layer_difference"],
        "tolerance": report["tolerance"],
    }


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """A Llama with random weights, written tensor by tensor."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    save_bert_tokenizer(folder, [*SPECIAL, "word"])
    config = LlamaConfig(**shape, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    del state["lm_head.weight"]
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> Iterator[torch.Tensor]:
        values = torch.empty(state[name].shape, dtype=torch.bfloat16)
        yield values.fill_(1.0) if "norm" in name else values.normal_(0, 0.02, generator=generator)

    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: (torch.bfloat16, tuple(state[name].shape)) for name in names}, drawn)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
