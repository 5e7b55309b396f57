"""The images, the compose stack and its secrets: what can be checked without a Docker engine."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from tagger import __version__
from tagger.connections import connections_from_env, database, openai_client
from tagger.redis_connection import redis_client
from tagger.s3_connection import s3_client

ROOT = Path(__file__).parents[1]
COMPOSE_FILE = ROOT / "docker-compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {"airflow-init"}
OPTIONAL = {"OPENAI_BASE_URL"}
"""The variables that may be empty: no secrets."""

VARIABLE = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")
USES: list[tuple[str, str, str]] = VARIABLE.findall(COMPOSE_FILE.read_text())
"""Name, operator and what follows it of each variable in the compose file."""
VALUES = {name: f"{number:02x}" * 32 for number, name in enumerate(sorted({name for name, *_ in USES}), 16)}


def run(program: str, *arguments: str) -> None:
    path = Path(sysconfig.get_path("scripts"), program)
    done = subprocess.run([path, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def substituted(text: str) -> str:
    """Return what compose makes of a value with each variable set."""
    return VARIABLE.sub(lambda match: VALUES[match[1]], text).replace("$$", "$")


def setting(service: str, name: str) -> str:
    return substituted(SERVICES[service]["environment"][name])


def environments() -> dict[str, str]:
    """Return every variable of every service."""
    return {name: str(value) for service in SERVICES.values() for name, value in service.get("environment", {}).items()}


def instructions(name: str) -> list[list[str]]:
    """Return the arguments of each instruction of this name in the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith(f"{name} ")]


def example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


# compose file


def test_compose_file_follows_the_specification() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE))


def test_every_service_that_is_waited_for_exists_and_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES, name
            needed = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert how == {"condition": needed}, name


def test_named_volumes_are_declared_and_used() -> None:
    mounts = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert {source for source, *_ in mounts if not source.startswith(".")} == set(COMPOSE["volumes"])


def test_what_is_mounted_from_the_repository_exists_and_is_read_only() -> None:
    mounts = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", [])]
    bound = [mount for mount in mounts if mount[0].startswith(".")]
    assert bound
    for source, _, *mode in bound:
        assert (ROOT / source).exists()
        assert mode == ["ro"]


def test_only_the_web_interface_and_the_mail_page_are_published_on_loopback() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {"airflow-api-server": ["127.0.0.1:8080:8080"], "mailpit": ["127.0.0.1:8025:8025"]}
    assert not [name for name, service in SERVICES.items() if "network_mode" in service or "privileged" in service]


@pytest.mark.parametrize("name", ["airflow-worker", "airflow-worker-spot"])
def test_workers_can_be_scaled_and_stopped(name: str) -> None:
    service = SERVICES[name]
    assert not {"container_name", "hostname", "ports"} & set(service)
    assert service["init"] and service["environment"]["TINI_KILL_PROCESS_GROUP"]
    assert service["stop_grace_period"] == "60s"


@pytest.mark.parametrize("name", sorted(set(SERVICES) - ONE_SHOT))
def test_long_running_service_tells_its_health_and_comes_back(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("image", sorted({service["image"] for service in SERVICES.values()}))
def test_image_is_pinned(image: str) -> None:
    assert re.fullmatch(r"[a-z/]+:v?\d+(\.\d+)+(-[a-z]+)?", image)


def test_our_image_has_the_version_of_the_package() -> None:
    ours = {service["image"] for service in SERVICES.values() if "build" in service}
    assert ours == {f"tagger:{__version__}"}


# secrets


def test_env_example_names_each_variable_and_no_value() -> None:
    assert set(example()) == set(VALUES)
    assert set(example().values()) == {""}


def test_stack_does_not_start_with_a_secret_empty() -> None:
    for name, operator, _ in USES:
        assert operator == ("-" if name in OPTIONAL else "?"), name
    assert {default for _, operator, default in USES if operator == "-"} == {""}


def test_secrets_come_from_variables() -> None:
    for name, value in environments().items():
        if re.search(r"PASSWORD$|SECRET|KEY|AUTH$", name) or '"password"' in value:
            assert VARIABLE.search(value), name
        assert not re.search(r'://[^@/]*:[^@/]+@|"password": *"[^"]', VARIABLE.sub("", value)), name


def test_make_env_fills_in_every_secret_of_our_own(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / ".env.example").write_text((ROOT / ".env.example").read_text())
    script = tmp_path / "deploy" / "make-env.sh"
    script.write_text((ROOT / "deploy" / "make-env.sh").read_text())

    subprocess.run(["bash", script], check=True, capture_output=True)

    file = tmp_path / ".env"
    made = dict(line.split("=", 1) for line in file.read_text().splitlines() if line and not line.startswith("#"))
    assert file.stat().st_mode & 0o777 == 0o600
    assert {name for name, value in made.items() if not value} == {"OPENAI_API_KEY", "OPENAI_BASE_URL"}
    assert len(set(made.values())) == len(made) - 1
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}=", made.pop("AIRFLOW_FERNET_KEY"))
    assert all(re.fullmatch(r"([0-9a-f]{64})?", value) for value in made.values())
    assert subprocess.run(["bash", script], capture_output=True).returncode == 2


# Airflow's settings


def test_airflow_knows_every_setting() -> None:
    from airflow.configuration import conf

    known = {
        f"AIRFLOW__{section.upper().replace('.', '_')}__{option.upper()}"
        for section, description in conf.configuration_description.items()
        for option in description["options"]
    }
    assert {name for name in environments() if name.startswith("AIRFLOW__")} <= known


def test_executor_loads() -> None:
    """The lock's Celery and its provider fit together."""
    code = "import airflow.providers.celery.executors.celery_executor, airflow.providers.celery.cli.celery_command"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_connections_are_those_of_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = SERVICES["airflow-worker"]["environment"]
    names = [name for name in environment if name.startswith("AIRFLOW_CONN_")]
    for name in names:
        value = substituted(environment[name])
        assert json.loads(value)
        monkeypatch.setenv(name, value)
    assert len(names) == 5

    engine = database("tagger_db", connections_from_env)
    assert (engine.url.host, engine.url.database, engine.url.username) == ("postgres", "tagger", "tagger")
    assert engine.url.password == setting("postgres", "TAGGER_DB_PASSWORD")
    s3 = s3_client("aws_default", connections_from_env)
    assert s3.meta.endpoint_url == "http://seaweedfs:8333"
    keys = connections_from_env("aws_default")
    assert keys is not None
    assert (keys.login, keys.password) == (
        setting("seaweedfs", "AWS_ACCESS_KEY_ID"),
        setting("seaweedfs", "AWS_SECRET_ACCESS_KEY"),
    )
    assert openai_client("openai_default", connections_from_env).api_key == VALUES["OPENAI_API_KEY"]
    with redis_client("redis_default", connections_from_env) as redis:
        options = redis.connection_pool.connection_kwargs
    assert (options["host"], options["db"], options["password"]) == ("valkey", 1, setting("valkey", "REDISCLI_AUTH"))
    mail = connections_from_env("smtp_default")
    assert mail is not None
    assert (mail.host, mail.port, mail.extra["from_email"]) == ("mailpit", 1025, "tagger@example.com")


# images


def test_dockerfile_and_scripts_are_clean() -> None:
    run("hadolint", "Dockerfile")
    run("shellcheck", *map(str, sorted(ROOT.glob("deploy/*.sh"))))


def test_dockerfile_has_both_targets_and_they_run_as_a_fixed_user() -> None:
    stages = [arguments[2] for arguments in instructions("FROM")]
    assert stages[-1] == "airflow"  # the default
    assert "tag" in stages
    assert instructions("USER") == [["50000"], ["50000"]]
    assert instructions("ENTRYPOINT") == [["[tagger]"]]


def test_base_image_is_pinned() -> None:
    bases = [base for base, _, stage in instructions("FROM")]
    stages = [stage for _, _, stage in instructions("FROM")]
    outside = [base for base in bases if base not in stages]
    assert outside and all(re.fullmatch(r"python:3\.1[123]\.\d+-slim-[a-z]+", base) for base in outside)


def test_all_that_is_copied_exists_and_is_let_in() -> None:
    copied = [
        source for *sources, _ in instructions("COPY") if not sources[0].startswith("--from") for source in sources
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert not ignored(source), source


@pytest.mark.parametrize("path", [".env", ".git/config", ".venv/bin/python", ".demo/logs", "tests/conftest.py"])
def test_dockerignore_keeps_out(path: str) -> None:
    assert ignored(path)


def ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a path out; the last pattern that matches it or a folder above it decides."""
    decided = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch(str(part), pattern) for part in (Path(path), *Path(path).parents)):
                decided = not line.startswith("!")
    return decided


def test_locks_agree() -> None:
    """What `tagger tag` runs with is what Airflow runs with."""

    def versions(file: str) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE))

    slim, full = versions("requirements-tag.txt"), versions("requirements.txt")
    assert slim.items() <= full.items()
    assert not [name for name in slim if name.startswith("apache-airflow")]
