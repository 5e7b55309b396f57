"""The tagging pages in Airflow's UI: one in its navigation, and a tab at each run of a DAG."""

import logging
from functools import cached_property
from typing import Any
from urllib.parse import quote

from airflow.plugins_manager import AirflowPlugin

logger = logging.getLogger(__name__)

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="{}" stroke="{}" stroke-width="2" '
    'stroke-linecap="round" stroke-linejoin="round"><path d="M3 4v7.2L12.6 21 21 12.6 11.2 3H4a1 1 0 0 0-1 1z"/>'
    '<circle cx="7.5" cy="7.5" r=".9"/></svg>'
)


def _icon(fill: str, stroke: str) -> str:
    return f"data:image/svg+xml,{quote(ICON.format(fill, stroke))}"


class TaggingPlugin(AirflowPlugin):
    """What `tagger.airflow.pages` has, where Airflow looks for it. Addresses are relative to Airflow's own."""

    name = "tagging"
    external_views = [  # noqa: RUF012 - Airflow's own attribute
        {
            "name": "Tagging",
            "href": href,
            "destination": destination,
            "url_route": url_route,
            "nav_top_level": destination == "nav",
            "icon": _icon("#fff", "#3f3f46"),
            "icon_dark_mode": _icon("none", "#e4e4e7"),
        }
        for href, destination, url_route in (
            ("tagger/", "nav", "tagging"),
            ("tagger/run/{DAG_ID}/{RUN_ID}", "dag_run", "tagging_run"),
        )
    ]

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The app, imported where it is asked for: in the API server, while every process loads the plugins."""
        try:
            from tagger.airflow.pages import app
        except Exception:  # Airflow itself must start
            logger.exception("the tagging pages are not served")
            return []
        return [{"name": "tagging", "url_prefix": "/tagger", "app": app}]
