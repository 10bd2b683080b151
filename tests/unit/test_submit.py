"""What the check of an input answers where the validator itself gives up."""

import pytest

from backcast.api.deps import Known, Version
from backcast.api.submit import check_input
from backcast.errors import InvalidInput
from backcast.models import TaskType
from backcast.targets.inputs import Inputs


def test_an_integer_that_can_not_be_divided_is_refused() -> None:
    schema = {"properties": {"amount": {"multipleOf": 0.5}}}
    task = TaskType(name="pay", pool="default", input_schema=schema)
    known = Known([Version(task, Inputs(schema))], 0)
    assert check_input(known, {"amount": 1.5}) == task
    with pytest.raises(InvalidInput, match="can't be checked"):
        check_input(known, {"amount": 10**400})
