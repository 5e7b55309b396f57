"""One Airflow DAG for each dataset file in the folder `datasets` beside this file, or in `$TAGGER_DATASETS`."""

import os
from pathlib import Path

from tagger.airflow.dags import tagging_dags

globals().update(tagging_dags(Path(os.environ.get("TAGGER_DATASETS") or Path(__file__).parent / "datasets")))
