"""What cannot work is refused before weights load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.backbones import load
from peftkit.cli import main


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(load, "load_model", refuse)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank=33", "attention.self.query', which is 32 × 32; lower method.rank"),
        ("method.targets=query+valeu", "target 'valeu' matches no module of bert"),
        ("method.targets=classifier", "target 'classifier' is in the head, which trains as a whole"),
        ("task.max_length=65", "task.max_length is 65, but"),
    ],
)  # fmt: skip
def test_one_error_and_exit_2(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["train", str(write_config()), override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_virtual_tokens_count_against_the_backbones_limit(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.methods import LoRA

    monkeypatch.setattr(LoRA, "virtual_tokens", lambda self: 40)
    assert main(["train", str(write_config())]) == 2
    assert "takes at most 64 tokens, of which method 'lora' takes 40" in capsys.readouterr().err


def test_checkpointing_that_the_architecture_lacks(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_bert: Path
) -> None:
    import shutil

    from transformers import AlbertConfig

    folder = tmp_path / "albert"
    shutil.copytree(tiny_bert, folder)
    AlbertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64
    ).save_pretrained(folder)
    config = write_config(backbone={"name": str(folder)})
    assert main(["train", str(config), "training.gradient_checkpointing=true"]) == 2
    assert "gradient_checkpointing: transformers has none for albert" in capsys.readouterr().err
