"""What the offline stand-in answers: it reads a request in the tagger's form, picks tags, and builds OpenAI's JSON."""

import json
import math
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from demo.stand_in_http import Json, Reply

MODEL = "offline-stand-in"

NO_MEANING = 0.5
"""What speaks against every tag: half a word."""

Tags = tuple[tuple[str, str], ...]  # ids and descriptions

_TEXT = re.compile(r'\A<text id="([0-9a-fA-F]+)">\n(.*)\n</text id="\1">\n?\Z', re.DOTALL)
_PACKED = re.compile(r'<text id="\d+-([0-9a-f]{6})">\n(.*?)\n</text id="\d+-\1">', re.DOTALL)
_TAG_LINE = re.compile(r"^- ([^\n]+?): (.*)$", re.MULTILINE)
_EXAMPLE = re.compile(r'^".*$', re.MULTILINE)
_AT_MOST = re.compile(r"\bat most (\d+) tag", re.IGNORECASE)

_CONFIDENCE = '"confidence": 0'
"""Stands in the form of an answer that is to have it."""

# Latin words of four letters, runs of kanji, runs of katakana.
_WORD = re.compile(
    r"[a-z\u00df-\u00f6\u00f8-\u024f]{4,}|[\u3005\u3400-\u4dbf\u4e00-\u9fff]{2,}|[\u30a1-\u30fa\u30fc]{2,}"
)
_SUFFIX = re.compile(r"(?<=.{4})(ations?|ical|ious|ions?|ies|ing|ous|ed|es|ic|al|e|(?<!s)s|y)$")
_COMMON = """about after also among before being between both each either else every from general have having into like
    many more most much only other over related same some such than that their them then there these they this those
    through topic topics very what when where which while with within without 一般 全般 場合 内容 関係 関連"""
_STOP_WORDS = frozenset(_COMMON.split())


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks about one text: the tags to choose from, how many, and whether with a confidence for each.

    In a packed request `key` is empty.
    """

    key: str
    text: str
    system: str
    tags: Tags
    at_least: int
    at_most: int
    confidence: bool


def token_usage(prompt: int, answer: int, cached: int = 0) -> Json:
    """Return OpenAI's `usage` for these token counts."""
    usage: Json = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return usage | {"prompt_tokens_details": {"cached_tokens": cached}}


def completion(
    content: str | None,
    finish_reason: str = "stop",
    refusal: str | None = None,
    model: str = MODEL,
    usage: Json | None = None,
) -> Reply:
    """Return a chat completion; without `usage` it claims 100 prompt tokens and the content's estimate."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    body: Json = {"id": f"chatcmpl-{MODEL}", "object": "chat.completion", "created": int(time.time()), "model": model}
    body["choices"] = [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}]
    body["usage"] = token_usage(100, estimate_tokens(content or refusal or "")) if usage is None else usage
    return Reply(body=body | {"system_fingerprint": MODEL})


def estimate_tokens(text: str) -> int:
    """Estimate tokens: four ASCII characters make one, any other character is one."""
    ascii_only = len(text.encode("ascii", "ignore"))
    return math.ceil(ascii_only / 4) + len(text) - ascii_only


def read_question(request: Json) -> Question:
    """Read a request about one text; raises what `read_questions` raises."""
    [question] = read_questions(request)
    return question


def read_questions(request: Json) -> list[Question]:
    """Read a request's body; raises LookupError, TypeError or ValueError if it is not of the tagger's form."""
    first, last, wanted = request["messages"][0], request["messages"][-1], request["response_format"]
    if (first["role"], last["role"]) != ("system", "user") or not request["model"] or request.get("stream"):
        raise ValueError("roles, model or stream")
    texts = _TEXT.findall(last["content"]) or [("", text) for text in _unpack(last["content"])]
    rules = _EXAMPLE.sub("", first["content"])  # what an example says is no rule
    if wanted["type"] == "json_object":
        tags, item, confidence = {}, {}, _CONFIDENCE in rules
    else:
        tags = _tags(wanted["json_schema"]["schema"], texts[0][0])
        item, confidence = tags["items"], "properties" in tags["items"]
        item = item["properties"]["tag"] if confidence else item
    described: dict[str, str] = dict(_TAG_LINE.findall(rules))
    chosen = tuple((each, described[each]) for each in item.get("enum", described))
    if not chosen:
        raise ValueError("no tags")
    at_least, at_most = int(tags.get("minItems", 0)), min(map(int, _AT_MOST.findall(rules)))
    return [Question(key, text, first["content"], chosen, at_least, at_most, confidence) for key, text in texts]


def _unpack(content: str) -> list[str]:
    """Return the texts of a packed request, whose marker lines are numbered and share one mark."""
    found = _PACKED.findall(content)
    marks = [f'text id="{number}-{found[0][0]}"' for number in range(1, len(found) + 1)]
    packed = "\n".join(f"<{mark}>\n{text}\n</{mark}>" for mark, (_, text) in zip(marks, found, strict=True))
    if not found or packed != content:
        raise ValueError("no text between marker lines")
    return [text for _, text in found]


def _tags(schema: Json, key: str) -> Any:
    """Return the schema of one text's tags; each answer of a packed request has some."""
    return (schema if key else schema["properties"]["answers"]["items"])["properties"]["tags"]


def prompt_tokens(request: Json, questions: Sequence[Question]) -> int:
    """Estimate a request's tokens: the system message and the text, or all of a packed message."""
    user = questions[0].text if questions[0].key else request["messages"][-1]["content"]
    return estimate_tokens(questions[0].system) + estimate_tokens(user)


def answer(questions: Sequence[Question]) -> str:
    """Return the content of the answer, with the tags of each text."""
    if questions[0].key:
        return json.dumps({"tags": _tags_asked_for(questions[0])}, ensure_ascii=False)
    answers = [{"id": str(number), "tags": _tags_asked_for(each)} for number, each in enumerate(questions, 1)]
    return json.dumps({"answers": answers}, ensure_ascii=False)


def _tags_asked_for(question: Question) -> list[Any]:
    """Return the tags in the form that is asked for."""
    if not question.confidence:
        return choose_tags(question)
    scores = _scores(question)
    return [{"tag": tag, "confidence": _confidence(tag, scores)} for tag in _best(scores, question)]


def choose_tags(question: Question) -> list[str]:
    """Return the tags whose descriptions share words with the text, best first; ties in tag order."""
    return _best(_scores(question), question)


def _best(scores: dict[str, float], question: Question) -> list[str]:
    matching = sum(score > 0 for score in scores.values())
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    return ranked[: min(max(matching, question.at_least), question.at_most)]


def _confidence(tag: str, scores: dict[str, float]) -> float:
    """Return a tag's part of what speaks for it, for the best of the others, and for that the words mean nothing."""
    rival = max((score for other, score in scores.items() if other != tag), default=0.0)
    return round(scores[tag] / (scores[tag] + rival + NO_MEANING), 2)


def _scores(question: Question) -> dict[str, float]:
    """Return how much each tag's description shares with the text."""
    text = _plain(question.text)
    words = Counter(map(_stem, _WORD.findall(text)))
    scores: dict[str, float] = {}
    for tag, weights in _weigh_words(question.tags):
        counts = {word: words[word] if word.isascii() else text.count(word) for word in weights}
        # A word counts three times at most, so that one frequent word does not beat several that fit.
        scores[tag] = sum(weight * min(counts[word], 3) for word, weight in weights.items())
    return scores


@lru_cache(maxsize=64)
def _weigh_words(tags: Tags) -> list[tuple[str, dict[str, float]]]:
    """Return each tag's words, each with one over the number of tags that share it."""
    found = [(tag, set(_WORD.findall(_plain(description))) - _STOP_WORDS) for tag, description in tags]
    words = [(tag, sorted(set(map(_stem, each)))) for tag, each in found]
    shared = Counter(word for _, each in words for word in each)
    return [(tag, {word: 1 / shared[word] for word in each}) for tag, each in words]


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return _SUFFIX.sub("", word)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
