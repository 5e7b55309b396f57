"""The commands that delete: clean, forget."""

import argparse
import sys
from pathlib import Path

from tagger.cli_quality import Add
from tagger.connections import Connections
from tagger.dataset import Dataset
from tagger.dataset_files import (
    dataset_files,
    dataset_paths,
    datasets_folder,
    find_dataset,
    load_dataset,
    load_datasets,
)
from tagger.exceptions import DatasetError, InputError, StorageError


def add_commands(add: Add) -> None:
    """Add the commands of this module."""
    _add_clean(add)
    _add_forget(add)


def _add_clean(add: Add) -> None:
    clean = add("clean", _clean, "list snapshots and runs past their `retention`, or specs; with --yes, delete them")
    clean.add_argument("dataset", nargs="*", metavar="DATASET", help="default: all of the folder")
    clean.add_argument(
        "--spec", nargs="*", metavar="ID", help="the records of these specs in DATASET's storage; none: list all specs"
    )
    clean.add_argument("--yes", action="store_true", help="delete what is listed")


def _clean(options: argparse.Namespace, connections: Connections) -> None:
    paths = dataset_paths(options.dataset)
    if options.spec is None:
        _clean_by_age(_loaded(paths), connections, yes=options.yes)
        return
    if len(options.dataset) != 1 or (options.yes and not options.spec):
        raise InputError("`tagger clean DATASET --spec [ID …]`: expected one DATASET, and with `--yes` ids of specs")
    folders = {folder.resolve() for folder in (paths[0].parent, datasets_folder())}
    others = [dataset for folder in folders for dataset in _loaded(dataset_files(folder))]
    _clean_specs(_loaded(paths)[0], others, options.spec, connections, yes=options.yes)


def _loaded(paths: list[Path]) -> list[Dataset]:
    """Read dataset files before anything is done; a mistake in any is an error."""
    loaded = load_datasets(paths)
    for error in loaded.values():
        if isinstance(error, DatasetError):
            raise error
    return [dataset for dataset in loaded.values() if isinstance(dataset, Dataset)]


def _clean_by_age(datasets: list[Dataset], connections: Connections, *, yes: bool) -> None:
    from tagger.clean import Amount, amounts, clean, describe, find_overdue
    from tagger.storage import Storage

    total, problems = Amount(), list[str]()
    for dataset in datasets:
        overdue = find_overdue(Storage.connect(dataset.storage, dataset.storage_conn_id, connections), dataset)
        snapshots, runs = amounts(overdue)
        print(f"{dataset.dataset}: {describe(dataset.retention)}")
        print(f"  snapshots past that: {snapshots}\n  runs past that: {runs}")
        for run_id in overdue.active:
            print(f"  left alone: run `{run_id}`, which has a batch that is not collected")
        if yes:
            deleted, failed = clean(overdue)
            total, problems = total + deleted, problems + failed
        else:
            total = total + snapshots + runs
    if yes:
        print(f"deleted: {total}")
    elif total.objects:
        print(f"nothing is deleted without `--yes`, which deletes {total}; what runs did and cost stays in the history")
    for problem in problems:
        print(f"tagger: {problem}", file=sys.stderr)
    if problems:
        of_runs = "1 run" if len(problems) == 1 else f"{len(problems)} runs"
        raise StorageError(f"the files of {of_runs} could not be deleted")


def _clean_specs(
    dataset: Dataset, folder: list[Dataset], specs: list[str], connections: Connections, *, yes: bool
) -> None:
    from tagger.price import usd
    from tagger.storage import Storage
    from tagger.stored_specs import check_removable, remove, stored_specs

    storage = Storage.connect(dataset.storage, dataset.storage_conn_id, connections)
    found = stored_specs(storage, folder, list(dict.fromkeys(specs)))
    if specs:
        check_removable(storage, found)
    for spec in found:
        print(spec)
    if not specs:
        print(f"{storage.url}: {len(found)} specs; `--spec ID` with one that is not used any more is how it is removed")
        return
    for spec in found:
        if yes:
            remove(storage, spec)
        print(
            f"spec {spec.spec}: {'removed' if yes else 'not removed without `--yes`'}; a dataset that comes back to it "
            f"pays for its {spec.extent.records:,} texts again: about {usd(spec.repeat_usd)}"
        )


def _add_forget(add: Add) -> None:
    forget = add(
        "forget", _forget, "list all that is kept of rows which are gone from the source; with --yes, remove it"
    )
    forget.add_argument("dataset", metavar="DATASET")
    forget.add_argument("ids", nargs="+", metavar="ID", help="of a row; all after `--` if one begins with a dash")
    forget.add_argument("--yes", action="store_true", help="remove what is listed")


def _forget(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.forget import Erasure

    erasure = Erasure(load_dataset(find_dataset(options.dataset)), options.ids, connections)
    found = erasure.find()
    print("\n".join(erasure.describe(found)))
    if found.traces and options.yes:
        erasure.remove(found)
        print("removed, and looked for again: nothing is left")
    elif found.traces:
        print("nothing is removed without `--yes`")
