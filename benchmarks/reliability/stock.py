"""The stock column: `transformers.Trainer` with peft, as their documentation has it, resuming what it finds.

    python -m benchmarks.reliability.stock CONFIG.json [output=FOLDER]

trains what the JSON file describes (`backbone`, `train` and `held_out` files of rows, `method`, `output` and the names
of `SETTINGS`), goes on from the last checkpoint in the output folder, and leaves `final/` with the saved model and
`losses.json` with the loss of every step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SETTINGS = ("learning_rate", "max_steps", "per_device_train_batch_size", "save_steps", "seed")
METHODS = ("lora", "adalora", "prefix", "full")
"""Those of peft, and full fine-tuning; a bottleneck adapter is not among them."""
LABELS = ("negative", "positive")


def main(arguments: list[str]) -> int:
    from transformers.trainer_utils import get_last_checkpoint

    config = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    for name, _, value in (one.partition("=") for one in arguments[1:]):
        config[name] = value
    output = Path(config["output"])
    output.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(config)
    last = get_last_checkpoint(str(output))
    print(f"continuing from {last}" if last else "beginning", flush=True)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(output / "final"))
    losses = [[event["step"], event["loss"]] for event in trainer.state.log_history if "loss" in event]
    (output / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    return 0


def make_trainer(config: dict[str, Any], model: Any = None) -> Any:
    """Their Trainer for a configuration, on a model that `make_model` made before or makes now."""
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    settings = {name: config[name] for name in SETTINGS}
    set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(config["backbone"])
    arguments = TrainingArguments(
        output_dir=config["output"],
        save_strategy="steps",
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(
        model=make_model(config) if model is None else model,
        args=arguments,
        train_dataset=encoded(config["train"], tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


def make_model(config: dict[str, Any]) -> Any:
    from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        config["backbone"],
        num_labels=len(LABELS),
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    everywhere: dict[str, Any] = {
        "target_modules": ["query", "key", "value", "dense"],
        "lora_alpha": 8,
        "task_type": TaskType.SEQ_CLS,
    }
    match config["method"]:
        case "lora":
            return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, **everywhere))
        case "adalora":
            ranks: dict[str, Any] = {
                "target_r": 2,
                "init_r": 4,
                "total_step": config["max_steps"],
                "tinit": 2,
                "tfinal": 4,
            }
            return get_peft_model(model, AdaLoraConfig(**ranks, **everywhere))
        case "prefix":
            prefix = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=4, encoder_hidden_size=8)
            return get_peft_model(model, prefix)
        case _:
            return model


def encoded(file: str, tokenizer: Any) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    return [
        dict(tokenizer(row["text"], truncation=True, max_length=32), labels=LABELS.index(row["label"])) for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
