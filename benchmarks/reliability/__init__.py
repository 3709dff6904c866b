"""What happens to training runs that are killed, stopped, starved of disk or lied to: peftkit beside Trainer + peft.

    python -m benchmarks.reliability --tier full
    python -m benchmarks.reliability --tier short --out /tmp/reliability kills sigterm

Every experiment runs alike in two columns: `peftkit`, which is `peftkit train CONFIG`, and `stock`, which is
`transformers.Trainer` with peft, saving every few steps and resuming from `get_last_checkpoint`. Each finished trial is
one line of OUT/EXPERIMENT.jsonl, so that a command that was stopped goes on when it is given again; `--fresh` begins
anew. OUT/EXPERIMENT.json counts the outcomes of both columns, with environment, command and date. The command fails if
a trial of peftkit ends otherwise than the experiment calls good.

An experiment is a module of this package, named in `EXPERIMENTS`, with

    GOOD: tuple[str, ...]       the outcomes that peftkit's trials must have
    COLUMNS: tuple[str, ...]    optional; both if absent
    trials(tier) -> list[str]   the names of its trials, alike in every call; the same for both columns
    run(trial, column, bench, folder) -> dict[str, Any]
                                what one trial came to: `outcome` and whatever else is worth keeping. `folder` is new,
                                empty and the trial's own. A column that cannot do the trial says `not offered`
    missing() -> str            optional; what the machine lacks for it, for which nothing is tried then
    figures(rows) -> dict       optional; further figures for the summary, of the rows of one column

`bench` (`workbench.Workbench`) has the tiny backbone, the data and, for each column, the `Program`: its command line
for a method and folder, the runs of it that nothing happens to, and the processes. What a trial draws at random comes
from `random.Random(trial)`, so that the trials are the same ones in every run of the command.

Training processes are forked from one that has imported everything, because importing takes longer than training a tiny
model. From there on it is the command line's own code, from `main` to the exit code.
"""

EXPERIMENTS = (
    *("kills", "sigterm", "processes", "disk_full", "checkpoint_cost"),
    *("corruptions", "hostile", "payloads", "not_numbers"),
)
COLUMNS = ("peftkit", "stock")
