"""Whole runs: what the next day costs, and what is left in the target."""

from tests.project import Project


def test_second_run_over_the_same_rows_asks_nothing(project: Project) -> None:
    project.put(1, "apple pie")
    project.put(2, "a zebra in the rain")

    first, second = project.run(), project.run()

    assert (first.tagged, first.cached, first.llm_requests) == (2, 0, 2)
    assert (second.tagged, second.cached, second.llm_requests) == (0, 2, 0)
    assert {row_id: row.tags for row_id, row in project.target().items()} == {1: ["fruit"], 2: ["animal", "weather"]}
