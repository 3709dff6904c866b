"""A tiny T5 with RANDOM weights, and a tokenizer of the data it will translate. It is not a pretrained model.

    python benchmarks/tiny_t5.py runs/tiny_t5 [${PEFTKIT_DATA}/multi30k_en_de/train.jsonl]

Makes a folder for `backbone.name` where no pretrained encoder-decoder is at hand. All that such a model knows, it
learns in the run itself: full fine-tuning is the only sensible method, because an adapter around random weights has
nothing to adapt, and its scores say nothing about T5's. The same data give the same folder, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, T5Config

SEED = 0
PIECES = 4000
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
DATA = "multi30k_en_de/train.jsonl"
WARNING = "RANDOM WEIGHTS: this is not a pretrained model. Train all of it; judge nothing about T5 by it."


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of `PIECES` pieces, learnt from `texts`; it ends every text with `</s>` as T5's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, special_tokens=[PAD, END, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def make_config(pieces: int) -> T5Config:
    """Two blocks on each side, 192 units, four heads: 2.4 million parameters, a third of them embeddings."""
    from transformers import T5Config

    return T5Config(
        vocab_size=pieces,
        d_model=192,
        d_kv=48,
        num_heads=4,
        d_ff=512,
        num_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.0,  # a run too short to overfit
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def make(data: Path, folder: Path) -> int:
    """Write configuration, weights and tokenizer into `folder`; returns the number of parameters."""
    import torch
    from transformers import T5ForConditionalGeneration

    with data.open(encoding="utf-8") as lines:
        tokenizer = make_tokenizer(text for line in lines for text in json.loads(line).values())
    torch.manual_seed(SEED)
    model = T5ForConditionalGeneration(make_config(len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"{WARNING}\n\nMade by benchmarks/tiny_t5.py.\n", encoding="utf-8")
    return model.num_parameters()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("data", type=Path, nargs="?", metavar="FILE", help=f"default: $PEFTKIT_DATA/{DATA}")
    options = parser.parse_args()
    data = options.data or Path(os.environ.get("PEFTKIT_DATA", "")) / DATA
    if not data.is_file():
        parser.error(f"no file {data}: name one, or set PEFTKIT_DATA")
    if options.folder.exists():
        parser.error(f"{options.folder} exists: name a new folder")
    print(f"{WARNING}\n{options.folder}: {make(data, options.folder):,} parameters", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
