"""How a comparison reads: one screen, and the verdict in one sentence."""

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from tagger.price import usd

if TYPE_CHECKING:
    from tagger.comparison import Comparison, Difference, Moving
    from tagger.quality import Value

SURE = 0.05
"""The p-value below which a difference is called one."""

TAGS_SHOWN = 10
MOVES_SHOWN = 6
ROWS_SHOWN = 5

WIDTH = 110
"""Of lines that are wrapped."""

STAND_IN = "The offline stand-in answered, which is no LLM: these figures say nothing about how well a model tags."


def verdict(found: "Comparison") -> str:
    """Return what to make of a comparison, in one sentence."""
    if found.difference is None or not found.agreement.changed:
        said = _changes(found)
    else:
        said = _labelled(found, found.difference)
    price = f"it costs {times} as much a text, and " if (times := _times(found)) else ""
    return f"{said}; {price}{_moving(found.moving)}."


def _labelled(found: "Comparison", difference: "Difference") -> str:
    texts = found.agreement.texts
    change = difference.exact_match
    p = difference.p_value
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    figures = (
        f"{_points(change.value)} points exact match "
        f"(95 % interval {_points(change.low)} to {_points(change.high)}, {chance})"
    )
    if p >= SURE or not change.value:
        return f"No difference can be told with {texts:,} texts: B has {figures}" + _beside(difference, texts)
    return f"B is {'better' if change.value > 0 else 'worse'}: {figures} on {texts:,} texts"


def _beside(difference: "Difference", texts: int) -> str:
    """Return what else there is to know where the exact matches do not tell: other figures, or how many labels would.

    Connor's formula (1987) for McNemar's test: a difference of this size, with 80 % power.
    """
    f1 = difference.micro_f1
    if f1.low is not None and f1.high is not None and f1.low * f1.high > 0:
        return f", but {_points(f1.value)} points micro F1 ({_points(f1.low)} to {_points(f1.high)})"
    apart, discordant = difference.exact_match.value or 0.0, difference.only_a_right + difference.only_b_right
    if not apart:
        return ""
    share = discordant / texts
    needed = ((1.96 * share**0.5 + 0.84 * max(share - apart**2, 0.0) ** 0.5) / apart) ** 2
    return f"; about {_rounded(needed)} labels would tell a difference of this size" if needed > texts else ""


def _rounded(count: float) -> str:
    """Return a number with two digits that count."""
    return f"{float(f'{count:.2g}'):,.0f}"


def _changes(found: "Comparison") -> str:
    agreed = found.agreement
    share = f"95 % interval {_percent(agreed.changed_low)} to {_percent(agreed.changed_high)}"
    if not agreed.changed:
        return f"B changes none of the {agreed.texts:,} texts ({share}): for its tags, neither is better"
    return (
        f"B changes {_percent(agreed.changed / agreed.texts)} of the {agreed.texts:,} texts ({share}): "
        "label some to know whether that is better"
    )


def _moving(moving: "Moving") -> str:
    if moving.texts is None:
        return f"what moving the table costs is not known ({moving.problem})"
    if not moving.texts:
        return "no other text has to be moved"
    what = f"moving {moving.texts:,} {'texts' if moving.of == 'target' else 'rows'}"
    if moving.usd is None:
        return f"{what} costs an unknown amount, for the price is (`llm.price`)"
    return f"{what} costs about {usd(moving.usd)}{' through the Batch API' if moving.batch else ''}"


def describe(found: "Comparison") -> list[str]:
    """Return a comparison as lines to read, the verdict last."""
    return [
        *([STAND_IN] if found.is_stand_in else []),
        f"A  {found.a.file}  {found.a.model}  spec {found.a.spec_id}",
        f"B  {found.b.file}  {found.b.model}  spec {found.b.spec_id}",
        *(f"   {line}" for change in found.changed for line in _wrapped("differs", [change])),
        f"   {found.origin}; {found.agreement.texts:,} answered by both",
        *(f"   {line}" for line in found.left_out),
        "",
        *_sides(found),
        "",
        *_agreement(found),
        "",
        verdict(found),
    ]


def _sides(found: "Comparison") -> Iterator[str]:
    a, b = found.a, found.b
    rows = [["", "A", "B", "B - A"]]
    if found.difference is not None:
        change = found.difference
        for name, in_a, in_b, by in (
            ("exact match", a.exact_match, b.exact_match, change.exact_match),
            ("micro F1", a.micro_f1, b.micro_f1, change.micro_f1),
            ("macro F1", a.macro_f1, b.macro_f1, change.macro_f1),
        ):
            rows.append([f"{name}, % (95 %)", _with_interval(in_a), _with_interval(in_b), _signed_interval(by)])
        rows.append(["right in one alone", f"{change.only_a_right:,}", f"{change.only_b_right:,}", ""])
    rows += [
        ["without a tag", _percent(a.untagged), _percent(b.untagged), ""],
        ["refused / no answer", f"{a.refused} / {a.unanswered}", f"{b.refused} / {b.unanswered}", ""],
        ["cost of 1,000 texts", _thousand(a.cost_a_text_usd), _thousand(b.cost_a_text_usd), _times(found)],
        [
            "tokens a text, in / out",
            _tokens(a.input_tokens_a_text, a.output_tokens_a_text),
            _tokens(b.input_tokens_a_text, b.output_tokens_a_text),
            "",
        ],
        ["seconds a text", _seconds(a.seconds_a_text), _seconds(b.seconds_a_text), ""],
        ["asked now", _asked(a.requests, a.spent_usd), _asked(b.requests, b.spent_usd), ""],
    ]
    yield from _table(rows, left=1)


def _agreement(found: "Comparison") -> Iterator[str]:
    agreed = found.agreement
    yield (
        f"the same tags on {_percent(agreed.same)} of the texts ({agreed.texts - agreed.changed:,} of "
        f"{agreed.texts:,}), mean Jaccard {agreed.jaccard:.3f}"
    )
    if not agreed.changed:
        return
    movers = [tag for tag in agreed.tags if tag.gained or tag.lost]
    rows = [["tag", "in A", "in B", "both", "gained", "lost", "kappa"]]
    only = {
        **dict.fromkeys(found.tags_only_in_a, " (only in A)"),
        **dict.fromkeys(found.tags_only_in_b, " (only in B)"),
    }
    for tag in movers[:TAGS_SHOWN]:
        counts = (tag.a, tag.b, tag.both, tag.gained, tag.lost)
        kappa = "-" if tag.kappa is None else f"{tag.kappa:.2f}"
        rows.append([tag.tag + only.get(tag.tag, ""), *(f"{count:,}" for count in counts), kappa])
    yield from _table(rows, left=1)
    rest = len(agreed.tags) - len(rows) + 1
    if rest:
        yield f"{rest:,} more tags that changed on fewer texts, or none"
    yield from _wrapped("where they go", (f"{e.a} → {e.b} {e.texts:,} times" for e in agreed.moves[:MOVES_SHOWN]))
    yield from _wrapped("rows", (f"{e.row}: {_joined(e.a)} → {_joined(e.b)}" for e in found.examples[:ROWS_SHOWN]))


def _wrapped(name: str, parts: Iterable[str]) -> list[str]:
    return wrap(f"{name}: {'; '.join(parts)}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _joined(tags: Sequence[str]) -> str:
    return "+".join(tags) or "(none)"


def _table(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Yield aligned lines; the first columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells: Iterable[tuple[int, str]] = enumerate(row)
        line = "  ".join(cell.ljust(widths[i]) if i < left else cell.rjust(widths[i]) for i, cell in cells)
        yield line.rstrip()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f}"


def _with_interval(value: "Value | None") -> str:
    if value is None or value.value is None or value.low is None or value.high is None:
        return "-"
    return f"{100 * value.value:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _signed_interval(value: "Value") -> str:
    return f"{_points(value.value)} ({_points(value.low)} to {_points(value.high)})"


def _thousand(cost: float | None) -> str:
    return "unknown" if cost is None else usd(1000 * cost)


def _times(found: "Comparison") -> str:
    a, b = found.a.cost_a_text_usd, found.b.cost_a_text_usd
    return f"{b / a:.2f} times" if a and b is not None else ""


def _tokens(inputs: float | None, outputs: float | None) -> str:
    return "-" if inputs is None or outputs is None else f"{inputs:,.0f} / {outputs:,.0f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


def _asked(requests: int, spent: float | None) -> str:
    return f"{requests:,} requests, {usd(spent)}" if requests else "all cached"
