"""A database that goes away while a table is looked up."""

from dataclasses import replace

import psycopg

from demo.postgresql import PostgreSQL
from tagger.connections import database
from tagger.exceptions import Unreachable
from tagger.tables import connecting, reflect
from tests.databases import database_connection
from tests.fault_proxy import POSTGRESQL_ANSWERS, Fault, StreamProxy


def test_a_lost_connection_may_pass_and_is_of_no_weight_at_the_end(postgresql: PostgreSQL) -> None:
    with psycopg.connect(postgresql.airflow_uri, autocommit=True) as admin:
        admin.execute("CREATE TABLE IF NOT EXISTS there (id BIGINT PRIMARY KEY)")
    with StreamProxy(postgresql.database.port, POSTGRESQL_ANSWERS, "COMMIT") as proxy:
        through_proxy = replace(database_connection(postgresql.database), port=proxy.port)

        def look_up() -> str:
            try:
                with connecting(database("db", lambda _: through_proxy), "db") as connection:
                    reflect(connection, "there")
            except Unreachable:
                return "unreachable"
            return "done"

        assert look_up() == "done"
        outcomes = []
        for at in range(1, proxy.requests + 1):
            proxy.arm(Fault("reset", at))
            outcomes.append(look_up())

    lost = outcomes.index("done")
    assert outcomes == ["unreachable"] * lost + ["done"] * (len(outcomes) - lost)
    assert 0 < len(outcomes) - lost <= 2  # a rollback, and the goodbye
