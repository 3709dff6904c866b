"""What `backbone.dtype: auto` comes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.backbones import precision
from peftkit.backbones.load import BackboneSettings
from peftkit.backbones.precision import multiplies_bfloat16
from peftkit.config import load_run, run_id, settings_of

PROCESSORS = {
    "processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n": True,
    "processor\t: 0\nflags\t\t: fpu amx_bf16\n": True,
    "processor\t: 0\nFeatures\t: fp asimd bf16\n": True,
    "processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t\t: bf16\n": False,
    "model name\t: none\n": False,
    "": False,
}


@pytest.mark.parametrize(("text", "multiplies"), PROCESSORS.items())
def test_flags_of_processors(text: str, multiplies: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert multiplies_bfloat16(file) is multiplies


def test_where_the_system_does_not_tell_it_is_float32(tmp_path: Path) -> None:
    assert not multiplies_bfloat16(tmp_path / "absent")


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_run_is_named_and_recorded_by(
    multiplies: bool, dtype: str, monkeypatch: pytest.MonkeyPatch, write_config: Callable[..., Path]
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: multiplies)
    chosen, written = (load_run(write_config(), [f"backbone.dtype={one}"]) for one in ("auto", dtype))
    assert settings_of(chosen)["backbone"]["dtype"] == dtype
    assert run_id(chosen) == run_id(written)
    assert BackboneSettings(name="x", dtype="auto").dtype == dtype
    assert BackboneSettings(name="x").dtype == "float32"
