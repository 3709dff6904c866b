"""(IA)³, VeRA, prompt tuning, P-tuning and every other method that peft has.

    accelerate launch recipes/from_peft.py --config recipes/configs/reuters_r8_ia3.yaml
    accelerate launch recipes/from_peft.py --config recipes/configs/reuters_r8_peft.yaml method.type=lokr method.r=8

method.kind is ia3, vera, prompt, p_tuning, or peft with the name and the fields of one of peft's methods.

Test accuracy on Reuters R8 in 250 steps, seed 1 (the head alone 0.8040): ia3 0.9571, vera 0.9698,
prompt 0.9223, p_tuning 0.8534, peft with loha 0.9520.
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
from peftkit.methods.from_peft import FromPeft
from peftkit.prepare import prepare
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train


def main() -> None:
    run = read_run(expect=FromPeft)
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
