"""Every service, killed at every stage of a job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.matrix import Cell, Matrix, cells_of, open_matrix, toy_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with open_matrix(tmp_path_factory.mktemp("matrix"), "a", "b", "z") as matrix:
        yield matrix


@pytest.fixture
def matrix(federation: Matrix) -> Iterator[Matrix]:
    yield federation
    federation.quiet()


def test_nobody_is_killed(matrix: Matrix) -> None:
    views = matrix.succeeded(matrix.submit(toy_job()), toy_job())
    assert [view["restarts"] for view in views.values()] == [0, 0, 0]


@pytest.mark.parametrize("cell", cells_of("guest service", "host service", "arbiter service", "database"))
def test_a_service_is_killed(matrix: Matrix, cell: Cell) -> None:
    matrix.run(cell)


def test_the_records_of_all_of_it_hold(matrix: Matrix) -> None:
    matrix.check_records()
