"""A sequence of tasks, learnt one after the other, and what is forgotten of the earlier ones.

    python recipes/continual.py --config recipes/sequences/sst2_emotion_r8.yaml strategy=per_task

A sequence that was stopped goes on when the command is given again; tasks that are learnt are not learnt again.
docs/continual.md explains strategies and figures.
"""

import sys

from peftkit.artifacts.loading import merge_backbone
from peftkit.artifacts.store import save
from peftkit.audit.examine import audit
from peftkit.backbones.load import load
from peftkit.console import guard
from peftkit.continual.carry import carry_on, seal
from peftkit.continual.course import Stage, begin
from peftkit.continual.outcome import conclude
from peftkit.continual.rehearsal import rehearse
from peftkit.continual.rows import add_row
from peftkit.continual.sequence import read_sequence
from peftkit.evaluation import baselines, evaluate
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train


def main() -> None:
    course = begin(read_sequence())
    for stage in course.stages():
        if not stage.is_trained:
            learn(stage)
        add_row(stage)
    conclude(course)


def learn(stage: Stage) -> None:
    accelerator = start(stage.run)
    merge_backbone(stage.run)
    data = stage.prepare()
    audit(stage.run, data)
    run, mixed = rehearse(stage, data)
    backbone = load(run.backbone, data.head)
    model = run.method.attach(backbone, total_steps=run.training.total_steps(len(mixed.train.encoded)))
    announce(run, mixed, model, accelerator)
    scores = baselines(run.task, data.train, data.test)
    scores |= carry_on(stage, data, backbone, model, accelerator)
    record = train(model, run, mixed, accelerator)
    scores["after"] = evaluate(model, run.task, data.test, accelerator)
    seal(stage, run, backbone, model)
    save(run, mixed, backbone, model, record, scores, accelerator)
    report(run, record, scores)


if __name__ == "__main__":
    sys.exit(guard(main))
