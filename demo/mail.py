"""An SMTP server on loopback that delivers nothing: each mail becomes a file."""

import email
import email.policy
import re
from asyncio import Server
from email.message import EmailMessage
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from demo.processes import LOOPBACK

SENDER = "tagger@example.com"


class MailCatcher:
    """Writes each mail as `NNN-subject.eml` into a folder, and its HTML part beside it as `NNN-subject.html`.

    It answers in a thread inside its `with` block, on a port that was free.
    """

    def __init__(self, folder: Path) -> None:
        """Describes the server; mails that are in the folder already stay."""
        self.folder = folder
        self._controller = _Controller(_Writer(folder), hostname=LOOPBACK, port=0)

    @property
    def airflow_connection(self) -> dict[str, Any]:
        """The Airflow connection of this server, for `smtp_default`."""
        extra = {"disable_ssl": True, "disable_tls": True, "from_email": SENDER}
        return {"conn_type": "smtp", "host": LOOPBACK, "port": self._controller.port, "extra": extra}

    def mails(self) -> list[EmailMessage]:
        """Return the mails in the order they came."""
        return [_parse(file.read_bytes()) for file in sorted(self.folder.glob("*.eml"))]

    def __enter__(self) -> Self:
        """Start answering."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._controller.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop listening."""
        self._controller.stop()


class _Controller(Controller):
    def _trigger_server(self) -> None:
        assert isinstance(self.server, Server)
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call]


class _Writer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        mail = _parse(envelope.content)
        number = sum(1 for _ in self._folder.glob("*.eml")) + 1
        name = f"{number:03}-{re.sub(r'[^a-z0-9]+', '-', str(mail['subject']).lower()).strip('-')[:80]}"
        html = mail.get_body(("html",))
        if html is not None:
            (self._folder / f"{name}.html").write_text(html.get_content(), encoding="utf-8")
        # renamed when it is whole, for others count and read the mails meanwhile
        part = self._folder / f"{name}.part"
        part.write_bytes(envelope.content)
        part.rename(self._folder / f"{name}.eml")
        return "250 Kept"


def _parse(raw: bytes) -> EmailMessage:
    return email.message_from_bytes(raw, policy=email.policy.default)
