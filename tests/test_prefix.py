"""Prefix tuning against the papers' formulas in float64, peft with the same values, and models that read real text."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, CONFIGS, IDS, MASK, SEQ2SEQ, SEQUENCE, TOKEN, evaluated, loss_of, tiny_config
from conftest import save_word_tokenizer
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BartConfig

import peftkit.api
from peftkit.backbones.layouts import layout_for
from peftkit.backbones.load import wrap
from peftkit.errors import MethodError, NotMergeable
from peftkit.methods import Prefix
from peftkit.methods.base import trained_parameters
from peftkit.methods.prefix import prefix_layers

LENGTH = 5
GROUPED = CONFIGS["llama"]
MORE: dict[str, dict[str, Any]] = {
    "gemma3_text": GROUPED | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": GROUPED,
    "phi3": {name: value for name, value in GROUPED.items() if name != "head_dim"},
}
DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", *MORE)
BY_HAND = ("deberta", "deberta-v2", "mpnet")
"""They compute their scores by themselves, in the one way that they have."""
NO_POSITIONS = ("t5", "roberta")
"""They tell positions by themselves, wherever the padding is."""
RIGHT_ONLY = ("bart", "mpnet")
"""BART takes no positions, and to MPNet padding is the token of number 1, which is another one here."""
PEFT_TASKS = {SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS", CAUSAL: "CAUSAL_LM"}


def plain(architecture: str, head: str, implementation: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    implementation = "eager" if architecture in BY_HAND else implementation
    if architecture in MORE:
        config = AutoConfig.for_model(architecture, **MORE[architecture] | changes)
    else:
        config = tiny_config(architecture, **changes)
    return getattr(transformers, head).from_config(config, attn_implementation=implementation).eval()


def prefixed(model: nn.Module, std: float = 1.0, **settings: Any) -> Any:
    """The model with keys and values that matter."""
    torch.manual_seed(1)
    attached = Prefix(**{"length": LENGTH} | settings).attach(wrap(model), 1)
    for _, layer in prefix_layers(attached):
        for parameter in layer.parameters():
            parameter.data += std * torch.randn_like(parameter)
    return attached.eval()


def values(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values by the name of the attention module."""
    return {name.removesuffix(".prefix"): layer.rows() for name, layer in prefix_layers(model)}


def head_of(architecture: str) -> str:
    if architecture in DECODERS:
        return CAUSAL
    return SEQ2SEQ if architecture in ("t5", "bart") else TOKEN


def close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return one.shape == two.shape and float((one - two).abs().max()) <= tolerance * max(1.0, float(two.abs().max()))


def numbers(model: nn.Module) -> int:
    return peftkit.api.trainable_parameters(model)


class TestFormula:
    """softmax(Q [P_K; K]ᵀ + bias) [P_V; V], written out in float64 for one attention module of a whole model."""

    def caught(self, model: Any, name: str, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What the attention module is given and what it returns."""
        seen: list[Any] = []
        hook = model.get_submodule(name).register_forward_hook(
            lambda _, args, options, out: seen.append((args[0] if args else options["hidden_states"], out[0])),
            with_kwargs=True,
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        return seen[0][0].double(), seen[0][1].double()

    def attended(self, query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scores: Tensor) -> Any:
        """All (batch, n, heads, width), the prefix (length, heads · width); returns (batch, n, heads · width)."""
        key, value = (
            torch.cat([rows.double().view(1, LENGTH, *held.shape[2:]).expand(len(held), -1, -1, -1), held], dim=1)
            for rows, held in zip(prefix, (key, value), strict=True)
        )
        key, value = (one.repeat_interleave(query.shape[2] // one.shape[2], dim=2) for one in (key, value))
        columns = torch.zeros(*scores.shape[:-1], LENGTH, dtype=torch.float64)
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key) + torch.cat([columns, scores.double()], dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), value).flatten(2)

    @pytest.mark.parametrize("size", [None, 6])
    @pytest.mark.parametrize("start", ["as drawn", "moved"])
    def test_bert(self, size: int | None, start: str) -> None:
        model = prefixed(plain("bert", SEQUENCE), reparametrization_size=size, std=float(start == "moved"))
        name = "bert.encoder.layer.1.attention.self"
        given, found = self.caught(model, name, input_ids=IDS, attention_mask=MASK)
        module = model.get_submodule(name)
        query, key, value = (
            (given @ part.weight.double().T + part.bias.double()).unflatten(-1, (4, 8))
            for part in (module.query, module.key, module.value)
        )
        hidden = torch.where(MASK.bool(), 0.0, -torch.inf)[:, None, None]
        expected = self.attended(query / math.sqrt(8), key, value, values(model)[name], hidden.expand(-1, -1, 7, -1))
        assert torch.allclose(found, expected, atol=1e-6)

    def test_llama_with_grouped_queries(self) -> None:
        model = prefixed(plain("llama", CAUSAL))
        name = "model.layers.1.self_attn"
        given, found = self.caught(model, name, input_ids=IDS, attention_mask=MASK)
        module = model.get_submodule(name)
        query, key, value = (
            (given @ part.weight.double().T).unflatten(-1, (-1, 8))
            for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        # real tokens stand behind the prefix, whose keys are not turned
        angles = (LENGTH + torch.arange(7.0))[:, None] / 10_000 ** (torch.arange(0, 8, 2) / 8)
        turn = torch.polar(torch.ones(()).double(), angles.double())[:, None]

        def turned(states: Tensor) -> Tensor:
            whole = torch.complex(*states.chunk(2, dim=-1)) * turn
            return torch.cat([whole.real, whole.imag], dim=-1)

        seen = torch.ones(7, 7, dtype=torch.bool).tril() & MASK.bool()[:, None, None]
        scores = torch.where(seen, 0.0, -torch.inf)
        result = self.attended(turned(query) / math.sqrt(8), turned(key), value, values(model)[name], scores)
        assert torch.allclose(found[MASK.bool()], (result @ module.o_proj.weight.double().T)[MASK.bool()], atol=1e-6)

    @pytest.mark.parametrize("side", ["encoder", "decoder"])
    def test_t5_whose_relative_bias_knows_no_prefix(self, side: str) -> None:
        model = prefixed(plain("t5", SEQ2SEQ))
        name = f"{side}.block.0.layer.0.SelfAttention"
        given, found = self.caught(model, name, input_ids=IDS[:1], decoder_input_ids=IDS[:1])
        module = model.get_submodule(name)
        query, key, value = (
            (given @ part.weight.double().T).unflatten(-1, (4, 8)) for part in (module.q, module.k, module.v)
        )
        apart = torch.arange(7) - torch.arange(7)[:, None]
        # near keys have a bucket each; those that come later have the second half of an encoder's
        bucket = apart.abs() + (16 * (apart > 0) if side == "encoder" else 0)
        bias = module.relative_attention_bias.weight[bucket].permute(2, 0, 1)[None]
        scores = bias if side == "encoder" else bias.masked_fill(apart > 0, -torch.inf)
        expected = self.attended(query, key, value, values(model)[name], scores) @ module.o.weight.double().T
        assert torch.allclose(found, expected, atol=1e-6)

    @pytest.mark.parametrize("architecture", ["deberta", "deberta-v2"])
    def test_deberta_whose_positions_know_no_prefix(self, architecture: str) -> None:
        """(q·k + q·k_r + k·q_r) / √(3 d) of He et al. 2021, equation 4; a prefix has the first term only."""
        changes = {"position_buckets": -1} if architecture == "deberta-v2" else {}
        model = prefixed(plain(architecture, TOKEN, **changes))
        name, between = "deberta.encoder.layer.1.attention.self", []
        module = model.get_submodule(name)
        module.pos_dropout.register_forward_hook(lambda _, __, out: between.append(out.double()))
        given, found = self.caught(model, name, input_ids=IDS[:1], attention_mask=MASK[:1])

        def projected(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            result = states @ weight.double().T
            return (result if bias is None else result + bias.double()).unflatten(-1, (4, 8))

        if architecture == "deberta":
            fused = module.in_proj.weight.view(4, 3, 8, 32).transpose(0, 1).reshape(3, 32, 32)
            query, key, value = map(projected, 3 * [given], fused, (module.q_bias, None, module.v_bias))
            key_between = projected(between[0], module.pos_proj.weight, None)
            query_between = projected(between[0], module.pos_q_proj.weight, module.pos_q_proj.bias)
        else:
            parts = (module.query_proj, module.key_proj, module.value_proj)
            query, key, value = (projected(given, part.weight, part.bias) for part in parts)
            query_between, key_between = (projected(between[0], part.weight, part.bias) for part in parts[:2])
        distance = torch.arange(7)[:, None] - torch.arange(7) + 16  # row 16 is no distance
        scores = torch.einsum("bihd,ijhd->bhij", query, key_between[distance])
        scores = scores + torch.einsum("bjhd,ijhd->bhij", key, query_between[distance])
        scale = math.sqrt(3 * 8)
        expected = self.attended(query / scale, key, value, values(model)[name], scores / scale)
        assert torch.allclose(found, expected, atol=1e-6)

    def test_mpnet_whose_positions_know_no_prefix(self) -> None:
        model = prefixed(plain("mpnet", TOKEN))
        name = "mpnet.encoder.layer.1.attention.attn"
        given, found = self.caught(model, name, input_ids=IDS[:1])
        module = model.get_submodule(name)
        query, key, value = (
            (given @ part.weight.double().T + part.bias.double()).unflatten(-1, (4, 8))
            for part in (module.q, module.k, module.v)
        )
        apart = torch.arange(7) - torch.arange(7)[:, None]
        bucket = apart.abs() + 16 * (apart > 0)  # as in T5
        scores = model.mpnet.encoder.relative_attention_bias.weight[bucket].permute(2, 0, 1)[None]
        result = self.attended(query / math.sqrt(8), key, value, values(model)[name], scores)
        assert torch.allclose(found, result @ module.o.weight.double().T + module.o.bias.double(), atol=1e-6)


class TestAgainstPeft:
    """peft gives the same prefix to the model as its cache; where there are windows, its prefix falls out of them."""

    @pytest.mark.parametrize("padding", ["right", "left"])
    @pytest.mark.parametrize(
        ("architecture", "head"),
        [
            *((name, head) for name in ("bert", "roberta", "electra") for head in (SEQUENCE, TOKEN)),
            *((name, head) for name in DECODERS if name not in MORE for head in (SEQUENCE, TOKEN, CAUSAL)),
            *((name, CAUSAL) for name in MORE),
        ],
    )
    def test_same_logits(self, architecture: str, head: str, padding: str) -> None:
        from peft import PrefixTuningConfig, get_peft_model

        base = plain(architecture, head)
        ours = prefixed(copy.deepcopy(base))
        config = PrefixTuningConfig(task_type=PEFT_TASKS[head], num_virtual_tokens=LENGTH)
        theirs: Any = get_peft_model(base, config).eval()
        rows = [one for pair in values(ours).values() for one in pair]
        theirs.prompt_encoder.default.embedding.weight.data.copy_(torch.cat(rows, dim=1))
        ids, mask = (IDS, MASK) if padding == "right" else (IDS.flip(1), MASK.flip(1))
        with torch.no_grad():
            found, expected = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, theirs))
        assert close(found, expected, 1e-6)

    @pytest.mark.parametrize("architecture", ["bart", "t5"])
    def test_the_decoder(self, architecture: str) -> None:
        """peft has no prefix for encoder and cross attention; and T5's relative bias, which says how far real tokens
        are apart, takes peft's prefix for text before them. Where there is none of these, both are the same."""
        from peft import PrefixTuningConfig, get_peft_model

        base = plain(architecture, SEQ2SEQ)
        if architecture == "t5":
            base.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.zero_()
        ours = prefixed(copy.deepcopy(base))
        config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
        theirs: Any = get_peft_model(base, config).eval()
        given = iter(theirs.get_prompt(1).self_attention_cache.layers)
        for name, layer in list(prefix_layers(ours)):
            if "decoder" in name and "self" in name.lower():
                cached = next(given)
                layer.key.data.copy_(cached.keys[0].transpose(0, 1).flatten(1))
                layer.value.data.copy_(cached.values[0].transpose(0, 1).flatten(1))
            else:
                delattr(ours.get_submodule(name.removesuffix(".prefix")), "prefix")
        assert next(given, None) is None
        assert close(evaluated(ours, SEQ2SEQ), evaluated(theirs, SEQ2SEQ), 1e-6)


class TestPositions:
    """Where a model counts what is in its cache, the first real token has position `LENGTH`; elsewhere 0."""

    CASES = (
        ("bert", "bert.embeddings", True),
        ("electra", "electra.embeddings", True),
        ("gpt2", "transformer.wpe", True),
        ("gpt_neox", "gpt_neox.rotary_emb", True),
        ("llama", "model.rotary_emb", True),
        ("gemma3_text", "model.rotary_emb", True),
        ("distilbert", "distilbert.embeddings", False),
        ("albert", "albert.embeddings", False),
        ("modernbert", "model.rotary_emb", False),
    )

    def caught(self, model: nn.Module, name: str, **inputs: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_hook(
            lambda _, __, out: seen.append(out if isinstance(out, Tensor) else torch.cat(out))
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        return seen[0]

    @pytest.mark.parametrize(("architecture", "name", "moved"), CASES)
    @pytest.mark.parametrize("given", [None, 3])
    def test_first_position(self, architecture: str, name: str, moved: bool, given: int | None) -> None:
        """`given`: the caller counts positions himself, from there."""
        base = plain(architecture, head_of(architecture))
        first = (given or 0) + LENGTH * moved
        expected = self.caught(base, name, input_ids=IDS, position_ids=(first + torch.arange(7))[None])
        inputs = {} if given is None else {"position_ids": (given + torch.arange(7))[None]}
        assert torch.equal(self.caught(prefixed(base), name, input_ids=IDS, **inputs), expected)

    def test_roberta_keeps_the_position_of_padding(self) -> None:
        base = plain("roberta", TOKEN)
        table = base.roberta.embeddings.position_embeddings
        first = 1 + int(base.config.pad_token_id)
        expected = torch.where(MASK.bool(), torch.arange(7) + first + LENGTH, base.config.pad_token_id)
        name = "roberta.embeddings.position_embeddings"
        assert torch.equal(self.caught(prefixed(base), name, input_ids=IDS), table.weight[expected])

    def test_bart_moves_its_decoder_only(self) -> None:
        model = prefixed(plain("bart", SEQ2SEQ))
        for side, first in (("encoder", 0), ("decoder", LENGTH)):
            name = f"model.{side}.embed_positions"
            table = model.get_submodule(name).weight
            found = self.caught(model, name, input_ids=IDS, decoder_input_ids=IDS)
            assert torch.equal(found[0], table[2 + first : 9 + first])

    def test_they_are_taken_from_the_input(self) -> None:
        assert Prefix(length=7).virtual_tokens() == 7


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


class TestText:
    TEXT = "the film was very good"

    def started(self, model: nn.Module, tokenizer: Any, length: int = LENGTH, text: str = TEXT) -> Any:
        backbone = wrap(model, tokenizer)
        method = Prefix(length=length, initialization="text", initialization_text=text)
        was_training = model.training
        attached = method.attach(backbone, 1)
        assert attached.training == was_training
        return attached.eval()

    @pytest.mark.parametrize("architecture", DECODERS)
    @pytest.mark.parametrize("length", [5, 8, 3])
    def test_a_decoder_starts_as_if_it_had_read_the_text(self, architecture: str, length: int, tokenizer: Any) -> None:
        base = plain(architecture, CAUSAL)
        ids = tokenizer(self.TEXT)["input_ids"]
        assert len(ids) == 5
        text = torch.tensor([ids + ids])[:, :length].expand(2, -1)
        with torch.no_grad():
            expected = base(input_ids=torch.cat([text, IDS], dim=1)).logits[:, length:]
            found = self.started(base, tokenizer, length)(input_ids=IDS).logits
        assert close(found, expected, 1e-5)

    def projected(self, model: nn.Module, names: list[str], **inputs: Tensor) -> list[Tensor]:
        """The mean of what linear layers return."""
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen[name].append(out[0]))
            for name in names
        ]
        with torch.no_grad():
            model(**inputs)
        for hook in hooks:
            hook.remove()
        return [torch.stack(outputs).mean(0) for outputs in seen.values()]

    @pytest.mark.parametrize(
        ("architecture", "paths"),
        [
            ("bert", [f"bert.encoder.layer.{i}.attention.self.{{}}" for i in range(2)]),
            ("albert", ["albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{}"]),
        ],
    )
    def test_an_encoder_starts_from_what_it_computes(self, architecture: str, paths: list[str], tokenizer: Any) -> None:
        model = plain(architecture, TOKEN).train()
        names = [path.format(role) for path in paths for role in ("key", "value")]
        expected = self.projected(model, names, input_ids=torch.tensor([tokenizer(self.TEXT)["input_ids"]]))
        found = [one for pair in values(self.started(model, tokenizer)).values() for one in pair]
        assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(found, expected, strict=True))

    @pytest.mark.parametrize("head", [SEQUENCE, SEQ2SEQ])
    def test_both_sides_of_bart_read_it(self, head: str, tokenizer: Any) -> None:
        model = plain("bart", head)
        ids = torch.tensor([tokenizer(self.TEXT)["input_ids"]])
        modules = [f"encoder.layers.{i}.self_attn" for i in range(2)]
        modules += [f"decoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "encoder_attn")]
        names = [f"{module}.{role}_proj" for module in modules for role in "kv"]
        expected = self.projected(model.model, names, input_ids=ids, decoder_input_ids=ids)
        found = [one for pair in values(self.started(model, tokenizer)).values() for one in pair]
        assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(found, expected, strict=True))

    def test_what_it_needs(self, tokenizer: Any) -> None:
        with pytest.raises(MethodError, match="initialization 'text' needs the backbone's tokenizer"):
            self.started(plain("bert", TOKEN), None)
        with pytest.raises(MethodError, match="the tokenizer makes no token of initialization_text ' '"):
            self.started(plain("bert", TOKEN), tokenizer, text=" ")

    def test_it_is_loaded_without_the_tokenizer(self, tokenizer: Any, tmp_path: Path) -> None:
        method = Prefix(length=LENGTH, initialization="text", initialization_text=self.TEXT)
        model = method.attach(wrap(plain("gpt2", CAUSAL), tokenizer), 1)
        method.save(model, tmp_path)
        loaded = method.load(wrap(plain("gpt2", CAUSAL)), tmp_path)
        assert torch.equal(evaluated(loaded, CAUSAL), evaluated(model, CAUSAL))


class TestReparametrized:
    def test_keys_and_values_are_the_outputs_of_one_mlp(self) -> None:
        model = prefixed(plain("bert", SEQUENCE), reparametrization_size=6)
        layers = [layer for _, layer in prefix_layers(model)]
        start = layers[0].shared
        assert layers[1].shared is start
        weight, bias = (
            torch.cat([getattr(layer.up, name) for layer in layers]).double() for name in ("weight", "bias")
        )
        assert weight.shape == (2 * 2 * 32, 6)  # layers · 2 · d outputs
        hidden = torch.tanh(start.embedding.double() @ start.down.weight.double().T + start.down.bias.double())
        expected = (hidden @ weight.T + bias).split(32, dim=1)
        found = [one for pair in values(model).values() for one in pair]
        assert all(torch.allclose(one.double(), two, atol=1e-6) for one, two in zip(found, expected, strict=True))

    def test_encoder_decoder_and_cross_attention_have_one_each(self) -> None:
        layers = dict(prefix_layers(prefixed(plain("bart", SEQ2SEQ), reparametrization_size=6)))
        by_kind: dict[str, set[int]] = {}
        for name, layer in layers.items():
            by_kind.setdefault(name.replace(".0.", ".*.").replace(".1.", ".*."), set()).add(id(layer.shared))
        assert [len(starts) for starts in by_kind.values()] == [1, 1, 1]
        assert len(set.union(*by_kind.values())) == 3

    def test_it_is_folded_away(self, tmp_path: Path) -> None:
        method = Prefix(length=LENGTH, reparametrization_size=6)
        torch.manual_seed(1)
        model = method.attach(wrap(plain("bart", SEQUENCE)), 1)
        optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.05)
        loss_of(model.train(), SEQUENCE).backward()
        optimizer.step()
        method.save(model, tmp_path)
        tensors = load_file(tmp_path / "trained.safetensors")
        prefix = {name for name in tensors if ".prefix." in name}
        assert all(name.endswith((".prefix.key", ".prefix.value")) for name in prefix)
        assert {tensors[name].shape for name in prefix} == {(LENGTH, 32)}
        assert {name.partition(".")[0] for name in tensors.keys() - prefix} == {"classification_head"}
        loaded = method.load(wrap(plain("bart", SEQUENCE)), tmp_path)
        assert close(evaluated(loaded, SEQUENCE), evaluated(model, SEQUENCE), 1e-6)


class TestCounts:
    def test_bart_large_as_in_the_paper(self) -> None:
        with torch.device("meta"):
            model = transformers.BartForConditionalGeneration(BartConfig())
        method, layout = Prefix(length=200), layout_for("bart")
        # 12 times the encoder, the decoder, and the cross attention
        assert method.added_parameters(model, layout) == 14_745_600 == 200 * 1024 * 2 * 36
        with_mlp = Prefix(length=200, reparametrization_size=800)
        per_kind = 200 * 1024 + (1024 * 800 + 800) + (800 * 2 * 12 * 1024 + 2 * 12 * 1024)
        assert with_mlp.added_parameters(model, layout) == 3 * per_kind
        assert with_mlp.stored_parameters(model, layout) == 14_745_600

    @pytest.mark.parametrize("size", [None, 6])
    @pytest.mark.parametrize(
        ("architecture", "kinds", "modules", "width"),
        [("bert", 1, 2, 32), ("albert", 1, 1, 32), ("llama", 1, 2, 16), ("t5", 3, 6, 32), ("phi3", 1, 2, 16)],
    )
    def test_what_trains(self, architecture: str, kinds: int, modules: int, width: int, size: int | None) -> None:
        model = plain(architecture, CAUSAL if architecture == "phi3" else SEQUENCE)
        method, backbone = Prefix(length=LENGTH, reparametrization_size=size), wrap(model)
        expected = folded = 2 * LENGTH * width * modules
        if size:
            expected = kinds * (LENGTH * width + (width * size + size)) + modules * (size * 2 * width + 2 * width)
        assert method.added_parameters(model, backbone.layout) == expected
        assert method.stored_parameters(model, backbone.layout) == folded
        head = sum(p.numel() for name in backbone.head_modules for p in model.get_submodule(name).parameters())
        assert numbers(method.attach(backbone, 1)) == expected + head


class TestSaved:
    def test_names_shapes_and_size(self, tmp_path: Path) -> None:
        method = Prefix(length=3)
        method.save(method.attach(wrap(plain("llama", SEQUENCE)), 1), tmp_path)
        tensors = load_file(tmp_path / "trained.safetensors")
        inside = [f"model.layers.{i}.self_attn.prefix.{role}" for i in range(2) for role in ("key", "value")]
        assert set(tensors) == {*inside, "score.weight"}
        assert {tensors[name].shape for name in inside} == {(3, 16)}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    def test_there_is_no_merged_form(self) -> None:
        with pytest.raises(NotMergeable, match=r"no weights of the plain model .* ship the run folder itself"):
            Prefix().merge(prefixed(plain("bert", SEQUENCE)))

    def test_the_configuration_stays_clean(self, tmp_path: Path) -> None:
        model = prefixed(plain("t5", SEQ2SEQ))
        model.config.save_pretrained(tmp_path)
        model.generation_config.save_pretrained(tmp_path)
        assert not any("peftkit" in file.read_text() for file in tmp_path.iterdir())
        again = transformers.AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(tmp_path))
        assert again.config._attn_implementation == "sdpa"


GENERATING: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "t5": {},
    "bart": {"forced_eos_token_id": None},
}


class TestGeneration:
    """Tokens out of caches are those of the whole input read again at every step."""

    def model(self, architecture: str) -> Any:
        model = prefixed(plain(architecture, head_of(architecture), **GENERATING[architecture]))
        model.generation_config.update(eos_token_id=None, forced_eos_token_id=None, do_sample=False)
        return model

    def generated(self, model: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Tokens, and the logits of every step."""
        # decoders are padded on the left
        left = not model.config.is_encoder_decoder
        ids, mask = (IDS.flip(1), MASK.flip(1)) if left else (IDS, MASK)
        model.generation_config.update(return_dict_in_generate=True, output_logits=True, max_new_tokens=9)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, **options)
        assert len(out.logits) == 9
        return out.sequences, torch.stack(out.logits)

    def check(self, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        assert torch.equal(found[0], expected[0])
        assert close(found[1], expected[1], 1e-5)

    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("architecture", GENERATING)
    def test_cached(self, architecture: str, beams: int) -> None:
        model = self.model(architecture)
        found = self.generated(model, num_beams=beams)
        self.check(found, self.generated(model, num_beams=beams, use_cache=False))
        untouched = plain(architecture, head_of(architecture), **GENERATING[architecture])
        untouched.generation_config = model.generation_config
        assert not close(self.generated(untouched, num_beams=beams)[1], found[1], 1e-2)

    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "t5", "bart"])
    def test_static_cache(self, architecture: str, beams: int) -> None:
        model = self.model(architecture)
        static = self.generated(model, num_beams=beams, cache_implementation="static")
        self.check(static, self.generated(model, num_beams=beams, use_cache=False))

    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
    def test_eager(self, architecture: str) -> None:
        model = self.model(architecture)
        expected = self.generated(model)
        model.set_attn_implementation("eager")
        self.check(self.generated(model), expected)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_alone_and_in_a_batch(self, architecture: str) -> None:
        model = self.model(architecture)
        tokens, logits = self.generated(model)
        alone = model.generate(IDS.flip(1)[1:, 2:])
        self.check((tokens[1:, 2:], logits[:, 1:]), (alone.sequences, torch.stack(alone.logits)))

    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
    def test_a_prompt_read_in_two_parts(self, architecture: str) -> None:
        model = self.model(architecture)
        with torch.no_grad():
            whole = model(IDS).logits
            first = model(IDS[:, :4], use_cache=True)
            second = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
        assert close(torch.cat([first.logits, second], dim=1), whole, 1e-5)
        assert first.past_key_values.get_seq_length() == 7  # nothing of the prefix is in it


class TestBatches:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize(
        ("architecture", "padding"),
        [*((name, "right") for name in CONFIGS), *((name, "left") for name in CONFIGS if name not in RIGHT_ONLY)],
    )
    def test_an_example_alone_and_in_a_batch(self, architecture: str, implementation: str, padding: str) -> None:
        head = CAUSAL if architecture in DECODERS else SEQUENCE if architecture == "bart" else TOKEN
        model = prefixed(plain(architecture, head, implementation))
        ids, mask, inputs = IDS.clone(), MASK, {}
        if padding == "left":
            ids[1], mask = ids[1].roll(2), MASK.flip(1)
        if padding == "left" and architecture not in NO_POSITIONS:
            inputs = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            batch = model(ids, attention_mask=mask, **inputs).logits
            alone = model(IDS[1:, :5], attention_mask=MASK[1:, :5]).logits
        found = batch[1:] if head == SEQUENCE else batch[1:][:, mask[1].bool()]
        assert close(found, alone, 1e-5)

    @pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in BY_HAND])
    def test_eager_and_sdpa(self, architecture: str) -> None:
        head = head_of(architecture)
        one, two = (prefixed(plain(architecture, head, kind)) for kind in ("sdpa", "eager"))
        assert close(evaluated(one, head), evaluated(two, head), 1e-5)

    @pytest.mark.parametrize("architecture", ["bert", "llama", "bart"])
    def test_attention_weights(self, architecture: str) -> None:
        model = prefixed(plain(architecture, head_of(architecture), "eager"))
        extra = {"decoder_input_ids": IDS} if architecture == "bart" else {}
        with torch.no_grad():
            out = model(IDS, attention_mask=MASK, output_attentions=True, **extra)
        kinds = ("encoder_attentions", "decoder_attentions", "cross_attentions") if extra else ("attentions",)
        for kind in kinds:
            for weights in out[kind]:
                assert weights.shape == (2, 4, 7, LENGTH + 7)
                assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
                assert float(weights[..., :LENGTH].min()) > 0  # every query sees every prefix

    def test_a_window_does_not_reach_it(self) -> None:
        """The last query of a window of 2 sees itself, one neighbour, and the whole prefix."""
        model = prefixed(plain("mistral", CAUSAL, "eager", sliding_window=2))
        weights = model(IDS[:1], output_attentions=True).attentions[0][0, :, -1]
        assert ((weights > 0).sum(-1) == LENGTH + 2).all()


class TestTraining:
    @pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
    def test_training_and_evaluation_compute_the_same(self, architecture: str) -> None:
        model = prefixed(plain(architecture, SEQUENCE))
        with torch.no_grad():
            one, two = (mode(IDS, attention_mask=MASK).logits for mode in (model.train(), model.eval()))
        assert torch.equal(one, two)

    def test_dropout_falls_on_each_example_anew(self) -> None:
        model = prefixed(plain("bert", SEQUENCE), dropout=0.5)
        twice = IDS[:1].expand(2, -1)
        with torch.no_grad():
            one, two = model.train()(twice).logits
            alike, same = model.eval()(twice).logits
        assert not torch.allclose(one, two, atol=1e-3)
        assert torch.allclose(alike, same, atol=1e-6)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_attention_dropout_falls_on_the_prefix_too(self, implementation: str) -> None:
        """Half of the weights of an attention that sees little but its prefix are dropped."""
        model = prefixed(plain("bert", SEQUENCE, implementation, max_position_embeddings=512), length=500)
        module, outputs = model.get_submodule("bert.encoder.layer.0.attention.self"), []
        module.dropout.p = 0.5
        module.prefix.value.data.fill_(1.0)
        module.prefix.key.data.zero_()
        module.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
        with torch.no_grad():
            model.train()(IDS)
        by_head = outputs[0].unflatten(-1, (4, 8)).mean(-1)
        # a mean of 500 values that are 0 or 2 with equal chance
        assert 0.5 / math.sqrt(500) < float(by_head.std()) < 2 / math.sqrt(500)

    @pytest.mark.parametrize("size", [None, 6])
    def test_a_backbone_in_bfloat16(self, size: int | None) -> None:
        exact = prefixed(plain("llama", SEQUENCE), reparametrization_size=size)
        base = plain("llama", SEQUENCE).to(torch.bfloat16)
        model = prefixed(base, reparametrization_size=size)
        assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
        loss_of(model.train(), SEQUENCE).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained_parameters(model).values())
        assert close(evaluated(model, SEQUENCE).float(), evaluated(exact, SEQUENCE), 0.1)

    def test_autocast(self) -> None:
        model = prefixed(plain("bert", SEQUENCE))
        expected = evaluated(model, SEQUENCE)
        with torch.autocast("cpu", torch.bfloat16):
            found = evaluated(model, SEQUENCE)
        assert close(found.float(), expected, 0.05)

    def test_a_copy_is_its_own_model(self) -> None:
        model = prefixed(plain("gpt2", CAUSAL))
        before, twin = evaluated(model, CAUSAL), copy.deepcopy(model)
        assert torch.equal(evaluated(twin, CAUSAL), before)
        for _, layer in prefix_layers(twin):
            layer.key.data += 1.0
        twin.set_attn_implementation("eager")
        assert not torch.allclose(evaluated(twin, CAUSAL), before)
        assert torch.equal(evaluated(model, CAUSAL), before)

    def test_a_copied_mlp_is_shared_as_before(self) -> None:
        model = prefixed(plain("bert", SEQUENCE), reparametrization_size=6)
        twin = copy.deepcopy(model)
        assert numbers(twin) == numbers(model)
        assert torch.equal(evaluated(twin, SEQUENCE), evaluated(model, SEQUENCE))


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"length": 0}, "greater than 0"),
            ({"dropout": 1.0}, "less than 1"),
            ({"reparametrization_size": 0}, "greater than 0"),
            ({"initialization": "words"}, "'random' or 'text'"),
            ({"initialization": "text"}, "initialization 'text' and initialization_text need each other"),
            ({"initialization_text": "a"}, "initialization 'text' and initialization_text need each other"),
            ({"initialization": "text", "initialization_text": ""}, "at least 1 character"),
            (
                {"initialization": "text", "initialization_text": "a", "reparametrization_size": 8},
                "with reparametrization_size an MLP computes them; leave one of the two out",
            ),
        ],
    )
    def test_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message) as caught:
            Prefix(**settings)
        assert caught.value.error_count() == 1

    def test_heads_that_mix(self) -> None:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(tiny_config("deberta", talking_head=True))
        with pytest.raises(MethodError, match="does not attend through transformers' attention functions"):
            Prefix().added_parameters(model, layout_for("deberta"))

    def test_longer_than_the_positions(self) -> None:
        message = r"length 32 leaves no position for any token: bert \(BertModel\) has 32; lower method\.length"
        with torch.device("meta"):
            bert, modern = (transformers.AutoModel.from_config(tiny_config(name)) for name in ("bert", "modernbert"))
        with pytest.raises(MethodError, match=message):
            Prefix(length=32).added_parameters(bert, layout_for("bert"))
        assert Prefix(length=31).added_parameters(bert, layout_for("bert")) == 31 * 2 * 32 * 2
        # its positions are not taken
        assert Prefix(length=32).added_parameters(modern, layout_for("modernbert")) == 32 * 2 * 32 * 2

    def test_attaching_twice(self) -> None:
        model = prefixed(plain("bert", SEQUENCE))
        with pytest.raises(MethodError, match="this model has a prefix already; attach to a model as"):
            peftkit.api.attach(model, Prefix())

    def test_an_attention_that_takes_no_mask(self) -> None:
        model = plain("bert", SEQUENCE)
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(MethodError, match=r"attends by 'flash_attention_2', .*attn_implementation='sdpa'"):
            evaluated(Prefix().attach(wrap(model), 1), SEQUENCE)


WriteConfig = Callable[..., Path]
