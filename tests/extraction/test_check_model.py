import threading

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import check_model
from tests.helpers.models import lively


def test_a_model_that_cannot_be_copied_is_refused_before_anything_is_computed():
    model = lively()
    model.lock = threading.Lock()
    with pytest.raises(MoeeError, match="a model that can be copied"):
        check_model(model)
