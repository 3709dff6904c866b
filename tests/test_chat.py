"""Conversations as token ids and masks, against transformers' own; bad data, cut ones, and replies that are learnt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CITIES, PEOPLE, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftkit.cli import main
from peftkit.data.chat_rendering import ChatTemplate
from peftkit.data.chat_templates import TEMPLATES
from peftkit.data.collate import IGNORED
from peftkit.data.conversations import fault
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings, splits_from
from peftkit.errors import DataError, UsageError
from peftkit.tasks import Chat

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]"]

# As published models write them, without and with the marks by which transformers finds what the assistant wrote:
# in each template "«" and "»" stand where `{% generation %}` and `{% endgeneration %}` stand in the marked one.
FAMILIES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "«{{ m['content'] + '<|im_end|>' }}»{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}"
        "«{{ m['content'] | trim + '<|eot_id|>' }}»{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "system in brackets": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
        "{% for m in loop_messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system_message if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}«{{ ' ' + m['content'].strip() + ' ' + eos_token }}»{% endif %}{% endfor %}"
    ),
    "model for assistant": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}«{{ m['content'] | trim + '<end_of_turn>' }}»"
        "{{ '\n' }}{% else %}{{ m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "bars": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
        "«{{ m['content'] + eos_token }}»{{ '\n' }}{% else %}{{ m['content'] + eos_token + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "brackets": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "«{{ m['content'] + eos_token }}»{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "words": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Answer:' }}«{{ ' ' + m['content'] + '\n\n' }}»"
        "{% else %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
    ),
}
TURNS = [
    {"role": "user", "content": "Who was the first emperor?"},
    {"role": "assistant", "content": "Augustus, I think."},
    {"role": "user", "content": "And  after him"},
    {"role": "assistant", "content": "Tiberius.\nThen\n\n  Caligula!"},
]
SYSTEM = {"role": "system", "content": "Answer in few words."}
CHATS = {
    "one turn": TURNS[:2],
    "two turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "unanswered": [*TURNS, {"role": "user", "content": "Thanks"}],
}


def plain(family: str) -> str:
    return FAMILIES[family].replace("«", "").replace("»", "")


def marked(family: str) -> str:
    return FAMILIES[family].replace("«", "{% generation %}").replace("»", "{% endgeneration %}")


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows("chats.jsonl", list(records), range(1, len(records) + 1))


def chats(*conversations: Sequence[dict[str, Any]]) -> Rows:
    return rows_of(*({"messages": list(one)} for one in conversations))


def chat(**settings: Any) -> Chat:
    return Chat(data=DataSettings(train="chats.jsonl"), **settings)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """Byte-level byte pairs, and words that own the space before them."""
    corpus = [message["content"] for message in [SYSTEM, *TURNS]] + ["Answer: user system assistant model <<SYS>>"] * 3
    found = {}
    for name in ("bytes", "spaces"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        levels = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.pre_tokenizer = levels[name == "spaces"]
        tokenizer.decoder = (decoders.ByteLevel(), decoders.Metaspace())[name == "spaces"]
        alphabet = pre_tokenizers.ByteLevel.alphabet() if name == "bytes" else []
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>", *SPECIAL], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        found[name] = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
        )
    return found


def with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def learnt(example: dict[str, Any]) -> list[int]:
    assert all(label in (token, IGNORED) for label, token in zip(example["labels"], example["input_ids"], strict=True))
    return [int(label != IGNORED) for label in example["labels"]]


@pytest.mark.parametrize("name", ["bytes", "spaces"])
@pytest.mark.parametrize(
    ("family", "conversation"),
    [(f, c) for f in FAMILIES for c in CHATS if (f, c) != ("model for assistant", "system")],  # it has no system turn
)
def test_ids_and_masks_are_those_of_transformers(
    family: str, conversation: str, name: str, tokenizers: dict[str, Any]
) -> None:
    tokenizer, messages = tokenizers[name], CHATS[conversation]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=marked(family), return_dict=True, return_assistant_tokens_mask=True
    )
    assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    for template in (plain(family), marked(family)):
        encoded = chat().encode(chats(messages), with_template(tokenizer, template), ())
        assert encoded.examples[0]["input_ids"] == expected["input_ids"]
        assert learnt(encoded.examples[0]) == expected["assistant_masks"]
        assert not encoded.dropped


@pytest.mark.parametrize("family", TEMPLATES)
def test_our_own_templates_write_what_they_continue(family: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], None)
    template = ChatTemplate.of(tokenizer, TEMPLATES[family], with_tools=False)
    for messages in CHATS.values():
        whole = template.text(messages)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = template.text(messages[:turn], prompt=True)
                assert whole.startswith(prompt)
                assert whole[len(prompt) :].lstrip(" ").startswith(message["content"])
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        rendered = template.rendered(messages)
        texts = [tokenizer.decode(rendered.ids[first:end], skip_special_tokens=True) for first, end in rendered.turns]
        assert [text.strip() for text in texts] == said
        assert all(message["content"] in whole for message in messages)
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
    assert template.end_token() == tokenizer.convert_tokens_to_ids(ends.get(family, "</s>"))


def test_a_named_template_wins_over_that_of_the_tokenizer(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("chatml"))
    example = chat(template="plain").encode(chats(TURNS[:2]), tokenizer, ()).examples[0]
    expected = "User: Who was the first emperor?</s>\nAssistant: Augustus, I think.</s>\n"
    assert tokenizer.decode(example["input_ids"]) == expected
    assert chat(template="plain").head(chats(TURNS)).chat_template == TEMPLATES["plain"]
    assert chat().head(chats(TURNS)).chat_template is None


def test_a_tokenizer_without_a_template_needs_one_named(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"no chat template; name one as task.template, such as chatml or plain"):
        chat().encode(chats(TURNS), with_template(tokenizers["bytes"], None), ())


@pytest.mark.parametrize("family", ["chatml", "brackets"])
def test_the_loss_can_be_of_the_last_answer_or_of_everything(family: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain(family))
    answers, last, everything = (
        chat(loss_on=where).encode(chats(TURNS), tokenizer, ()).examples[0]
        for where in ("assistant", "last_assistant", "all")
    )
    assert everything["labels"] == answers["input_ids"] == last["input_ids"]
    first_half = len(tokenizer.apply_chat_template(TURNS[:3])["input_ids"])
    assert learnt(last)[:first_half] == [0] * first_half
    assert learnt(last)[first_half:] == learnt(answers)[first_half:]
    assert 0 < sum(learnt(last)) < sum(learnt(answers))


def test_the_end_token_is_learnt_though_it_fills_batches_up_too(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("bars"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    labels = chat().encode(chats(TURNS), tokenizer, ()).examples[0]["labels"]
    assert labels.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ("hi", "no messages"),
        (["hi"], "a message without a role"),
        ([{"content": "hi"}], "a message without a role"),
        ([{"role": "bot", "content": "hi"}], "unknown role 'bot'"),
        ([*TURNS, SYSTEM], "turns out of order (system after assistant)"),
        (TURNS[1:], "turns out of order (assistant first)"),
        ([TURNS[0], TURNS[2], TURNS[1]], "turns out of order (user after user)"),
        ([TURNS[0], TURNS[1], TURNS[1]], "turns out of order (assistant after assistant)"),
        ([TURNS[0], {"role": "tool", "content": "4"}], "turns out of order (tool after user)"),
        ([TURNS[0]], "no assistant turn"),
        ([SYSTEM], "no assistant turn"),
        ([TURNS[0], {"role": "assistant", "content": " \n"}], "an empty assistant turn"),
        ([TURNS[0], {"role": "assistant"}], "an empty assistant turn"),
        ([{"role": "user", "content": ""}, TURNS[1]], "an empty user turn"),
        ([{"role": "user", "content": [{"type": "image"}]}, TURNS[1]], "content that is not text"),
    ],
)
def test_bad_conversations_are_dropped_and_counted(messages: Any, reason: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("chatml"))
    encoded = chat().encode(rows_of({"messages": TURNS}, {"messages": messages}, {"messages": TURNS}), tokenizer, ())
    assert encoded.dropped == {1: reason}
    assert [encoded.owner(index) for index in range(len(encoded))] == [0, 2]


def test_conversations_with_tools_are_in_order() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    result = {"role": "tool", "content": "4"}
    assert fault([TURNS[0], call, result, result, TURNS[1]], answered=True) is None
    assert fault([{**TURNS[0], "content": "x"}], answered=False) is None
    assert fault([SYSTEM], answered=False) == "no user turn"


def test_only_rows_of_train_are_dropped(tiny_chat: Path) -> None:
    from peftkit.config import Run
    from peftkit.prepare import prepare

    good, bad = {"messages": TURNS[:2]}, {"messages": [TURNS[0]]}
    settings = {"backbone": {"name": str(tiny_chat)}, "method": {"kind": "head"}, "training": {"learning_rate": 0.1}}
    run = Run.model_validate(settings | {"task": {"kind": "chat", "data": None, "max_length": 64}})
    data = prepare(run, splits_from([good, bad, good, bad], dev=[good]))
    assert "train: 2 of 4 rows are dropped (2 no assistant turn), e.g. train row 2" in data.notes
    with pytest.raises(DataError, match=r"^dev row 2: no assistant turn; only rows of train are dropped"):
        prepare(run, splits_from([good], dev=[good, bad]))
    with pytest.raises(DataError, match=r"no row is left to learn from \(1 no assistant turn\)"):
        prepare(run, splits_from([bad], dev=[good]))


@pytest.mark.parametrize(("format", "column"), [("messages", "messages"), ("sharegpt", "conversations")])
def test_formats_say_the_same(format: str, column: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("chatml"))
    expected = chat().encode(chats([SYSTEM, *TURNS]), tokenizer, ()).examples
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    records = {
        "messages": [SYSTEM, *TURNS],
        "sharegpt": [{"from": names[one["role"]], "value": one["content"]} for one in [SYSTEM, *TURNS]],
    }
    task = chat(format=format)
    assert task.encode(rows_of({column: records[format]}), tokenizer, ()).examples == expected
    renamed = chat(format=format, messages="chat", system="never used")
    assert renamed.encode(rows_of({"chat": records[format]}), tokenizer, ()).examples == expected
    with pytest.raises(DataError, match=f"no column '{column}'"):
        task.encode(rows_of({"texts": []}), tokenizer, ())
    text = task.rows_from_text(["hi"])
    prompt = task.encode(text, tokenizer, (), supervised=False).examples[0]["prompt"]
    assert tokenizer.decode(prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_alpaca_rows_become_one_question_and_answer(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("chatml"))
    rows = rows_of(
        {"instruction": "Sum up.", "input": "A text.", "output": "It."},
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
    )
    found = chat(format="alpaca", system="Be kind.").encode(rows, tokenizer, ())
    for example, asked, answer in zip(found.examples, ("Sum up.\nA text.", "Say hi."), ("It.", "Hi."), strict=True):
        said = [("system", "Be kind."), ("user", asked), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in said]
        assert example["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    with pytest.raises(DataError, match="no column 'input'"):
        chat(format="alpaca").encode(rows_of({"instruction": "a", "output": "b"}), tokenizer, ())
    bare = chat(format="alpaca", input=None).encode(rows_of({"instruction": "a", "output": "b"}), tokenizer, ())
    assert not bare.dropped
    empty = chat(format="alpaca").encode(rows_of({**rows.records[0], "output": None}, rows.records[1]), tokenizer, ())
    assert empty.dropped == {0: "no assistant turn"}
    with pytest.raises(ValueError, match="format 'alpaca' has no column messages"):
        chat(format="alpaca", messages="chat")
    with pytest.raises(ValueError, match="format 'messages' has no column output"):
        chat(output="answer")


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def test_tools_reach_the_template(tokenizers: dict[str, Any]) -> None:
    template = "{% for tool in tools or [] %}{{ tool['function']['name'] + '\n' }}{% endfor %}" + plain("chatml")
    tokenizer = with_template(tokenizers["bytes"], template)
    rows = rows_of({"messages": TURNS, "tools": TOOLS}, {"messages": TURNS, "tools": json.dumps(TOOLS)})
    expected = tokenizer.apply_chat_template(TURNS, tools=TOOLS)["input_ids"]
    assert tokenizer.decode(expected).startswith("add\n")
    assert [one["input_ids"] for one in chat(tools="tools").encode(rows, tokenizer, ()).examples] == [expected] * 2
    with pytest.raises(DataError, match=r"chats.jsonl:1: 'tools' is not JSON"):
        chat(tools="tools").encode(rows_of({"messages": TURNS, "tools": "[{"}), tokenizer, ())
    with pytest.raises(DataError, match=r"chats.jsonl:1: 'tools' is not a list of JSON schemas"):
        chat(tools="tools").encode(rows_of({"messages": TURNS, "tools": "{}"}), tokenizer, ())
    with_template(tokenizer, plain("chatml"))
    with pytest.raises(UsageError, match=r"task.tools: the chat template does not write tools"):
        chat(tools="tools").encode(rows, tokenizer, ())


def test_long_conversations_lose_whole_turns_from_the_end(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("chatml"))
    sizes = [len(tokenizer.apply_chat_template(TURNS[:count])["input_ids"]) for count in (2, 4)]
    ids = {limit: chat(max_length=limit).encode(chats(TURNS), tokenizer, ()) for limit in (*sizes, sizes[1] - 1)}
    assert [found.truncated for found in ids.values()] == [1, 0, 1]
    assert ids[sizes[1]].lengths == [sizes[1]]
    half = tokenizer.apply_chat_template(TURNS[:2])["input_ids"]
    assert ids[sizes[0]].examples[0]["input_ids"] == ids[sizes[1] - 1].examples[0]["input_ids"] == half
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids[sizes[0]].examples[0]["labels"].count(end) == 1


def test_an_only_answer_that_is_too_long_loses_its_end(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("chatml"))
    whole = tokenizer.apply_chat_template(TURNS[:2])["input_ids"]
    asked = len(tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"])
    short = chat(max_length=asked + 2).encode(chats(TURNS[:2]), tokenizer, ())
    assert short.examples == [{"input_ids": whole[: asked + 2], "labels": [IGNORED] * asked + whole[asked : asked + 2]}]
    assert short.truncated == 1
    none = chat(max_length=asked).encode(chats(TURNS[:2]), tokenizer, ())
    assert none.dropped == {0: f"an answer that begins beyond {asked} tokens"}


def test_long_questions_lose_their_oldest_turns(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("chatml"))
    conversation = [SYSTEM, *TURNS, {"role": "user", "content": "Thanks"}]

    def prompt(*messages: dict[str, Any]) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)["input_ids"]
        return ids

    whole, middle, last = prompt(*conversation), prompt(SYSTEM, *conversation[3:]), prompt(SYSTEM, conversation[-1])
    for expected, limits in ((whole, (len(whole),)), (middle, (len(whole) - 1, len(middle))), (last, (len(last),))):
        for limit in limits:
            found = chat(max_length=limit).encode(chats(conversation), tokenizer, (), supervised=False)
            assert found.examples[0]["prompt"] == expected
            assert found.truncated == (expected != whole)
    short = chat(max_length=len(last) - 1).encode(chats(conversation), tokenizer, (), supervised=False)
    assert short.dropped == {0: f"a question of more than {len(last) - 1} tokens"}


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizers: dict[str, Any]) -> None:
    drops = plain("chatml").replace(
        "{{ m['content'] + '<|im_end|>' }}",
        "{{ (m['content'] if loop.last else m['content'].split('\n')[-1]) + '<|im_end|>' }}",
    )
    tokenizer = with_template(tokenizers["bytes"], drops)
    thoughts = [*TURNS[2:], *TURNS[:2]]
    encoded = chat().encode(chats(thoughts, TURNS[:2]), tokenizer, ())
    assert list(encoded.dropped) == [0]
    assert "writes earlier turns otherwise once others follow" in encoded.dropped[0]


def test_a_header_that_no_generation_prompt_writes_is_refused(tokenizers: dict[str, Any]) -> None:
    headless = plain("chatml").partition("{% if add_generation_prompt %}")[0]
    encoded = chat().encode(chats(TURNS), with_template(tokenizers["bytes"], headless), ())
    assert "has no generation prompt, so its header of an assistant turn would be learnt" in encoded.dropped[0]


def test_what_a_template_raises_is_told(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("model for assistant"))
    encoded = chat().encode(chats([SYSTEM, *TURNS]), tokenizer, ())
    assert encoded.dropped == {0: "the chat template refuses it: System role not supported"}


def test_an_end_that_is_no_token_is_noted(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    assert chat().encode(chats(TURNS), with_template(tokenizer, plain("chatml")), ()).notes == ()
    foreign = plain("chatml").replace("im_end", "fin")
    assert (
        "no token for the end of an answer, '<|fin|>'"
        in chat().encode(chats(TURNS), with_template(tokenizer, foreign), ()).notes[0]
    )
    endless = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    endless += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    notes = chat().encode(chats(TURNS), with_template(tokenizer, endless), ()).notes
    assert "writes nothing behind an answer, so the model does not learn where to stop" in notes[0]


def test_demonstrations_are_earlier_turns_that_are_not_learnt(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_template(tokenizers["bytes"], plain("chatml"))
    shown = {"messages": [SYSTEM, *TURNS[2:]]}
    for where in ("assistant", "all"):
        task = chat(demonstrations=(shown,), loss_on=where)
        example = task.encode(chats([SYSTEM, *TURNS[:2]]), tokenizer, ()).examples[0]
        assert example["input_ids"] == tokenizer.apply_chat_template([SYSTEM, *TURNS[2:], *TURNS[:2]])["input_ids"]
        before = len(tokenizer.apply_chat_template([SYSTEM, *TURNS[2:]])["input_ids"]) - 1  # the line break
        assert sum(learnt(example)[:before]) == 0
        assert sum(learnt(example)[before:]) > 0


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any]) -> Path:
    """A random Llama with a chat template, which fills batches up with its end token."""
    folder = tmp_path_factory.mktemp("tiny_chat")
    with_template(tokenizers["bytes"], plain("chatml")).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizers["bytes"]),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_replies_are_learnt_with_their_end(tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    homes = dict(zip(PEOPLE, CITIES, strict=True))
    rows = [
        {"messages": [{"role": "user", "content": who}, {"role": "assistant", "content": f"{where}!"}]}
        for who, where in homes.items()
    ]
    data = str(write_jsonl(tmp_path / "chats.jsonl", rows))
    config = {
        "backbone": {"name": str(tiny_chat)},
        "task": {"kind": "chat", "max_length": 64, "data": {"train": data, "dev": data, "test": data}}
        | {"generation": {"max_new_tokens": 24, "metrics": ["exact_match"], "limit": 3}},
        "method": {"kind": "full"},
        "training": {"learning_rate": 5e-3, "max_steps": 60, "batch_size": 4, "evaluate_every": 60, "seed": 1},
        "audit": {"overlap": 1.0, "duplicates": 1.0},
        "output": {"folder": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["after"]["values"]
    assert scores["loss"] < 0.05
    assert {name: scores[name] for name in ("token_accuracy", "exact_match")} == {"token_accuracy": 1, "exact_match": 1}
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), *homes]) == 0
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["reply"] for one in replies] == [f"{where}!" for where in homes.values()]
    assert replies[0]["messages"] == [{"role": "user", "content": PEOPLE[0]}]
    assert main(["predict", str(tmp_path / "run"), "--file", data]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert again == replies


def test_a_merged_model_has_the_template_it_was_trained_with(tiny_chat: Path, tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "chats.jsonl", [{"messages": TURNS[:2]}] * 4))
    config = {
        "backbone": {"name": str(tiny_chat)},
        "task": {"kind": "chat", "template": "plain", "max_length": 64, "data": {"train": data, "dev": data}},
        "method": {"kind": "lora", "rank": 2, "alpha": 4},
        "training": {"learning_rate": 1e-3, "max_steps": 1, "batch_size": 4},
        "audit": {"overlap": 1.0, "duplicates": 1.0},
        "output": {"folder": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATES["plain"]
