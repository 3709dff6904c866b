"""Prompting a language model: zero- or few-shot, without training.

accelerate launch recipes/prompting.py --config recipes/configs/sst2_label_words_prompting.yaml method.shots=4
"""

import sys

from peftkit.artifacts.continued import start_from
from peftkit.artifacts.loading import merge_backbone
from peftkit.artifacts.store import save
from peftkit.audit.examine import audit
from peftkit.backbones.load import load
from peftkit.config import read_run
from peftkit.console import guard
from peftkit.demonstrations import with_demonstrations
from peftkit.evaluation import baselines, evaluate
from peftkit.methods import Prompting
from peftkit.prepare import prepare
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train


def main() -> None:
    run = read_run(expect=Prompting)
    splits = run.task.splits()
    run = with_demonstrations(run, splits)
    accelerator = start(run)
    merge_backbone(run)
    data = prepare(run, splits)
    audit(run, data)
    backbone = load(run.backbone, data.head)
    model = run.method.attach(backbone, total_steps=0)
    start_from(run, data, backbone, model)
    announce(run, data, model, accelerator)
    scores = baselines(run.task, data.train, data.test)
    record = train(model, run, data, accelerator)
    scores["after"] = evaluate(model, run.task, data.test, accelerator)
    save(run, data, backbone, model, record, scores, accelerator)
    report(run, record, scores)


if __name__ == "__main__":
    sys.exit(guard(main))
