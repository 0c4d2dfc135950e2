"""What docs/alerts.md tells an operator to type: the commands exist, the SQL runs, the PromQL names what there is."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from jobs.settings import Settings
from migrations.__main__ import upgrade
from tests.deploy import promql
from tests.deploy.commands import check_stiefel
from tests.deploy.series import exported
from tests.deploy.test_rules import with_recorded

TEXT = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
# As it is typed: inline, where lines may be broken, or in a block.
TYPED = [
    " ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", TEXT, flags=re.S))
]


def test_every_command_of_stiefel_exists_with_its_options() -> None:
    commands = re.findall(r"^\s*(stiefel [^#\n]+)", TEXT, re.MULTILINE) + [c for c in TYPED if c.startswith("stiefel ")]
    assert len(commands) > 20
    for command in commands:
        check_stiefel(command)


def test_every_query_of_the_database_runs(postgresql: Callable[[], str]) -> None:
    url = postgresql()
    upgrade(url)
    queries = re.findall(r"""psql "\$DATABASE" -c (["'])(.+?)\1""", TEXT, re.DOTALL)
    assert len(queries) == TEXT.count("psql ") - 1 > 5  # one is without a query
    engine = create_engine(url)
    with engine.connect() as connection:
        for _, query in queries:
            connection.execute(text(query))
    engine.dispose()


def test_every_expression_of_promql_names_what_exists(tmp_path: Path) -> None:
    series = with_recorded(exported(tmp_path))
    expressions = [code for code in TYPED if re.search(r"\w:stiefel_|^sum|stiefel_\w+\{", code)]
    assert len(expressions) >= 4
    for expression in expressions:
        promql.labels_of(expression, series)


@pytest.mark.parametrize("setting", sorted(set(re.findall(r"STIEFEL_[A-Z_]+", TEXT))))
def test_every_setting_exists(setting: str) -> None:
    clients = {"STIEFEL_API", "STIEFEL_API_KEY"}
    assert setting in clients or setting.removeprefix("STIEFEL_").lower() in Settings.model_fields
