"""A run told as a model card of the Hub: what it learned from, how, what came of it, and how to load it.

Every figure is read from the run's own files; what they do not hold is said to be unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.artifacts.emissions import Power, metadata, told
from peftkit.artifacts.manifest import read_manifest
from peftkit.artifacts.merge import REPORT
from peftkit.artifacts.merge_command import sizes, smaller
from peftkit.artifacts.store import PREDICTIONS
from peftkit.backbones.bundled import BUNDLES
from peftkit.backbones.runs import RUN_FILE
from peftkit.config import load_run
from peftkit.errors import ArtifactError, UsageError
from peftkit.tensor_files import parse_object

PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
}
"""The Hub's names of what a model class is for."""
CONFIDENCE = 0.95
UNKNOWN = Power()


def card(folder: Path, merged: Path | None = None, power: Power = UNKNOWN) -> str:
    """The card of a finished run, or of the plain model that it was merged into.

    Args:
        merged: what `peftkit merge` wrote of this very run.
        power: of the machine that it was trained on, for an estimate of its emissions.

    Raises:
        UsageError: a folder that is none of these.
        ArtifactError: files that were changed, or a merge of another run.
    """
    from huggingface_hub import ModelCardData

    power.check()
    manifest = read_manifest(folder)
    report = None if merged is None else _merge_report(merged, manifest)
    named = _metadata(manifest, plain=merged is not None or manifest["artifact"] == "model")
    if emissions := metadata(manifest, power):
        named["co2_eq_emissions"] = emissions
    data = ModelCardData(**named)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {folder.resolve().name}\n\n{_summary(manifest)}",
        f"## How to load it\n\n```python\n{_loading(folder, merged, manifest)}\n```",
        f"## Scores\n\n{_scores(folder, manifest)}",
        *([] if report is None else [f"## Merge\n\n{_merge(report)}"]),
        f"## Data\n\n{_data(folder, manifest)}",
        f"## Training\n\n{_training(manifest, power)}",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(manifest: dict[str, Any], plain: bool) -> dict[str, Any]:
    backbone, model_class = manifest["backbone"], manifest["head"]["model_class"]
    is_hub_id = not backbone["name"].startswith("bundled:") and backbone["folder"] is None
    is_peft = manifest["artifact"] == "adapter"
    return {
        "base_model": backbone["name"] if is_hub_id else None,
        "library_name": "transformers" if plain else "peft" if is_peft else "peftkit",
        "pipeline_tag": PIPELINES.get(model_class),
        "tags": ["peftkit", manifest["method"]["kind"]],
    }


def _summary(manifest: dict[str, Any]) -> str:
    backbone, training = manifest["backbone"], manifest["training"]
    trained, total = training["trainable_parameters"], training["total_parameters"]
    lines = [
        f"`{backbone['name']}`, tuned by `{manifest['method']['kind']}` for `{manifest['task']}` with peftkit "
        f"{manifest['versions']['peftkit']}.",
        "",
        f"- backbone: `{backbone['name']}`, revision {backbone['revision'] or 'unknown'}, sha256 of its weights "
        f"`{backbone['weights_sha256']}`",
        f"- licence of the backbone: {_license(backbone['name'])}",
        f"- parameters: {trained:,} trained of {total:,} ({trained / total:.2%}), {manifest['saved_parameters']:,} "
        "saved",
        f"- run: `{manifest['run_id']}`",
    ]
    if manifest["head"]["labels"]:
        lines.append(f"- labels: {', '.join(f'`{label}`' for label in manifest['head']['labels'])}")
    return "\n".join(lines)


def _license(name: str) -> str:
    known = BUNDLES.get(name.removeprefix("bundled:")) if name.startswith("bundled:") else None
    return known.license if known else "see its own card"


def _loading(folder: Path, merged: Path | None, manifest: dict[str, Any]) -> str:
    model_class = manifest["head"]["model_class"]
    if merged is not None:
        return (
            f"from transformers import AutoTokenizer, {model_class}\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{merged}")\n'
            f'model = {model_class}.from_pretrained("{merged}")'
        )
    return f'import peftkit\n\npredictor = peftkit.load_predictor("{folder}")\nprint(predictor(["…"]))'


def _scores(folder: Path, manifest: dict[str, Any]) -> str:
    scores = manifest["scores"]
    names = list(scores["after"])
    lines = [
        "| | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for title in (one for one in ("majority", "before", "after") if one in scores):
        figures = (scores[title].get(name) for name in names)
        lines.append(f"| {title} | " + " | ".join("" if one is None else f"{one:.4f}" for one in figures) + " |")
    lines += ["", f"On `{manifest['evaluated_on']}`; `majority` ignores the input, `before` is the untuned model."]
    return "\n".join([*lines, _interval(folder / PREDICTIONS, scores["after"].get("accuracy"))])


def _interval(predictions: Path, accuracy: float | None) -> str:
    """Wilson's interval of an accuracy; it holds for the drawn examples, not for another seed."""
    from scipy.stats import binomtest

    if accuracy is None or not predictions.is_file():
        return "One run, and no interval: other seeds would score otherwise."
    count = sum(1 for line in predictions.read_text(encoding="utf-8").splitlines() if line)
    right = round(accuracy * count)
    if not count or abs(right / count - accuracy) > 1e-9:
        return "One run, and no interval: the accuracy is of parts of examples, which do not vary alone."
    low, high = binomtest(right, count).proportion_ci(CONFIDENCE, "wilson")
    return (
        f"Accuracy {accuracy:.4f}, {CONFIDENCE:.0%} interval {low:.4f} to {high:.4f} ({right:,} of {count:,}, Wilson) "
        "over which examples were drawn. One run; other seeds would score otherwise."
    )


def _merge(report: dict[str, Any]) -> str:
    settings, rows = report["settings"], report["rows"]
    lines = [
        f"W + ΔW in {settings['precision']}, cast once to {settings['dtype']}, read back by plain transformers:",
        "",
    ]
    if report["layers"]:
        lines.append(
            f"- {report['layers']:,} adapted layers compute the same, to {report['layer_difference']:.2g} relative "
            f"({settings['layer_tolerance']:g} allowed)"
        )
    if less := smaller(settings):
        lines.append(f"- {' and '.join(less)}: {sizes(report)}")
    if rows:
        limit = f"{report['tolerance']:g} allowed" if settings.get("limited", True) else "measured, and not limited"
        lines += [
            f"- compared on {rows:,} of {report['examples']:,} rows of {settings['probe']}: largest difference of a "
            f"logit {report['largest_difference']:.2g}, relative {report['relative']:.2g} ({limit})",
            f"- {report['equal_predictions']:,} of {rows:,} predictions equal",
        ]
    if score := report["score"]:
        lines.append(f"- {score['name']} {score['before']:.6g} before, {score['after']:.6g} after")
    return "\n".join(lines)


def _data(folder: Path, manifest: dict[str, Any]) -> str:
    run = load_run(folder / RUN_FILE)
    named = {} if run.task.data is None else run.task.data.model_dump(mode="json", exclude_defaults=True)
    sources = [f"- {key}: `{value}`" for key, value in named.items()] or ["- given by a program"]
    return "\n".join([*sources, f"- fingerprint `{manifest['data']}`", *(f"- {note}" for note in manifest["notes"])])


def _training(manifest: dict[str, Any], power: Power) -> str:
    training = manifest["training"]
    settings = ", ".join(f"{key} {value}" for key, value in manifest["method"].items() if value is not None)
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    hours = training["seconds"] / 3600 * training["processes"]
    return "\n".join(
        [
            f"- {settings}",
            f"- {training['steps']:,} steps, {training['tokens']:,} tokens, {training['seconds']:,.0f} s on "
            f"{training['processes']} process{'es' if training['processes'] > 1 else ''} ({hours:.2f} process hours)",
            *(f"- {line}" for line in told(manifest, power)),
            f"- peak memory {training['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"- {versions}",
        ]
    )


def _merge_report(merged: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    file = merged / REPORT
    if not file.is_file():
        raise UsageError(f"{merged} has no {REPORT}; name a folder that `peftkit merge` wrote")
    report = parse_object(file.read_bytes(), file)
    if report["run_id"] != manifest["run_id"]:
        raise ArtifactError(f"{merged} was merged from run {report['run_id']}, not from {manifest['run_id']}")
    return report


def write_card(folder: Path, merged: Path | None, target: Path | None, power: Power = UNKNOWN) -> str:
    """The card, or where it was written: to a new file.

    Raises:
        UsageError: the file exists.
    """
    from peftkit.disk import write_text

    text = card(folder, merged, power)
    if target is None:
        return text.rstrip("\n")
    if target.exists():
        raise UsageError(f"{target} exists; name a new file")
    write_text(target, text)
    return f"wrote {target}"
