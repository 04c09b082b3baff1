"""Every worker, and the broker, killed at every stage of a job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.matrix import Cell, Matrix, cells_of, open_matrix

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with open_matrix(tmp_path_factory.mktemp("matrix"), "a", "b", "z") as matrix:
        yield matrix


@pytest.fixture
def matrix(federation: Matrix) -> Iterator[Matrix]:
    yield federation
    federation.quiet()


@pytest.mark.parametrize("cell", cells_of("guest worker", "host worker", "arbiter worker", "broker"))
def test_a_worker_or_the_broker_is_killed(matrix: Matrix, cell: Cell) -> None:
    matrix.run(cell)


def test_the_records_of_all_of_it_hold(matrix: Matrix) -> None:
    matrix.check_records()
