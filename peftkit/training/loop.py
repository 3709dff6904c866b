"""The only training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.config import Run, run_id
from peftkit.data.collate import IGNORED, collate
from peftkit.errors import TrainingError
from peftkit.evaluation import evaluate
from peftkit.methods.base import trained_parameters
from peftkit.prepare import Prepared
from peftkit.session import claim
from peftkit.tasks.losses import summed_loss, supervised_weight
from peftkit.training import batches, checkpoint
from peftkit.training.checkpoint import Progress
from peftkit.training.meter import Meter, peak_memory_bytes
from peftkit.training.optimizer import make_optimizer, make_schedule
from peftkit.training.tracking import Log, learning_curve

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainRecord:
    """What training did and what it cost. `seconds` is of training alone, without evaluation."""

    steps: int
    best_step: int
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    processes: int
    losses: tuple[float, ...]
    evaluations: tuple[dict[str, Any], ...]


def train(
    model: nn.Module, run: Run, data: Prepared, accelerator: Accelerator, metrics: Sequence[Any] = ()
) -> TrainRecord:
    """Train what has `requires_grad`; leaves the best (or last) weights in `model`.

    Continues from the newest checkpoint in the run folder, if there is one.

    Raises:
        TrainingError: a loss that is not a number, or a batch without supervision.
    """
    claim(run, accelerator)
    loop = _Loop(model, run, data, accelerator, metrics)
    loop.resume()
    return loop.run_to_end()


class _Loop:
    def __init__(
        self, model: nn.Module, run: Run, data: Prepared, accelerator: Accelerator, metrics: Sequence[Any]
    ) -> None:
        import torch

        self.model, self.run, self.data, self.accelerator, self.metrics = (
            model,
            run,
            data,
            accelerator,
            metrics,
        )
        settings = run.training
        self.total_steps = settings.total_steps(len(data.train))
        self.lengths = data.train.encoded.lengths
        self.every = (
            settings.steps_per_epoch(len(data.train)) if settings.evaluate_every == "epoch" else settings.evaluate_every
        )
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        optimizer = make_optimizer(model, settings, accelerator.device.type)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        # stepped by hand: a prepared schedule would advance once for every process
        self.schedule = make_schedule(optimizer, settings, self.total_steps)
        self.class_weights = torch.tensor(data.class_weights, device=accelerator.device)
        self.folder = Path(str(run.output.folder))
        self.progress = Progress(run_id(run))

    def resume(self) -> None:
        found = checkpoint.load_checkpoint(
            self.folder / CHECKPOINTS,
            run_id(self.run),
            self.model,
            self.run.method,
            self.optimizer,
            self.schedule,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if found:
            self.progress = found
            self.accelerator.print(f"continuing from step {found.step:,} of {self.total_steps:,}")

    def run_to_end(self) -> TrainRecord:
        progress, settings = self.progress, self.run.training
        log = Log(self.folder, self.accelerator, progress.step)
        ahead = batches.steps(self.lengths, settings.batch_size, settings.seed, settings.group_by_length, progress.step)
        meter = Meter(
            self.total_steps,
            progress.step,
            progress.tokens,
            progress.seconds,
            self.accelerator.is_main_process,
        )
        stop = self._has_stalled()
        self.model.train()
        with meter:
            while progress.step < self.total_steps and not stop:
                epoch, batch = next(ahead)
                rate = self.schedule.get_last_lr()[0]
                loss, norm = self._step(batch)
                progress.step += 1
                progress.losses.append(loss)
                meter.step(sum(self.lengths[index] for index in batch), loss)
                log.write(
                    progress.step,
                    {"epoch": epoch, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
                    | {"tokens_per_second": round(meter.tokens_per_second, 1)},
                )
                if progress.step % self.every == 0 or progress.step == self.total_steps:
                    meter.pause()
                    stop = self._evaluate(meter, log)
                    progress.tokens, progress.seconds = meter.tokens, meter.seconds
                    self._save()
                    meter.resume()
        return self._finish(meter)

    def _step(self, batch: Sequence[int]) -> tuple[float, float]:
        """One optimizer step; returns the batch's mean loss and the gradient norm before clipping."""
        accelerator, settings = self.accelerator, self.run.training
        parts = batches.micro_batches(
            batch,
            self.lengths,
            settings.micro_batch_size,
            accelerator.num_processes,
            accelerator.process_index,
        )
        weight = self._weight(batch)
        total = 0.0
        for position, part in enumerate(parts):
            last = position == len(parts) - 1
            quiet = contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped)
            with quiet:
                loss = self._micro_loss(part)
                # the average over processes that DDP takes is undone, so that gradients are sums over the batch
                accelerator.backward(loss * (accelerator.num_processes / weight))
            total += float(loss.detach())
        mean = float(accelerator.reduce(self.class_weights.new_tensor(total), "sum")) / weight
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at step {self.progress.step + 1}; lower training.learning_rate"
                f"{' or use precision: fp32' if settings.precision != 'fp32' else ''}"
            )
        norm = accelerator.clip_grad_norm_(
            list(trained_parameters(self.model).values()), settings.max_gradient_norm or math.inf
        )
        self.optimizer.step()
        self.schedule.step()
        self.run.method.after_step(self.model, self.progress.step + 1)
        self.optimizer.zero_grad()
        return mean, float(norm)

    def _micro_loss(self, part: batches.MicroBatch) -> Any:
        examples = [self.data.train.encoded.examples[index] for index in part.indices]
        batch = collate(examples, self.data.train.pad_id, self.accelerator.device)
        with self.accelerator.autocast():
            logits = self.run.task.logits(self.wrapped, batch)
        loss = summed_loss(self.run.task.loss, logits, batch["labels"], self.class_weights)
        return loss if part.counted else loss * 0.0

    def _weight(self, batch: Sequence[int]) -> float:
        labels: list[int] = []
        for index in batch:
            one = self.data.train.encoded.examples[index]["labels"]
            labels.extend([one] if isinstance(one, int) else one)
        weight = supervised_weight(labels, self.data.class_weights)
        if not weight:
            places = ", ".join(self.data.train.rows.where(index) for index in list(batch)[:3])
            raise TrainingError(f"nothing to learn in a whole batch: every label is masked ({IGNORED}), e.g. {places}")
        return weight

    def _evaluate(self, meter: Meter, log: Log) -> bool:
        """Score dev, keep the weights if they are the best; True when training should stop."""
        progress, settings = self.progress, self.run.training
        scores = evaluate(self.model, self.run.task, self.data.dev, self.accelerator, self.metrics).scores
        figures = {f"dev_{name}": value for name, value in scores.values.items()}
        log.write(progress.step, figures)
        progress.evaluations.append({"step": progress.step} | figures)
        better = progress.best_value is None or scores.value > progress.best_value
        if better:
            progress.best_value, progress.best_step = scores.value, progress.step
            progress.evaluations_without_gain = 0
            if settings.keep_best and self.accelerator.is_main_process:
                checkpoint.save_trained(self.model, self.folder / CHECKPOINTS / checkpoint.BEST)
        else:
            progress.evaluations_without_gain += 1
        meter.say(f"step {progress.step:,}: dev {scores.headline} {scores.value:.4f}{' (best)' if better else ''}")
        return self._has_stalled()

    def _has_stalled(self) -> bool:
        patience = self.run.training.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _save(self) -> None:
        accelerator = self.accelerator
        checkpoint.save_checkpoint(
            self.folder / CHECKPOINTS,
            self.progress,
            self.model,
            self.run.method,
            self.optimizer,
            self.schedule,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.wait_for_everyone,
        )

    def _finish(self, meter: Meter) -> TrainRecord:
        progress, accelerator = self.progress, self.accelerator
        accelerator.wait_for_everyone()
        if self.run.training.keep_best and progress.best_step != progress.step:
            checkpoint.load_trained(self.model, self.folder / CHECKPOINTS / checkpoint.BEST)
            meter.say(f"kept the weights of step {progress.best_step:,}, the best on dev")
        if accelerator.is_main_process:
            learning_curve(progress, self.run.task.headline, self.folder)
        self.model.eval()
        parameters = trained_parameters(self.model).values()
        return TrainRecord(
            steps=progress.step,
            best_step=progress.best_step if self.run.training.keep_best else progress.step,
            seconds=meter.seconds,
            tokens=meter.tokens,
            tokens_per_second=meter.tokens / max(meter.seconds, 1e-9),
            peak_memory_bytes=peak_memory_bytes(),
            trainable_parameters=sum(p.numel() for p in parameters),
            total_parameters=sum(p.numel() for p in self.model.parameters()),
            processes=accelerator.num_processes,
            losses=tuple(progress.losses),
            evaluations=tuple(progress.evaluations),
        )
