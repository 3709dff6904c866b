"""Generated text against token by token argmax without cache, padding or `generate`, and against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, SEQ2SEQ, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit.backbones.load import wrap
from peftkit.data.collate import collate
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings
from peftkit.errors import UsageError
from peftkit.methods import Bottleneck, LoRA, Prefix, PromptTuning
from peftkit.methods.base import trained_parameters
from peftkit.tasks import Completion
from peftkit.tasks.generation import Generation, generate

END = 2
# of many lengths; one holds the end token, which is what batches are filled up with
PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [20, END, 21, 22], [30, 31], [9, END]]
METHODS = {
    "plain": None,
    "lora": LoRA(rank=4, targets="all"),
    "bottleneck": Bottleneck(bottleneck_size=4),
    "prefix": Prefix(length=3),
    "prompt": PromptTuning(length=3),
}


def attached(architecture: str, method: Any, auto: str = CAUSAL) -> Any:
    """A tiny random model with weights of the method that are not those it starts with."""
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(tiny_config(architecture))
    if method is not None:
        model = method.attach(wrap(model), total_steps=10)
    for parameter in trained_parameters(model).values() if method is not None else ():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def greedy(model: Any, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """One prompt alone: the whole text goes through the model again for every token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        token = int(found.logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


class TestGenerate:
    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    @pytest.mark.parametrize("method", METHODS)
    def test_a_batch_writes_what_each_prompt_gets_alone(self, architecture: str, method: str) -> None:
        model = attached(architecture, METHODS[method])
        settings = Generation(max_new_tokens=8)
        together = generate(model, PROMPTS, [END], settings)
        assert together == [greedy(model, prompt, 8, {END}) for prompt in PROMPTS]
        assert together == [generate(model, [prompt], [END], settings)[0] for prompt in PROMPTS]
        assert len({tuple(tokens) for tokens in together}) > 1

    def test_lora_writes_what_transformers_writes_with_the_merged_model(self) -> None:
        model = attached("llama", METHODS["lora"])
        found = generate(model, PROMPTS, [END], Generation(max_new_tokens=8, beams=3, length_penalty=0.5))
        merged: Any = METHODS["lora"].merge(model)  # type: ignore[union-attr]
        options = {"num_beams": 3, "length_penalty": 0.5, "do_sample": False, "eos_token_id": END, "pad_token_id": 0}
        for prompt, tokens in zip(PROMPTS, found, strict=True):
            ids = torch.tensor([prompt])
            whole = merged.generate(input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=8, **options)
            assert tokens == [token for token in whole[0, len(prompt) :].tolist() if token not in (END, 0)]

    @pytest.mark.parametrize("architecture", ["bart", "t5"])
    def test_an_encoder_is_given_padding_on_the_right(self, architecture: str) -> None:
        model = attached(architecture, None, SEQ2SEQ)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.generation_config.forced_eos_token_id = None  # BART's, which ends a text that is cut
        found = generate(model, PROMPTS, [END], Generation(max_new_tokens=6))
        for prompt, tokens in zip(PROMPTS, found, strict=True):
            written = [model.generation_config.decoder_start_token_id]
            while len(written) <= 6:
                with torch.no_grad():
                    out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([written]))
                written.append(int(out.logits[0, -1].argmax()))
                if written[-1] == END:
                    written.pop()
                    break
            assert tokens == written[1:]

    def test_ends_at_the_first_of_several_tokens(self) -> None:
        model = attached("llama", None)
        free = greedy(model, PROMPTS[1], 8, set())
        end = free[3]
        expected = free[: free.index(end)]
        assert generate(model, [PROMPTS[1]], [47, end], Generation(max_new_tokens=8)) == [expected]
        model.generation_config.eos_token_id = [46, end]
        assert generate(model, [PROMPTS[1]], [47], Generation(max_new_tokens=8)) == [expected]

    def test_a_models_own_taste_is_not_followed(self) -> None:
        model = attached("llama", None)
        expected = generate(model, PROMPTS, [END], Generation(max_new_tokens=8))
        own = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0, "min_new_tokens": 8, "num_beams": 4}
        model.generation_config.update(**own, no_repeat_ngram_size=1, max_length=4)
        assert generate(model, PROMPTS, [END], Generation(max_new_tokens=8)) == expected

    def test_groups_of_tokens_do_not_recur(self) -> None:
        model = attached("gpt2", None)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)  # so nearly even that it repeats itself
        for size, repeats in ((0, True), (2, False)):
            (tokens,) = generate(model, [[5]], [], Generation(max_new_tokens=20, no_repeat_ngram_size=size))
            pairs = list(zip([5, *tokens], tokens, strict=False))
            assert (len(set(pairs)) < len(pairs)) == repeats

    def test_sampling_follows_its_seed_and_leaves_torchs_alone(self) -> None:
        model = attached("llama", None)
        one, two = (Generation(max_new_tokens=12, do_sample=True, temperature=2.0, seed=seed) for seed in (1, 2))
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first = generate(model, PROMPTS, [END], one)
        assert torch.equal(torch.rand(3), expected)
        assert generate(model, PROMPTS, [END], one) == first
        assert generate(model, PROMPTS, [END], two) != first
        narrow = Generation(max_new_tokens=12, do_sample=True, top_p=1e-6)
        assert generate(model, PROMPTS, [END], narrow) == [greedy(model, prompt, 12, {END}) for prompt in PROMPTS]

    def test_positions_that_a_model_does_not_have(self) -> None:
        with pytest.raises(
            UsageError, match=r"a prompt of 6 tokens and 27 new ones are more than the model's 32 positions"
        ):
            generate(attached("gpt2", None), PROMPTS, [END], Generation(max_new_tokens=27))

    def test_sees_through_what_accelerate_puts_around_models(self) -> None:
        class Wrapped(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

        model = attached("llama", METHODS["lora"])
        settings = Generation(max_new_tokens=4)
        assert generate(Wrapped(model), PROMPTS, [END], settings) == generate(model, PROMPTS, [END], settings)

    def test_a_real_model_tells_the_same_stories_in_a_batch(self, real_weights: Path) -> None:
        folder = real_weights / "stories260k"
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        prompts = tokenizer(["Once upon a time", "Lily", "The little dog was very happy because he"]).input_ids
        settings = Generation(max_new_tokens=24)
        found = generate(model, prompts, settings.end_tokens(tokenizer), settings)
        assert found == [greedy(model, prompt, 24, {tokenizer.eos_token_id}) for prompt in prompts]
        assert settings.text(found[0], tokenizer).startswith(", there was a little girl named")


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"temperature": 0.7}, "temperature would change nothing without do_sample: true"),
            ({"temperature": 0.7, "top_p": 0.9}, "temperature and top_p would change nothing"),
            ({"do_sample": True, "beams": 2}, "do_sample and beams are two ways to choose tokens"),
            ({"length_penalty": 2.0}, "length_penalty compares beams"),
            ({"stop": [""]}, "at least 1 character"),
            ({"metrics": ["blue"]}, "Input should be 'bleu'"),
            ({"limit": 0}, "greater than 0"),
        ],
    )
    def test_what_does_not_go_together(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Generation(**settings)

    def test_all_defaults_written_out_are_read_back(self) -> None:
        for settings in (Generation(), Generation(do_sample=True, top_p=0.5, stop=("\n",), metrics=("rouge",))):
            assert Generation.model_validate_json(settings.model_dump_json(), strict=True) == settings

    def test_text_ends_before_the_first_stop(self, tiny_llama: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        ids = tokenizer("good film . bad story !").input_ids
        assert Generation().text([*ids, tokenizer.eos_token_id], tokenizer) == "good film . bad story !"
        assert Generation(stop=("story", "bad")).text(ids, tokenizer) == "good film . "
        assert Generation(stop=("nowhere",)).text(ids, tokenizer) == "good film . bad story !"

    def test_end_tokens(self, tiny_llama: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        film = tokenizer.convert_tokens_to_ids("film")
        assert Generation(stop_tokens=("film", "</s>")).end_tokens(tokenizer) == [tokenizer.eos_token_id, film]
        with pytest.raises(UsageError, match=r"stop_tokens: no token '<s'; did you mean '<s>'\?"):
            Generation(stop_tokens=("<s",)).end_tokens(tokenizer)


class TestInTasks:
    rows = Rows(
        "t.jsonl", [{"prompt": f"the {word}", "completion": " film"} for word in ("good", "bad", "sad")], [1, 2, 3]
    )

    def task(self, **generation: Any) -> Completion:
        settings = Generation(max_new_tokens=5, **generation)
        return Completion(data=DataSettings(train="t.jsonl"), max_length=16, generation=settings)

    @pytest.fixture(scope="class")
    def tokenizer(self, tiny_llama: Path) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @pytest.fixture(scope="class")
    def model(self, tiny_llama: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()

    def test_dev_is_scored_without_generating_while_training(self) -> None:
        assert self.task().while_training().generation is None
        assert self.task().longest_input == 21
        assert self.task().while_training().longest_input == 16

    def test_as_many_rows_as_the_limit_says_get_text_and_all_get_a_loss(self, tokenizer: Any, model: Any) -> None:
        task = self.task(limit=2, metrics=("exact_match",))
        encoded = task.encode(self.rows, tokenizer, ())
        with torch.no_grad():
            found = task.predict(model, collate(encoded.examples, tokenizer.pad_token_id), ())
        predictions = task.join(found, encoded, self.rows, tokenizer)
        assert ["text" in prediction for prediction in predictions] == [True, True, False]
        assert all(prediction["tokens"] == 2 for prediction in predictions)  # ` film` and the end
        assert task.scoring_note(encoded) == "text is generated for 2 of 3 rows, and the loss is of all"
        assert self.task().scoring_note(self.task().encode(self.rows, tokenizer, ())) == ""
        assert task.order(encoded) == [0, 1, 2]
        encoded.examples[0]["prompt"] = None
        assert task.order(encoded) == [1, 0, 2]  # those that are written for first, in one batch
        assert task.while_training().order(encoded) == [0, 1, 2]
        assert "exact_match" in task.score(predictions, self.rows, ()).values
        ids = tokenizer("the good").input_ids
        expected = tokenizer.decode(greedy(model, ids, 5, {tokenizer.eos_token_id}))
        assert predictions[0]["text"] == expected

    def test_metrics_without_text_are_refused(self) -> None:
        with pytest.raises(ValueError, match="metrics compare texts; set generation"):
            Completion(data=DataSettings(train="t.jsonl"), metrics=("rouge",))
        with pytest.raises(UsageError, match=r"none were generated; set task\.generation"):
            self.task().metric_inputs([{"nats": 1.0}] * 3, self.rows, ())
