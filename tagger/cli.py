"""The console script `tagger`: the steps of a run by hand, with the same functions that the DAG calls."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

from tagger import __version__, cli_quality, cli_upkeep
from tagger.connections import Connections, connections_from_env
from tagger.dataset import Dataset
from tagger.dataset_files import dataset_paths, find_dataset, load_dataset
from tagger.exceptions import InputError, RunFailed, StorageError, TaggerError, Terminated

DESCRIPTION = """Tag the new and changed texts of a table with an LLM, and pay for each text once.

DATASET is a name under dags/datasets (or $TAGGER_DATASETS) or a path to a YAML file.
Exit code: 0 done; 1 the work failed or the budget was reached; 2 wrong input, or something is unreachable."""


def main(arguments: list[str] | None = None) -> int:
    """Run the console script; return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("tagger").setLevel(logging.INFO)
    command: Callable[[argparse.Namespace, Connections], None] = options.command
    try:
        command(options, connections_from_env)
    except TaggerError as e:
        print(f"tagger: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("tagger: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tagger", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"tagger {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[..., None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=command)
        return sub

    check = add("check", _check, "validate dataset files and connections")
    check.add_argument("dataset", nargs="*", metavar="DATASET", help="default: all of the folder")
    check.add_argument("--create", action="store_true", help="make the target table and the bucket if they are missing")
    snapshot = add("snapshot", _snapshot, "take today's rows out of the source")
    plan = add("plan", _plan, "find out which texts are new, and write the shards")
    tag = add("tag", _tag, "tag the new texts of one shard, or of all")
    tag.add_argument("--shard", type=int, metavar="K")
    load = add("load", _load, "write the tags into the target table")
    run = add("run", _run, "all steps in this process")
    report = add("report", _report, "sum a run up; without a run id: show the latest one, and what all did and cost")
    cli_quality.add_commands(add)
    cli_upkeep.add_commands(add)
    for sub in (snapshot, plan, tag, load, run):
        sub.add_argument("dataset", metavar="DATASET")
        sub.add_argument("--run-id", metavar="ID", required=sub is not run)
    report.add_argument("dataset", nargs="?", metavar="DATASET", help="default: all of the folder")
    shown = report.add_mutually_exclusive_group()
    shown.add_argument("--run-id", metavar="ID")
    shown.add_argument("--by", choices=["day", "month"], help="show the history only, all of it")
    shown.add_argument(
        "--html", metavar="FILE", type=Path, help="write it all as a page, in one file that needs no other"
    )
    for sub in (snapshot, run):
        rows = sub.add_mutually_exclusive_group()
        rows.add_argument("--day", type=_day, metavar="YYYY-MM-DD", help="the rows changed on this day")
        rows.add_argument("--all", action="store_true", dest="all_rows", help="all rows")
        sub.add_argument("--limit", type=int, metavar="N", help="ask for the first N new texts only")
        sub.add_argument("--dry-run", action="store_true", help="plan and estimate only; nothing is written")
        sub.add_argument("--retry-refused", action="store_true", help="ask for refused texts again")
        sub.add_argument("--max-cost-usd", type=float, metavar="USD", help="instead of the file's limit")
    form = report.add_mutually_exclusive_group()
    for either in (run, form):
        either.add_argument("--json", action="store_true", help="print the summary as the last line of stdout")
    form.add_argument("--csv", action="store_true", help="with --by, which --json goes with too: print the history so")
    return parser


def _day(value: str) -> date:
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no date such as 2026-11-30") from None


def _dataset(options: argparse.Namespace) -> Dataset:
    return load_dataset(find_dataset(options.dataset))


def _open(options: argparse.Namespace, connections: Connections) -> Any:
    from tagger.runs import open_run

    return open_run(_dataset(options), options.run_id, connections)


def _check(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.airflow.check import check_airflow
    from tagger.check import check

    failed: list[TaggerError] = []
    for path in dataset_paths(options.dataset):
        try:
            dataset = load_dataset(path)
            of_airflow = check_airflow(dataset, connections)
            for line in chain(check(dataset, connections, create=options.create), of_airflow):
                print(f"{path.stem}: {line}")
        except TaggerError as e:
            failed.append(e)
    _raise(failed)


def _snapshot(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.runs import open_run, utc_now
    from tagger.snapshot import snapshot
    from tagger.window import run_options, select_rows

    dataset = _dataset(options)
    selection = select_rows(dataset, end=utc_now(), day=options.day, all_rows=options.all_rows)
    otherwise = run_options(
        limit=options.limit,
        dry_run=options.dry_run,
        retry_refused=options.retry_refused,
        max_cost_usd=options.max_cost_usd,
    )
    snapshot(dataset, open_run(dataset, options.run_id, connections), selection, connections, otherwise)


def _plan(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.plan import plan

    planned = plan(_open(options, connections), connections)
    if planned.problem is not None:
        raise RunFailed(planned.problem)


def _tag(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.tag import tag

    run = _open(options, connections)
    shards = [options.shard] if options.shard is not None else [shard.shard for shard in run.plan().shards]
    _wait_for_batches(run, shards, connections)
    for number in shards:
        tag(run, number, connections, alone=options.shard is None)


def _wait_for_batches(run: Any, shards: list[int], connections: Connections) -> None:
    if run.dataset().llm.mode == "batch" and shards:
        from tagger.batch import wait_for_shards

        wait_for_shards(run, shards, connections)


def _load(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.load import load_back

    load_back(_open(options, connections), connections)


def _run(options: argparse.Namespace, connections: Connections) -> None:
    """Go through all steps. Like the DAG, load and report what was tagged even where a shard broke."""
    from tagger.load import load_back
    from tagger.plan import plan
    from tagger.report import report
    from tagger.runs import utc_now
    from tagger.tag import tag

    options.run_id = options.run_id or f"cli__{utc_now().isoformat()}"
    _snapshot(options, connections)
    run = _open(options, connections)
    planned = plan(run, connections)
    if planned.pending and planned.problem is None and not options.dry_run:
        from tagger.batch import wait_for_others

        wait_for_others(run, connections)
        planned = plan(run, connections)
    broken: TaggerError | None = None
    try:
        _wait_for_batches(run, [shard.shard for shard in planned.shards], connections)
        for shard in planned.shards:
            tag(run, shard.shard, connections, alone=True)
    except Terminated:
        raise
    except TaggerError as e:
        broken = e
    try:
        load_back(run, connections)
    except TaggerError as e:
        broken = broken or e
    try:
        report(run)
    except TaggerError as e:
        broken = broken or e
    if options.json:
        _print_summary(run)
    if broken is not None:
        raise broken


def _print_summary(run: Any) -> None:
    from tagger.report import Summary

    summary = run.read("summary.json", Summary)
    if summary is not None:
        print(summary.model_dump_json())


def _report(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.report import report

    if options.csv and options.by is None:
        raise InputError("`--csv` needs `--by day` or `--by month`")
    if options.html and options.json:
        raise InputError("`--html` and `--json` do not go together")
    if options.run_id is None:
        show = _write_page if options.html else _show_latest if options.by is None else _show_history
        show(options, connections)
        return
    if options.dataset is None:
        raise InputError("`--run-id` needs a DATASET")
    run = _open(options, connections)
    try:
        report(run)
    finally:
        if options.json:
            _print_summary(run)


def _show_latest(options: argparse.Namespace, connections: Connections) -> None:
    """Show the latest run of each dataset, what is at work since, and where one is named its history too."""
    from tagger.history import DAYS_SHOWN, as_table, history, unfinished
    from tagger.report import Summary, describe
    from tagger.runs import Run

    failed: list[TaggerError] = []
    for path in _report_paths(options):
        storage, rollup = _rollup(load_dataset(path), connections)
        failed += map(StorageError, rollup.problems)
        finished = [run.run_id for run in rollup.runs if run.summary]
        latest = Run(storage, rollup.dataset, finished[-1]).read("summary.json", Summary) if finished else None
        for line in unfinished(rollup):
            print(f"{rollup.dataset}: {line}", file=sys.stderr)
        if latest is None:
            print(f"{rollup.dataset}: no {'finished run' if rollup.runs else 'run'} yet", file=sys.stderr)
        elif options.json:
            print(latest.model_dump_json())
        else:
            print("\n".join(describe(latest)))
        if options.dataset and not options.json and not failed and (days := history(rollup, "day")):
            months = history(rollup, "month")
            print("", *as_table(days[-DAYS_SHOWN:], "day"), "", *as_table(months, "month"), sep="\n")
    _raise(failed)


def _show_history(options: argparse.Namespace, connections: Connections) -> None:
    """Show the days, or the months, of each dataset."""
    from tagger.history import as_csv, as_rows, as_table, history

    periods = []
    for path in _report_paths(options):
        _, rollup = _rollup(load_dataset(path), connections)
        if not rollup.runs:
            print(f"{rollup.dataset}: no run yet", file=sys.stderr)
        _raise([StorageError(problem) for problem in rollup.problems])  # sums without them would be wrong
        periods += history(rollup, options.by)
    if options.json:
        print(json.dumps(as_rows(periods, options.by)))
    elif options.csv:
        print(as_csv(periods, options.by), end="")
    elif periods:
        print("\n".join(as_table(periods, options.by)))


def _write_page(options: argparse.Namespace, connections: Connections) -> None:
    """Write the page of one dataset, or of all. What cannot be read is told there too, as long as anything can."""
    from tagger.pages.data import Card, DatasetPage, card_of, page_of
    from tagger.pages.html import Data, write_html
    from tagger.runs import utc_now

    data, unread = Data(generated_at=utc_now(), datasets=[]), 0
    failed: list[TaggerError] = []
    for path in _report_paths(options):
        name = path.stem
        try:
            dataset = load_dataset(path)
            name = dataset.dataset
            _, rollup = _rollup(dataset, connections)
            data.datasets.append(page_of(rollup, None, None, card_of(rollup, data.generated_at)))
            failed += map(StorageError, rollup.problems)
        except (InputError, StorageError) as e:
            data.datasets.append(DatasetPage(card=Card(dag_id=f"tag_{name}", dataset=name, problem=str(e))))
            failed.append(e)
            unread += 1
    if unread < len(data.datasets):
        write_html(options.html, data)
    _raise(failed)


def _report_paths(options: argparse.Namespace) -> list[Path]:
    return dataset_paths([options.dataset] if options.dataset else [])


def _rollup(dataset: Dataset, connections: Connections) -> tuple[Any, Any]:
    """Return the storage of a dataset, and what all its runs did."""
    from tagger.rollup import rolled_up
    from tagger.storage import Storage

    storage = Storage.connect(dataset.storage, dataset.storage_conn_id, connections)
    return storage, rolled_up(storage, dataset)


def _raise(failed: list[TaggerError]) -> None:
    """Raise the last of the errors, if there are any, and tell of the others."""
    for error in failed[:-1]:
        print(f"tagger: {error}", file=sys.stderr)
    if failed:
        raise failed[-1]


if __name__ == "__main__":
    sys.exit(main())
