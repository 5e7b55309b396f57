"""Sends mails through Airflow's SMTP connection, with the provider's hook."""

import logging
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from smtplib import SMTPServerDisconnected
from typing import Any

from airflow.providers.smtp.hooks.smtp import SmtpHook
from airflow.sdk.exceptions import AirflowException

from tagger.airflow.connections import connections_from_airflow
from tagger.airflow.mails import Mail, email_conn_id, mails_off
from tagger.connections import Connection

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10
RETRY_LIMIT = 1
"""Where the connection sets none: the provider's 30 s and 5 would hold a worker for three minutes."""


def send(mail: Mail, to: list[str]) -> None:
    """Send a mail, or log in one line why it is not sent. With an SMTP server that hangs this takes a while."""
    if off := mails_off(to, connections_from_airflow):
        logger.warning("%s", off)
    connection = connections_from_airflow(email_conn_id())
    if not to or connection is None:
        return
    sender = _sender(connection)
    if sender is None:
        logger.error(
            "alerts: no mail is sent: connection `%s` has no `from_email` in its extra, and its login is no address",
            connection.conn_id,
        )
        return
    hook = _Hook(connection.conn_id, mail.text)
    try:
        hook.get_conn()
        hook.send_email_smtp(
            to=to,
            subject=mail.subject,
            html_content=mail.html,
            from_email=sender,
            mime_subtype="alternative",
            custom_headers={"Auto-Submitted": "auto-generated"},
        )
    except Exception as e:  # of sockets, TLS, smtplib, OAuth; their messages may show what should not be seen
        logger.error("alerts: no mail is sent: %s: %s", _address(connection), _kind(e))
    else:
        logger.info("alerts: mailed “%s” to %s", mail.subject, ", ".join(to))
    finally:
        hook.close()


class _Hook(SmtpHook):
    """The provider's hook, which makes mails of HTML alone, with the plain text before it; and with less patience."""

    def __init__(self, conn_id: str, text: str) -> None:
        super().__init__(conn_id)
        self._text = text

    @property
    def timeout(self) -> int:
        return int(self.conn.extra_dejson.get("timeout", TIMEOUT_SECONDS))

    @property
    def smtp_retry_limit(self) -> int:
        return int(self.conn.extra_dejson.get("retry_limit", RETRY_LIMIT))

    def close(self) -> None:
        """Close the connection, also one whose login failed, which the provider leaves open."""
        if self._smtp_client is not None:
            self._smtp_client.close()

    def _build_mime_message(self, *args: Any, **kwargs: Any) -> tuple[MIMEMultipart, list[str]]:
        message, recipients = super()._build_mime_message(*args, **kwargs)
        html = message.get_payload()
        message.set_payload([MIMEText(self._text, "plain", "utf-8"), *html])
        return message, recipients


def _sender(connection: Connection) -> str | None:
    login = connection.login or ""
    return connection.extra.get("from_email") or (login if "@" in login else None)


def _address(connection: Connection) -> str:
    default = 25 if connection.extra.get("disable_ssl") else 465
    return f"{connection.host}:{connection.port or default}"


def _kind(error: BaseException) -> str:
    """Return the kind of an error, with the server's code if it has one; never its message."""
    while isinstance(error, AirflowException | SMTPServerDisconnected) and error.__context__ is not None:
        error = error.__context__  # smtplib and the provider hide a timeout so
    code = getattr(error, "smtp_code", None)
    return type(error).__name__ if code is None else f"{type(error).__name__} {code}"
