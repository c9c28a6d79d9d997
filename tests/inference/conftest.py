"""Random models as fixtures."""

import pytest
from inference_models import CONFIGS, Model, make_model


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request) -> Model:
    """A model of each family."""
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama() -> Model:
    """A model of the commonest family, for what does not depend on the family."""
    return make_model(CONFIGS["llama"])
