"""The stand-in as the real OpenAI client and a plain HTTP client see it."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from demo.stand_in import MODEL, Reply, StandIn, completion, error, estimate_tokens, token_usage

ROOT = Path(__file__).parents[2]
ENGLISH = {
    "cardiology": "Heart and blood vessels.",
    "oncology": "Cancers and tumours.",
    "infection": "Infectious diseases, vaccines.",
}
JAPANESE = {"循環器": "心臓と血管の病気", "腫瘍": "がん、腫瘍の治療", "感染症": "ウイルスとワクチン"}
KEY = "00ff"


def body(text: str, tags: dict[str, str] = ENGLISH, at_most: int = 3, key: str = KEY, schema: bool = True) -> Any:
    """Return a request's body in the tagger's form."""
    lines = [f"- {tag}: {description}" for tag, description in tags.items()]
    system = "\n".join(["You tag articles.", *lines, f"Choose at most {at_most} tags. Answer in JSON."])
    items = {"type": "string", "enum": list(tags)}
    form = {"type": "object", "properties": {"tags": {"type": "array", "items": items}}}
    strict = {"type": "json_schema", "json_schema": {"name": "tags", "strict": True, "schema": form}}
    user = f'<text id="{key}">\n{text}\n</text id="{key}">'
    return {
        "model": "gpt-5-mini",
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "response_format": strict if schema else {"type": "json_object"},
    }


def client(llm: StandIn, key: str = "any") -> openai.OpenAI:
    """Return a client that never retries."""
    return openai.OpenAI(base_url=llm.base_url, api_key=key, max_retries=0, timeout=5)


def ask(llm: StandIn, text: str, **form: Any) -> ChatCompletion:
    """Ask once, over a connection of its own."""
    with client(llm) as sdk:
        answer: ChatCompletion = sdk.chat.completions.create(**body(text, **form))
    return answer


def tags_of(answer: ChatCompletion) -> list[str]:
    """Return an answer's tags."""
    tags: list[str] = json.loads(answer.choices[0].message.content or "")["tags"]
    return tags


@pytest.fixture
def llm() -> Iterator[StandIn]:
    """Return a running stand-in without faults."""
    with StandIn() as server:
        yield server


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A vaccine against INFECTION.", ["infection"]),
        ("Vaccination of patients with cancer, whose tumour grew", ["oncology", "infection"]),
        ("Nothing that fits.", []),
        ("Bloodless heartlands", []),
        ("", []),
    ],
)
def test_english_words(llm: StandIn, text: str, expected: list[str]) -> None:
    """Words match whatever their case and ending, the tag with most of them first."""
    assert tags_of(ask(llm, text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("慢性心臓病の患者を調べた", ["循環器"]),
        ("新型コロナウイルスのﾜｸﾁﾝ", ["感染症"]),
        ("天気の話", []),
    ],
)
def test_japanese_words(llm: StandIn, text: str, expected: list[str]) -> None:
    """Runs of kanji and katakana match anywhere in the text, half width too."""
    assert tags_of(ask(llm, text, tags=JAPANESE)) == expected


def test_limit_and_ties(llm: StandIn) -> None:
    """At most N tags are chosen; ties keep the tags' order."""
    assert tags_of(ask(llm, "vaccine, tumour, heart", at_most=2)) == ["cardiology", "oncology"]


def test_shared_words(llm: StandIn) -> None:
    """A word of several descriptions weighs less than one of a single description."""
    tags = {"a": "Heart patients.", "b": "Lung patients.", "c": "Liver."}
    assert tags_of(ask(llm, "patients with a liver", tags=tags)) == ["c", "a", "b"]


def test_json_object(llm: StandIn) -> None:
    """Without a schema the tags are read from the system message."""
    assert tags_of(ask(llm, "the heart", schema=False)) == ["cardiology"]


def test_min_items(llm: StandIn) -> None:
    """A schema's minItems is kept even if no word matches."""
    request = body("Nothing that fits.")
    request["response_format"]["json_schema"]["schema"]["properties"]["tags"]["minItems"] = 1
    assert tags_of(client(llm).chat.completions.create(**request)) == ["cardiology"]


def test_says_what_it_is(llm: StandIn) -> None:
    """Every answer names the stand-in, whatever model was asked for."""
    answer = ask(llm, "the heart")
    assert (answer.model, answer.system_fingerprint) == (MODEL, MODEL)
    assert [model.id for model in client(llm).models.list()] == [MODEL]
    assert llm.calls[0].model == "gpt-5-mini"


def test_usage(llm: StandIn) -> None:
    """The system part counts as cached from its second use on, in steps of 128 tokens."""
    tags = ENGLISH | {"other": "x" * 5000}
    usages = [ask(llm, text, tags=tags).usage for text in ("one heart", "two hearts")]
    cached = [usage and usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens for usage in usages]
    system = estimate_tokens(body("", tags)["messages"][0]["content"])
    assert cached == [0, system // 128 * 128]
    assert [usage and usage.prompt_tokens for usage in usages] == [system + 3, system + 3]
    assert all(usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in usages)


def test_short_prompts_are_not_cached(llm: StandIn) -> None:
    """Below 1024 tokens nothing counts as cached."""
    usage = [ask(llm, "heart").usage for _ in range(2)][1]
    assert usage and usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens == 0


def test_estimate() -> None:
    """Four ASCII characters make a token, any other character is one."""
    assert [estimate_tokens(text) for text in ("", "abcde", "心臓", "心臓 ab")] == [0, 2, 2, 3]


def test_refusals() -> None:
    """Whether a text is refused depends on the text alone."""
    with StandIn(refusals=0.5) as llm:
        answers = [[ask(llm, f"heart {n}").choices[0].message for n in range(12)] for _ in range(2)]
    refused = [[message.refusal is not None for message in messages] for messages in answers]
    assert refused[0] == refused[1]
    assert {True, False} == set(refused[0])
    assert all((message.content is None) == (message.refusal is not None) for message in answers[0])


def test_rate_limit() -> None:
    """A 429 comes in OpenAI's shape, with Retry-After."""
    with StandIn(rate_429=1, retry_after=1.5) as llm, pytest.raises(openai.RateLimitError) as caught:
        ask(llm, "heart")
    assert caught.value.response.headers["retry-after"] == "1.5"
    assert caught.value.code == "rate_limit_exceeded"


def test_server_error() -> None:
    """A 500 comes in OpenAI's shape."""
    with StandIn(rate_500=1) as llm, pytest.raises(openai.InternalServerError) as caught:
        ask(llm, "heart")
    assert caught.value.type == "server_error"


def test_retries_draw_again() -> None:
    """Faults repeat from server to server, but each retry of a text is another draw."""

    def statuses() -> list[int]:
        with StandIn(rate_429=0.3, rate_500=0.3) as llm:
            for _ in range(20):
                post(llm, body("heart"))
            return [call.status for call in llm.calls]

    first = statuses()
    assert set(first) == {200, 429, 500}
    assert first == statuses()


@pytest.mark.parametrize("rates", [{"rate_429": 1.1}, {"refusals": -0.1}, {"rate_429": 0.6, "rate_500": 0.6}])
def test_impossible_rates(rates: dict[str, Any]) -> None:
    """Rates that are no fractions are an error."""
    with pytest.raises(ValueError, match="fractions"):
        StandIn(**rates)


def test_wrong_key() -> None:
    """With a key of its own the server refuses any other."""
    with StandIn(api_key="right") as llm:
        with pytest.raises(openai.AuthenticationError) as caught:
            client(llm, "wrong").chat.completions.create(**body("heart"))
        with pytest.raises(openai.AuthenticationError):
            client(llm, "wrong").models.list()
        assert tags_of(client(llm, "right").chat.completions.create(**body("heart"))) == ["cardiology"]
    assert caught.value.code == "invalid_api_key"
    assert [call.status for call in llm.calls] == [401, 200]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "user", "content": "hello"}]),
        ("response_format", None),
        ("response_format", {"type": "text"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}),
        ("stream", True),
        ("model", None),
    ],
)
def test_bad_request(llm: StandIn, change: str, value: Any) -> None:
    """What the tagger would not send is refused."""
    status, answer = post(llm, body("heart") | {change: value})
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("missing", ["- oncology: ", "at most", '</text id="00ff">'])
def test_bad_messages(llm: StandIn, missing: str) -> None:
    """Tag lines, the limit and the text's marker lines must be there."""
    request = body("heart")
    for message in request["messages"]:
        message["content"] = message["content"].replace(missing, "")
    with pytest.raises(openai.BadRequestError, match="Expected"):
        client(llm).chat.completions.create(**request)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"null"])
def test_no_json(llm: StandIn, raw: bytes) -> None:
    """A body that is no JSON object is a bad request, not a crash."""
    assert post(llm, raw)[0] == 400


def test_unknown_url(llm: StandIn) -> None:
    """Other URLs are not found."""
    with pytest.raises(openai.NotFoundError):
        client(llm).embeddings.create(model="x", input="y", encoding_format="float")
    with pytest.raises(openai.NotFoundError):
        client(llm).models.retrieve("x")


def test_script(llm: StandIn) -> None:
    """Each chat request takes one scripted reply, then the server answers by itself again."""
    llm.script(
        completion('{"tags": ["oncology"]}', model="gpt-5-mini", usage=token_usage(7, 5, 2)),
        completion(None, finish_reason="length"),
        error(429, "No money.", "insufficient_quota", "insufficient_quota", headers={"Retry-After": "9"}),
        lambda request: completion(json.dumps({"tags": [request["model"]]})),
        Reply(body=b"<html>", headers={"Content-Type": "text/html"}),
    )
    answer = ask(llm, "heart")
    assert (answer.model, tags_of(answer), answer.usage and answer.usage.total_tokens) == (
        "gpt-5-mini",
        ["oncology"],
        12,
    )
    assert ask(llm, "heart").choices[0].finish_reason == "length"
    with pytest.raises(openai.RateLimitError) as caught:
        ask(llm, "heart")
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("insufficient_quota", "9")
    assert tags_of(ask(llm, "heart")) == ["gpt-5-mini"]
    assert isinstance(ask(llm, "heart"), str)
    assert tags_of(ask(llm, "heart")) == ["cardiology"]


def test_dropped_connection(llm: StandIn) -> None:
    """A scripted drop is a connection error for the client and status 0 in the count."""
    llm.script(Reply(close=True))
    with pytest.raises(openai.APIConnectionError):
        ask(llm, "heart")
    assert [call.status for call in llm.calls] == [0]


def test_delay(llm: StandIn) -> None:
    """A call is counted before its delay, so that one the client gave up is counted too."""
    llm.script(Reply(delay=30))
    with pytest.raises(openai.APITimeoutError):
        client(llm).with_options(timeout=0.1).chat.completions.create(**body("heart"))
    assert len(llm.calls) == 1


def test_counts(llm: StandIn) -> None:
    """Calls are counted by the text's id and status; texts are not kept."""
    llm.script(error(500, "Broken."))
    post(llm, body("heart", key="aa"))
    post(llm, body("heart", key="aa"))
    post(llm, body("heart", key="bb"))
    assert llm.calls_per_key() == {"aa": 2, "bb": 1}
    assert llm.calls_per_key(status=200) == {"aa": 1, "bb": 1}
    assert {call.text for call in llm.calls} == {None}
    assert len({call.sha256 for call in llm.calls}) == 1


def test_keep_texts() -> None:
    """On request the texts are kept, exactly as sent."""
    with StandIn(keep_texts=True) as llm:
        post(llm, body("two\nlines\r\n "))
    assert llm.calls[0].text == "two\nlines\r\n "


def test_stats(llm: StandIn) -> None:
    """The totals count calls and tokens and hold no text."""
    answer = ask(llm, "heart")
    post(llm, {})
    stats = fetch(llm.base_url.removesuffix("v1") + "stats")
    assert answer.usage
    assert stats == {
        "calls": 2,
        "by_status": {"200": 1, "400": 1},
        "asked": {"online": 2},
        "max_in_flight": 1,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "files": 0,
        "batches": 0,
        "routes": {"POST /v1/chat/completions": 2},
    }


def test_keep_alive(llm: StandIn) -> None:
    """One connection serves request after request, errors among them."""
    connection = http.client.HTTPConnection("127.0.0.1", llm.port, timeout=5)
    local = []
    for raw in (json.dumps(body("heart")), "{", json.dumps(body("心臓", JAPANESE), ensure_ascii=False)):
        connection.request("POST", "/v1/chat/completions", raw.encode())
        local.append(connection.sock.getsockname())
        response = connection.getresponse()
        assert int(response.headers["Content-Length"]) == len(response.read())
    connection.close()
    assert len(set(local)) == 1


def test_missing_length(llm: StandIn) -> None:
    """A body of unknown length is refused and its connection closed."""
    connection = http.client.HTTPConnection("127.0.0.1", llm.port, timeout=5)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, response.headers["Connection"]) == (400, "close")
    connection.close()


def test_concurrency() -> None:
    """32 threads are answered at once, each with its own answer."""
    together = threading.Barrier(32)

    def reply(_: Any) -> Reply:
        together.wait(5)
        return completion("{}")

    with StandIn() as llm, client(llm) as sdk, ThreadPoolExecutor(32) as pool:
        llm.script(*[reply] * 32)
        list(pool.map(lambda n: sdk.chat.completions.create(**body("heart", key=f"{n:x}")), range(32)))
        texts = [("heart", ["cardiology"]), ("tumour", ["oncology"])] * 64
        answers = pool.map(lambda pair: tags_of(sdk.chat.completions.create(**body(pair[0]))), texts)
        assert list(answers) == [expected for _, expected in texts]
        assert llm.max_in_flight == 32
        assert len(llm.calls) == 160


def test_closing() -> None:
    """A closed server drops the calls in flight and answers no more on connections left open."""
    with ThreadPoolExecutor() as pool, client(llm := StandIn(latency=30)) as idle:
        with llm:
            idle.models.list()
            pending = pool.submit(ask, llm, "heart")
            wait_until(lambda: len(llm.calls) == 1)
        assert isinstance(pending.exception(5), openai.APIConnectionError)
        with pytest.raises(openai.APIConnectionError):
            idle.models.list()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_process(tmp_path: Path, stop: signal.Signals) -> None:
    """As a process it prints its URL, serves, and ends cleanly on a signal in spite of calls in flight."""
    port_file = tmp_path / "port"
    command = [
        sys.executable,
        "-m",
        "demo.stand_in",
        "--port-file",
        str(port_file),
        "--latency",
        "30",
        "--api-key",
        "k",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        banner = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:(\d+)/v1", banner)
        assert url
        assert "NO LLM" in banner
        sdk = openai.OpenAI(base_url=url[0], api_key="k", max_retries=0, timeout=5)
        assert [model.id for model in sdk.models.list()] == [MODEL]
        assert port_file.read_text() == f"{url[1]}\n"
        with ThreadPoolExecutor() as pool:
            pending = pool.submit(lambda: sdk.chat.completions.create(**body("the secret heart")))
            wait_until(lambda: fetch(url[0].removesuffix("v1") + "stats")["calls"] == 1)
            process.send_signal(stop)
            assert process.wait(1) == 0
            assert isinstance(pending.exception(5), openai.APIConnectionError)
        assert process.stdout.read() == ""
        assert process.stderr
        assert process.stderr.read() == ""


def test_port_in_use(llm: StandIn) -> None:
    """A port in use is one clear line, not a traceback."""
    command = [sys.executable, "-m", "demo.stand_in", "--port", str(llm.port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait up to five seconds for something."""
    deadline = time.monotonic() + 5
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fetch(url: str) -> Any:
    """Return a URL's JSON."""
    with urllib.request.urlopen(url, timeout=5) as response:
        return json.load(response)


def post(llm: StandIn, request: Any) -> tuple[int, Any]:
    """Post a chat request as it is; returns status and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", llm.port, timeout=5)
    raw = request if isinstance(request, bytes) else json.dumps(request).encode()
    connection.request("POST", "/v1/chat/completions", raw)
    response = connection.getresponse()
    status, answer = response.status, json.load(response)
    connection.close()
    return status, answer


def with_confidence(request: Any) -> Any:
    """Return a request that asks for tags with their confidence."""
    tags = request["response_format"]["json_schema"]["schema"]["properties"]["tags"]
    properties = {"tag": tags["items"], "confidence": {"type": "number"}}
    tags["items"] = {"type": "object", "properties": properties}
    return request


def confidence_of(llm: StandIn, request: Any) -> dict[str, float]:
    """Return the tags of a request's answer, in order, with their confidence."""
    with client(llm) as sdk:
        answer = sdk.chat.completions.create(**request)
    return {each["tag"]: each["confidence"] for each in json.loads(answer.choices[0].message.content or "")["tags"]}


def test_confidence(llm: StandIn) -> None:
    """Asked for it, the stand-in is the surer of a tag the more words speak for it and the fewer for the others."""
    alone = confidence_of(llm, with_confidence(body("the heart and its blood vessels")))
    beside = confidence_of(llm, with_confidence(body("the heart and its blood vessels; a tumour")))
    tie = confidence_of(llm, with_confidence(body("the heart; a tumour")))
    assert list(beside) == ["cardiology", "oncology"]
    assert 1 > alone["cardiology"] > beside["cardiology"] > tie["cardiology"] == tie["oncology"]
    assert tie["oncology"] > beside["oncology"] > 0


def test_confidence_without_schema(llm: StandIn) -> None:
    """Without a schema it is the answer's form, in the system message, that tells."""
    request = body("the heart", schema=False)
    request["messages"][0]["content"] += '\n{"tags": [{"tag": "...", "confidence": 0.0}]}'
    assert confidence_of(llm, request) == confidence_of(llm, with_confidence(body("the heart")))


def test_examples_are_no_rules(llm: StandIn) -> None:
    """What an example says is neither a tag nor a limit."""
    request = body("vaccine, tumour, heart")
    example = json.dumps('Choose at most 1 tag:\n- other: heart, vaccine. "confidence": 0')
    request["messages"][0]["content"] += f'\n{example} → ["oncology"]\n'
    assert tags_of(client(llm).chat.completions.create(**request)) == ["cardiology", "oncology", "infection"]
    request["response_format"] = {"type": "json_object"}
    assert tags_of(client(llm).chat.completions.create(**request)) == ["cardiology", "oncology", "infection"]
