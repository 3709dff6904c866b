"""The only training loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from peftkit.backbones.load import WEIGHTS_SHA256
from peftkit.config import Run, settings_of
from peftkit.data.collate import collate
from peftkit.disk import require_space
from peftkit.engine.engage import engaged
from peftkit.errors import TrainingError, UsageError
from peftkit.evaluation import evaluate
from peftkit.methods.base import trained_parameters
from peftkit.prepare import Prepared
from peftkit.session import claim, run_folder
from peftkit.tasks.base import Scores
from peftkit.training import batches, checkpoint, diagnosis
from peftkit.training.activations import recompute_activations
from peftkit.training.checkpoint import Checkpoints, Progress
from peftkit.training.gradients import gradients_of
from peftkit.training.health import Health
from peftkit.training.meter import EXPECTED, Meter
from peftkit.training.optimizer import Moments, Position, make_optimizer, make_schedule
from peftkit.training.random_state import random_state
from peftkit.training.record import TrainRecord
from peftkit.training.regularise import make_objective
from peftkit.training.resuming import resumed
from peftkit.training.sharding import is_sharded, place
from peftkit.training.shortage import retried
from peftkit.training.stopping import Stop
from peftkit.training.supervision import supervision
from peftkit.training.tracking import Log, learning_curve
from peftkit.training.watch import pace_of
from peftkit.training.whole import whole

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

CHECKPOINTS = "checkpoints"


def train(
    model: nn.Module, run: Run, data: Prepared, accelerator: Accelerator, metrics: Sequence[Any] = ()
) -> TrainRecord:
    """Train what has `requires_grad`; leaves the best (or last) weights in `model`.

    Continues from the newest checkpoint in the run folder, if there is one. SIGTERM and Ctrl-C end the training after
    the step, with a checkpoint.

    A method that trains nothing takes no step.

    Raises:
        TrainingError: a loss that is not a number, or a batch without supervision.
        ArtifactError: too little room on the disk, checkpoints of which none is whole, or one that is not of this run.
        Interrupted: a signal ended it.
    """
    if not run.method.trains:
        claim(run, accelerator)
        return TrainRecord.of(model, accelerator)
    if run.method.start_from is not None and not hasattr(model, "started_from"):
        raise UsageError("method.start_from is set and not done: call start_from(run, data, backbone, model) before")
    require_space(run_folder(run), checkpoint.bytes_needed(model, run.method, run.training.keep_best))
    loop = _Loop(model, run, data, accelerator, metrics)
    claim(run, accelerator)
    loop.resume()
    with engaged(model, run.engine, accelerator.device):
        return loop.run_to_end()


class _Loop:
    def __init__(
        self, model: nn.Module, run: Run, data: Prepared, accelerator: Accelerator, metrics: Sequence[Any]
    ) -> None:
        import torch

        self.model, self.run, self.data, self.accelerator = model, run, data, accelerator
        self.pace = pace_of(accelerator)
        settings, examples = run.training, len(data.train.encoded)
        self.total_steps = settings.total_steps(examples)
        self.lengths = data.train.encoded.lengths
        by_epoch = settings.evaluate_every == "epoch"
        self.every = settings.steps_per_epoch(examples) if by_epoch else int(settings.evaluate_every)
        if settings.gradient_checkpointing:
            recompute_activations(model)
        place(model, accelerator)
        optimizer = make_optimizer(model, settings, run.method)
        # processes that hold shares of the model average its gradients by themselves
        self.wrapped = accelerator.prepare_model(model, evaluation_mode=is_sharded(model))
        self.trained = list(trained_parameters(model).values())
        self.optimizer = accelerator.prepare(optimizer)
        self.gradients = gradients_of(self.wrapped, accelerator)
        # stepped by hand: a prepared schedule would advance once for every process
        self.schedule = make_schedule(optimizer, settings, self.total_steps)
        self.penalties: dict[str, float] = {}
        self.class_weights = torch.tensor(data.class_weights, device=accelerator.device)
        self.task_on_dev = run.task.while_training()
        # what they compare may be what dev is scored without
        self.metrics_on_dev = metrics if self.task_on_dev is run.task else ()
        self.objective = make_objective(run.task, settings, model)
        self.epoch, self.stop = 0, Stop(accelerator)
        self.folder = run_folder(run)
        self.health = Health(model, run.method)
        weights = getattr(model, WEIGHTS_SHA256, "")
        self.progress = Progress(settings_of(run), data.fingerprint, weights, accelerator.num_processes)
        states = {"optimizer": Moments(self.optimizer), "schedule": Position(self.schedule)}
        if accelerator.scaler is not None:
            states["scaler"] = accelerator.scaler
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, model, run.method, states)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        from accelerate.utils import set_seed

        accelerator = self.accelerator
        if accelerator.process_index:
            # dropout that fell alike in all processes would be less noise than one process has
            set_seed(self.run.training.seed + accelerator.process_index)
        self.progress = resumed(self.checkpoints, self.progress, self.run, accelerator, self.total_steps)
        at = self.progress
        self.log = Log(self.folder, accelerator, at.step)
        self.meter = Meter(self.total_steps, at.step, at.tokens, at.seconds, accelerator.is_main_process)

    def run_to_end(self) -> TrainRecord:
        """Train, evaluate and checkpoint until the last step, or until dev no longer gains."""
        settings, progress = self.run.training, self.progress
        ahead = batches.steps(self.lengths, settings.batch_size, settings.seed, settings.group_by_length, progress.step)
        self.model.train()
        with self.meter, self.stop:
            while progress.step < self.total_steps and not self._has_stalled():
                self._train_step(*next(ahead))
                evaluates = progress.step % self.every == 0 or progress.step == self.total_steps
                if not (evaluates or self._checkpoint_is_due() or self.stop.is_asked):
                    continue
                self.meter.pause()
                if evaluates:
                    self._evaluate()
                self._save()
                self.stop.leave(progress.step)
                self.meter.resume()
        self.meter.pause()  # what follows, such as drawing the learning curve, is no training
        return self._finish()

    def _train_step(self, epoch: int, batch: Sequence[int]) -> None:
        rate, self.epoch = float(self.schedule.get_last_lr()[0]), epoch
        loss = self._gradients(batch)
        norm = self._update(rate, batch)
        self.progress.step += 1
        self.progress.losses.append(loss)
        self.meter.step(sum(self.lengths[index] for index in batch), loss)
        figures = {"epoch": epoch, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
        if self.health.leaps(loss):
            figures["leap"] = True
            self.meter.say(f"step {self.progress.step:,}: the loss leapt to {loss:.4f}; see gradient_norm in log.jsonl")
        figures |= self.penalties | self.run.method.figures(self.model)
        speed = {"tokens_per_second": round(self.meter.tokens_per_second, 1)}
        self.log.write(self.progress.step, figures | speed)

    def _gradients(self, batch: Sequence[int]) -> float:
        """Gradients of a global batch, in micro-batches as small as memory asks for; returns its mean loss."""
        progress, settings = self.progress, self.run.training
        most = progress.micro_batch_size or settings.micro_batch_size or len(batch)
        asked = max(len(part.indices) for part in self._parts(batch, most))
        loss, size = retried(
            lambda size: self._accumulate(batch, size), asked, settings, self.optimizer.zero_grad, progress.step + 1
        )
        if size < asked:
            progress.micro_batch_size = size
            self.meter.say(f"step {progress.step + 1:,}: out of memory; micro-batches have {size} examples from now on")
        return loss

    def _accumulate(self, batch: Sequence[int], size: int) -> float:
        """Gradients of a global batch, over all processes; returns its mean loss."""
        accelerator, parts = self.accelerator, self._parts(batch, size)
        weight = supervision(self.run.task, self.data, batch, self.progress.step + 1)
        total = self.class_weights.new_zeros(())
        for part, number in itertools.product(parts, range(self.objective.passes)):
            last = part is parts[-1] and number == self.objective.passes - 1
            with self.gradients.part(last):
                loss = self._micro_loss(part, number)
                if last:
                    self.pace.arrive()
                # the average over processes that DDP takes is undone, so that gradients are sums over the batch
                accelerator.backward(loss * (accelerator.num_processes / weight) + (self._penalty() if last else 0.0))
            total += loss.detach()
        self.gradients.complete()
        mean = self.stop.summed(total) / weight
        if not math.isfinite(mean):
            where = diagnosis.of_loss(self.model, map(self._looked_into, parts))
            raise diagnosis.no_number("loss", mean, self.progress.step + 1, where, self.run.training)
        return mean

    def _parts(self, batch: Sequence[int], size: int) -> list[batches.MicroBatch]:
        place = (self.accelerator.num_processes, self.accelerator.process_index)
        return batches.micro_batches(batch, self.lengths, size, *place, self.run.training.micro_batch_tokens)

    def _looked_into(self, part: batches.MicroBatch) -> tuple[str, Callable[[], object]]:
        rows = ", ".join(self.data.train.where(index) for index in part.indices[:3])
        return rows + (", …" if len(part.indices) > 3 else ""), lambda: self._micro_loss(part, 0, self.model)

    def _penalty(self) -> Any:
        """What the method adds to the loss of a whole step, alike in all processes; logged apart from the loss."""
        penalty = self.run.method.penalty(self.model)
        if penalty is None:
            return 0.0
        self.penalties = {"penalty": float(penalty.detach())}
        return penalty

    def _update(self, rate: float, batch: Sequence[int]) -> float:
        """Clip, step, and clear the gradients; returns their norm before clipping."""
        accelerator, settings = self.accelerator, self.run.training
        self._beat()
        self.health.check_gradients()
        norm = float(whole(accelerator.clip_grad_norm_(self.trained, settings.max_gradient_norm or math.inf)))
        if accelerator.scaler is None and not math.isfinite(norm):  # fp16 skips such steps and lowers its scale
            where = diagnosis.of_gradients(self.model, lambda: self._gradients(batch))
            raise diagnosis.no_number("gradient norm", norm, self.progress.step + 1, where, settings)
        self.optimizer.step()
        if accelerator.optimizer_step_was_skipped:
            self.run.method.skipped_step(self.model, self.progress.step + 1)
        else:
            self.schedule.step()
            self.run.method.after_step(self.model, self.progress.step + 1)
            self.health.after_step(rate)
        self.optimizer.zero_grad()
        self.pace.rest("after a step")
        return norm

    def _beat(self) -> None:
        self.pace.beat("training", f"step {self.progress.step + 1}")

    def _micro_loss(self, part: batches.MicroBatch, number: int, model: nn.Module | None = None) -> Any:
        self._beat()
        examples = [self.data.train.encoded.examples[index] for index in part.indices]
        examples = [self.run.task.for_epoch(example, self.epoch) for example in examples]
        batch = collate(examples, self.data.train.pad_id, self.accelerator.device)
        self._beat()
        with self.accelerator.autocast():
            loss = self.objective.loss(model or self.wrapped, self.model, batch, self.class_weights, number)
        return loss if part.counted else loss * 0.0

    def _evaluate(self) -> None:
        """Score dev; keep the weights if they are the best so far."""
        progress = self.progress
        scores = self._dev_scores()
        figures = {f"dev_{name}": value for name, value in scores.values.items()}
        self.log.write(progress.step, figures)
        progress.evaluations.append({"step": progress.step} | figures)
        settled = self.run.method.is_settled(self.model)
        better = settled and (progress.best_value is None or scores.goodness > progress.best_value)
        progress.evaluations_without_gain = 0 if better or not settled else progress.evaluations_without_gain + 1
        if better:
            progress.best_value, progress.best_step = scores.goodness, progress.step
            if self.run.training.keep_best:
                self.checkpoints.save_best(progress.step, self.accelerator.is_main_process)
        mark = " (best)" if better else ""
        self.meter.say(f"step {progress.step:,}: dev {scores.headline} {scores.value:.4f}{mark}")

    def _dev_scores(self) -> Scores:
        try:
            return evaluate(self.model, self.task_on_dev, self.data.dev, self.accelerator, self.metrics_on_dev).scores
        except TrainingError as error:
            raise TrainingError(f"after step {self.progress.step}: {error}") from error

    def _has_stalled(self) -> bool:
        patience = self.run.training.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _checkpoint_is_due(self) -> bool:
        every = self.run.training.checkpoint_every
        return every != "evaluation" and self.progress.step % every == 0

    def _save(self) -> None:
        from accelerate.utils import gather_object

        self.progress.tokens, self.progress.seconds = self.meter.tokens, self.meter.seconds
        self.pace.arrive()
        random_states = gather_object([random_state()])
        self.checkpoints.save(self.progress, random_states, self.accelerator.is_main_process)

    def _finish(self) -> TrainRecord:
        progress, accelerator, keep_best = self.progress, self.accelerator, self.run.training.keep_best
        self.pace.arrive()
        accelerator.wait_for_everyone()
        self.run.method.finish(self.model, self.folder if accelerator.is_main_process else None)
        self.health.check_frozen()
        if keep_best and progress.best_step != progress.step:
            self.checkpoints.load_best(progress.best_step)
            self.meter.say(f"kept the weights of step {progress.best_step:,}, the best on dev")
        if accelerator.is_main_process:
            learning_curve(progress, self.task_on_dev.headline, self.folder)
        self.model.eval()
        record = TrainRecord.of(self.model, accelerator, progress, self.meter, keep_best)
        memory = {"memory_growth_bytes": record.memory_growth_bytes, EXPECTED: record.expected_memory_bytes}
        self.log.write(progress.step, memory)
        return record
