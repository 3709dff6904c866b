"""The command line. Each verb calls one function; heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from peftkit import artifact_verbs
from peftkit.arguments import parsers
from peftkit.bench.advice.command import advise
from peftkit.console import Parser, guard, say
from peftkit.errors import ConfigError, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for failure, 2 for usage, 130 for Ctrl-C."""
    return guard(lambda: _run(sys.argv[1:] if arguments is None else list(arguments)))


def train(options: argparse.Namespace) -> None:
    from peftkit.config import load_run

    run = _allowing(load_run(options.config, options.overrides), options.allow)
    from peftkit.experiment import train as train_run

    train_run(run)


def launch(options: argparse.Namespace) -> None:
    from peftkit.config import load_run
    from peftkit.job import launch as launch_run

    launch_run(_allowing(load_run(options.config, options.overrides), options.allow), options)


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
    say("\n".join(json.dumps(row, ensure_ascii=False) for row in predict_rows(saved, rows)))


def merge(options: argparse.Namespace) -> None:
    from peftkit.artifacts.merge_command import answer
    from peftkit.typed import typed_rows

    say(answer(options, lambda task, file: typed_rows(task, [], None, file)))


def combine(options: argparse.Namespace) -> None:
    say(artifact_verbs.combine(options))


def diff(options: argparse.Namespace) -> None:
    say(artifact_verbs.diff(options))


def extract(options: argparse.Namespace) -> None:
    say(artifact_verbs.extract(options))


def export(options: argparse.Namespace) -> None:
    say(artifact_verbs.export(options))


def bundle(options: argparse.Namespace) -> None:
    from peftkit.artifacts.bundle import bundle as bundle_run
    from peftkit.data.files import read_file

    probe = read_file(options.data) if options.data else None
    result = bundle_run(options.run, options.target, probe, options.probe_rows)
    say(
        f"{result.numbers:,} logits of {result.rows:,} rows compared in a process of its own; largest difference "
        f"{result.largest_difference:.2g}"
    )
    say(f"wrote {options.target} ({result.bytes / 2**20:,.1f} MiB): peftkit.load_predictor('{options.target}')")


def card(options: argparse.Namespace) -> None:
    from peftkit.artifacts.card import write_card
    from peftkit.artifacts.emissions import Power

    say(write_card(options.run, options.merged, options.out, Power(options.watts, options.co2_per_kwh)))


def serve(options: argparse.Namespace) -> None:
    from peftkit.serving.command import serve as serve_runs

    serve_runs(options)


def bench_run(options: argparse.Namespace) -> None:
    from peftkit.bench.command import run

    run(options)


def bench_status(options: argparse.Namespace) -> None:
    from peftkit.bench.command import status

    status(options)


def bench_report(options: argparse.Namespace) -> None:
    from peftkit.bench.report_command import report_command

    report_command(options)


def bench_compare(options: argparse.Namespace) -> None:
    from peftkit.bench.report_command import compare_command

    compare_command(options)


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
    from peftkit.tables import table

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
    from peftkit.shipped import configs, launches, recipes, sequences

    folders = {"recipes": recipes, "configs": configs, "sequences": sequences, "accelerate": launches}
    for title, files in ((name, found()) for name, found in folders.items()):
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


def _run(arguments: list[str]) -> None:
    parser, verbs = _parsers()
    if arguments[:1] == ["bench"]:
        if len(arguments) == 1 or arguments[1].startswith("-"):
            raise UsageError(
                f"peftkit bench needs one more word: {', '.join(n[6:] for n in verbs if n[:6] == 'bench ')}"
            )
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
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
    commands = (
        *(train, launch, audit, validate, evaluate, predict, merge, bundle, card, serve),
        *(bench_run, bench_status, bench_report, bench_compare, advise),
        *(combine, diff, extract, export, params, plan, fetch, schema),
    )
    named = {command.__name__.replace("_", " "): command for command in commands}
    return parsers(named | {"ls": list_recipes, "cp": copy_config, "env": environment})


if __name__ == "__main__":
    sys.exit(main())
