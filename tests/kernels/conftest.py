"""Fixtures of the kernels' tests."""

import pytest
from mosaic_checks import RACE


@pytest.fixture
def no_races(capsys):
    yield
    assert RACE not in capsys.readouterr().out
