"""The trigger form, which is the backfill form too: what a run may do otherwise than the dataset file says."""

from typing import Any

from airflow.sdk import Param

from tagger.dataset import Dataset


def params(dataset: Dataset) -> dict[str, Param]:
    """Return the parameters of a dataset's DAG."""
    cap = dataset.limits.max_cost_usd
    fields: dict[str, dict[str, Any]] = {
        "target_date": {
            "default": None,
            "type": ["null", "string"],
            "format": "date",
            "title": "Target date",
            "description": f"Take the rows changed on this day ({dataset.timezone}) instead of the run's own window. "
            "Leave it empty in a backfill: there each run has its own date.",
        },
        "rows": {
            "default": "window",
            "type": "string",
            "enum": ["window", "all"],
            "title": "Rows",
            "description": "window: the rows changed since the run before, and those not finished yet. all: the whole "
            "table, to load it first or to bring a new prompt to old rows. Texts that are tagged already cost nothing.",
        },
        "limit": {
            "default": None,
            "type": ["null", "integer"],
            "minimum": 1,
            "title": "Limit",
            "description": "Ask for the first so many new texts only, to try something out. The others count "
            "as skipped, and the next run asks for them.",
        },
        "dry_run": {
            "default": False,
            "type": "boolean",
            "title": "Dry run",
            "description": "Only find out how many texts are new and what they would cost, as the log of the "
            "plan step tells. No text is asked, nothing is written to the target table.",
        },
        "retry_refused": {
            "default": False,
            "type": "boolean",
            "title": "Ask for refused texts again",
            "description": "Texts that the LLM refused (content filter, too long an answer) are asked again, and paid "
            "for again. Otherwise they stay refused.",
        },
        "max_cost_usd": {
            "default": None,
            "type": ["null", "number"],
            "exclusiveMinimum": 0,
            "title": "Most that this run may cost (USD)",
            "description": "No new call starts when so much is spent. Empty: as in the dataset file ("
            + ("no limit" if cap is None else f"${cap:g}")
            + ").",
        },
    }
    return {name: Param(**field) for name, field in fields.items()}
