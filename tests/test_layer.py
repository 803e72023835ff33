"""The layer against the float64 oracle: outputs, routing, losses and all gradients."""

import pytest

from tests import cases
from tests.layers import check_against_oracle


@pytest.mark.parametrize("index", range(40))
def test_random_layers_match_the_oracle(rng, index):
    check_against_oracle(cases.random_case(rng))
