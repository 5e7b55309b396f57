"""What a benchmark tags: texts that are the same in every run, their table, the dataset file, and the connections."""

import json
import os
import sqlite3
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tagger.dataset import Dataset

if TYPE_CHECKING:  # contenders have no servers
    from tests.servers import RedisServer

BUCKET = "bench"
CHARS = 300

LOCK = {"conn_id": "redis_default"}
"""`lock` of a dataset file."""

FOREIGN = ("AIRFLOW_", "AWS_", "OPENAI_", "TAGGER_", "LUIGI_")
"""Variables of the user's that no benchmark may see."""

_ENGLISH_TEXT = """
patients with chronic disease were followed after treatment and the outcome compared against a control group over
several years of careful study in which blood pressure heart rate weight sleep diet and exercise were measured every
month by trained staff at twelve hospitals while adverse events such as fever pain rash or infection were reported
"""
_JAPANESE_TEXT = """
患者 治療 結果 比較 研究 血圧 心拍数 体重 睡眠 食事 運動 測定 病院 発熱 疼痛 感染 報告 慢性疾患 追跡 調査 において
による された について および 高齢者 小児 手術 診断 薬剤 投与 副作用 改善 検査 予防 が の を に は した
"""
_ENGLISH, _JAPANESE = _ENGLISH_TEXT.split(), _JAPANESE_TEXT.split()

TAGS = [
    {"id": "cardiology", "description": "Heart and blood vessels."},
    {"id": "neurology", "description": "Brain, nerves and muscles."},
    {"id": "oncology", "description": "Tumours and their treatment."},
    {"id": "infection", "description": "Bacteria, viruses, fungi, parasites and what they cause."},
    {"id": "surgery", "description": "Operations, their preparation and their aftermath."},
    {"id": "children", "description": "Patients under eighteen."},
    {"id": "nutrition", "description": "Diet, weight and metabolism."},
    {"id": "mental_health", "description": "Mood, behaviour, sleep and addiction."},
]


def text(number: int) -> str:
    """Return the text of a number: about 300 characters, English if it is even, Japanese if it is odd."""
    random = Random(number)
    if number % 2:
        return (f"症例{number}: " + "".join(random.choices(_JAPANESE, k=160)))[:CHARS]
    return (f"Case {number}: " + " ".join(random.choices(_ENGLISH, k=70)))[:CHARS]


def dataset(storage: str, *, in_flight: int, table: str = "texts", **changes: Any) -> dict[str, Any]:
    """Return the content of a dataset file. `storage` is a name below the bucket; `changes` are further keys."""
    return {
        "dataset": "bench",
        "storage": f"s3://{BUCKET}/{storage}",
        "source": {"conn_id": "source", "table": table, "id_column": "id", "text_columns": ["body"]},
        "target": {"table": f"{table}_tags"},
        "llm": {"model": "bench-model", "concurrency": in_flight, "price": {"input": 0.25, "output": 2.0}},
        "prompt": "You tag medical articles by topic. Go by what an article is about, not by what it mentions.",
        "tags": TAGS,
        **changes,
    }


def create_source(path: Path, texts: int, table: str = "texts") -> None:
    """Write the texts 0, 1, … into a table of an SQLite file."""
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, body TEXT NOT NULL)")
        connection.executemany(f"INSERT INTO {table} VALUES (?, ?)", ((n, text(n)) for n in range(texts)))
    connection.close()


def request(parsed: Dataset, key: str, body: str) -> dict[str, Any]:
    """Return what the SDK is given to ask for a text's tags: the same for all contenders."""
    from tagger.prompt import Prompt, response_format

    asked = Prompt(parsed).messages(key, body)
    return {"model": parsed.llm.model, "messages": asked, "response_format": response_format(parsed)}


def redis_connection(server: "RedisServer") -> dict[str, Any]:
    """Return the connection that `LOCK` names."""
    return {"conn_type": "redis", "host": server.host, "port": server.port}


def environment(
    s3_url: str, llm_url: str, source: Path, keys: tuple[str, str] = ("bench", "bench"), **more: dict[str, Any]
) -> dict[str, str]:
    """Return the environment of a contender: its connections, and nothing of the user's accounts.

    `keys` is S3's key pair, `more` are further connections by their id.
    """
    ours = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN) and "proxy" not in k.lower()}
    login, password = keys
    aws = {"conn_type": "aws", "login": login, "password": password, "extra": {"endpoint_url": s3_url}}
    others = {f"AIRFLOW_CONN_{conn_id.upper()}": json.dumps(connection) for conn_id, connection in more.items()}
    return (
        ours
        | others
        | {
            "AIRFLOW_CONN_SOURCE": json.dumps({"conn_type": "sqlite", "host": str(source)}),
            "AIRFLOW_CONN_AWS_DEFAULT": json.dumps(aws),
            "AIRFLOW_CONN_OPENAI_DEFAULT": json.dumps({"conn_type": "openai", "host": llm_url, "password": "bench"}),
            # for gokart, which reads no connections
            "AWS_ACCESS_KEY_ID": login,
            "AWS_SECRET_ACCESS_KEY": password,
            "AWS_ENDPOINT_URL_S3": s3_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
    )
