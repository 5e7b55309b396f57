"""An evaluation as one page without scripts that needs no other file: bars, a heat map, the worst cases."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tagger.evaluate import Case, Evaluation
    from tagger.quality import Quality, Reliability, Value

MAP_TAGS = 15
"""Tags in the heat map: those with the most confusions."""

PAIRS = 30

BAR = 70
"""Pixels that a bar of 1 has."""

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --dim: #5c6675; --line: #d8dde5; --back: #ffffff; --bar: #2f6fd0;
  --bar-back: #e8ecf2; --bad: #b3261e; --note: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --dim: #9aa4b2; --line: #39424f; --back: #14181f; --bar: #7aa8f5; --bar-back: #252c37;
    --bad: #ff8a80; --note: #3b3216; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; }
.dim { color: var(--dim); }
.note { background: var(--note); padding: .6rem .8rem; border-radius: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.tags { white-space: normal; }
th { color: var(--dim); font-weight: 600; }
.number { text-align: right; }
.missing { color: var(--bad); }
svg { vertical-align: middle; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
.track { fill: var(--bar-back); }
.bar, .cell { fill: var(--bar); }
.whisker { stroke: var(--text); stroke-width: 1.5; }
.axis { stroke: var(--line); fill: none; }
"""


def write_page(file: Path, figures: "Evaluation") -> None:
    """Write an evaluation as a page; the file appears whole, or stays as it was.

    Raises:
        InputError: it cannot be written there.
    """
    from tagger.pages.html import write_whole

    write_whole(file, page(figures))


def page(figures: "Evaluation") -> str:
    """Return the page; nothing can run or be loaded there."""
    from tagger.evaluate import STAND_IN, cost_line, review_line, texts_line, title, untagged_line

    f, q = figures, figures.quality
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    name = f"{f.dataset}: quality of the tags"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
        f'<h1>{escape(name)}</h1>\n<p class="dim">{escape(title(f))}</p>',
        f'<p class="note">Note: {escape(STAND_IN)}.</p>' if f.stand_in else "",
        *(f"<p>{escape(line)}</p>" for line in (texts_line(f), cost_line(f), f"No tag: {untagged_line(q)}")),
        *(f"<p>Labels: {escape(line)}</p>" for line in f.labels.lines),
        _scores(q),
        _pairs(q),
        _heat_map(q),
        _reliability(f.reliability) if f.reliability is not None else "",
        f"<p>{escape(review_line(f.review))}</p>" if f.review is not None else "",
        _cases(f.worst),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _scores(q: "Quality") -> str:
    from tagger.evaluate import macro_line, worst_first

    nothing = '<td class="number"></td>' * 2
    rows = [
        f"<td>micro</td>{nothing}{_values(q.micro.precision, q.micro.recall, q.micro.f1)}",
        f"<td>macro</td>{nothing}{_values(q.macro.precision, q.macro.recall, q.macro.f1)}",
        f"<td>exact match</td>{nothing}{_values(q.exact_match)}<td></td><td></td>",
    ]
    rows += [
        f"<td>{escape(tag.tag)}</td>{_numbers(tag.support, tag.predicted)}{_values(tag.precision, tag.recall, tag.f1)}"
        for tag in worst_first(q.tags)
    ]
    about = "Worst tags first. Bars end at the figure; the lines over them are 95 % bootstrap intervals."
    return _section("Tags", about, _table(["tag", "#texts", "#given", "precision", "recall", "F1"], rows)) + (
        f'\n<p class="dim">{escape(told)}.</p>' if (told := macro_line(q)) else ""
    )


def _values(*values: "Value") -> str:
    return "".join(f"<td>{_bar(value)}</td>" for value in values)


def _bar(value: "Value") -> str:
    from tagger.evaluate import shown_value

    if value.value is None or value.low is None or value.high is None:
        return "-"
    return (
        f'<svg width="{BAR}" height="12" aria-hidden="true">'
        f'<rect class="track" width="{BAR}" height="12"/>'
        f'<rect class="bar" width="{BAR * value.value:.1f}" height="12"/>'
        f'<line class="whisker" x1="{BAR * value.low:.1f}" x2="{BAR * value.high:.1f}" y1="6" y2="6"/></svg> '
        f"{shown_value(value)}"
    )


def _pairs(q: "Quality") -> str:
    rows = [
        f"<td>{escape(each.gold)}</td><td>{escape(each.given)}</td>{_numbers(each.texts, each.support)}"
        for each in q.confusions[:PAIRS]
    ]
    about = "A tag that texts should have and did not get, and the one that they got instead. (none): no tag at all."
    if not rows:
        return _section("Most often confused", "No tag was given instead of another.", "")
    return _section("Most often confused", about, _table(["should have", "got instead", "#texts", "#of"], rows))


def _heat_map(q: "Quality") -> str:
    """Draw what the texts of a tag got: the darker, the greater the share of the row's texts."""
    weight: dict[str, int] = {}
    for pair in q.confusions:
        for tag in (pair.gold, pair.given):
            weight[tag] = weight.get(tag, 0) + pair.texts
    chosen = set(sorted(weight, key=lambda tag: -weight[tag])[:MAP_TAGS])
    names = [name for name in (*(tag.tag for tag in q.tags), "(none)") if name in chosen]
    if not names:
        return ""
    counts = {(pair.gold, pair.given): pair.texts for pair in q.confusions}
    counts |= {(tag.tag, tag.tag): tag.right for tag in q.tags} | {("(none)", "(none)"): q.both_untagged}
    support = {tag.tag: tag.support for tag in q.tags} | {"(none)": q.gold_untagged}
    size, left, top = 34, 190, 130
    width, height = left + size * len(names) + 60, top + size * len(names) + 4
    parts = [f'<svg width="{width}" height="{height}" role="img" aria-label="Heat map of confusions">']
    for i, name in enumerate(names):
        x, y = left + size * i, top + size * i
        parts.append(f'<text x="{left - 8}" y="{y + 21}" text-anchor="end">{escape(_short(name))}</text>')
        parts.append(f'<text transform="translate({x + 20} {top - 8}) rotate(-50)">{escape(_short(name))}</text>')
        for j, given in enumerate(names):
            count = counts.get((name, given), 0)
            share = min(count / support[name], 1.0) if support[name] else 0.0
            cell, told = left + size * j, f"{name} → {given}: {count:,} of {support[name]:,}"
            parts.append(
                f'<rect class="cell" x="{cell}" y="{y}" width="{size - 1}" height="{size - 1}" '
                f'fill-opacity="{0.04 + 0.6 * share:.2f}"><title>{escape(told)}</title></rect>'
            )
            if count:
                parts.append(f'<text x="{cell + size / 2 - 0.5}" y="{y + 21}" text-anchor="middle">{count}</text>')
    about = "Rows: the tag that texts should have. Columns: what they got; on the diagonal the same tag."
    if len(names) < len(weight):
        about += f" The {len(names)} most confused of {len(weight)}."
    return _section("Heat map", about, "".join([*parts, "</svg>"]))


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _reliability(table: "Reliability") -> str:
    rows = [
        f"<td>{each.low:.1f} to {each.high:.1f}</td>{_numbers(each.tags)}"
        f'<td class="number">{each.mean_confidence:.2f}</td><td class="number">{100 * each.right:.0f} %</td>'
        for each in table.bins
    ]
    dots = "".join(
        f'<circle class="bar" cx="{20 + 200 * each.mean_confidence:.1f}" cy="{220 - 200 * each.right:.1f}" r="4"/>'
        for each in table.bins
    )
    chart = (
        '<svg width="240" height="240" role="img" aria-label="Share right by confidence">'
        '<rect class="axis" x="20" y="20" width="200" height="200"/>'
        f'<line class="axis" x1="20" y1="220" x2="220" y2="20"/>{dots}</svg>'
    )
    about = (
        f"{table.tags:,} tags; expected calibration error {table.ece:.3f}. Dots on the diagonal: the values are what "
        "they say. Across: confidence from 0 to 1; up: share right."
    )
    return _section("Confidence", about, chart + _table(["confidence", "#tags", "#mean", "#right"], rows))


def _cases(worst: "Sequence[Case]") -> str:
    if not worst:
        return _section("Worst cases", "No text has a wrong tag, or lacks one.", "")
    rows = [
        f'<td>{escape(each.row)}</td><td class="tags">{_tags(each.gold)}</td><td class="tags">{_given(each)}</td>'
        for each in worst
    ]
    about = "By row: most wrong and missing tags first."
    return _section("Worst cases", about, _table(["row", "should have", "got"], rows))


def _given(case: "Case") -> str:
    if case.refused is not None:
        return f'<span class="missing">refused: {escape(case.refused)}</span>'
    if case.confidence is None:
        return _tags(case.predicted)
    return _tags([f"{tag} {sure:.2f}" for tag, sure in zip(case.predicted, case.confidence, strict=True)])


def _tags(tags: Iterable[str]) -> str:
    return escape(", ".join(tags) or "(none)")


def _numbers(*numbers: int) -> str:
    return "".join(f'<td class="number">{number:,}</td>' for number in numbers)


def _table(heads: list[str], rows: list[str]) -> str:
    """Return a table; heads that begin with `#` are over numbers."""
    head = "".join(
        f'<th scope="col" class="number">{each[1:]}</th>' if each[0] == "#" else f'<th scope="col">{each}</th>'
        for each in heads
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _section(title: str, about: str, content: str) -> str:
    return f'<h2>{title}</h2>\n<p class="dim">{escape(about)}</p>\n<div class="wide">{content}</div>'
