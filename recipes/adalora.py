"""AdaLoRA: a rank budget that falls during training, shared out among the matrices by importance.

    accelerate launch recipes/adalora.py --config recipes/configs/reuters_r8_adalora.yaml method.target_rank=4

reuters_r8_adalora.yaml, seed 1: test accuracy 0.9621 (the head alone 0.8040) in 250 steps, total rank 432 → 288;
501,176 parameters train, 347,528 are saved; 1.41 GiB.
Raw figures: benchmarks/results/reuters_r8.json, by benchmarks/recipes.py. Not yet measured on a GPU.
"""

import sys

from peftkit.artifacts.continued import start_from
from peftkit.artifacts.loading import merge_backbone
from peftkit.artifacts.store import save
from peftkit.audit.examine import audit
from peftkit.backbones.load import load
from peftkit.config import read_run
from peftkit.console import guard
from peftkit.evaluation import baselines, evaluate
from peftkit.methods import AdaLoRA
from peftkit.prepare import prepare
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train


def main() -> None:
    run = read_run(expect=AdaLoRA)
    accelerator = start(run)
    merge_backbone(run)
    data = prepare(run)
    audit(run, data)
    backbone = load(run.backbone, data.head)
    model = run.method.attach(backbone, total_steps=run.training.total_steps(len(data.train.encoded)))
    start_from(run, data, backbone, model)
    announce(run, data, model, accelerator)
    scores = baselines(run.task, data.train, data.test)
    scores["before"] = evaluate(model, run.task, data.test, accelerator)
    record = train(model, run, data, accelerator)
    scores["after"] = evaluate(model, run.task, data.test, accelerator)
    save(run, data, backbone, model, record, scores, accelerator)
    report(run, record, scores)


if __name__ == "__main__":
    sys.exit(guard(main))
