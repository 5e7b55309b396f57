"""The tagging pages in Airflow's UI, and the API behind them: what the API server serves below `/tagger`.

Every route wants a logged-in user, and those of a DAG one who may read its runs. Nothing is written, and there is no
text to be seen: rollups, plans, summaries and the books of shards have none.
"""

import re
from collections.abc import Collection
from datetime import date, datetime
from pathlib import Path as FilePath
from typing import Annotated, Any

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, get_user, requires_access_dag
from airflow.models.dag import DagModel
from airflow.utils.session import create_session
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, Field
from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import tagger.pages
from tagger import __version__
from tagger.airflow.dataset_pages import DAYS_SHOWN, MOST_DAYS, DatasetPages
from tagger.airflow.page_storage import Readers
from tagger.airflow.run_page import RunPage, RunPages
from tagger.airflow.tagged_dags import (
    AirflowRun,
    airflow_run,
    airflow_runs,
    tag_tasks,
    tagged_dag_ids,
    tagged_dags,
    where_of,
)
from tagger.exceptions import InputError
from tagger.pages.data import Card, DatasetPage

DESCRIPTION = """What each dataset costs, what the cache saves, which tags move and which rows failed: as JSON, for the
pages in Airflow's UI and for others. Everything is read, nothing written, and no text of a source table is in any
answer.

Money is in USD, days are dates of the dataset's time zone, `null` is what is not known. Log in as for Airflow's own
API: `POST /auth/token`, then `Authorization: Bearer …`."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

STATIC = FilePath(tagger.pages.__file__).parent / "static"
STATIC_NAMES = frozenset(file.name for file in STATIC.iterdir() if file.suffix in {".css", ".js"})

FIRST_DAY, LAST_DAY = date(2000, 1, 1), date(2199, 12, 31)


class Secured:
    """Sets the security headers of every answer, errors too; what allows no other caching is not to be stored."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_secured)


class Datasets(BaseModel):
    """The datasets that the user may read."""

    datasets: list[Card] = Field(description="By DAG id.")


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str


def _iso_day(value: str) -> date:
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        day = date.fromisoformat(value)
        if FIRST_DAY <= day <= LAST_DAY:
            return day
    raise ValueError(f"expected a day from {FIRST_DAY} to {LAST_DAY}, such as 2026-11-30")


IsoDay = Annotated[date, BeforeValidator(_iso_day)]
PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
"""The tab is there at the runs of all DAGs, whatever their names. Databases take no NUL."""

DagId = Annotated[str, Path(max_length=250, pattern=PRINTABLE, description="The DAG of the dataset.")]
RunId = Annotated[str, Path(max_length=250, pattern=PRINTABLE, description="The run, as Airflow calls it.")]

READS_RUNS = [Depends(requires_access_dag("GET", DagAccessEntity.RUN))]
NO_USER: dict[int | str, dict[str, Any]] = {401: {"model": Refusal, "description": "Nobody is logged in."}}
REFUSALS: dict[int | str, dict[str, Any]] = NO_USER | {
    403: {"model": Refusal, "description": "The user may not read the runs of this DAG."},
    404: {"model": Refusal, "description": "There is no such DAG with the tag `tagger`, or no such run."},
    422: {"model": Refusal, "description": "A parameter is not as described."},
}

api = FastAPI(
    title="tagger",
    version=__version__,
    description=DESCRIPTION,
    dependencies=[Depends(get_user)],
    servers=[{"url": ".", "description": "Below Airflow's own address."}],
    openapi_url=None,  # FastAPI would show it to everybody
    docs_url=None,
    redoc_url=None,
    redirect_slashes=False,
)
app = Secured(api)

_static = StaticFiles(directory=STATIC)
_readers = Readers()
_datasets, _runs = DatasetPages(_readers), RunPages(_readers)


@api.get("/", include_in_schema=False)
def overview() -> HTMLResponse:
    """Return the shell of the overview and of the datasets' pages."""
    return _shell("")


@api.get("/run/{dag_id}/{run_id}", include_in_schema=False, dependencies=READS_RUNS)
def run_tab(dag_id: DagId, run_id: RunId) -> HTMLResponse:
    """Return the shell of a run's tab; the data tell whether there is such a run."""
    return _shell("../../")


@api.get("/static/{name}", include_in_schema=False)
async def static(name: str, request: Request) -> Response:
    """Return a file of the pages."""
    if name not in STATIC_NAMES:
        raise HTTPException(404, "no such file")
    response = await _static.get_response(name, request.scope)
    response.headers["Cache-Control"] = "private, no-cache"  # to be asked for again, and mostly not sent again
    return response


@api.get("/openapi.json", include_in_schema=False)
def openapi() -> JSONResponse:
    """Return the description of this API."""
    return JSONResponse(api.openapi())


@api.get("/api/v1/datasets", summary="All datasets", responses=NO_USER)
def datasets(user: GetUserDep) -> Datasets:
    """Return a card for each dataset whose runs the user may read.

    What could not be read of one is told in its `problem`, and the others are not affected.
    """
    with create_session(scoped=False) as session:
        tagged = tagged_dag_ids(session)
    readable = _readable(tagged, user)  # by sessions of Airflow's own: a request needs one connection at a time
    with create_session(scoped=False) as session:
        found = tagged_dags(session, readable)
    return Datasets(datasets=_datasets.cards(found))


@api.get("/api/v1/datasets/{dag_id}", summary="One dataset", responses=REFUSALS, dependencies=READS_RUNS)
def dataset(
    dag_id: DagId,
    start: Annotated[
        IsoDay | None, Query(description=f"The first day; by default, so that there are {DAYS_SHOWN} days.")
    ] = None,
    end: Annotated[
        IsoDay | None,
        Query(description=f"The last day, included; by default today. At most {MOST_DAYS:,} days after the first."),
    ] = None,
) -> DatasetPage:
    """Return what happened to a dataset on each of these days, and its runs."""
    with create_session(scoped=False) as session:
        found = tagged_dags(session, [dag_id])
    if not found:
        raise _no_dag(dag_id)

    def runs_of(since: datetime, until: datetime) -> list[AirflowRun]:
        with create_session(scoped=False) as session:
            return airflow_runs(session, dag_id, since, until)

    try:
        return _datasets.page(found[0], start, end, runs_of)
    except InputError as e:
        raise HTTPException(422, str(e)) from None


@api.get("/api/v1/datasets/{dag_id}/runs/{run_id}", summary="One run", responses=REFUSALS, dependencies=READS_RUNS)
def run(dag_id: DagId, run_id: RunId) -> RunPage:
    """Return a run's summary, how far its shards are, and which rows failed.

    While it runs, a shard's figures are at most some ten seconds old.
    """
    with create_session(scoped=False) as session:
        if dag_id not in tagged_dag_ids(session):
            raise _no_dag(dag_id)
        known = airflow_run(session, dag_id, run_id)
        tasks, where = tag_tasks(session, dag_id, run_id), where_of(session, dag_id, run_id)
    if known is None:
        raise HTTPException(404, f"DAG `{dag_id}` has no run `{run_id}`: Airflow forgot it, or it ran without Airflow")
    return _runs.page(dag_id, known, tasks, where)


@api.exception_handler(RequestValidationError)
def refused(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say in one line what is wrong with a parameter."""
    wrong = error.errors()[0]
    message = str(wrong["msg"]).removeprefix("Value error, ")
    return JSONResponse({"detail": f"`{wrong['loc'][-1]}`: {message}"}, 422)


def _shell(root: str) -> HTMLResponse:
    """Return the page; `root` is the way from its address to that of this app."""
    return HTMLResponse((STATIC / "page.html").read_text(encoding="utf-8").replace("{{root}}", root))


def _readable(dag_ids: Collection[str], user: Any) -> set[str]:
    """Return the DAGs whose runs a user may read."""
    manager, teams = get_auth_manager(), DagModel.get_dag_id_to_team_name_mapping(list(dag_ids))
    return {
        dag_id
        for dag_id in dag_ids
        if manager.is_authorized_dag(
            method="GET",
            access_entity=DagAccessEntity.RUN,
            details=DagDetails(id=dag_id, team_name=teams.get(dag_id)),
            user=user,
        )
    }


def _no_dag(dag_id: str) -> HTTPException:
    return HTTPException(404, f"no DAG `{dag_id}` with the tag `tagger`")
