"""The commands that measure and correct tags: evaluate, compare, review."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tagger.connections import Connections
from tagger.dataset import Dataset
from tagger.dataset_files import find_dataset, load_dataset, load_datasets
from tagger.exceptions import DatasetError, InputError
from tagger.review_file import STATUSES

Add = Callable[[str, Callable[[argparse.Namespace, Connections], None], str], argparse.ArgumentParser]
"""Adds a command: its name, its function, its help."""


def add_commands(add: Add) -> None:
    """Add the commands of this module."""
    _add_evaluate(add)
    _add_compare(add)
    _add_review(add)


def _add_evaluate(add: Add) -> None:
    evaluate = add("evaluate", _evaluate, "measure the tags of labelled texts")
    evaluate.add_argument("dataset", metavar="DATASET")
    evaluate.add_argument(
        "labels", metavar="LABELS", nargs="?", type=Path, help="CSV or Parquet: `text` or `row_id`, and `tags`"
    )
    evaluate.add_argument("--reviewed", action="store_true", help="the reviewed rows of the target are the labels")
    evaluate.add_argument("--sample", type=_count, metavar="N", help="measure so many of them, drawn at random")
    evaluate.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the sample and the intervals")
    evaluate.add_argument("--max-cost-usd", type=float, metavar="USD", help="instead of the file's limit")
    evaluate.add_argument("--keep-disagreeing", action="store_true", help="keep labels that disagree about a text")
    evaluate.add_argument("--ignore-unknown", action="store_true", help="leave rows out whose tags the dataset has not")
    evaluate.add_argument("--json", action="store_true", help="print all figures as the last line of stdout")
    evaluate.add_argument("--html", metavar="FILE", type=Path, help="write them as a page, in one file")


def _evaluate(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.evaluate import describe, evaluate
    from tagger.evaluate_page import write_page

    if (options.labels is None) == (not options.reviewed):
        raise InputError("evaluate: expected either LABELS, a CSV or Parquet file, or `--reviewed`")
    dataset = _dataset(options.dataset)
    labels = _labels(options, dataset, connections)
    if options.sample is not None:
        labels = labels.sample(options.sample, options.seed)
    figures = evaluate(
        dataset,
        labels,
        connections,
        name="reviewed rows" if options.reviewed else options.labels.name,
        seed=options.seed,
        max_cost_usd=options.max_cost_usd,
    )
    if options.html is not None:
        write_page(options.html, figures)
    print(figures.model_dump_json() if options.json else "\n".join(describe(figures)))


def _labels(options: argparse.Namespace, dataset: Dataset, connections: Connections) -> Any:
    from tagger.labels import labels_of_rows, read_labels

    unknown, disagreeing = options.ignore_unknown, options.keep_disagreeing
    if not options.reviewed:
        return read_labels(options.labels, dataset, connections, ignore_unknown=unknown, keep_disagreeing=disagreeing)
    from tagger.review import reviewed_labels

    tags = reviewed_labels(dataset, connections)
    return labels_of_rows(tags, dataset, connections, ignore_unknown=unknown, keep_disagreeing=disagreeing)


def _count(value: str) -> int:
    if not value.isascii() or not value.isdigit() or not int(value):
        raise argparse.ArgumentTypeError(f"{value!r} is no number of 1 or more")
    return int(value)


def _seed(value: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise argparse.ArgumentTypeError(f"{value!r} is no number of 0 or more")
    return int(value)


def _add_compare(add: Add) -> None:
    compare = add("compare", _compare, "let two dataset files tag the same texts: what changes, is it better, its cost")
    compare.add_argument("a", metavar="A", help="the dataset as it is")
    compare.add_argument("b", metavar="B", help="the changed one, usually a copy of A's file with a line or two edited")
    compare.add_argument("labels", nargs="?", type=Path, metavar="LABELS", help="CSV or Parquet: row_id or text, tags")
    compare.add_argument("--sample", type=_count, default=200, metavar="N", help="texts to ask (default: 200)")
    compare.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the sample and the intervals")
    compare.add_argument(
        "--max-cost-usd", type=float, metavar="USD", help="for both together, instead of the files' limits"
    )
    compare.add_argument(
        "--ignore-unknown", action="store_true", help="leave labels out that have a tag which A or B has not"
    )
    compare.add_argument(
        "--keep-disagreeing", action="store_true", help="keep labels that give one text different tags"
    )
    compare.add_argument("--json", action="store_true", help="print the figures as the last line of stdout")


def _compare(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.compare import Candidate, compare
    from tagger.compare_screen import describe, verdict

    a, b = (Candidate(name, _alone(find_dataset(name))) for name in (options.a, options.b))
    found = compare(
        a,
        b,
        connections,
        labels=options.labels,
        sample=options.sample,
        seed=options.seed,
        max_cost_usd=options.max_cost_usd,
        ignore_unknown=options.ignore_unknown,
        keep_disagreeing=options.keep_disagreeing,
    )
    if options.json:
        print(json.dumps(found.model_dump(mode="json") | {"verdict": verdict(found)}))
    else:
        print("\n".join(describe(found)))


def _alone(path: Path) -> Dataset:
    """Read a dataset file that may stand beside another of its name: a copy to compare it with."""
    loaded = load_datasets([path])[path]
    if isinstance(loaded, DatasetError):
        raise loaded
    return loaded


def _add_review(add: Add) -> None:
    review = add("review", _review, "move rows to a CSV for people to correct, and their corrections back")
    review.add_argument("direction", choices=["export", "import"], metavar="export|import")
    review.add_argument("dataset", metavar="DATASET")
    review.add_argument("file", type=Path, metavar="FILE", help="a CSV that spreadsheets open (UTF-8 with BOM)")
    review.add_argument("--status", choices=STATUSES, help="export: the rows of this status (review)")
    review.add_argument("--limit", type=_count, metavar="N", help="export: no more rows than this")
    review.add_argument("--no-text", action="store_true", help="export: leave the texts out")
    review.add_argument("--by", metavar="NAME", help="import: whose reviews they are, where the file does not say")
    review.add_argument("--overwrite", action="store_true", help="import: replace what was reviewed since the export")
    review.add_argument("--skip", action="store_true", help="import: leave out the rows that have a problem")


def _review(options: argparse.Namespace, connections: Connections) -> None:
    of_export = {"--status": options.status, "--limit": options.limit, "--no-text": options.no_text}
    of_import = {"--by": options.by, "--overwrite": options.overwrite, "--skip": options.skip}
    for name, given in (of_import if options.direction == "export" else of_export).items():
        if given:
            raise InputError(f"`{name}` does not go with `review {options.direction}`")
    (_review_export if options.direction == "export" else _review_import)(options, connections)


def _review_export(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.review import export_reviews

    status = options.status or "review"
    dataset, texts = _dataset(options.dataset), not options.no_text
    rows = export_reviews(dataset, options.file, connections, status=status, limit=options.limit, texts=texts)
    print(f"{options.file}: {rows:,} rows ({status})")
    if texts and rows:
        print(f"{options.file} holds the rows' texts: keep it as you keep the table", file=sys.stderr)
    if rows:
        print(
            "put the right tags into `reviewed_tags` (`a; b`, or `(none)`), and bring it back: `tagger review import`"
        )


def _review_import(options: argparse.Namespace, connections: Connections) -> None:
    from tagger.review import PROBLEMS_SHOWN, import_reviews

    done = import_reviews(
        _dataset(options.dataset),
        options.file,
        connections,
        by=options.by,
        overwrite=options.overwrite,
        skip=options.skip,
    )
    told = f"{done.reviewed:,} rows reviewed, {done.cleared:,} reviews taken back, {done.unchanged:,} as they were"
    repeated = f", {done.repeated:,} there before in the file" if done.repeated else ""
    print(f"{told}{repeated}, {done.empty:,} without `reviewed_tags`, {len(done.problems):,} left out")
    for problem in done.problems[:PROBLEMS_SHOWN]:
        print(f"  {problem}")


def _dataset(name: str) -> Dataset:
    return load_dataset(find_dataset(name))
