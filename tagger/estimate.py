"""The estimate: what the new texts of a run will take, in tokens, money and time.

Tokens are predicted from what records of this spec really used, by the length of their texts in each script. The first
run of a spec has no records: it is guessed from the lengths alone, and says so.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tagger.cache import Chars, Record, Usage
from tagger.dataset import LLM, Dataset, Price
from tagger.price import cost_usd, estimated_tokens, price_of
from tagger.prompt import Prompt, example_line
from tagger.runs import Estimate

SAMPLE = 64
LEAST_SAMPLE = 16
"""Records that are read: as many as there are new texts, within these bounds. More would say no more about so few."""

TOKENS_PER_CHAR = (1 / 4, 1.0)
"""Of narrow and of wide characters, as far as no record tells."""

DOUBT = (0.15, 0.5)
"""Standard deviation of these two between texts and tokenizers: how soon records outweigh them."""

REASONING_TOKENS = 400
"""Hidden tokens of an answer that nothing is known of yet; they take some hundred on short texts."""

REASONING_MODELS = re.compile(r"(.*/)?(gpt-5|o[134])")

CACHED_FROM = 1024
CACHED_STEP = 128
"""Endpoints cache a prompt's beginning of so many tokens or more, in such steps (OpenAI's rule)."""

FRAME = '{"tags": []}'
FRAME_TOGETHER = '{"id": "10", "tags": []}, '
"""An answer without its tags, alone and together with others."""

FRAME_OF_TAG = '{"tag": , "confidence": 0.95}'
"""What a tag takes in an answer beside its id, where confidence is asked for."""

GUESS_BAND = (0.5, 2.0)
"""Bounds of a cost that is guessed by the lengths, in parts of it."""

LEAST_BAND = 0.05
"""Half the band's least width, in parts of the cost: what no sample shows, such as calls that are made again."""

CONVERTED_BAND = 0.25
"""Likewise, where texts were asked alone and now are asked together."""


class Lengths:
    """How many texts are asked, and how long they are in all."""

    def __init__(self, llm: LLM) -> None:
        self.texts = 0
        self.narrow = 0
        self.wide = 0
        self.short = 0
        """Texts that are asked together with others."""
        self._together = llm.texts_per_request
        self._short_chars = _short_chars(llm)

    def add(self, text: str) -> None:
        """Count a text."""
        chars = Chars.of(text)
        self.texts += 1
        self.narrow += chars.narrow
        self.wide += chars.wide
        self.short += len(text) <= self._short_chars

    @property
    def requests(self) -> int:
        """How many requests they are."""
        return self.texts - self.short + -(-self.short // self._together)


def _short_chars(llm: LLM) -> int:
    """Return the length of the longest texts that are asked together."""
    if llm.texts_per_request == 1:
        return 0
    from tagger.packing import SHORT_CHARS

    return SHORT_CHARS


def sample_size(texts: int) -> int:
    """Return how many records to read for the estimate of so many texts."""
    return min(SAMPLE, max(LEAST_SAMPLE, texts))


def estimate(
    dataset: Dataset, lengths: Lengths, records: Sequence[Record], *, requests_per_second: float | None = None
) -> Estimate:
    """Return what texts of these lengths will take, predicted from a sample of the spec's records.

    `requests_per_second` is what an earlier run reached.
    """
    if not lengths.texts:
        nothing = {"texts": 0, "input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 0}
        return Estimate(**nothing, usd=0.0, low_usd=0.0, high_usd=0.0, basis="records", seconds=0.0)
    price = price_of(dataset.llm, batch=dataset.llm.mode == "batch")
    if dataset.llm.texts_per_request == 1:  # what texts asked together would have used alone, nobody knows
        records = [record for record in records if record.asked != "together"]
    usage, low, high = _by_records(dataset, lengths, records, price) if records else _guess(dataset, lengths, price)
    return Estimate(
        texts=lengths.texts,
        input_tokens=usage.input,
        cached_input_tokens=usage.cached_input,
        output_tokens=usage.output,
        usd=cost_usd(usage, price),
        low_usd=low,
        high_usd=high,
        basis="records" if records else "lengths",
        seconds=_seconds(dataset.llm, lengths.requests, usage.input + usage.output, requests_per_second),
    )


def guess_usage(dataset: Dataset, lengths: Lengths) -> Usage:
    """Return what texts of these lengths may use, where no record tells: by the prompt's length and theirs."""
    prompt = _Prompt(dataset)
    narrow, wide = TOKENS_PER_CHAR
    return Usage(
        input=round(prompt.tokens(lengths) + lengths.narrow * narrow + lengths.wide * wide),
        cached_input=prompt.cached(lengths),
        output=round(lengths.texts * _answer_tokens(dataset)),
    )


def _guess(dataset: Dataset, lengths: Lengths, price: Price | None) -> tuple[Usage, float | None, float | None]:
    """Return a guess at the usage, and the bounds of its cost. The upper one does without the endpoint's cache."""
    usage = guess_usage(dataset, lengths)
    cost, uncached = cost_usd(usage, price), cost_usd(Usage(input=usage.input, output=usage.output), price)
    if cost is None or uncached is None:
        return usage, None, None
    return usage, GUESS_BAND[0] * cost, max(GUESS_BAND[1] * cost, uncached)


class _Prompt:
    """About how many tokens the prompt has beside the texts."""

    def __init__(self, dataset: Dataset) -> None:
        self._llm, fixed = dataset.llm, Prompt(dataset)
        self.alone, marks = _lengths_of(fixed.messages("0" * 32, ""))
        self.of_one = self.alone + marks
        """Of a request for one text."""
        self.together, self.marks = _lengths_of(fixed.messages_together({"0" * 32: ""}))
        """Of a request for several, and for each of them."""

    def share(self, text_tokens: int) -> float:
        """Return what a text asked together with others takes, in parts of what it takes alone."""
        together = self.together / self._llm.texts_per_request + self.marks
        return (together + text_tokens) / (self.of_one + text_tokens)

    def tokens(self, lengths: Lengths) -> int:
        """Return those of all requests."""
        alone = lengths.texts - lengths.short
        return alone * self.of_one + (lengths.requests - alone) * self.together + lengths.short * self.marks

    def cached(self, lengths: Lengths) -> int:
        """Return how many of them the endpoint will have cached, which no batch counts on."""
        if self._llm.mode == "batch" or self.alone < CACHED_FROM:
            return 0
        later = max(lengths.requests - self._llm.concurrency, 0)
        return self.alone // CACHED_STEP * CACHED_STEP * later


def _lengths_of(request: list[dict[str, str]]) -> tuple[int, int]:
    system, user = (estimated_tokens(message["content"]) for message in request)
    return system, user


def _answer_tokens(dataset: Dataset) -> float:
    """Return about how many tokens an answer has: half of the tags it may have, and what a reasoning model thinks."""
    all_tags = estimated_tokens(json.dumps(dataset.tag_ids, ensure_ascii=False))
    tags = (1 + min(dataset.max_tags, len(dataset.tags))) / 2
    frame = FRAME if dataset.llm.texts_per_request == 1 else FRAME_TOGETHER
    of_tag = all_tags / len(dataset.tags) + (estimated_tokens(FRAME_OF_TAG) if dataset.confidence else 0)
    return estimated_tokens(frame) + tags * of_tag + _reasoning_tokens(dataset.llm)


def example_cost(dataset: Dataset) -> tuple[int, float | None]:
    """Return about how many tokens an example has, of those there are, and what one more adds to 1,000 requests in USD.

    The cost is None where the price is not known, and less where the endpoint has the prompt cached.
    """
    total = sum(estimated_tokens(example_line(example)) for example in dataset.examples)
    tokens = round(total / len(dataset.examples))
    price = price_of(dataset.llm, batch=dataset.llm.mode == "batch")
    return tokens, cost_usd(Usage(input=1000 * tokens), price)


def _reasoning_tokens(llm: LLM) -> int:
    if not REASONING_MODELS.match(llm.model) or llm.params.get("reasoning_effort") in ("minimal", "none"):
        return 0
    return REASONING_TOKENS // llm.texts_per_request


def _by_records(
    dataset: Dataset, lengths: Lengths, records: Sequence[Record], price: Price | None
) -> tuple[Usage, float | None, float | None]:
    """Return the usage that records predict, and the bounds of its cost: about two standard errors to either side."""
    import numpy as np

    texts = lengths.texts
    chars = [record.chars for record in records if record.chars is not None]
    if 2 * len(chars) >= len(records):
        records = [record for record in records if record.chars is not None]
        wanted = np.array([texts, lengths.narrow, lengths.wide], float)
    else:  # most are of before lengths were kept: their mean
        chars = [Chars()] * len(records)
        wanted = np.array([texts, 0, 0], float)
    prompt = _Prompt(dataset)
    used = _as_asked_now(records, dataset.llm, prompt)
    sizes = np.array([(1, c.narrow, c.wide) for c in chars], float)
    inputs = np.array([usage.input for usage in used], float)
    weights, doubt = _fit(prompt.tokens(lengths) / texts, sizes, inputs)
    total = sum(used, Usage())
    share, output = total.cached_input / max(total.input, 1), total.output / len(used)
    expected = float(weights @ wanted)
    usage = Usage(input=round(expected), cached_input=round(expected * share), output=round(texts * output))
    cost = cost_usd(usage, price)
    if cost is None:
        return usage, None, None
    per_input = (cost_usd(Usage(input=10**6, cached_input=round(10**6 * share)), price) or 0.0) / 10**6
    per_output = (cost_usd(Usage(output=10**6), price) or 0.0) / 10**6
    off = [cost_usd(each, price) for each in used] - (sizes @ weights * per_input + output * per_output)
    noise = float(np.std(off, ddof=1)) if len(used) > 1 else cost / texts
    errors = 2 + 4 / max(len(used) - 1, 1)  # about Student's t at 95 %
    unlike = wanted - texts * sizes.mean(axis=0)  # by how much the new texts differ from the sample
    variance = noise**2 * (texts**2 / len(used) + texts) + per_input**2 * float(unlike @ doubt @ unlike)
    least = LEAST_BAND if used == [record.usage for record in records] else CONVERTED_BAND
    band = max(errors * variance**0.5, least * cost)
    return usage, max(cost - band, 0.0), cost + band


def _as_asked_now(records: Sequence[Record], llm: LLM, prompt: _Prompt) -> list[Usage]:
    """Return what the records used, those of before texts were asked together (`texts_per_request`) as if they were."""
    if llm.texts_per_request == 1 or any(record.asked == "together" for record in records):
        return [record.usage for record in records]
    longest, longer = _short_chars(llm), estimated_tokens(FRAME_TOGETHER) - estimated_tokens(FRAME)

    def together(usage: Usage, chars: Chars) -> Usage:
        if chars.narrow + chars.wide > longest:
            return usage
        return Usage(
            input=round(usage.input * prompt.share(chars.tokens)),
            cached_input=usage.cached_input // llm.texts_per_request,
            output=usage.output + longer,
        )

    return [together(record.usage, record.chars or Chars()) for record in records]


def _fit(fixed: float, sizes: Any, inputs: Any) -> tuple[Any, Any]:
    """Return input tokens a text, a narrow and a wide character, and the covariance of these three.

    Least squares that begin at what is known without records, so that a script which no record has keeps that, and in
    which a text far off the others counts less. The level is then that of the sample: what calls made again took is
    in it.
    """
    import numpy as np

    known = np.array([fixed, *TOKENS_PER_CHAR], float)
    trust = np.diag(1 / np.array([fixed / 2 + 50, *DOUBT]) ** 2)
    weights = known
    for _ in range(10):
        off = inputs - sizes @ weights
        noise = max(1.5 * float(np.median(abs(off))), 1.0)
        seen = sizes.T * (np.minimum(1, 2 * noise / np.maximum(abs(off), 1e-9)) / noise**2)
        step = np.linalg.solve(seen @ sizes + trust, seen @ (inputs - sizes @ known))
        weights = np.maximum(known + step, 0)
    off = inputs - sizes @ weights
    weights[0] = max(weights[0] + off.mean(), 0)
    return weights, np.linalg.inv(sizes.T @ sizes / max(off.var(), 1.0) + trust)


def _seconds(llm: LLM, requests: int, tokens: int, requests_per_second: float | None) -> float | None:
    """Return how long it takes at the limits; None where nothing tells."""
    if llm.mode == "batch":
        return None
    rates = ((requests, llm.requests_per_minute), (tokens, llm.tokens_per_minute))
    times = [60 * amount / rate for amount, rate in rates if rate]
    if requests_per_second:
        times.append(requests / requests_per_second)
    return max(times, default=None)
