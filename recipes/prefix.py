"""Prefix tuning: trained keys and values in front of those of every attention of a frozen backbone.

    accelerate launch recipes/prefix.py --config recipes/configs/reuters_r8_prefix.yaml method.length=40

With method.reparametrization_size=512 they are trained through an MLP, which is not saved.

reuters_r8_prefix.yaml, seed 1: test accuracy 0.9493 (the head alone 0.8040) in 250 steps, 1.07 GiB.
reuters_r8_smollm2_prefix.yaml: 0.9032 (the head alone 0.8351) in 150 steps, 1.47 GiB.
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
from peftkit.methods import Prefix
from peftkit.prepare import prepare
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train


def main() -> None:
    run = read_run(expect=Prefix)
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
