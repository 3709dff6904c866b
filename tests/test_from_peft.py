"""(IA)³, VeRA, prompt and P-tuning, and peft's other methods, against plain peft and the papers' formulas."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packaging.version
import peft
import pytest
import torch
import transformers
from architectures import CAUSAL, IDS, MASK, SEQ2SEQ, SEQUENCE, TOKEN, Place, evaluated, loss_of, on_meta, tiny_config
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import peftkit.api
from peftkit.backbones.layouts import layout_for
from peftkit.backbones.load import Backbone, wrap
from peftkit.backbones.modules import head_modules
from peftkit.errors import ArtifactError, ConfigError, MethodError, NotMergeable, UsageError
from peftkit.methods import IA3, LoRA, Peft, PromptTuning, PTuning, VeRA
from peftkit.methods.base import Method, trained_parameters
from peftkit.methods.from_peft import FromPeft

QUESTIONS = "AutoModelForQuestionAnswering"
WEIGHTS = "adapter_model.safetensors"


def tiny(architecture: str, model_class: str = SEQUENCE, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    config.num_labels = 2 if model_class == QUESTIONS else config.num_labels
    return getattr(transformers, model_class).from_config(config).eval()


def attached(method: Method, architecture: str = "bert", model_class: str = SEQUENCE, seed: int = 1) -> Any:
    backbone = wrap(tiny(architecture, model_class))
    torch.manual_seed(seed)
    return method.attach(backbone, 3)


def loaded(method: Method, folder: Path, architecture: str = "bert", model_class: str = SEQUENCE) -> Any:
    """The saved adapter on the same weights, with another head."""
    model = tiny(architecture, model_class)
    for name in head_modules(model):
        for parameter in model.get_submodule(name).parameters():
            nn.init.normal_(parameter)
    return method.load(wrap(model), folder)


def train(model: Any, model_class: str = SEQUENCE, steps: int = 3) -> Any:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.02)
    model.train()
    for _ in range(steps):
        loss_of(model, model_class).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def counts(method: Method, model: Any) -> tuple[int, int]:
    layout = layout_for(model.config.model_type)
    return method.added_parameters(model, layout), method.stored_parameters(model, layout)


def close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return float((one - two).abs().max()) <= tolerance * max(1.0, float(two.abs().max()))


def randomize(model: nn.Module, part: str) -> None:
    chance = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, 1.0, 0.3, generator=chance)


# --- against a configuration for peft that is written by hand --------------------------------------


def by_hand(name: str) -> Any:
    """What a user of peft would write for BERT with a classifier."""
    common: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    linears = r"bert\.encoder\..*(query|key|value|dense)"
    match name:
        case "ia3":
            down = r"bert\.encoder\.layer\.\d+\.output\.dense"
            scaled = r"bert\.encoder\..*(key|value)"
            return peft.IA3Config(target_modules=f"{scaled}|{down}", feedforward_modules=down, **common)
        case "vera":
            return peft.VeraConfig(r=8, target_modules=linears, **common)
        case "prompt":
            return peft.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB", **common)
        case "p_tuning":
            kind: Any = "LSTM"
            return peft.PromptEncoderConfig(
                num_virtual_tokens=3, encoder_reparameterization_type=kind, encoder_hidden_size=16, **common
            )
        case "loha":
            return peft.LoHaConfig(r=4, alpha=6, target_modules=linears, **common)
        case "oft":
            return peft.OFTConfig(r=0, oft_block_size=4, target_modules=linears, **common)
        case "fourierft":
            return peft.FourierFTConfig(n_frequency=9, target_modules=r"bert\.encoder\..*value", **common)
        case _:
            return peft.LNTuningConfig(target_modules=r".*LayerNorm", **common)


OURS: dict[str, FromPeft] = {
    "ia3": IA3(),
    "vera": VeRA(rank=8),
    "prompt": PromptTuning(length=3),
    "p_tuning": PTuning(length=3),
    "loha": Peft(type="loha", r=4, alpha=6),  # type: ignore[call-arg]
    "oft": Peft(type="oft", r=0, oft_block_size=4),  # type: ignore[call-arg]
    "fourierft": Peft(type="fourierft", n_frequency=9, targets="value"),  # type: ignore[call-arg]
    "ln_tuning": Peft(type="LN_TUNING"),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("name", OURS)
def test_trains_like_peft_configured_by_hand(name: str) -> None:
    from peft import get_peft_model

    ours = train(attached(OURS[name]))
    model = tiny("bert")
    torch.manual_seed(1)
    theirs = train(get_peft_model(model, by_hand(name)))
    assert not close(evaluated(ours, SEQUENCE), evaluated(tiny("bert"), SEQUENCE), 1e-3)
    assert torch.equal(evaluated(ours, SEQUENCE), evaluated(theirs, SEQUENCE))


# --- (IA)³ -----------------------------------------------------------------------------------------


class TestIA3:
    @pytest.mark.parametrize(
        ("model_type", "settings", "expected"),
        [
            ("t5", {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "num_layers": 12}, 129_024),
            ("roberta", {}, 12 * (768 + 768 + 3072)),
            ("llama", {"num_key_value_heads": 8}, 32 * (1024 + 1024 + 11008)),
            ("gpt2", {}, 12 * (768 + 768 + 3072)),
        ],
    )
    def test_counts_of_real_sizes(self, model_type: str, settings: dict[str, Any], expected: int) -> None:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **settings))
        assert counts(IA3(), model) == (expected, expected)

    @pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5"])
    def test_the_same_as_weights_scaled_by_hand(self, architecture: str) -> None:
        """l ⊙ (W x + b) = (l ⊙ W) x + l ⊙ b for keys and values, W (l ⊙ x) = (W diag(l)) x for what comes down."""
        model = attached(IA3(), architecture)
        plain = tiny(architecture).double()
        assert torch.equal(evaluated(model, SEQUENCE), evaluated(tiny(architecture), SEQUENCE))
        randomize(model, "ia3_l")
        seen = 0
        for name, parameter in model.named_parameters():
            if ".ia3_l." not in name:
                continue
            scale, path = parameter.detach().double().flatten(), re.sub(r"^base_model\.model\.|\.ia3_l.*", "", name)
            whole, _, role = path.rpartition(".")
            fused = architecture == "gpt2" and role in ("key", "value")
            part = plain.get_submodule(whole if fused else path)
            rows = slice(*{"key": (32, 64), "value": (64, 96)}[role]) if fused else slice(None)
            outputs_last = architecture == "gpt2"  # its weights are (in, out)
            if re.search(r"(output\.dense|mlp\.c_proj|down_proj|wo)$", path) and "attention.output" not in path:
                part.weight.data.mul_(scale[:, None] if outputs_last else scale)
            else:
                if outputs_last:
                    part.weight.data[:, rows] *= scale
                else:
                    part.weight.data *= scale[:, None]
                if getattr(part, "bias", None) is not None:
                    part.bias.data[rows] *= scale
            seen += 1
        assert seen == {"t5": 2 * (3 + 5)}.get(architecture, 2 * 3)
        model = model.double()
        assert close(evaluated(model, SEQUENCE), evaluated(plain, SEQUENCE), 1e-10)

    def test_without_a_feed_forward_target(self, tmp_path: Path) -> None:
        method = IA3(targets="key+value")
        model = train(attached(method, "llama"))
        method.save(model, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["feedforward_modules"] == []
        assert torch.equal(evaluated(loaded(method, tmp_path, "llama"), SEQUENCE), evaluated(model, SEQUENCE))

    def test_embeddings_are_refused(self) -> None:
        with pytest.raises(MethodError, match=r"\(IA\)³ is for linear layers, and 'bert\.embeddings\.word_embeddings'"):
            attached(IA3(targets="key+word_embeddings"))


# --- VeRA ------------------------------------------------------------------------------------------


class TestVeRA:
    def test_formula_in_float64_with_matrices_of_unlike_shape(self) -> None:
        method = VeRA(rank=40, projection_seed=5)  # more than any matrix has
        model = train(attached(method))
        tuner = model.base_model
        for path in ("attention.self.query", "intermediate.dense", "output.dense"):
            layer = tuner.model.bert.encoder.layer[1].get_submodule(path)
            weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
            a = tuner.vera_A["default"].double()[:, : weight.shape[1]]
            b = tuner.vera_B["default"].double()[: weight.shape[0]]
            d, scale = layer.vera_lambda_d["default"].double(), layer.vera_lambda_b["default"].double()
            x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
            expected = x.double() @ weight.T + bias + scale * ((d * (x.double() @ a.T)) @ b.T)
            assert float(scale.detach().abs().max()) > 0.01
            assert torch.allclose(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
        assert tuner.vera_A["default"].shape == (40, 40)

    def test_counts_and_what_is_saved(self, tmp_path: Path) -> None:
        method = VeRA(rank=64)
        model = attached(method)
        added = 2 * (4 * (64 + 32) + (64 + 40) + (64 + 32))
        assert counts(method, on_meta(Place("bert", SEQUENCE))) == (added, added)
        method.save(model, tmp_path)
        saved = load_file(tmp_path / WEIGHTS)
        assert sum(t.numel() for name, t in saved.items() if ".classifier." not in name) == added
        assert all(".vera_lambda_" in name or ".classifier." in name for name in saved)

    @pytest.mark.parametrize(("rank", "expected"), [(1024, 12 * 2 * (1024 + 768)), (256, 24_576)])
    def test_query_and_value_of_roberta_base(self, rank: int, expected: int) -> None:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("roberta"))
        assert counts(VeRA(rank=rank, targets="query_value"), model)[0] == expected

    def test_other_projections_are_noticed(self, tmp_path: Path) -> None:
        method = VeRA(rank=4)
        method.save(train(attached(method)), tmp_path)
        with safe_open(tmp_path / WEIGHTS, "pt") as file:
            notes = json.loads(file.metadata()["peftkit"])
        assert len(notes["projections_sha256"]) == 64
        tensors = load_file(tmp_path / WEIGHTS)
        notes |= {"projections_sha256": "0" * 64, "torch_version": "9.9"}
        save_file(tensors, tmp_path / WEIGHTS, {"peftkit": json.dumps(notes)})
        with pytest.raises(
            ArtifactError, match=r"random projections of .* with torch [\d.].*was trained, with torch 9\.9"
        ):
            loaded(method, tmp_path)

    def test_resuming_needs_the_same_projections(self) -> None:
        method = VeRA(rank=4)
        model = attached(method)
        state = {name: tensor.clone() for name, tensor in method.state(model).items()}
        method.load_state(model, state)
        other = VeRA(rank=4, projection_seed=1)
        with pytest.raises(MethodError, match=r"draws other random projections here, with torch .* checkpoint; resume"):
            method.load_state(attached(other), state)

    def test_settings(self) -> None:
        with pytest.raises(ValidationError, match="d_initial must not be 0: b starts at 0 too"):
            VeRA(d_initial=0.0)
        with pytest.raises(MethodError, match=r"VeRA is for linear layers"):
            attached(VeRA(rank=4, targets="word_embeddings"))


# --- virtual tokens --------------------------------------------------------------------------------

VIRTUAL: list[Any] = [PromptTuning(length=3), PTuning(length=3), PTuning(length=3, encoder="mlp")]


def behind_prompt(model: Any, ids: Tensor = IDS, mask: Tensor = MASK, **more: Any) -> Any:
    """What the untouched task model computes of the virtual tokens' embeddings and the words' put together by hand."""
    base = model.get_base_model()
    prompt = model.get_prompt_embedding_to_save("default")[None].expand(len(ids), -1, -1)
    embeddings = torch.cat([prompt, base.get_input_embeddings()(ids)], 1)
    with torch.no_grad():
        return base(
            inputs_embeds=embeddings, attention_mask=nn.functional.pad(mask, (prompt.shape[1], 0), value=1), **more
        )


def plain_peft(architecture: str, model_class: str, task: str) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    model = tiny(architecture, model_class)
    torch.manual_seed(1)
    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type=task)).eval()


class TestAlignment:
    @pytest.mark.parametrize("method", VIRTUAL, ids=lambda one: one.kind)
    @pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "t5"])
    def test_logits_of_a_tagger_belong_to_the_tokens(self, architecture: str, method: Method) -> None:
        model = attached(method, architecture, TOKEN).eval()
        with torch.no_grad():
            found = model(input_ids=IDS, attention_mask=MASK).logits
            positional = model(IDS, MASK).logits
        assert found.shape == (*IDS.shape, 3)
        assert close(found, behind_prompt(model).logits[:, 3:], 1e-6)
        assert torch.equal(positional, found)
        assert plain_peft(architecture, TOKEN, "TOKEN_CLS")(IDS, MASK).logits.shape[1] == IDS.shape[1] + 3

    def test_labels_of_a_tagger(self) -> None:
        model = attached(PromptTuning(length=3), "bert", TOKEN).eval()
        labels = IDS % 3
        output = model(input_ids=IDS, attention_mask=MASK, labels=labels)
        assert torch.allclose(output.loss, cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
        with pytest.raises(ValueError, match="batch_size"):
            plain_peft("bert", TOKEN, "TOKEN_CLS")(IDS, MASK, labels=labels)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma"])
    def test_a_decoder_classifies_by_the_last_real_token(self, architecture: str) -> None:
        model = attached(PromptTuning(length=3, initialization="random"), architecture).eval()

        def alone(one: Any) -> Tensor:
            rows = [
                one(input_ids=i[None, : m.sum()], attention_mask=m[None, : m.sum()]).logits
                for i, m in zip(IDS, MASK, strict=True)
            ]
            return torch.cat(rows)

        with torch.no_grad():
            together = model(input_ids=IDS, attention_mask=MASK).logits
            assert close(together, alone(model), 1e-5)
            assert close(model(input_ids=IDS).logits, together, 1e-5)  # told by the ids where no mask is given
            plain = plain_peft(architecture, SEQUENCE, "SEQ_CLS")
            assert not close(plain(input_ids=IDS, attention_mask=MASK).logits, alone(plain), 1e-3)

    @pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "mpnet"])
    def test_an_encoder_classifies_independently_of_padding(self, architecture: str) -> None:
        model = attached(PTuning(length=3), architecture).eval()
        with torch.no_grad():
            together = model(input_ids=IDS, attention_mask=MASK).logits
            alone = model(input_ids=IDS[1:, :5], attention_mask=MASK[1:, :5]).logits
        assert close(together[1:], alone, 1e-5)
        assert close(together, behind_prompt(model).logits, 1e-6)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_logits_of_a_language_model(self, architecture: str) -> None:
        model = attached(PromptTuning(length=3), architecture, CAUSAL).eval()
        with_prompt = behind_prompt(model).logits
        whole = with_prompt[:, 3:]
        with torch.no_grad():
            output = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
            kept = model(input_ids=IDS, attention_mask=MASK, logits_to_keep=torch.tensor([1, 4])).logits
            last = model(input_ids=IDS, attention_mask=MASK, logits_to_keep=2).logits
        assert torch.allclose(output.logits[MASK.bool()], whole[MASK.bool()], atol=1e-5)
        expected = cross_entropy(with_prompt[:1, 2:-1].flatten(0, 1), IDS[:1].flatten())  # the row without padding
        assert torch.allclose(model(input_ids=IDS[:1], attention_mask=MASK[:1], labels=IDS[:1]).loss, expected)
        assert torch.allclose(kept, whole[:, [1, 4]], atol=1e-5)
        assert torch.allclose(last[0], whole[0, -2:], atol=1e-5)

    def test_answers_to_questions(self) -> None:
        model = attached(PromptTuning(length=3), "bert", QUESTIONS).eval()
        start, end = torch.tensor([2, 3]), torch.tensor([4, 3])
        output = model(input_ids=IDS, attention_mask=MASK, start_positions=start, end_positions=end)
        whole = behind_prompt(model)
        assert torch.equal(output.start_logits, whole.start_logits[:, 3:])
        assert torch.equal(output.end_logits, whole.end_logits[:, 3:])
        expected = cross_entropy(whole.start_logits, start + 3) + cross_entropy(whole.end_logits, end + 3)
        assert torch.allclose(output.loss, expected / 2)

    def test_token_types_of_questions(self) -> None:
        """peft's class for question answering takes them and forgets them."""
        types = (torch.arange(7) > 2).long().expand(2, -1)
        model = attached(PromptTuning(length=3), "bert", QUESTIONS).eval()
        with torch.no_grad():
            found = model(input_ids=IDS, attention_mask=MASK, token_type_ids=types).start_logits
            behind = behind_prompt(model, token_type_ids=nn.functional.pad(types, (3, 0))).start_logits[:, 3:]
            assert close(found, behind, 1e-6)
            assert not close(model(input_ids=IDS, attention_mask=MASK).start_logits, found, 1e-3)
            plain = plain_peft("bert", QUESTIONS, "QUESTION_ANS")
            without = plain(input_ids=IDS, attention_mask=MASK).start_logits
            assert torch.equal(plain(input_ids=IDS, attention_mask=MASK, token_type_ids=types).start_logits, without)

    @pytest.mark.parametrize("method", [LoRA(rank=2), IA3(), Peft(type="loha", r=2)], ids=lambda one: one.kind)  # type: ignore[call-arg]
    def test_token_types_reach_what_is_adapted(self, method: Method, tmp_path: Path) -> None:
        types = (torch.arange(7) > 2).long().expand(2, -1)
        inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types}
        model = attached(method, "bert", QUESTIONS).eval()
        with torch.no_grad():
            assert torch.equal(model(**inputs).start_logits, tiny("bert", QUESTIONS)(**inputs).start_logits)
            method.save(model, tmp_path)
            again = loaded(method, tmp_path, "bert", QUESTIONS).eval()
            assert torch.equal(again(**inputs).start_logits, model(**inputs).start_logits)

    def test_a_bare_encoder(self) -> None:
        model = attached(PromptTuning(length=3), "bert", "AutoModel").eval()
        found = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        assert torch.equal(found, behind_prompt(model).last_hidden_state[:, 3:])

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_without_the_adapter(self, architecture: str) -> None:
        model = attached(PromptTuning(length=3), architecture, CAUSAL).eval()
        with torch.no_grad(), model.disable_adapter():
            found = model(input_ids=IDS, attention_mask=MASK).logits
        assert torch.allclose(
            found[0], tiny(architecture, CAUSAL)(input_ids=IDS, attention_mask=MASK).logits[0], atol=1e-6
        )

    def test_outputs_without_names_are_refused(self) -> None:
        model = attached(PromptTuning(length=3), "bert", TOKEN)
        with pytest.raises(MethodError, match="call the model with return_dict=True"):
            model(input_ids=IDS, attention_mask=MASK, return_dict=False)


class TestGeneration:
    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    @pytest.mark.parametrize("method", VIRTUAL[:2], ids=lambda one: one.kind)
    def test_a_language_model_goes_on_as_its_own_logits_say(self, architecture: str, method: Method) -> None:
        model = train(attached(method, architecture, CAUSAL), CAUSAL)
        ids = IDS[:1, :4]
        with torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
            )
            for _ in range(5):
                following = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, following], 1)
        assert torch.equal(found, ids)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_padding_on_the_left_changes_nothing(self, architecture: str) -> None:
        """peft alone drops the positions, which GPT-2's embeddings then take from the padding too."""
        ids, mask = IDS[1:].roll(2, 1), MASK[1:].roll(2, 1)
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        model = train(attached(PromptTuning(length=3, initialization="random"), architecture, CAUSAL), CAUSAL)
        alone = model.generate(input_ids=ids[:, 2:], attention_mask=mask[:, 2:], **options)
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options)[:, 2:], alone)
        with torch.no_grad():
            padded = model(input_ids=ids, attention_mask=mask).logits[:, 2:]
            assert close(padded, model(input_ids=ids[:, 2:], attention_mask=mask[:, 2:]).logits, 1e-5)
            plain = plain_peft("gpt2", CAUSAL, "CAUSAL_LM")
            lone = plain(input_ids=ids[:, 2:], attention_mask=mask[:, 2:]).logits
            assert not close(plain(input_ids=ids, attention_mask=mask).logits[:, 2:], lone, 1e-3)

    @pytest.mark.parametrize("architecture", ["t5", "bart"])
    def test_text_to_text(self, architecture: str) -> None:
        model = train(attached(PromptTuning(length=3), architecture, SEQ2SEQ), SEQ2SEQ)
        start = model.config.decoder_start_token_id
        options = {
            "max_new_tokens": 4,
            "do_sample": False,
            "eos_token_id": None,
            "num_beams": 1,
            "forced_eos_token_id": None,
        }
        with torch.no_grad():
            found = model.generate(input_ids=IDS, attention_mask=MASK, **options)
            ids = torch.full((2, 1), start)
            for _ in range(4):
                logits = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=ids).logits
                assert torch.allclose(logits, behind_prompt(model, decoder_input_ids=ids).logits, atol=1e-5)
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, ids)


class TestVirtualTokens:
    @pytest.mark.parametrize("architecture", ["bert", "electra", "albert", "distilbert", "gpt2", "bart", "t5"])
    def test_prompt_counts(self, architecture: str, tmp_path: Path) -> None:
        task = SEQ2SEQ if architecture in ("t5", "bart") else TOKEN
        width = 16 if architecture in ("electra", "albert") else 32  # of the embeddings, not of the blocks
        method = PromptTuning(length=5)
        assert counts(method, on_meta(Place(architecture, task))) == (5 * width, 5 * width)
        model = attached(method, architecture, task)
        method.save(model, tmp_path)
        assert load_file(tmp_path / WEIGHTS)["prompt_embeddings"].shape == (5, width)
        assert method.virtual_tokens() == 5

    @pytest.mark.parametrize("encoder", ["lstm", "mlp"])
    @pytest.mark.parametrize("hidden", [None, 12])
    def test_p_tuning_counts_and_leaves_its_network_behind(
        self, encoder: Any, hidden: int | None, tmp_path: Path
    ) -> None:
        method = PTuning(length=5, encoder=encoder, encoder_hidden_size=hidden)
        model = train(attached(method, "bert", TOKEN), TOKEN)
        network = nn.ModuleDict(model.prompt_encoder["default"].named_children())
        added = sum(parameter.numel() for parameter in network.parameters())
        assert counts(method, on_meta(Place("bert", TOKEN))) == (added, 5 * 32)
        network = copy.deepcopy(network).double()
        tokens: Any = network["embedding"].weight[None]
        if encoder == "lstm":
            lstm: Any = network["lstm_head"]
            assert (lstm.hidden_size, lstm.num_layers, lstm.bidirectional) == (hidden or 16, 2, True)
            tokens, _ = lstm(tokens)
        expected = network["mlp_head"](tokens)[0]
        method.save(model, tmp_path)
        saved = load_file(tmp_path / WEIGHTS)
        assert set(saved) == {"prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"}
        assert torch.allclose(saved["prompt_embeddings"].double(), expected, atol=1e-6)
        again = loaded(method, tmp_path, "bert", TOKEN)
        assert close(evaluated(again, TOKEN), evaluated(model, TOKEN), 1e-6)
        assert "mlp_head" not in dict(again.prompt_encoder["default"].named_children())

    def test_initialization_by_words(self, tiny_llama: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
        ids = [tokenizer.convert_tokens_to_ids(word) for word in ("good", "film", "bad")]
        for length, expected in ((2, ids[:2]), (7, [*ids, *ids, ids[0]])):
            method = PromptTuning(length=length, initialization="text", initialization_text="good film bad")
            model: Any = method.attach(wrap(tiny("llama"), tokenizer), 1)
            table = model.get_base_model().get_input_embeddings().weight
            assert torch.equal(model.prompt_encoder["default"].embedding.weight, table[expected])
        with pytest.raises(MethodError, match="text needs a tokenizer, which this model came without"):
            attached(method, "llama")
        nothing = PromptTuning(length=2, initialization="text", initialization_text="\N{ZERO WIDTH SPACE}")
        tokenizer = transformers.BertTokenizer(
            vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}
        )
        with pytest.raises(MethodError, match=r"method\.initialization_text: .* has no tokens"):
            nothing.attach(wrap(tiny("bert"), tokenizer), 1)

    def test_initialization_by_vocabulary_and_by_chance(self) -> None:
        model = attached(PromptTuning(length=6))
        prompt = model.prompt_encoder["default"].embedding.weight
        table = model.get_base_model().get_input_embeddings().weight
        assert all((table == row).all(1).any() for row in prompt)
        model = attached(PromptTuning(length=30, initialization="random"))
        drawn = model.prompt_encoder["default"].embedding.weight.detach()
        assert 0.9 < float(drawn.std()) < 1.1

    @pytest.mark.parametrize("architecture", ["bert", "llama"])
    @pytest.mark.parametrize("method", VIRTUAL[:2], ids=lambda one: one.kind)
    def test_gradient_checkpointing_gives_the_same_gradients(self, architecture: str, method: Method) -> None:
        found = []
        for checkpointing in (False, True):
            model = attached(method, architecture)
            model.config.use_cache = False
            if checkpointing:
                # its name from transformers 5.23 on, and before
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            loss_of(model.train(), SEQUENCE).backward()
            found.append({name: parameter.grad for name, parameter in trained_parameters(model).items()})
        kept, recomputed = found
        assert kept.keys() == recomputed.keys()
        for name, gradient in kept.items():
            assert gradient.abs().sum() > 0, name
            assert close(recomputed[name], gradient, 1e-6), name

    @pytest.mark.parametrize(
        ("method", "architecture", "model_class", "message"),
        [
            (PromptTuning(length=4), "t5", SEQUENCE, r"t5 \(T5ForSequenceClassification\) feeds its decoder the ids"),
            (PTuning(), "bart", SEQUENCE, r"bart \(BartForSequenceClassification\) feeds its decoder the ids"),
            (PTuning(), "bart", QUESTIONS, r"bart \(BartForQuestionAnswering\) feeds its decoder the ids"),
            (PTuning(), "bert", "AutoModelForMaskedLM", r"bert \(BertForMaskedLM\) is none of them"),
            (PromptTuning(), "gpt2", SEQUENCE, r"100 virtual tokens leave no room in the 32 positions of gpt2"),
        ],
    )
    def test_refusals_before_weights_load(
        self, method: Method, architecture: str, model_class: str, message: str
    ) -> None:
        with pytest.raises(MethodError, match=message):
            method.added_parameters(on_meta(Place(architecture, model_class)), layout_for(architecture))

    @pytest.mark.parametrize("method", VIRTUAL[:2], ids=lambda one: one.kind)
    def test_there_is_no_merged_form(self, method: Method) -> None:
        with pytest.raises(NotMergeable, match=r"adds 3 tokens to the input, .* ship the run folder"):
            method.merge(attached(method))

    @pytest.mark.parametrize(
        "settings",
        [
            {"initialization": "text"},
            {"initialization_text": "x"},
            {"initialization": "text", "initialization_text": " "},
        ],
    )
    def test_text_and_its_initialization_go_together(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match="initialization: text and initialization_text go together"):
            PromptTuning(**settings)

    def test_defaults_of_the_papers(self) -> None:
        assert PromptTuning().length == 100
        assert (PTuning().length, PTuning().encoder) == (9, "lstm")
        assert (VeRA().rank, VeRA().d_initial) == (256, 0.1)


# --- any other of peft's ---------------------------------------------------------------------------

TYPES: dict[str, dict[str, Any]] = {
    "loha": {"r": 4, "alpha": 6},
    "lokr": {"r": 4},
    "oft": {"r": 0, "oft_block_size": 4},
    "boft": {"boft_block_size": 4},
    "ln_tuning": {},
    "fourierft": {"n_frequency": 20},
    "hra": {"r": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "vblora": {"r": 2, "num_vectors": 16, "vector_length": 8},
    "lora": {"r": 4, "lora_bias": True, "rank_pattern": {"query": 2}},
    "ia3": {},
    "lily": {"r": 4},
}
FRESH = """
import json, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
from pathlib import Path
import test_from_peft as here
found = {}
for folder, settings in json.load(sys.stdin).items():
    model = here.loaded(here.Peft(**settings), Path(folder))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found[folder] = here.evaluated(model, here.SEQUENCE).tolist()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Tensor]]:
    """Each type trained and saved, and what a fresh process computes with it."""
    root = tmp_path_factory.mktemp("types")
    models = {}
    for name, settings in TYPES.items():
        method = Peft(type=name, **settings)
        models[name] = train(attached(method))
        (root / name).mkdir()
        method.save(models[name], root / name)
    asked = {str(root / name): {"type": name} | settings for name, settings in TYPES.items()}
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    fresh = json.loads(done.stdout.splitlines()[-1])
    return {name: (model, root / name, torch.tensor(fresh[str(root / name)])) for name, model in models.items()}


@pytest.mark.parametrize("name", TYPES)
class TestTypes:
    def method(self, name: str) -> Peft:
        return Peft(type=name, **TYPES[name])

    def test_a_fresh_process_computes_the_same(self, saved: Any, name: str) -> None:
        model, _, fresh = saved[name]
        assert close(fresh, evaluated(model, SEQUENCE), 1e-6)

    def test_files_hold_what_is_counted_without_weights(self, saved: Any, name: str) -> None:
        _, folder, _ = saved[name]
        before = torch.get_rng_state()
        added, stored = counts(self.method(name), on_meta(Place("bert", SEQUENCE)))
        assert torch.equal(torch.get_rng_state(), before)
        assert 0 < added <= stored
        found = load_file(folder / WEIGHTS)
        assert sum(t.numel() for n, t in found.items() if "classifier" not in n) == stored
        assert sum("classifier" in n for n in found) == 2
        size = sum(file.stat().st_size for file in folder.iterdir())
        assert size <= 1.02 * sum(tensor.nbytes for tensor in found.values()) + 64 * 1024

    def test_all_that_trains_and_nothing_else_moves(self, saved: Any, name: str) -> None:
        method = self.method(name)
        model = attached(method)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trained = set(trained_parameters(model))
        added, _ = counts(method, on_meta(Place("bert", SEQUENCE)))
        assert sum(before[n].numel() for n in trained if ".modules_to_save." not in n) == added
        loss_of(model.train(), SEQUENCE).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
        train(model)
        assert {n for n, p in model.named_parameters() if not torch.equal(before[n], p)} == trained

    def test_merged_is_plain_and_computes_the_same(self, saved: Any, name: str) -> None:
        model, _, _ = saved[name]
        if name == "lily":
            with pytest.raises(NotMergeable, match=r"peft does not merge type 'lily' here \(.*\); ship the run folder"):
                self.method(name).merge(copy.deepcopy(model))
            return
        merged = self.method(name).merge(copy.deepcopy(model))
        assert list(merged.state_dict()) == list(tiny("bert").state_dict())
        assert not any(type(part).__module__.startswith("peft") for part in merged.modules())
        assert close(evaluated(merged, SEQUENCE), evaluated(model, SEQUENCE), 1e-5)


class TestPeft:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"type": "lohaa"}, "peft has no type 'lohaa'; did you mean 'loha'?"),
            ({"type": "zzz"}, r"peft has no type 'zzz'; it can be: .*fourierft, "),
            (
                {"type": "adalora"},
                "'adalora' cannot be run through kind: peft: it follows a schedule, which kind: adalora",
            ),
            ({"type": "prompt_tuning"}, "use kind: prompt"),
            ({"type": "P_TUNING"}, "use kind: p_tuning"),
            ({"type": "prefix_tuning"}, "use kind: prefix"),
            ({"type": "poly"}, "it wants the number of a task with every batch"),
            ({"type": "xlora"}, "it mixes adapters that were trained before"),
            (
                {"type": "loha", "rank": 4},
                r"rank: type 'loha' has no such field; it can be: alpha, .*, r, rank_dropout",
            ),
            ({"type": "loha", "alpa": 4}, r"alpa: type 'loha' has no such field; did you mean 'alpha'\?"),
            ({"type": "loha", "r": "8"}, r"r should be a valid integer, got '8'"),
            ({"type": "loha", "r": [8]}, r"r should be a valid integer, got \[8\]"),
            (
                {"type": "loha", "target_modules": ["query"]},
                r"target_modules is not set by hand: say it with `targets`",
            ),
            ({"type": "loha", "modules_to_save": ["x"]}, "head is trained and saved with every method"),
            ({"type": "loha", "layers_to_transform": [0]}, "name the modules with `targets`"),
            ({"type": "loha", "inference_mode": True}, "peft fills it in itself"),
            ({"type": "loha", "base_model_name_or_path": "x"}, "say it with `backbone`"),
            ({"type": "loha", "targets": "qeury"}, "target 'qeury' matches no module .*'query'"),
            ({"type": "loha", "targets": "classifier"}, "target 'classifier' is in the head"),
            ({"type": "oft", "r": 0, "oft_block_size": 7}, r"peft cannot put type 'oft' on this model: "),
            ({"type": "lora", "init_lora_weights": "eva"}, r"'eva' is computed from batches of data"),
            ({"type": "lora", "init_lora_weights": "loftq"}, r"'loftq' quantises the backbone"),
            ({"type": "lora", "init_lora_weights": "pissa_niter_4"}, r"rewrites the backbone; use kind: lora"),
            (
                {"type": "lora", "rank_pattern": {"qeury": 2}},
                r"rank_pattern: 'qeury' is no target; did you mean 'query'\?",
            ),
            ({"type": "lora", "bias": "some"}, r"bias should be 'none', 'all' or 'lora_only', got 'some'"),
            ({"type": "ln_tuning", "targets": "LayerNrom"}, r"target 'LayerNrom' is no normalisation of the model"),
            ({"type": "boft", "boft_n_butterfly_factor": 2}, "it stays 1"),
            ({"type": "shira", "r": 4}, "depends on the weights' values, so it cannot be counted before they load"),
            (
                {"type": "trainable_tokens", "token_indices": [1]},
                r"cannot train and save a head \(classifier\) beside it",
            ),
        ],
    )
    def test_refusals_before_weights_load(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(MethodError, match=message) as caught:
            Peft(**settings).added_parameters(on_meta(Place("bert", SEQUENCE)), layout_for("bert"))
        assert "\n" not in str(caught.value)

    def test_what_peft_leaves_out_without_a_word(self) -> None:
        """OSF knows linear layers only, and returns a model in which nothing trains."""
        with pytest.raises(MethodError, match=r"type 'osf' adds nothing to 'transformer\.h\.0\..*', a Conv1D"):
            Peft(type="osf").added_parameters(on_meta(Place("gpt2", CAUSAL)), layout_for("gpt2"))

    def test_a_rewritten_backbone(self) -> None:
        from peft import LoraConfig

        if "kasa_config" not in LoraConfig.__dataclass_fields__:
            pytest.skip("this peft has no KaSA")
        with pytest.raises(MethodError, match=r"rewrites the backbone \('bert\.encoder\.layer\.0.*weight'\)"):
            attached(Peft(type="lora", r=4, kasa_config={}))  # type: ignore[call-arg]

    def test_biases_are_saved_or_refused(self, tmp_path: Path) -> None:
        """peft 0.20 trains the biases of `lora_only` and leaves them out of the file."""
        method = Peft(type="lora", r=4, bias="lora_only")  # type: ignore[call-arg]
        if packaging.version.parse(peft.__version__) < packaging.version.parse("0.21"):
            with pytest.raises(MethodError, match=r"trains '.*bias', which this version of peft does not save"):
                attached(method)
            return
        model = train(attached(method))
        method.save(model, tmp_path)
        assert torch.equal(evaluated(loaded(method, tmp_path), SEQUENCE), evaluated(model, SEQUENCE))

    def test_weights_of_the_backbone_are_refused_before_they_train(self) -> None:
        """Loading refuses them: an adapter from a stranger could hold any."""
        with pytest.raises(MethodError, match=r"saves 'bert\..*LayerNorm\.bias', a weight of the backbone itself"):
            attached(Peft(type="lora", r=4, bias="all"))  # type: ignore[call-arg]

    def test_what_trains_must_be_saved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from peftkit.methods import any_peft, from_peft

        def all_but_one(model: nn.Module) -> dict[str, Tensor]:
            return dict(sorted(from_peft.adapter_state(model).items())[1:])

        monkeypatch.setattr(any_peft, "adapter_state", all_but_one)
        with pytest.raises(MethodError, match=r"trains '.*', which this version of peft does not save"):
            attached(Peft(type="loha", r=4))  # type: ignore[call-arg]

    def test_norms_by_name(self) -> None:
        layout, model = layout_for("bert"), on_meta(Place("bert", SEQUENCE))
        assert counts(Peft(type="ln_tuning"), model)[0] == 5 * 64
        assert len(Peft(type="ln_tuning", targets="output.LayerNorm").targets_in(model, layout)) == 4
        assert len(Peft(type="ln_tuning", targets=("bert.embeddings.LayerNorm",)).targets_in(model, layout)) == 1

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_tokens_of_a_language_model(self, architecture: str, tmp_path: Path) -> None:
        method = Peft(type="trainable_tokens", token_indices=[1, 7, 11])  # type: ignore[call-arg]
        model = train(attached(method, architecture, CAUSAL), CAUSAL)
        method.save(model, tmp_path)
        stored = sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS).values())
        assert counts(method, on_meta(Place(architecture, CAUSAL))) == (3 * 32, stored)
        again = loaded(method, tmp_path, architecture, CAUSAL)
        assert torch.equal(evaluated(again, CAUSAL), evaluated(model, CAUSAL))

    def test_fused_parts(self, tmp_path: Path) -> None:
        method = Peft(type="loha", r=4, targets="query+value")  # type: ignore[call-arg]
        model = train(attached(method, "gpt2"))
        method.save(model, tmp_path)
        assert torch.equal(evaluated(loaded(method, tmp_path, "gpt2"), SEQUENCE), evaluated(model, SEQUENCE))
        merged = method.merge(model)
        assert list(merged.state_dict()) == list(tiny("gpt2").state_dict())

    def test_a_torch_that_draws_other_numbers(self, tmp_path: Path) -> None:
        method = Peft(type="fourierft", n_frequency=9)  # type: ignore[call-arg]
        model = attached(method)
        method.save(model, tmp_path)
        tensors, notes = load_file(tmp_path / WEIGHTS), {"random_streams_sha256": "0" * 64, "torch_version": "9.9"}
        save_file(tensors, tmp_path / WEIGHTS, {"peftkit": json.dumps(notes)})
        with pytest.raises(ArtifactError, match=r"'fourierft' draws parts of .* again.* load it with torch 9\.9"):
            loaded(method, tmp_path)
        state = method.state(model)
        method.load_state(model, state)
        with pytest.raises(MethodError, match="torch draws others here than in the checkpoint"):
            method.load_state(model, {name: tensor + 1 for name, tensor in state.items()})
        assert Peft(type="loha").state(model) == {}

    @pytest.mark.parametrize(
        "method",
        [Peft(type="loha", r=4), Peft(type="hra", r=4), IA3(), VeRA(rank=4), PromptTuning(length=3), PTuning(length=3)],  # type: ignore[call-arg]
        ids=lambda one: str(getattr(one, "type", one.kind)),
    )
    def test_weights_in_half_precision(self, tmp_path: Path, method: FromPeft) -> None:
        torch.manual_seed(1)
        model = train(method.attach(wrap(tiny("bert").bfloat16()), 3))
        assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
        method.save(model, tmp_path)
        again = method.load(wrap(tiny("bert").bfloat16()), tmp_path)
        assert close(evaluated(again, SEQUENCE), evaluated(model, SEQUENCE), 1e-6)

    def test_norms_in_half_precision(self) -> None:
        with pytest.raises(MethodError, match=r"in bfloat16 it loses every step .* backbone\.dtype: float32"):
            Peft(type="ln_tuning").attach(wrap(tiny("bert").bfloat16()), 3)


class TestConfiguration:
    def method(self, **fields: Any) -> dict[str, Any]:
        return {"method": {"kind": "peft", "type": "loha", "r": 4, "targets": "query_value"} | fields}

    def test_the_run_knows_the_fields_of_peft(self, write_config: Callable[..., Path]) -> None:
        from peftkit.config import load_run, run_id

        one = load_run(write_config(**self.method()))
        assert one.method.model_dump()["r"] == 4
        assert run_id(one) != run_id(load_run(write_config(**self.method(r=5))))
        assert run_id(one) == run_id(load_run(write_config(**self.method())))
        assert run_id(one) != run_id(load_run(write_config(**self.method()), ["method.alpha=3"]))

    def test_validating_needs_no_peft(self, write_config: Callable[..., Path]) -> None:
        code = (
            "import sys; from pathlib import Path; from peftkit.config import load_run; load_run(Path(sys.argv[1])); "
            "print([name for name in ('peft', 'torch') if name in sys.modules])"
        )
        file = write_config(**self.method(no_such_field=1))
        done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_our_own_keys_are_checked_at_once(self, write_config: Callable[..., Path]) -> None:
        from peftkit.config import load_run

        with pytest.raises(ConfigError, match=r"method\.type: missing"):
            load_run(write_config(method={"kind": "peft", "r": 4}))
        with pytest.raises(ConfigError, match=r"method\.targets: should be"):
            load_run(write_config(**self.method(targets=3)))
        with pytest.raises(ConfigError, match=r"no kind 'peftt'; did you mean 'peft'\?"):
            load_run(write_config(method={"kind": "peftt", "type": "loha"}))

    def test_fields_of_peft_are_checked_before_weights_load(
        self, write_config: Callable[..., Path], tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from peftkit.config import load_run
        from peftkit.prepare import prepare

        with pytest.raises(UsageError, match=r"method: alpa: type 'loha' has no such field; did you mean 'alpha'\?"):
            prepare(load_run(write_config(**self.method(alpa=4))))
        with pytest.raises(UsageError, match=r"takes at most 64 tokens, of which method 'prompt' takes 40"):
            prepare(load_run(write_config(method={"kind": "prompt", "length": 40})))

    def test_counting_on_the_command_line(self, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from peftkit.cli import main

        ask = ["params", "--backbone", str(tiny_bert), "--json", "--method"]
        assert main([*ask, "peft:type=loha,r=8,targets=query"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["adapter_parameters"] == 2 * 2 * 8 * (32 + 32)
        assert main([*ask, "peft:type=loha,rr=8"]) == 2
        assert "type 'loha' has no such field; did you mean 'r'?" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("task", "method"),
        [
            ("entities", {"kind": "prompt", "length": 4}),
            ("sentiment", {"kind": "p_tuning", "length": 4}),
            ("sentiment", {"kind": "vera", "rank": 8}),
            ("entities", {"kind": "peft", "type": "lokr", "r": 4}),
        ],
        ids=lambda one: one if isinstance(one, str) else one["kind"],
    )
    def test_a_whole_run(self, write_config: Callable[..., Path], task: str, method: dict[str, Any]) -> None:
        from peftkit.artifacts.predict import evaluate_rows
        from peftkit.artifacts.store import load_run as load_saved
        from peftkit.config import load_run
        from peftkit.experiment import train as train_run

        training = {"learning_rate": 0.03, "epochs": 1, "batch_size": 16, "seed": 1, "gradient_checkpointing": True}
        run = load_run(write_config(task, method=method, training=training))
        train_run(run)
        found = load_saved(str(run.output.folder))
        again = evaluate_rows(found, found.run.task.splits().held_out).scores
        assert again.values == found.manifest["scores"]["after"]


def test_public_names() -> None:
    names = ("IA3", "PTuning", "Peft", "PromptTuning", "VeRA")
    assert all(getattr(peftkit, name) is getattr(peftkit.methods, name) for name in names)


def test_attach_from_python() -> None:
    model = peftkit.api.attach(tiny("bert"), Peft(type="oft", r=0, oft_block_size=4))  # type: ignore[call-arg]
    heads = 32 * 3 + 3
    assert peftkit.api.trainable_parameters(model) == heads + 2 * (5 * 8 + 10) * 6
    backbone: Backbone = wrap(tiny("bert"))
    assert backbone.head_modules == ("classifier",)
