"""The contract of a method, on backbones that bitsandbytes quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import CAUSAL, SEQ2SEQ, SEQUENCE, TOKEN, Place, save_checkpoint
from contract import TASK, Reloader, attached, check_cell
from contract_variants import VARIANTS, Variant

from peftkit.backbones.quantization import FP4, NF4, Int8

IN_NF4 = NF4(block_size=32, compute_dtype="float32")
IN_FP4 = FP4(block_size=32, double=False, storage_dtype="bfloat16", compute_dtype="float32")
IN_INT8 = Int8(compute_dtype="float32")
PLACES = (
    Place("bert", SEQUENCE, IN_NF4),
    Place("llama", CAUSAL, IN_NF4),
    Place("gpt2", TOKEN, IN_FP4),
    Place("gpt_neox", SEQUENCE, IN_INT8),
    Place("t5", SEQ2SEQ, IN_INT8),
)
REFUSED = {"lora pissa", "lora olora dora", "lora mica", "peft loha", "peft lokr", "peft oft", "peft fourierft"}
REFUSED |= {"lora orthogonal", "top_layers", "full"}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one.name)
def test_what_reads_the_weights_is_refused_before_they_load(variant: Variant) -> None:
    conflicts = variant.method.conflicts(task=TASK, dtype="float32", quantization=IN_NF4, checkpointing=False)
    assert bool(conflicts) == (variant.name in REFUSED)
    for conflict in conflicts:
        assert "which nf4 does not allow; leave backbone.quantization out" in conflict


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.architecture}-{place.quantization.kind}")
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name not in REFUSED], ids=lambda one: one.name)
def test_contract(variant: Variant, place: Place, contract_root: Path, tmp_path: Path, reloader: Reloader) -> None:
    checkpoint = save_checkpoint(place, contract_root)
    model = attached(variant, place, checkpoint)
    if isinstance(model, str):  # for the reason that it has without quantisation
        assert attached(variant, Place(place.architecture, place.model_class), checkpoint) == model
        return
    check_cell(variant, place, checkpoint, tmp_path / "saved", reloader, model)
