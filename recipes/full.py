"""Full fine-tuning: every parameter trains.

    accelerate launch recipes/full.py --config recipes/configs/sst2_full.yaml

sst2_full.yaml, seeds 1, 2, 3: test accuracy 0.8863 / 0.8913 / 0.8748, mean 0.8841 (0.4917 untuned),
16 minutes of training on one CPU thread, 1.31 GiB.
Raw figures: benchmarks/results/recipes.json, by benchmarks/recipes.py. Not yet measured on a GPU.
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
from peftkit.methods import Full
from peftkit.prepare import prepare
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train


def main() -> None:
    run = read_run(expect=Full)
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
