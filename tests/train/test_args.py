"""The command line of a training run."""

from dataclasses import fields

from rpd_sb3.algos import ALGOS
from rpd_sb3.train.__main__ import make_parser
from rpd_sb3.train.args import ALGORITHMS, AT_LEAST, MAY_CHANGE, TrainArgs


def test_the_light_list_of_algorithms_is_complete() -> None:
    assert tuple(ALGOS) == ALGORITHMS


def test_every_flag_is_a_field_and_every_field_a_flag() -> None:
    flags = {action.dest for action in make_parser()._actions} - {"help", "resume"}
    assert flags == set(TrainArgs.__dataclass_fields__)
    assert flags >= MAY_CHANGE | set(AT_LEAST)


def test_the_help_says_the_defaults() -> None:
    helps = {action.dest: action.help or "" for action in make_parser()._actions}
    for field in fields(TrainArgs):
        if type(field.default) in (int, str):
            assert helps[field.name].endswith(f"[{field.default}]")
