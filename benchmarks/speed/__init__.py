"""How fast training is, and what it holds: peftkit beside the stock tools on the same work, and the hardware's floor.

    PEFTKIT_DATA=<folder> python -m benchmarks.speed --workload sst2 --rounds 3 --steps 12
    PEFTKIT_DATA=<folder> python -m benchmarks.speed --gate --workload sst2 --steps 200
    PEFTKIT_DATA=<folder> python -m benchmarks.speed --seeds 5 --workload sst2
    PEFTKIT_DATA=<folder> python -m benchmarks.speed --profile --workload sst2
    PEFTKIT_DATA=<folder> python -m benchmarks.speed --together 8 --workload sst2 --steps 40
    PEFTKIT_DATA=<folder> python -m benchmarks.speed --scaling
    python -m benchmarks.speed --report

The first command trains the arms of a workload (`--list` names both), a process each, in turn, for some rounds, each
round beginning with another arm. All take the same steps: the batches are those that peftkit draws, tokenised once and
kept (`plan.py`), the adapters and heads begin with the same numbers, optimizer and schedule are the same. Only arms
that group examples by length make other batches, of the same examples. Every finished arm of a round is kept at once
in RESULTS/<workload>.json, so that a command that was stopped goes on when it is given again; an arm whose package is
not installed is kept as missing, with the reason, and tried again the next time.

What peftkit's arms run is `peftkit train` on a shipped configuration; what is set otherwise is in `workloads.py`: the
batch, the steps, LoRA's rank and dropout, how many rows are read, and what is evaluated, which is not timed.

- `stock.py` is the process of `transformers.Trainer`, with peft, at its defaults and tuned; of TRL's `SFTTrainer`,
  whose Python is named by `--trl-python` or SPEED_TRL_PYTHON; and of `adapters` (`--adapters-python`,
  SPEED_ADAPTERS_PYTHON), which needs a transformers of its own.
- `floor.py` is the least time: arithmetic / the measured matrix rate + bytes that must move / the measured bandwidth.
- `gate.py` compares losses and gradients of every technique with stock, step by step.
- `seeds.py` compares final scores over seeds, with dropout.
- `profile.py` shows where the time of a step goes.
- `together.py` is many runs at once against one after the other.
- `scaling.py` is time and memory against length, batch, rank and width.
- `report.py` writes the tables and the chart of docs/speed.md from what is kept.

The stock arms also take a GPU where there is one; none of this was ever run on one.

Tokens are real ones, without padding. Times are of the steps alone: no loading, no evaluation, and not the first step,
which sets things up; it is kept beside the others. Memory is the peak of the process (VmHWM) over what was resident
before the backbone was loaded; stock arms have imported all libraries by then, and peftkit imports peft and its metrics
later, which counts as its memory.
"""
