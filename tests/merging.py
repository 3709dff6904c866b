"""Backbones, runs and rows for the tests of merges: small, made on the spot, with adapters that do something."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from conftest import CITIES, FILLERS, PEOPLE, WORDS, save_word_tokenizer, sentiment_rows

from benchmarks.made_runs import make_run
from peftkit.config import Run
from peftkit.data.rows import Rows

LABELS = ("negative", "positive")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8},
    "rslora": {"kind": "lora", "rank": 4, "alpha": 8, "variant": "rslora"},
    "dora": {"kind": "lora", "rank": 4, "alpha": 8, "variant": "dora"},
    "pissa": {"kind": "lora", "rank": 4, "alpha": 8, "initialization": "pissa"},
    "lora_bias": {"kind": "peft", "type": "lora", "r": 4, "lora_alpha": 8, "lora_bias": True},
    "adalora": {"kind": "adalora", "target_rank": 2, "initial_rank": 4, "final_fraction": 0.3},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 8},
    "full": {"kind": "full"},
    "bitfit": {"kind": "bitfit"},
    "layernorm": {"kind": "layernorm"},
    "top_layers": {"kind": "top_layers", "layers": 1},
    "head": {"kind": "head"},
}
TASKS: dict[str, dict[str, Any]] = {
    "classes": {"kind": "sequence_classification"},
    "relations": {"kind": "relation_extraction"},
    "target": {"kind": "seq2seq", "source": "prompt", "target": "completion"},
    "text": {"kind": "completion", "prompt": "prompt", "completion": "completion", "loss_on": "all"},
}


def llama(folder: Path, tied: bool) -> Path:
    """A random Llama with biases, whose blocks can be quantised; its generation configuration is not the default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    save_word_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
        attention_bias=True,
        mlp_bias=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    return folder


def described(backbone: Path, task: str, method: str, folder: Path, **held: Any) -> Run:
    """A run; `held` is how the backbone is."""
    return Run.model_validate(
        {
            "backbone": {"name": str(backbone)} | held,
            "task": {"max_length": 32} | TASKS[task],
            "method": METHODS[method],
            "training": {"learning_rate": 0.01, "max_steps": 1, "evaluation_batch_size": 8},
            "output": {"folder": str(folder)},
        }
    )


def made(backbone: Path, task: str, method: str, folder: Path, **held: Any) -> Path:
    """The folder of a run that counts as finished."""
    run = described(backbone, task, method, folder, **held)
    return make_run(run, run.task.head(rows(task)), folder)


def rows(task: str, count: int = 12) -> Rows:
    """Rows with labels to compare on."""
    if task == "classes":
        records = sentiment_rows(count, seed=3)
    else:
        chance = random.Random(3)
        records = [_marked(chance) if task == "relations" else _prompted(chance) for _ in range(count)]
    return Rows("probe.jsonl", records, range(1, count + 1))


def _marked(chance: random.Random) -> dict[str, Any]:
    words = [f"<e1>{chance.choice(PEOPLE)}</e1>", chance.choice(FILLERS), f"<e2>{chance.choice(CITIES)}</e2>"]
    return {"text": " ".join([*words, chance.choice(FILLERS)]), "label": chance.choice(("near", "none"))}


def _prompted(chance: random.Random) -> dict[str, Any]:
    return {"prompt": " ".join(chance.choices(FILLERS, k=4)), "completion": " ".join(chance.choices(FILLERS, k=3))}
