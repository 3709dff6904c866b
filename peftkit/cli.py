"""The command line. Each verb calls one function; heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftkit.console import Parser, guard, say
from peftkit.errors import ConfigError, UsageError
from peftkit.planning.command import add_plan_options

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for failure, 2 for usage, 130 for Ctrl-C."""
    return guard(lambda: _run(sys.argv[1:] if arguments is None else list(arguments)))


def train(options: argparse.Namespace) -> None:
    from peftkit.config import load_run

    run = _allowing(load_run(options.config, options.overrides), options.allow)
    from peftkit.experiment import train as train_run

    train_run(run)


def audit(options: argparse.Namespace) -> None:
    from peftkit.config import load_run
    from peftkit.data.mix import missing_files

    run = _allowing(load_run(options.config, options.overrides), options.allow)
    if missing := missing_files(run.task.data):
        raise ConfigError(missing)
    from peftkit.audit.show import audit_shown

    audit_shown(run, str(options.config), as_json=options.json, html=options.html)


def evaluate(options: argparse.Namespace) -> None:
    from peftkit.artifacts.ensemble import load_runs

    saved = load_runs([options.run, *options.others])
    from peftkit.artifacts.predict import evaluate_rows
    from peftkit.data.files import read_file
    from peftkit.report import per_class_table, scores_table

    rows = read_file(options.data) if options.data else saved.run.task.splits().held_out
    scores = evaluate_rows(saved, rows).scores
    if options.json:
        say(json.dumps({"data": rows.source, "scores": scores.values, "per_class": scores.per_class}, indent=2))
        return
    say(scores_table({" + ".join(map(str, [options.run, *options.others])): scores}, rows.source))
    if scores.per_class:
        say()
        say(per_class_table(scores))


def predict(options: argparse.Namespace) -> None:
    from peftkit.artifacts.ensemble import load_runs
    from peftkit.artifacts.predict import predict_rows
    from peftkit.typed import typed_rows

    if options.texts and options.file:
        raise UsageError("give texts or --file, not both")
    if options.text_pair and not options.texts:
        raise UsageError(
            "--text-pair goes with texts on the command line; in a file or stdin, the pair is in each line"
        )
    if not options.texts and not options.file and sys.stdin.isatty():
        raise UsageError("no text: give texts, --file FILE, or pipe one text a line into stdin")
    saved = load_runs([options.run, *options.others])
    rows = typed_rows(saved.run.task, options.texts, options.text_pair, options.file)
    for row in predict_rows(saved, rows):
        print(json.dumps(row, ensure_ascii=False))


def merge(options: argparse.Namespace) -> None:
    from peftkit.artifacts.merge import check_target
    from peftkit.artifacts.merge import merge as merge_run
    from peftkit.artifacts.store import load_run, read_manifest
    from peftkit.data.files import read_file

    read_manifest(options.run)
    check_target(options.run, options.target)
    saved = load_run(options.run)
    probe = read_file(options.data) if options.data else saved.run.task.splits().held_out
    if options.probe_rows:
        probe = probe.head(options.probe_rows)
    result = merge_run(saved, options.target, probe)
    say(
        f"{result.equal_predictions:,} of {result.rows:,} predictions equal after re-reading; largest logit difference "
        f"{result.largest_difference:.2g} ({result.relative:.2g} relative, {result.tolerance:g} allowed)"
    )
    if result.rows < result.examples:
        say(f"compared on the first {result.rows:,} of {result.examples:,} examples; memory is set aside for no more")
    say(f"wrote {options.target}: transformers.{result.model_class}.from_pretrained('{options.target}')")
    if result.pooling == "mean":
        say("pooling is `mean`: average its token logits over the attention mask")
    if result.pooling == "markers":
        say("pooling is `markers`: average its token logits at the two opening markers")


def params(options: argparse.Namespace) -> None:
    from peftkit.planning.chart import check_chart, draw
    from peftkit.planning.survey import survey
    from peftkit.report import counts_csv, counts_table

    if options.chart:
        check_chart(options.chart)
    answers = survey(options.backbone, options.method, options.task, options.labels, options.budget)
    if options.chart:
        draw(answers, f"{options.backbone}, {options.task or 'without a head'}", options.chart)
    if options.json:
        print(json.dumps([one.as_dict() for one in answers], indent=2))
    else:
        print(counts_csv(answers) if options.csv else counts_table(answers), end="" if options.csv else "\n")


def plan(options: argparse.Namespace) -> None:
    from peftkit.planning.command import answer

    say(answer(options))


def fetch(options: argparse.Namespace) -> None:
    from peftkit.backbones import bundled
    from peftkit.report import table

    if options.list or not options.names:
        rows = [[f"bundled:{b.name}", b.kind, b.license, b.summary] for b in bundled.BUNDLES.values()]
        print(table([["name", "kind", "license", ""], *rows]))
        return
    for bundle in [bundled.bundle_named(name) for name in options.names]:
        bundled.fetch(bundle.name)
        print(f"bundled:{bundle.name}  {bundled.verify(bundle.name)}")


def validate(options: argparse.Namespace) -> None:
    from peftkit.config import load_run, run_id
    from peftkit.data.mix import missing_files

    run = load_run(options.config, options.overrides)
    say(f"{options.config}: valid (run {run_id(run)})")
    if run.task.data is None:
        say("task.data is null: this run takes its rows from Python only")
        return
    for problem in missing_files(run.task.data):
        say(f"not on this machine: {problem}")


def schema(options: argparse.Namespace) -> None:
    from peftkit.config import Run

    print(json.dumps(Run.model_json_schema(), indent=2))


def list_recipes(options: argparse.Namespace) -> None:
    from peftkit.shipped import configs, recipes

    for title, files in (("recipes", recipes()), ("configs", configs())):
        print(title)
        for file, summary in files.items():
            print(f"  {file.name:24} {summary}")


def copy_config(options: argparse.Namespace) -> None:
    from peftkit.shipped import copy

    say(f"wrote {copy(options.name, options.target)}")


def environment(options: argparse.Namespace) -> None:
    from peftkit.environment import describe

    print(json.dumps(describe(), indent=2))


def _allowing(run: Any, names: Sequence[str]) -> Any:
    """The run, with these findings of the audit allowed beside those of its configuration."""
    from peftkit.audit.settings import check_name

    for name in names:
        try:
            check_name(name)
        except ValueError as error:
            raise UsageError(f"--allow: {error}") from None
    allow = tuple(dict.fromkeys([*run.audit.allow, *names]))
    return run.model_copy(update={"audit": run.audit.model_copy(update={"allow": allow})})


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _run(arguments: list[str]) -> None:
    parser, verbs = _parsers()
    if not arguments or arguments[0] not in verbs:
        if arguments and not arguments[0].startswith("-"):
            from peftkit.schema import did_you_mean

            raise UsageError(f"no verb '{arguments[0]}'{did_you_mean(arguments[0], verbs)}")
        parser.parse_args(arguments)
    # a verb reads its own arguments, because only then may options stand between positional ones
    options = verbs[arguments[0]].parse_intermixed_args(arguments[1:])
    options.command(options)


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser for `peftkit` alone, and that of each verb."""
    parser = Parser(prog="peftkit", description="Parameter-efficient fine-tuning you can check.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, command: Command, summary: str) -> Parser:
        one = verbs.add_parser(name, help=summary, description=summary)
        one.set_defaults(command=command)
        return one

    for name, command, summary in (
        ("train", train, "Train, evaluate and save the run that a configuration describes."),
        ("audit", audit, "Look through the data of a run for faults, each with file and line."),
        ("validate", validate, "Check a configuration: every problem at once, with file and line."),
    ):
        one = verb(name, command, summary)
        one.add_argument("config", type=Path, metavar="CONFIG")
        one.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="win over the file")
        if name != "validate":
            one.add_argument("--allow", action="append", default=[], metavar="NAME", help="let this finding through")
        if name == "audit":
            one.add_argument("--json", action="store_true")
            one.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page with charts too")

    others: Any = {"action": "append", "type": Path, "default": [], "metavar": "RUN2", "dest": "others"}
    others["help"] = "another run of the same task; the mean of all is what counts (as often as there are runs)"
    one = verb("evaluate", evaluate, "Score a saved run on its test split, or on any file with its columns.")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("--with", **others)
    one.add_argument("--data", type=Path, metavar="FILE")
    one.add_argument("--json", action="store_true")

    one = verb("predict", predict, "Labels and probabilities for texts, a file, or stdin; one JSON object a line.")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("--with", **others)
    one.add_argument("texts", nargs="*", default=[], metavar="TEXT")
    one.add_argument("--text-pair", action="append", metavar="TEXT", help="the second text, once for each TEXT")
    one.add_argument("--file", type=Path, help="a table with the run's columns, or one text a line (.txt)")

    one = verb("merge", merge, "Write a run as one plain transformers model, read it back and compare.")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("target", type=Path, metavar="OUT")
    one.add_argument("--data", type=Path, metavar="FILE", help="rows to compare on (default: the test split)")
    one.add_argument(
        "--probe-rows", type=_positive, metavar="N", help="compare on the first N test rows (default: all)"
    )

    one = verb("params", params, "Exact parameter counts of methods on a backbone, from its configuration alone.")
    one.add_argument("--backbone", required=True, metavar="NAME", help="a name, or a folder with config.json")
    which = one.add_mutually_exclusive_group(required=True)
    which.add_argument("--method", action="append", metavar="KIND[:key=value,…]")
    which.add_argument("--all", action="store_true", help="every published method, at its paper's setting")
    one.add_argument(
        "--budget", metavar="N", help="find the rank, size or length that trains N parameters beside the head"
    )
    one.add_argument("--task", metavar="KIND", help="put this task's head on; without it there is no head")
    one.add_argument("--labels", type=int, default=2, metavar="N", help="outputs of the head (default: 2)")
    form = one.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true")
    form.add_argument("--json", action="store_true")
    one.add_argument("--chart", type=Path, metavar="FILE", help="draw what trains, as .png, .svg or .pdf")

    one = verb("plan", plan, "Memory, steps and time of a run, and what makes it fit, before a weight is loaded.")
    one.add_argument("config", type=Path, metavar="CONFIG")
    one.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="win over the file")
    add_plan_options(one)

    one = verb("fetch", fetch, "Get bundled backbones and data sets ahead of time; without a name, list them.")
    one.add_argument("names", nargs="*", default=[], metavar="NAME")
    one.add_argument("--list", action="store_true", help="list what there is")

    verb("ls", list_recipes, "List the recipes and configurations that come with peftkit.")
    one = verb("cp", copy_config, "Copy a shipped recipe or configuration here, to edit it.")
    one.add_argument("name", metavar="NAME")
    one.add_argument("target", type=Path, nargs="?", metavar="FILE")
    verb("schema", schema, "Print the JSON Schema of configurations, for editors.")
    verb("env", environment, "Print versions and devices, for bug reports.")
    return parser, verbs.choices


if __name__ == "__main__":
    sys.exit(main())
