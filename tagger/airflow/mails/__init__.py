"""Mails about runs: what they say, as plain text and as HTML, and the connection they go through.

Importable without Airflow, so that `tagger check` can tell whether mails would go out.
"""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

from tagger.connections import Connections

if TYPE_CHECKING:
    from jinja2 import Environment

    from tagger.report import ErrorCount

DEFAULT_CONN_ID = "smtp_default"


@dataclass(frozen=True)
class Mail:
    """What a mail tells of a run.

    `facts` and `counts` are labels with what stands beside them; `errors` is the summary's, `drift`
    a line for each share that jumped. `url` is a page of
    Airflow's UI, and `page` what is to be seen there.
    """

    dataset: str
    day: str
    headline: str
    tone: Literal["failure", "warning"]
    message: str
    facts: Mapping[str, str]
    next_step: str
    page: str
    url: str
    counts: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, "ErrorCount"] = field(default_factory=dict)
    drift: Sequence[str] = ()

    @property
    def subject(self) -> str:
        """The subject, in one line."""
        return " ".join(f"[tagger] {self.dataset}, {self.day}: {self.headline}".split())

    @property
    def text(self) -> str:
        """The mail as plain text."""
        return _templates().get_template("mail.txt").render(mail=self)

    @property
    def html(self) -> str:
        """The mail as HTML, without external resources."""
        return _templates().get_template("mail.html").render(mail=self)


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("tagger.airflow", "mails"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def email_conn_id() -> str:
    """Return the id of the connection that mails go through: Airflow's `[email] email_conn_id`, or its variable's."""
    if "airflow" in sys.modules:  # outside Airflow, to import it for this alone would take seconds
        from airflow.sdk.configuration import conf

        return str(conf.get("email", "email_conn_id", fallback=DEFAULT_CONN_ID))
    return os.environ.get("AIRFLOW__EMAIL__EMAIL_CONN_ID", DEFAULT_CONN_ID)


def mails_off(to: Collection[str], connections: Connections) -> str | None:
    """Return the line that says why no mail goes out, though there are recipients; None where nothing is amiss."""
    conn_id = email_conn_id()
    if not to or connections(conn_id) is not None:
        return None
    return f"alerts: mails are off: no connection `{conn_id}`"
