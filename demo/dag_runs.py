"""A process that runs DAGs with `dag.test()`: one JSON line in for each run, one JSON line out at its end.

It is kept for all runs of the demo, since importing Airflow and starting its first run take most of the time. What
Airflow itself prints goes to stderr.
"""

import json
import os
import runpy
import sys
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy


def main() -> None:
    """Answer the requests on stdin until it is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from airflow.utils.db import initdb
    from airflow.utils.session import create_session

    with create_session() as session:
        is_new = not sqlalchemy.inspect(session.get_bind()).has_table("dag_run")
    if is_new:
        initdb()
    dags = runpy.run_path(str(Path(os.environ["AIRFLOW__CORE__DAGS_FOLDER"], "tagging.py")))

    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        dag = dags[request["dag_id"]]
        dag.deadline = None  # of which dag.test() makes something that it cannot read at the run's end
        started = datetime.now(UTC)
        run = dag.test(logical_date=datetime.fromisoformat(request["logical_date"]), run_conf=request["conf"])
        with create_session() as session:  # dag.test() has the run start at its logical date
            run.start_date = started
            session.merge(run)
        print(json.dumps({"run_id": run.run_id, "state": str(run.state)}), file=answers)


if __name__ == "__main__":
    main()
