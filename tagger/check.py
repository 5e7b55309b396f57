"""`tagger check`: would a run of this dataset work? Nothing is asked that costs money."""

from collections.abc import Iterator
from contextlib import closing

import openai
import sqlalchemy as sa

from tagger.batch_api import BatchAPI
from tagger.clean import describe
from tagger.connections import Connections, database, openai_client
from tagger.dataset import Dataset
from tagger.exceptions import InputError, Unreachable
from tagger.mysql import check_rights
from tagger.plan import WITHOUT_LOCK
from tagger.price import price_of
from tagger.redis_connection import ping_redis, redis_client
from tagger.replica import missed_rows, takes_writes
from tagger.snapshot import SourceTable, database_time
from tagger.spec import spec_id
from tagger.storage import Storage
from tagger.tables import complete_target, connecting, create_target, existing_target, has_view, split_name


def check(dataset: Dataset, connections: Connections, *, create: bool = False) -> Iterator[str]:
    """Yield a line for each thing that is in order; with `create`, make the target table and the bucket.

    Raises:
        InputError: the first thing that is not.
    """
    yield f"spec {spec_id(dataset)}, {len(dataset.tags)} tags, {dataset.llm.model}"
    source = dataset.source
    with connecting(database(source.conn_id, connections), source.conn_id) as connection:
        ids = SourceTable(connection, dataset).id_type
        warnings = list(_source_warnings(connection, dataset))
    yield f"source {source.table}: there, its ids are {ids}"
    yield from (f"source {source.table}: {warning}" for warning in warnings)
    with connecting(database(dataset.target_conn_id, connections), dataset.target_conn_id) as connection:
        if not takes_writes(connection):
            raise InputError(
                f"`target.conn_id`: connection `{dataset.target_conn_id}` takes no writes (a replica?); it must name "
                "the primary"
            )
        if connection.dialect.name == "mysql":
            check_rights(connection, dataset.target_conn_id)
        for added in complete_target(connection, dataset.target.table, ids) if create else ():
            yield f"target {dataset.target.table}: {added} made"
        connection.commit()
        if existing_target(connection, dataset.target.table, ids) is not None:
            viewed = has_view(connection, dataset.target.table)
            without = f", but not its view {dataset.target.table}_effective; `--create` makes it"
            yield f"target {dataset.target.table}: there{'' if viewed else without}"
        elif create:
            create_target(connection, dataset.target.table, ids)
            connection.commit()
            yield f"target {dataset.target.table}: made"
        else:
            yield f"target {dataset.target.table}: missing; the first run makes it, or `--create`"
    made = Storage.connect(dataset.storage, dataset.storage_conn_id, connections).check(create=create)
    yield f"storage {dataset.storage}: {'made' if made else 'there'}"
    yield f"retention: {describe(dataset.retention)}"
    yield _check_llm(dataset, connections)
    by_batch = dataset.llm.mode == "batch"
    if by_batch:
        with closing(openai_client(dataset.llm.conn_id, connections)) as client:
            BatchAPI(client).check()
        yield "Batch API: there"
    price = price_of(dataset.llm, batch=by_batch)
    if price is None:
        yield f"price of {dataset.llm.model}: not known, so costs are not counted; `llm.price` sets it"
    else:
        line = f"price of {dataset.llm.model}: ${price.input:g} in, ${price.output:g} out per million tokens"
        yield line + (", by the Batch API" if by_batch else "")
    if dataset.lock is not None:
        with redis_client(dataset.lock.conn_id, connections) as redis:
            yield f"lock {dataset.lock.conn_id}: answers at {ping_redis(redis, dataset.lock.conn_id)}"
    else:
        yield WITHOUT_LOCK


def _source_warnings(connection: sa.Connection, dataset: Dataset) -> Iterator[str]:
    """Yield what costs time, or rows: no run fails for it."""
    source = dataset.source
    if source.updated_at is not None and _lacks_index(connection, source.table, source.updated_at):
        yield f"`{source.updated_at}` has no index, so each run reads the whole table"
    if missed := missed_rows(connection, dataset, database_time(connection)):
        yield missed


def _lacks_index(connection: sa.Connection, table: str, name: str) -> bool:
    """Return whether no index of a table finds rows by the values of a column.

    One that begins with the column does, unless it is a hash or of some rows only. False for a view, whose tables may
    have one, and on SQLite, where the window is no condition that an index serves.
    """
    inspector = sa.inspect(connection)
    schema, table_name = split_name(table)
    if connection.dialect.name == "sqlite" or table_name not in inspector.get_table_names(schema):
        return False
    firsts: list[list[str | None]] = [[*inspector.get_pk_constraint(table_name, schema)["constrained_columns"][:1]]]
    for index in inspector.get_indexes(table_name, schema):
        options = index.get("dialect_options", {})
        if not options.get("postgresql_where") and options.get("postgresql_using") != "hash":
            firsts.append(index["column_names"][:1])
    return [name] not in firsts


def _check_llm(dataset: Dataset, connections: Connections) -> str:
    """Ask for the list of models, which is free; servers without one are taken at their word."""
    client = openai_client(dataset.llm.conn_id, connections)
    endpoint = f"LLM endpoint {client.base_url}"
    try:
        known = {model.id for model in client.models.list()}
    except (openai.AuthenticationError, openai.PermissionDeniedError) as e:
        raise InputError(f"{endpoint} refuses the API key (HTTP {e.status_code})") from None
    except openai.APIConnectionError as e:
        raise Unreachable(f"{endpoint} does not answer ({type(e.__cause__ or e).__name__})") from None
    except openai.OpenAIError:
        return f"{endpoint}: answers, but lists no models"
    if known and dataset.llm.model not in known:
        raise InputError(f"{endpoint} has no model `{dataset.llm.model}`: see `llm.model`")
    return f"{endpoint}: answers, and has {dataset.llm.model}"
