import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import openai
import pytest
from botocore.exceptions import ClientError

from bench.endpoints import LLMEndpoint, S3Endpoint
from bench.measure import measured
from bench.project import dataset, request, text
from bench.report import Bound, ratio, table
from bench.seed import Seed
from demo.seaweedfs import s3_client
from tagger.cache import Cache
from tagger.dataset_files import parse_dataset
from tagger.spec import normalise, spec_id, text_key
from tagger.storage import Storage
from tests.conftest import REPOSITORY

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@pytest.fixture(scope="module")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with S3Endpoint(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_endpoint: S3Endpoint) -> "S3Client":
    s3_endpoint.clear()
    s3_endpoint.reset()
    return s3_client(s3_endpoint.url, "any", "any")


@pytest.fixture(scope="module")
def llm_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMEndpoint]:
    with LLMEndpoint(tmp_path_factory.mktemp("llm")) as server:
        yield server


@pytest.fixture
def client(llm_endpoint: LLMEndpoint) -> Iterator[openai.OpenAI]:
    llm_endpoint.behave(latency=0.01, share_429=0, retry_after=1)
    llm_endpoint.reset()
    with openai.OpenAI(base_url=llm_endpoint.base_url, api_key="any", max_retries=0) as client:
        yield client


class TestS3:
    def test_an_object_is_written_read_and_deleted(self, s3: "S3Client") -> None:
        s3.put_object(Bucket="b", Key="folder/一つ +&.json", Body=b"body")
        assert s3.get_object(Bucket="b", Key="folder/一つ +&.json")["Body"].read() == b"body"
        assert s3.head_object(Bucket="b", Key="folder/一つ +&.json")["ContentLength"] == 4
        s3.delete_object(Bucket="b", Key="folder/一つ +&.json")
        with pytest.raises(ClientError, match="NoSuchKey"):
            s3.get_object(Bucket="b", Key="folder/一つ +&.json")
        with pytest.raises(ClientError, match="404"):
            s3.head_object(Bucket="b", Key="folder/一つ +&.json")

    @pytest.mark.parametrize(
        ("headers", "body"),
        [
            ({"Transfer-Encoding": "chunked"}, b"4\r\nWiki\r\n5\r\npedia\r\n0\r\n\r\n"),
            ({"Content-Encoding": "aws-chunked"}, b"9;chunk-signature=0a\r\nWikipedia\r\n0\r\nx-amz-crc:1\r\n\r\n"),
        ],
    )
    def test_a_body_in_chunks_is_decoded(
        self, s3_endpoint: S3Endpoint, s3: "S3Client", headers: dict[str, str], body: bytes
    ) -> None:
        connection = HTTPConnection(s3_endpoint.url.removeprefix("http://"), timeout=10)
        connection.request("PUT", "/b/chunked", body, headers)
        assert connection.getresponse().status == 200
        connection.close()
        assert s3.get_object(Bucket="b", Key="chunked")["Body"].read() == b"Wikipedia"

    def test_a_part_of_an_object_is_read(self, s3: "S3Client") -> None:
        s3.put_object(Bucket="b", Key="k", Body=b"0123456789")
        answer = s3.get_object(Bucket="b", Key="k", Range="bytes=2-4")
        assert (answer["Body"].read(), answer["ContentRange"]) == (b"234", "bytes 2-4/10")
        assert s3.get_object(Bucket="b", Key="k", Range="bytes=-3")["Body"].read() == b"789"

    def test_an_object_that_exists_is_not_created(self, s3: "S3Client") -> None:
        s3.put_object(Bucket="b", Key="k", Body=b"first", IfNoneMatch="*")
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="b", Key="k", Body=b"second", IfNoneMatch="*")
        assert s3.get_object(Bucket="b", Key="k")["Body"].read() == b"first"

    @pytest.mark.parametrize("operation", ["list_objects_v2", "list_objects"])
    def test_a_listing_comes_in_pages_and_in_order(
        self, s3: "S3Client", operation: Literal["list_objects", "list_objects_v2"]
    ) -> None:
        names = [f"p/{number:02d} +%&<é>" for number in range(25)]
        for name in [*reversed(names), "o/before", "q/after"]:
            s3.put_object(Bucket="b", Key=name, Body=b"x")
        s3.delete_object(Bucket="b", Key=names.pop(7))
        paginator: Any = s3.get_paginator(operation)
        pages = list(paginator.paginate(Bucket="b", Prefix="p/", PaginationConfig={"PageSize": 10}))
        assert [len(page["Contents"]) for page in pages] == [10, 10, 4]
        assert [item["Key"] for page in pages for item in page["Contents"]] == names
        assert {item["Size"] for page in pages for item in page["Contents"]} == {1}

    def test_a_listing_with_a_delimiter_has_common_prefixes(self, s3: "S3Client") -> None:
        for name in ("a", "d/1", "d/2", "e/1", "f"):
            s3.put_object(Bucket="b", Key=name, Body=b"x")
        pages = list(
            s3.get_paginator("list_objects_v2").paginate(Bucket="b", Delimiter="/", PaginationConfig={"PageSize": 2})
        )
        assert [item["Key"] for page in pages for item in page.get("Contents", [])] == ["a", "f"]
        assert [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])] == ["d/", "e/"]

    def test_a_key_removed_and_written_again_is_listed_once(self, s3: "S3Client") -> None:
        for _ in range(2):
            s3.put_object(Bucket="b", Key="k", Body=b"x")
            s3.delete_objects(Bucket="b", Delete={"Objects": [{"Key": "k"}]})
        s3.put_object(Bucket="b", Key="k", Body=b"x")
        assert [item["Key"] for item in s3.list_objects_v2(Bucket="b")["Contents"]] == ["k"]

    def test_a_large_file_goes_in_parts_and_comes_back(
        self, s3_endpoint: S3Endpoint, s3: "S3Client", tmp_path: Path
    ) -> None:
        body = os.urandom(20_000_000)
        (tmp_path / "up").write_bytes(body)
        s3.upload_file(str(tmp_path / "up"), "b", "large")
        s3.download_file("b", "large", str(tmp_path / "down"))
        assert (tmp_path / "down").read_bytes() == body
        counts = s3_endpoint.requests()["files"]
        assert (counts["CreateMultipartUpload"], counts["UploadPart"], counts["CompleteMultipartUpload"]) == (1, 3, 1)

    def test_requests_are_counted_by_operation_and_apart_for_records(
        self, s3_endpoint: S3Endpoint, s3: "S3Client"
    ) -> None:
        s3.put_object(Bucket="b", Key="x/cache/spec/k", Body=b"")
        s3.list_objects_v2(Bucket="b", Prefix="x/cache/spec/")
        s3.put_object(Bucket="b", Key="x/runs/r", Body=b"")
        s3.head_bucket(Bucket="b")
        assert s3_endpoint.requests() == {
            "records": {"ListObjectsV2": 1, "PutObject": 1},
            "files": {"HeadBucket": 1, "PutObject": 1},
        }
        s3_endpoint.reset()
        assert s3_endpoint.requests() == {"records": {}, "files": {}}

    def test_what_it_does_not_know_is_refused(self, s3_endpoint: S3Endpoint, s3: "S3Client") -> None:
        with pytest.raises(ClientError, match="NotImplemented"):
            s3.get_bucket_versioning(Bucket="b")
        assert s3_endpoint.requests()["files"] == {"Other": 1}


class TestSeed:
    def test_seeded_records_are_found_by_the_cache_and_by_the_plan_of_the_same_dataset(
        self, s3_endpoint: S3Endpoint, s3: "S3Client", tmp_path: Path
    ) -> None:
        content = dataset("here", in_flight=4)
        parsed = parse_dataset(content, "bench.yaml")
        spec = spec_id(parsed)
        keys = [text_key(spec, normalise(text(number))) for number in range(100)]
        Seed(content, 100, tmp_path).fill(s3_endpoint, missing={0, 50})
        cache = Cache(Storage(parsed.storage, s3), spec, parsed.llm.model)
        assert cache.find(keys) == set(keys) - {keys[0], keys[50]}
        record = cache.read(keys[1])
        assert record is not None
        assert record.tags == ["cardiology"]

    def test_a_hundred_thousand_records_are_listed(
        self, s3_endpoint: S3Endpoint, s3: "S3Client", tmp_path: Path
    ) -> None:
        (tmp_path / "keys").write_text("".join(f"cache/{number:06d}\n" for number in range(100_000)))
        s3_endpoint.seed("b", tmp_path / "keys", "x" * 100)
        s3.put_object(Bucket="b", Key="cache/0500005", Body=b"y")
        pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket="b", Prefix="cache/05"))
        assert sum(page["KeyCount"] for page in pages) == 10_001
        assert s3.head_object(Bucket="b", Key="cache/099999")["ContentLength"] == 100


class TestLLM:
    def test_an_answer_has_tags_of_the_schema_and_usage(self, client: openai.OpenAI) -> None:
        parsed = parse_dataset(dataset("x", in_flight=1), "bench.yaml")
        answer = client.chat.completions.create(**request(parsed, "0" * 32, "a text"))
        content = json.loads(answer.choices[0].message.content or "")
        assert len(content["tags"]) == 1
        assert set(content["tags"]) <= set(parsed.tag_ids)
        assert answer.model == "bench-model"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 400

    def test_calls_are_counted_by_text(self, llm_endpoint: LLMEndpoint, client: openai.OpenAI) -> None:
        llm_endpoint.behave(latency=0.3)
        parsed = parse_dataset(dataset("x", in_flight=1), "bench.yaml")
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda t: client.chat.completions.create(**request(parsed, "k", t)), ["a", "b", "a"]))
        stats = llm_endpoint.stats()
        assert (stats["calls"], stats["texts"], stats["most_calls_per_text"]) == (3, 2, 2)
        assert stats["most_at_once"] == 3
        assert stats["cpu_seconds"] > 0
        llm_endpoint.reset()
        assert llm_endpoint.stats()["calls"] == 0

    def test_a_share_of_the_calls_is_refused(self, llm_endpoint: LLMEndpoint, client: openai.OpenAI) -> None:
        llm_endpoint.behave(share_429=1, retry_after=7)
        parsed = parse_dataset(dataset("x", in_flight=1), "bench.yaml")
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**request(parsed, "k", "a text"))
        assert refused.value.response.headers["retry-after"] == "7"
        stats = llm_endpoint.stats()
        assert (stats["answered_429"], stats["texts"], stats["most_calls_per_text"]) == (1, 0, 0)


def test_texts_are_distinct_and_of_about_300_characters() -> None:
    texts = [text(number) for number in range(2000)]
    assert len({normalise(each) for each in texts}) == 2000
    assert 280 < min(map(len, texts)) <= max(map(len, texts)) == 300
    assert text(7) == texts[7]


def test_a_step_is_measured() -> None:
    took = measured(lambda: {"n": sum(range(100_000))})
    assert took.returned == {"n": 4999950000}
    assert took.seconds > 0
    assert took.peak_mb > 1


def test_a_table_is_aligned_and_a_ratio_of_nothing_is_unknown() -> None:
    assert table("Title", ("", "n"), [("a", 1.0), ("bb", None)]).splitlines()[1:] == [
        "Title",
        "       n",
        "--  ----",
        "a   1.00",
        "bb     -",
    ]
    assert ratio(None, 2.0) is None
    assert ratio(1.0, 2.0) == 0.5


def test_a_bound_that_is_not_known_is_not_reached() -> None:
    assert not Bound("x", None, 1).reached
    assert Bound("x", 1, 1).reached
    assert Bound("x", 2, 1, at_least=True).reached


@pytest.mark.slow
def test_tree_prints_a_table_and_writes_the_ratios(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    command = [sys.executable, "-m", "bench.tree", "--texts", "50", "--latency", "0.05", "--json", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert "50 texts, 0.05 s, 64 in flight: tagger" in done.stdout
    content = json.loads(file.read_text())
    lines = {line["contender"]: line for line in content["summary"]}
    assert lines["floor"]["throughput_to_floor"] == 1
    assert lines["tagger"]["throughput_to_floor"] > 0
    assert lines["tagger"]["cpu_to_floor"] > 0
    assert {trial["contender"]: trial["s3"]["records"] for trial in content["trials"]} == {
        "floor": {"PutObject": 50},
        "tagger": {"PutObject": 50},
    }


@pytest.mark.slow
def test_tables_copies_loads_and_writes_the_ratios(tmp_path: Path) -> None:
    file = tmp_path / "tables.json"
    command = [sys.executable, "-m", "bench.tables", "--rows", "2000", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    lines = {line["step"]: line for line in json.loads(file.read_text())["summary"]}
    assert {name for name, line in lines.items() if line["to_copy"]} == {"snapshot", "load", "second load"}
    [round_] = json.loads(file.read_text())["trials"]
    assert round_["steps"]["load"]["returned"] == {"written": 2000, "deleted": 0, "tags": 2000}
    assert round_["steps"]["second load"]["returned"] == {"written": 0, "deleted": 0, "tags": 2000}
