"""Settings of a training check themselves, for the command line and for Python."""

import pytest

from deebert.training.strategies import TrainSettings
from deebert.utils.errors import InputError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0}, "learning_rate 0: give a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan: give a number above 0"),
        ({"highway_learning_rate": float("inf")}, "highway_learning_rate inf: give a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay -0.1: give a number from 0"),
        ({"per_gpu_train_batch_size": 0}, "per_gpu_train_batch_size 0: give a number from 1"),
        ({"distill": 1.5}, "distill 1.5: give a number from 0 up to 1"),
        ({"train_strategy": "tow_stage"}, "train_strategy tow_stage: choose one of two_stage, mixed, "),
    ],
)
def test_a_value_without_meaning_is_refused_by_the_name_of_its_field(values, message):
    with pytest.raises(InputError) as error:
        TrainSettings(**values)
    assert str(error.value).startswith(message)


def test_the_bounds_themselves_are_allowed():
    settings = TrainSettings(distill=1, weight_decay=0, per_gpu_train_batch_size=1, highway_learning_rate=None)
    assert (settings.distill, settings.highway_learning_rate) == (1, None)
