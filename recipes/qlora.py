"""QLoRA (Dettmers et al. 2023): LoRA around a backbone whose linear layers are held in 4 bits.

    accelerate launch recipes/qlora.py --config recipes/configs/sst2_qlora.yaml method.rank=16

Weights are unpacked for each product and multiplied in bfloat16; the head and the adapter train in float32. On a CPU it
saves memory and costs time; what it costs in quality is in docs/quantisation.md. Not yet run on a GPU.
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
from peftkit.methods import LoRA
from peftkit.prepare import prepare
from peftkit.report import announce, report
from peftkit.session import start
from peftkit.training.loop import train


def main() -> None:
    run = read_run(expect=LoRA, quantized=True)
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
