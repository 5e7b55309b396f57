"""The pages as one file that needs no server and no other file: for a mail or a meeting."""

import base64
import hashlib
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from pydantic import AwareDatetime, BaseModel

from tagger.exceptions import InputError
from tagger.pages.data import DatasetPage

STATIC = Path(__file__).parent / "static"

_ROOT = "{{root}}"
_STYLE = re.compile(r'<link rel="stylesheet" href="static/([\w.-]+)">')
_SCRIPT = re.compile(r'<script src="\{\{root\}\}static/([\w.-]+)" defer></script>\n?')


class Data(BaseModel):
    """What the file shows: all days of these datasets."""

    generated_at: AwareDatetime
    datasets: list[DatasetPage]


def html(data: Data, static: Path = STATIC) -> str:
    """Return the page with its style, its scripts and its figures in it; nothing else can run or be loaded there."""
    shell = _read(static / "page.html")
    scripts = [_read(static / name) for name in _SCRIPT.findall(shell)]
    head, name, rest = _STYLE.split(_SCRIPT.sub("", shell).replace(_ROOT, ""))
    style = _read(static / name)
    policy = [
        "default-src 'none'",
        f"script-src {' '.join(map(_hash, scripts))}",
        f"style-src {_hash(style)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    body, end, tail = rest.rpartition("</body>")
    parts = [
        f'{head}<meta http-equiv="Content-Security-Policy" content="{"; ".join(policy)}">\n',
        f"<style>{style}</style>{body}",
        f'<script type="application/json" id="data">{_as_data(data)}</script>\n',
        # these do not wait for the page, as those do that are loaded: they stand behind what they need
        *(f"<script>{script}</script>\n" for script in scripts),
        end + tail,
    ]
    return "".join(parts)


def write_html(file: Path, data: Data, static: Path = STATIC) -> None:
    """Write the page; the file appears whole, or stays as it was.

    Raises:
        InputError: it cannot be written there.
    """
    write_whole(file, html(data, static))


def write_whole(file: Path, page: str) -> None:
    """Write a page that `--html` asks for; the file appears whole, or stays as it was.

    Raises:
        InputError: it cannot be written there.
    """
    file = file.resolve()
    part = file.with_name(f".{secrets.token_hex(8)}.part")
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"`--html {file}`: not a file that could be replaced; name another")
        part.write_text(page, encoding="utf-8", newline="\n")
        part.replace(file)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        why = os.strerror(e.errno) if e.errno else type(e).__name__
        raise InputError(f"`--html {file}`: {why}; name a file in a folder that is there and may be written") from None


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _hash(inline: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def _as_data(data: Data) -> str:
    """Return JSON that ends no element and begins no comment."""
    text = data.model_dump_json()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
