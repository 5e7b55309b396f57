"""Public labelled texts as a dataset file and labels for `tagger evaluate` and `tagger compare`.

    python -m bench.labelled medical_abstracts FOLDER OUT     write OUT/medical_abstracts.yaml and .labels.csv
    python -m bench.labelled clinc_oos FOLDER OUT
    python -m bench.labelled medical_abstracts FOLDER OUT -- tagger evaluate …    and run a command beside the servers

FOLDER holds the set's own files. With a command, SeaweedFS runs with its data in OUT, and the offline stand-in answers
unless `OPENAI_BASE_URL` or `OPENAI_API_KEY` is set; the command finds the dataset by its name. The model is the one
line `model:` of the dataset file; `--model` sets it.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from demo.seaweedfs import SeaweedFS, s3_client
from demo.stand_in import StandIn

BUCKET = "labelled"
STAND_IN_MODEL = "offline-stand-in"

Labelled = Iterator[tuple[str, str]]
"""Texts and their labels; an empty label is no tag."""

MEDICAL = {
    "neoplasms": "Tumours, benign and malignant: cancer, carcinoma, sarcoma, lymphoma, leukemia, metastasis, and their "
    "chemotherapy, radiotherapy and surgery.",
    "digestive_system_diseases": "Diseases of the oesophagus, stomach, bowel, colon, liver, bile ducts, gallbladder "
    "and pancreas: ulcer, hepatitis, cirrhosis, gastritis, colitis, pancreatitis, gastrointestinal bleeding.",
    "nervous_system_diseases": "Diseases of the brain, spinal cord and nerves: stroke, epilepsy, seizures, dementia, "
    "Parkinson's disease, multiple sclerosis, neuropathy, headache, cerebral and neurologic disorders.",
    "cardiovascular_diseases": "Diseases of the heart and blood vessels: myocardial infarction, coronary artery "
    "disease, hypertension, arrhythmia, ventricular failure, aortic aneurysm, thrombosis.",
    "general_pathological_conditions": "Conditions that belong to no single one of the other systems: infection, pain, "
    "fever, inflammation, injury, shock, haemorrhage, complications, postoperative and congenital conditions.",
}
"""Ids and descriptions, in the order of the set's labels 1 to 5."""


def medical_abstracts(folder: Path) -> tuple[dict[str, Any], Labelled]:
    """Return the dataset file's part of its own and the labelled texts of the test split."""
    ids = list(MEDICAL)

    def texts() -> Labelled:
        with (folder / "medical_tc_test.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield row["medical_abstract"], ids[int(row["condition_label"]) - 1]

    return {
        "prompt": "You sort abstracts of medical articles by the class of conditions that the patients have. "
        "Go by what an article is about, not by what it mentions.",
        "tags": [{"id": tag, "description": description} for tag, description in MEDICAL.items()],
        "max_tags": 1,
        "allow_none": True,  # a text without a tag is a wrong answer; where one is required, it would be asked again
    }, texts()


def clinc_oos(folder: Path) -> tuple[dict[str, Any], Labelled]:
    """Return the dataset file's part of its own and the labelled texts: the test split, and the one out of scope."""
    splits = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    intents = sorted({intent for _, intent in splits["test"]})
    return {
        "prompt": "You sort what people say to an assistant by their intent. Where none of the intents fits, the "
        "sentence is out of scope: give no tag.",
        "tags": [{"id": intent, "description": _described(intent)} for intent in intents],
        "max_tags": 1,
        "allow_none": True,
    }, ((text, "" if intent == "oos" else intent) for text, intent in splits["test"] + splits["oos_test"])


def _described(intent: str) -> str:
    return f"The user's intent is: {intent.replace('_', ' ')}."


SETS: dict[str, Callable[[Path], tuple[dict[str, Any], Labelled]]] = {
    "medical_abstracts": medical_abstracts,
    "clinc_oos": clinc_oos,
}


def convert(name: str, folder: Path, out: Path, model: str = STAND_IN_MODEL) -> None:
    """Write a set's dataset file and labels into `out`."""
    own, labelled = SETS[name](folder)
    content = {
        "dataset": name,
        "storage": f"s3://{BUCKET}/{name}",
        "source": {"conn_id": "tagger_db", "table": name, "id_column": "id", "text_columns": ["text"]},
        "target": {"table": f"{name}_tags"},
        "llm": {"model": model} | ({"price": 0} if model == STAND_IN_MODEL else {}),
        **own,
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with (out / f"{name}.labels.csv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["text", "tags"])
        writer.writerows(labelled)


def main() -> int:
    """Convert a set, and run a command if there is one; return its exit code."""
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser("python -m bench.labelled", usage="%(prog)s SET FOLDER OUT [--model M] [-- …]")
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=STAND_IN_MODEL)
    options = parser.parse_args(arguments[:split])
    out: Path = options.out.absolute()
    try:
        convert(options.set, options.folder, out, options.model)
    except OSError as e:
        parser.error(f"{e.filename}: {e.strerror}; FOLDER has to hold the set's own files")
    command = arguments[split + 1 :]
    return _beside_servers(command, out) if command else 0


def _beside_servers(command: list[str], out: Path) -> int:
    with ExitStack() as stack:
        store = stack.enter_context(SeaweedFS(out / "seaweedfs", out / "seaweedfs.log"))
        client = s3_client(store.endpoint, store.access_key, store.secret_key)
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        aws = {"login": store.access_key, "password": store.secret_key, "extra": {"endpoint_url": store.endpoint}}
        environment = os.environ | {
            "AIRFLOW_CONN_AWS_DEFAULT": json.dumps({"conn_type": "aws", **aws}),
            "TAGGER_DATASETS": str(out),
        }
        if not {"OPENAI_BASE_URL", "OPENAI_API_KEY"} & environment.keys():
            stand_in = stack.enter_context(StandIn())
            environment |= {"OPENAI_BASE_URL": stand_in.base_url, "OPENAI_API_KEY": "offline"}
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
