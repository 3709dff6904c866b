"""New tokens with every method: against a plain model of transformers whose embedding matrix holds the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, SEQUENCE, Place, backbone_of, save_checkpoint
from contract_variants import VARIANTS, Variant
from torch import Tensor, nn

from peftkit.backbones.load import Backbone, BackboneSettings, Head, load
from peftkit.backbones.modules import head_modules
from peftkit.backbones.new_tokens import NAME, add_to_model, add_to_tokenizer, fold
from peftkit.errors import BackboneError, MethodError, NotMergeable
from peftkit.methods import LoRA, Peft
from peftkit.methods.base import trained_parameters

TOKENS = ("<e1>", "</e1>", "w7")
"""The last one is a word of the vocabulary already."""
BY_NAME = {variant.name: variant for variant in VARIANTS}
# every way to train, save and load, on an encoder; on others what is told apart by architecture
METHODS = (
    "lora",
    "lora pissa",
    "adalora",
    "bottleneck houlsby",
    "prefix",
    "prompt",
    "p_tuning",
    "ia3",
    "vera",
    "peft loha",
    "peft ln_tuning",
    "bitfit",
    "layernorm",
    "top_layers",
    "head",
    "full",
)
CELLS = [("bert", name) for name in METHODS]
CELLS += [(one, name) for one in ("llama", "gemma", "t5", "bart", "albert") for name in ("lora", "full")]
CELLS += [("llama", "prompt"), ("gpt2", "head"), ("gemma", "prefix")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("new_tokens")


def a_tokenizer() -> Any:
    """Forty-eight words, as many as the tiny models have embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(48)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")


def tiny(architecture: str, root: Path, head_seed: int = 1) -> Backbone:
    """A tiny sequence classifier with the new tokens."""
    backbone = backbone_of(save_checkpoint(Place(architecture, SEQUENCE), root), SEQUENCE, head_seed)
    backbone.tokenizer = a_tokenizer()
    add_to_model(backbone.model, backbone.tokenizer, TOKENS)
    backbone.head_modules = head_modules(backbone.model)
    return backbone


IDS = torch.tensor([[1, 48, 11, 49, 7, 9, 2], [1, 48, 21, 49, 2, 0, 0]])


def logits(model: nn.Module) -> Tensor:
    mask = (torch.arange(7) < torch.tensor([[7], [5]])).long()
    found: Tensor = model(input_ids=IDS, attention_mask=mask).logits
    return found


def evaluated(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return logits(model)


def rows_of(model: nn.Module) -> Tensor:
    """The rows that train."""
    found = [p for name, p in trained_parameters(model).items() if name.endswith(".rows")]
    assert len(found) == 1
    return found[0]


def plain(architecture: str, root: Path, rows: Tensor, head: dict[str, Tensor]) -> Any:
    """The checkpoint as transformers loads it, with a larger matrix, `rows` written into it, and a head."""
    model: Any = backbone_of(save_checkpoint(Place(architecture, SEQUENCE), root), SEQUENCE, 0).model
    model.resize_token_embeddings(50, mean_resizing=False)
    model.get_input_embeddings().weight.data[[48, 49, 7]] = rows
    model.load_state_dict(head, strict=False)
    return model


def trained(model: nn.Module, variant: Variant) -> None:
    """As many steps as the method needs, and that moves every row."""
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.02)
    model.train()
    for step in range(1, variant.steps + 1):
        torch.nn.functional.cross_entropy(logits(model).float(), torch.tensor([0, 2])).backward()
        optimizer.step()
        variant.method.after_step(model, step)
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "architecture", ["bert", "albert", "electra", "deberta", "modernbert", "gpt2", "llama", "bart"]
)
def test_rows_stand_in_for_the_matrix(architecture: str, root: Path) -> None:
    backbone = tiny(architecture, root)
    model: Any = backbone.model
    child = model.get_submodule(NAME)
    child.rows.data.normal_(generator=torch.Generator().manual_seed(3))
    head = {name: value for name, value in model.state_dict().items() if name.startswith(backbone.head_modules)}
    expected = evaluated(plain(architecture, root, child.rows.detach(), head))
    assert torch.equal(evaluated(model), expected)
    assert list(fold(model).state_dict()) == list(plain(architecture, root, child.rows, head).state_dict())
    assert torch.equal(evaluated(model), expected)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("architecture", "name"), CELLS, ids=[f"{one}-{name}" for one, name in CELLS])
def test_rows_train_with_every_method(architecture: str, name: str, root: Path, tmp_path: Path) -> None:
    variant, backbone = BY_NAME[name], tiny(architecture, root)
    untouched: Any = backbone.model
    before = {key: value.clone() for key, value in untouched.state_dict().items()}
    torch.manual_seed(0)
    model = variant.method.attach(backbone, variant.steps)
    trained(model, variant)
    if name != "full":
        moved = (rows_of(model) - before[f"{NAME}.rows"]).abs().amax(1)
        assert (moved > 0).all()
        matrix = untouched.get_input_embeddings().weight
        assert torch.equal(matrix, next(v for v in before.values() if v.shape == matrix.shape))
    after = evaluated(model)
    variant.method.save(model, tmp_path)
    loaded = variant.method.load(tiny(architecture, root, head_seed=2), tmp_path)
    tolerance: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5} if variant.rewrites_base else {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(evaluated(loaded), after, **tolerance)
    try:
        merged: Any = variant.method.merge(loaded)
    except NotMergeable:
        return
    torch.testing.assert_close(evaluated(merged), after, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = getattr(transformers, SEQUENCE).from_pretrained(tmp_path / "merged")
    assert again.get_input_embeddings().weight.shape[0] == 50
    assert list(again.state_dict()) == list(plain(architecture, root, torch.zeros(3, 1), {}).state_dict())
    torch.testing.assert_close(evaluated(again), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", ["word_embeddings+query", "query"])
def test_lora_on_the_embeddings_too(targets: str, root: Path, tmp_path: Path) -> None:
    method, variant = LoRA(targets=targets, rank=4), BY_NAME["lora"]
    model = method.attach(tiny("bert", root), 2)
    trained(model, variant)
    after = evaluated(model)
    method.save(model, tmp_path)
    loaded = method.load(tiny("bert", root, head_seed=2), tmp_path)
    torch.testing.assert_close(evaluated(loaded), after)
    torch.testing.assert_close(evaluated(method.merge(loaded)), after, rtol=1e-4, atol=1e-5)


def test_a_method_that_goes_past_the_embeddings_is_refused(root: Path) -> None:
    method = Peft(type="lora", targets="query", trainable_token_indices=[1])  # type: ignore[call-arg]
    with pytest.raises(MethodError, match="new tokens would not train; leave the embeddings out of its targets"):
        method.attach(tiny("bert", root), 2)


def test_starts_are_near_the_mean_and_the_same_every_time(root: Path) -> None:
    one, two = (tiny("bert", root, head_seed).model for head_seed in (1, 2))
    rows = one.get_submodule(NAME).get_parameter("rows")
    assert torch.equal(rows, two.get_submodule(NAME).get_parameter("rows"))
    words = one.get_parameter("bert.embeddings.word_embeddings.weight")[:48]
    assert not torch.equal(rows[0], rows[1])
    distance = ((rows[:2] - words.mean(0)) / words.std(0)).std(1)
    assert ((distance > 0.05) & (distance < 0.2)).all()
    assert torch.equal(rows[2], words[7])


def test_rows_stay_in_float32_over_a_bfloat16_backbone(root: Path) -> None:
    backbone = backbone_of(save_checkpoint(Place("gemma", SEQUENCE), root), SEQUENCE, 1)
    backbone.model.bfloat16()
    add_to_model(backbone.model, a_tokenizer(), TOKENS)
    backbone.head_modules = head_modules(backbone.model)
    model = BY_NAME["lora"].method.attach(backbone, 2)
    start = rows_of(model).detach().clone()
    trained(model, BY_NAME["lora"])
    assert rows_of(model).dtype == torch.float32
    assert not torch.equal(rows_of(model), start)


def test_language_models_are_refused(root: Path) -> None:
    model = backbone_of(save_checkpoint(Place("llama", CAUSAL), root), CAUSAL, 1).model
    with pytest.raises(BackboneError, match=r"llama \(LlamaForCausalLM\) predicts tokens"):
        add_to_model(model, a_tokenizer(), TOKENS)


def test_the_tokenizer_keeps_them_whole(tiny_bert: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    assert add_to_tokenizer(tokenizer, ("<E1>", "good")) == {"<E1>"}
    assert tokenizer.tokenize("the <E1>good film<E1>!") == ["the", "<E1>", "good", "film", "<E1>", "!"]
    # their case counts, although the tokenizer's own words have none
    assert "<E1>" not in tokenizer.tokenize("the <e1>")


def test_loading_adds_them_to_model_and_tokenizer(tiny_bert: Path) -> None:
    head = Head(SEQUENCE, ("a", "b"), new_tokens=("<e1>", "</e1>"))
    backbone = load(BackboneSettings(name=str(tiny_bert)), head)
    assert backbone.tokenizer is not None
    model: Any = backbone.model
    assert NAME in backbone.head_modules
    assert model.config.vocab_size == len(backbone.tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert model.get_submodule(NAME).ids.tolist() == backbone.tokenizer.convert_tokens_to_ids(["<e1>", "</e1>"])
