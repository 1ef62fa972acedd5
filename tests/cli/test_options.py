"""Numbers that an option of a command does not take are refused by the name of its flag, before any work."""

import dataclasses
import importlib
import pkgutil

import numpy as np
import pytest

import flr.cli
from flr.cli.options import AugmentOptions, DataOptions
from flr.cli.sids import SidsOptions
from flr.data import HistoryViews, planted_dataset
from flr.sids.quantize import MAX_LEVELS
from tests.helpers.numbers import is_number, outside

#: These check their numbers themselves, or hand them to a class that does before any work.
ELSEWHERE = {"BatchOptions", "PlanOptions", "QuickstartOptions", "RayOptions"}


def option_classes():
    """Every class of options that a module of flr.cli defines and that has numbers."""
    for module in pkgutil.iter_modules(flr.cli.__path__):
        if module.name != "__main__":
            for value in vars(importlib.import_module(f"flr.cli.{module.name}")).values():
                own = isinstance(value, type) and value.__module__ == f"flr.cli.{module.name}"
                if own and dataclasses.is_dataclass(value) and value.__name__.endswith("Options") and numbers_of(value):
                    yield value


def numbers_of(options):
    return {name for name in options.__dataclass_fields__ if is_number(options, name)}


CLASSES = [options for options in option_classes() if options.__name__ not in ELSEWHERE]


def test_every_number_of_a_command_has_a_range():
    assert {"DataOptions", "AugmentOptions", "ModelOptions", "SidsOptions"} <= {c.__name__ for c in CLASSES}
    assert [c.__name__ for c in CLASSES if numbers_of(c) != set(c.numbers)] == []


@pytest.mark.parametrize(("options", "name"), [(c, name) for c in CLASSES for name in c.numbers])
def test_numbers_out_of_range_are_refused_by_the_flags_name(options, name):
    for value in outside(options.numbers[name]):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as error:
            options(**{name: value})
        assert str(error.value) == f"{name}: expected {options.numbers[name]}, got {value!r}"


def test_the_ranges_are_those_of_what_is_called():
    least = {name: int(DataOptions.numbers[f"planted_{name}"].low) for name in ("items", "users")}
    planted_dataset(num_items=least["items"], num_users=least["users"])
    for name in least:
        with pytest.raises(ValueError, match=f"num_{name}: expected at least {least[name]}"):
            planted_dataset(**{f"num_{part}": least[part] - (part == name) for part in least})
    assert SidsOptions.numbers["levels"].high == MAX_LEVELS
    for name, field in (("views_weight", "weight"), ("views_decay", "decay")):
        taken = DataOptions.numbers[name]
        for value in (taken.low, taken.high):
            if taken.takes(value):
                HistoryViews(**{field: value})
            else:
                with pytest.raises(ValueError, match=f"{field}: expected"):
                    HistoryViews(**{field: value})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(AugmentOptions) if f.name.startswith("augment_")])
def test_every_chance_of_a_variation_reaches_the_rows(name):
    dataset = planted_dataset(num_items=20, num_users=30)
    _, augment = AugmentOptions(**{name: 0.4}).apply(dataset, max_history=10)
    field = name.removeprefix("augment_")
    chances = [f.name for f in dataclasses.fields(augment) if f"augment_{f.name}" in AugmentOptions.numbers]
    assert {chance: getattr(augment, chance) for chance in chances} == {**dict.fromkeys(chances, 0.0), field: 0.4}


@pytest.mark.parametrize("option", [{"neighbour_content": 0.0}, {"neighbour_temperature": 0.3}])
def test_what_shapes_neighbours_reaches_them(option):
    dataset = planted_dataset(num_items=20, num_users=30)
    _, plain = AugmentOptions(augment_neighbour=0.4).apply(dataset, max_history=10)
    _, shaped = AugmentOptions(augment_neighbour=0.4, **option).apply(dataset, max_history=10)
    assert not np.allclose(plain.neighbours.cumulative, shaped.neighbours.cumulative)
