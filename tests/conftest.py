"""Tiny random backbones and learnable toy data, made on the spot; no network."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import tiny_bert as tiny_bert_backbone

if TYPE_CHECKING:
    from contract import Reloader

# Set before torch is imported: tiny models gain nothing from threads, and parallel test runs would fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# fmt: off
WORDS = [
    "good", "great", "fine", "happy", "bright", "bad", "awful", "poor", "sad", "dark", "the", "a", "film", "story",
    "actor", "music", "was", "is", "and", "very", "quite", "paris", "london", "berlin", "rome", "alice", "bob",
    "carol", "dave", "went", "to", "met", "in", "with", "from", ".", ",", "!", "?",
]
# fmt: on
POSITIVE, NEGATIVE = WORDS[:5], WORDS[5:10]
CITIES, PEOPLE = WORDS[21:25], WORDS[25:29]
FILLERS = WORDS[10:21]


@pytest.fixture(scope="session", autouse=True)
def one_rereader() -> Iterator[None]:
    """Let one process read back all that this session merges: starting it takes longer than a tiny merge."""
    from peftkit.artifacts import fresh_process

    kept: list[fresh_process.Rereader] = []

    class Lasting(fresh_process.Rereader):
        def __new__(cls) -> Any:
            return kept[0] if kept else super().__new__(cls)

        def __init__(self) -> None:
            if not kept:
                super().__init__()
                kept.append(self)

        def close(self) -> None:
            """Stay for the next."""

        def kill(self) -> None:
            if self.waiting:
                kept.clear()
                super().kill()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fresh_process, "Rereader", Lasting)
        yield
    for left in kept:
        fresh_process.Rereader.close(left)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    root = os.environ.get("PEFTKIT_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("PEFTKIT_DATA does not name a folder with the real data sets")
    return Path(root)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers and 32 units, with a word-level vocabulary of the toy data."""
    return tiny_bert_backbone.make(
        tmp_path_factory.mktemp("tiny_bert"),
        WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A random Llama of 2 layers and 32 units with grouped queries; it has no padding token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    save_word_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(["<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def sentiment_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences whose label is told by one word."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        label = chance.choice(["negative", "positive"])
        words = chance.choices(FILLERS, k=chance.randint(2, 9))
        words.insert(chance.randrange(len(words)), chance.choice(POSITIVE if label == "positive" else NEGATIVE))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def entity_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Word lists with people (one or two words) and cities tagged in BIO."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        pairs = [(word, "O") for word in chance.choices(FILLERS, k=chance.randint(1, 4))]
        pairs += [(chance.choice(PEOPLE), "B-PER")]
        if chance.random() < 0.4:
            pairs += [(chance.choice(PEOPLE), "I-PER")]
        pairs += [("went", "O"), ("to", "O"), (chance.choice(CITIES), "B-LOC")]
        rows.append({"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]})
    return rows


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_conll(file: Path, rows: list[dict[str, Any]]) -> Path:
    blocks = ("".join(f"{w}\t{t}\n" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in rows)
    file.write_text("\n".join(blocks), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, dev and test of sentiment.jsonl and entities.conll."""
    folder = tmp_path_factory.mktemp("toy_data")
    for seed, (split, count) in enumerate({"train": 160, "dev": 40, "test": 60}.items()):
        write_jsonl(folder / f"sentiment_{split}.jsonl", sentiment_rows(count, seed))
        write_conll(folder / f"entities_{split}.conll", entity_rows(count, seed))
    return folder


@pytest.fixture
def write_config(tmp_path: Path, tiny_bert: Path, toy_data: Path) -> Callable[..., Path]:
    """Write a complete configuration of a toy run; keyword arguments replace sections."""
    import yaml

    def write(task: str = "sentiment", **sections: Any) -> Path:
        suffix, kind = {
            "sentiment": ("jsonl", "sequence_classification"),
            "entities": ("conll", "token_classification"),
        }[task]
        files = {split: str(toy_data / f"{task}_{split}.{suffix}") for split in ("train", "dev", "test")}
        config = {
            "backbone": {"name": str(tiny_bert)},
            "task": {"kind": kind, "data": files, "max_length": 32},
            "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
            "training": {"learning_rate": 0.01, "epochs": 4, "batch_size": 16, "seed": 1},
            "output": {"folder": str(tmp_path / "run")},
        } | sections
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return file

    return write


@pytest.fixture(scope="module")
def contract_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of the methods' contract lie."""
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def reloader() -> Iterator[Reloader]:
    """The other process of the methods' contract."""
    from contract import Reloader

    one = Reloader()
    yield one
    one.close()


@pytest.fixture(scope="session")
def real_weights(real_data: Path) -> Path:
    """The folder of small real models: PEFTKIT_WEIGHTS, or `weights` beside the real data sets."""
    root = Path(os.environ.get("PEFTKIT_WEIGHTS") or real_data.parent / "weights")
    if not root.is_dir():
        pytest.skip("neither PEFTKIT_WEIGHTS nor `weights` beside PEFTKIT_DATA is a folder of small real models")
    return root


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_llama: Path) -> Callable[[str], Path]:
    """The folder of a run of a few steps, by its name in `small_runs.RUNS`; trained when it is first asked for."""
    from small_runs import trained

    root = tmp_path_factory.mktemp("small_runs")
    return lambda name: trained(root, name, tiny_bert, tiny_llama)
