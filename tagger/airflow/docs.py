"""What the Airflow UI tells of a DAG and its steps to whoever is on call."""

from tagger.dataset import Dataset

DAG = """Tags the new and changed texts of `{source}` with {model} and writes the tags to `{target}`.

| step | what it does | when it fails |
|---|---|---|
| snapshot | takes the run's rows out of the source to `{storage}` | the message names the connection, table or column |
| plan | finds out which texts the cache lacks, and what they cost | as above; nothing is paid for yet |
| tag | asks the LLM, one gokart task per text; answers are kept at once | clear it: no answered text is asked again |
| load_back | writes the tags in one transaction | clear it: it is idempotent |
| report | sums the run up and fails it if too much failed | its log, and the mail, say why |

**To tag a day again**, trigger with a target date, or create a backfill. **To load the whole table**, or to bring a new
prompt to old rows, trigger with `rows: all`; with `dry_run` first, to see what that costs. A text that failed is asked
again by the next run, however old its row is. A text that is tagged is never paid for twice.

**Tagging** in the navigation shows what this dataset costs and how its tags move; the tab of that name at a run, how
far its shards are and which rows failed.

Source `{source_asset}` → target `{target_asset}`: other DAGs can be scheduled on the target's asset.
"""

STEPS = {
    "snapshot": """Takes the run's rows out of the source table to storage, and freezes the dataset file for the run.

**It fails** when the source or the storage is away, when a table or column is missing, or when ids appear twice or
timestamps are none; the last line of the log names it. Nothing is paid for yet. Mend it, then clear this task.""",
    "plan": """Finds out which of the texts have no answer in the cache, and spreads them over shards. The log says how
many are new, and what they will cost. Beyond the budget none is asked: there is no shard, and `report` fails the run
with the figures.

**It fails** when storage or target is away, or when a cost limit is set and the model's price is not known. Nothing is
paid for yet. Mend it, then clear this task.""",
    "tag": """Asks the LLM for the tags of one shard's texts; each answer is written to the cache at once. Single texts
that fail do not fail the shard. With `llm.mode: batch` it hands them to the Batch API, and is *deferred* for up to 24
hours while the provider works; a try after that goes on with the batch in flight and hands nothing over twice.

**It fails** when the endpoint refuses every call (wrong key, unknown model, no quota), when the budget is spent, or
when storage is away. The texts not asked become `skipped`. Mend the cause, then clear this task with what follows it:
no answered text is asked again. Left alone, the next run asks for the rest.""",
    "shards_ended": "Waits until all shards have ended, in whatever state.",
    "load_back": """Writes the tags into the target table in one transaction. Skipped where no row of it changes; else
the target's asset is updated, with the counts.

**It fails** when the target is away, or when more rows would be deleted than `limits.max_deleted_fraction` allows; the
tags are written then, and nothing is deleted. Clear it to do it again: it is idempotent.""",
    "load_ended": "Waits until load_back has ended, in whatever state.",
    "report": """Sums the run up: rows, texts by outcome, cost, failures by kind.

**It fails**, and with it the run, when a shard broke, when load_back did not succeed, when the budget was reached or
when more texts failed than `limits.max_failed_fraction` allows. The last line of the log, and the mail, say which.""",
    "dataset_file": "Fails with what is wrong in the dataset file. Mend the file; the DAG is back a minute later.",
}


def of_dag(dataset: Dataset) -> str:
    """Return the docs of a dataset's DAG, in Markdown."""
    return DAG.format(
        source=dataset.source.table,
        model=dataset.llm.model,
        target=dataset.target.table,
        storage=dataset.storage,
        source_asset=dataset.source_asset,
        target_asset=dataset.target_asset,
    )
