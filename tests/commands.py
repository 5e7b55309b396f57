"""The commands of a page of `docs/`, and stand-ins for programs in them that a machine of the tests need not have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
import yaml

from tests.conftest import REPOSITORY

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```(sh|sql|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of commands under a heading: those that look, those that mend, and the edit of the file in between."""

    title: str
    number: int
    """Of the block below its heading, from 1."""
    look: tuple[str, ...]
    mend: tuple[str, ...]
    edit: dict[str, Any]

    def __str__(self) -> str:
        """Name it for a test."""
        return self.title if self.number == 1 else f"{self.title} ({self.number})"

    @property
    def wants_airflow(self) -> bool:
        """Whether Airflow has to run."""
        return any(line.startswith("airflow ") for line in self.look + self.mend)


def fenced(page: str) -> dict[str, list[tuple[str, str]]]:
    """Return what stands between fences in a page of `docs/`, each with its language, by heading."""
    sections = _SECTION.findall((REPOSITORY / "docs" / page).read_text(encoding="utf-8"))
    return {title: _FENCED.findall(section) for title, section in sections}


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page of `docs/` whose commands stand below `# look` and `# mend`."""
    found = []
    for title, section in fenced(page).items():
        number, edit = 0, {}
        for kind, content in section:
            if kind == "yaml":
                edit = yaml.safe_load(content)
            else:
                number += 1
                looks, _, mends = content.removeprefix("# look\n").partition("# mend\n")
                found.append(Block(title, number, tuple(looks.splitlines()), tuple(mends.splitlines()), edit))
    return found


def redis_cli(words: Sequence[str]) -> str:
    """Return what `redis-cli -u URL …` prints: `--scan --pattern PATTERN`, or a command."""
    option, url, *command = words
    assert option == "-u"
    with redis.Redis.from_url(url, decode_responses=True) as client:
        if command[:2] == ["--scan", "--pattern"]:
            return "\n".join(client.scan_iter(command[2]))
        return str(client.execute_command(*command))


def aws_s3(client: S3Client, words: Sequence[str]) -> None:
    """Do what `aws s3 rm URL` and `aws s3 sync URL URL` do."""
    command, *urls = words
    (bucket, key), *to = (url.removeprefix("s3://").split("/", 1) for url in urls)
    if command == "rm":
        client.delete_object(Bucket=bucket, Key=key)
        return
    assert command == "sync"
    [[new_bucket, new_key]] = to
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key.rstrip('/')}/"):
        for item in page.get("Contents", []):
            name = new_key.rstrip("/") + item["Key"].removeprefix(key.rstrip("/"))
            client.copy_object(Bucket=new_bucket, Key=name, CopySource={"Bucket": bucket, "Key": item["Key"]})
