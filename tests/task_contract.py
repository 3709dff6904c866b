"""What the contract of tasks needs: for every task a small set to learn, tiny backbones, and a fresh process to ask."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from conftest import (
    CITIES,
    FILLERS,
    NEGATIVE,
    PEOPLE,
    POSITIVE,
    WORDS,
    entity_rows,
    sentiment_rows,
)

from benchmarks.tiny_bert import save_bert_tokenizer
from peftkit.tasks import AnyTask

ROWS = 12
Record = dict[str, Any]


def registered() -> list[str]:
    """Every kind of task in the registry; one that is several tasks in one, once for each."""
    names = []
    for task in get_args(get_args(AnyTask)[0]):
        kind, parts = task.model_fields["kind"].default, []
        for name in ("problem", "objective"):
            if name in task.model_fields:
                parts = list(get_args(task.model_fields[name].annotation))
        names += [f"{kind}/{part}" for part in parts] or [kind]
    return names


@dataclass(frozen=True)
class Entry:
    """A task with rows that a tiny model can learn by heart."""

    settings: Record
    rows: Callable[[], list[Record]]
    backbone: str
    """A key of `BACKBONES`."""
    solved: dict[str, float]
    """Figures of a model that knows the rows by heart."""
    texts: Sequence[str]
    """What `peftkit predict` is given."""
    pairs: Sequence[str] = ()
    full_steps: int = 60
    """Optimizer steps in which full fine-tuning has the rows by heart."""
    refused: dict[str, str] = field(default_factory=dict)
    """Methods that say no to this task, and a part of what they say."""


def _opinions() -> list[Record]:
    return sentiment_rows(ROWS, seed=3)


def _marked() -> list[Record]:
    """Both labels, one, or none: told by two words."""
    chance, rows = random.Random(0), []
    for index in range(ROWS):
        labels = [label for label, has in (("good", index % 2), ("place", index // 2 % 2)) if has]
        words = [
            chance.choice(POSITIVE if index % 2 else NEGATIVE),
            chance.choice(CITIES if "place" in labels else PEOPLE),
        ]
        rows.append({"text": " ".join([chance.choice(FILLERS), *words]), "label": labels})
    return rows


def _numbers() -> list[Record]:
    texts = [" ".join(POSITIVE[: index % 4] + FILLERS[: 1 + index % 3]) for index in range(ROWS)]
    return [{"text": text, "label": float(index % 4)} for index, text in enumerate(texts)]


def _questions() -> list[Record]:
    chance, rows = random.Random(0), []
    for index in range(ROWS):
        person, city = chance.choice(PEOPLE), chance.choice(CITIES)
        context = f"{chance.choice(FILLERS)} {person} went to {city} ."
        question, answer = ("a person", person) if index % 2 else ("a in", city)
        rows.append(
            {
                "id": str(index),
                "question": question,
                "context": context,
                "answers": {"text": [answer], "answer_start": [context.index(f" {answer}") + 1]},
            }
        )
    return rows


def _relations() -> list[Record]:
    chance = random.Random(0)
    verbs = {"met": "with", "went": "to"}
    rows = []
    for index in range(ROWS):
        verb = list(verbs)[index % 2]
        one, two = chance.choice(PEOPLE), chance.choice(CITIES)
        rows.append({"text": f"the <e1>{one}</e1> {verb} {verbs[verb]} <e2>{two}</e2> .", "label": verb})
    return rows


def _continued() -> list[Record]:
    return [{"prompt": f"{person} went", "completion": f" to {city}"} for person, city in _travels()]


def _chats() -> list[Record]:
    return [
        {"messages": [{"role": "user", "content": f"{person} ?"}, {"role": "assistant", "content": city}]}
        for person, city in _travels()
    ]


def _translated() -> list[Record]:
    return [{"source": f"{person} went to", "target": city} for person, city in _travels()]


def _travels() -> list[tuple[str, str]]:
    return list(zip(PEOPLE, CITIES, strict=True))


def _repeated() -> list[Record]:
    return [{"text": "the film was good and the story was bad ."}] * ROWS


_WRITTEN = {"max_new_tokens": 4, "metrics": ["exact_match"]}
_TYPED = ("the good film", "a bad story .")
ENTRIES: dict[str, Entry] = {
    "sequence_classification/single_label": Entry({}, _opinions, "bert", {"accuracy": 1}, _TYPED),
    "sequence_classification/multi_label": Entry({}, _marked, "bert", {"micro_f1": 1}, _TYPED),
    "sequence_classification/regression": Entry({}, _numbers, "bert", {"pearson": 1}, _TYPED),
    "token_classification": Entry({}, lambda: entity_rows(ROWS, 1), "bert", {"entity_f1": 1}, ("bob went to rome",)),
    "question_answering": Entry(
        {"stride": 4}, _questions, "bert", {"f1": 1}, ("a person",), ("the film alice went to rome .",)
    ),
    "relation_extraction": Entry({}, _relations, "bert", {"micro_f1": 1}, ("<e1>bob</e1> met with <e2>rome</e2>",)),
    "label_words": Entry(
        {"template": "{text} is", "words": {"positive": " good", "negative": " bad"}},
        _opinions,
        "llama",
        {"accuracy": 1},
        _TYPED,
    ),
    "completion": Entry({"generation": _WRITTEN}, _continued, "llama", {"exact_match": 1}, ("alice went",)),
    "chat": Entry({"generation": _WRITTEN, "template": "plain"}, _chats, "llama", {"exact_match": 1}, ("bob ?",)),
    "plain_text/causal": Entry({}, _repeated, "llama", {"token_accuracy": 1}, _TYPED),
    "plain_text/masked": Entry(
        {"joined": False},
        _repeated,
        "bert",
        {"token_accuracy": 1},
        _TYPED,
        full_steps=150,
        refused={"prompt": "virtual tokens in front of classifiers, taggers and language models"},
    ),
    "seq2seq": Entry(
        {"max_target_length": 8, "generation": _WRITTEN | {"beams": 2}},
        _translated,
        "t5",
        {"exact_match": 1},
        ("alice went to", "bob"),
        full_steps=120,
    ),
}


def save_bert(folder: Path) -> None:
    """A BERT that can also fill in masks."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    save_bert_tokenizer(folder, vocabulary)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    model = BertForMaskedLM(config)
    model.bert = BertModel(config)  # with the pooler that classifiers read
    model.tie_weights()
    model.save_pretrained(folder)


def save_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    pieces = save_byte_pairs(folder, ends=False)
    config = LlamaConfig(
        vocab_size=pieces,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    from torch import nn
    from transformers import T5Config, T5ForConditionalGeneration

    pieces = save_byte_pairs(folder, ends=True)
    config = T5Config(
        vocab_size=pieces,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # T5's own start is so small that little is learnt in few steps
            nn.init.normal_(parameter, std=1.0 if name.startswith("shared") else 0.2)
    model.save_pretrained(folder)


BACKBONES: dict[str, Callable[[Path], None]] = {"bert": save_bert, "llama": save_llama, "t5": save_t5}


def save_byte_pairs(folder: Path, ends: bool) -> int:
    """A tokenizer in which most words are one token; every text ends with `</s>` if it `ends`. Returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{word} {word}" for word in WORDS] * 2, trainer)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


class FreshProcess:
    """Another Python process that runs command lines of peftkit."""

    def __init__(self) -> None:
        script, pipe = Path(__file__).with_name("task_contract_process.py"), subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, text=True)

    def run(self, *arguments: str) -> str:
        """What `peftkit arguments…` prints."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["code"] == 0, answer["error"]
        return str(answer["output"])

    def close(self) -> None:
        self.process.communicate()  # closes both pipes and waits
