"""Parts of the backbone itself train where they are: its biases, its normalisations or its topmost layers.

    accelerate launch recipes/partial.py --config recipes/configs/reuters_r8_bitfit.yaml

reuters_r8_layernorm.yaml and reuters_r8_top_layers.yaml are the other two.

Test accuracy on Reuters R8 in 250 steps, seed 1 (the head alone 0.8040): bitfit 0.8333,
layernorm 0.9475, top_layers 0.9616.
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
from peftkit.methods.partial import Partial
from peftkit.prepare import prepare
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train


def main() -> None:
    run = read_run(expect=Partial)
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
