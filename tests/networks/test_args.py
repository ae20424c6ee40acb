"""network_args: typed, all problems together, without torch."""

import subprocess
import sys

import pytest

from library.errors import UserError
from networks._args import LoraArgs, lora_args, neuron_dropout


def test_values_are_typed():
    args = lora_args({"conv_dim": "8", "conv_alpha": "0.5", "rank_dropout": "0.1", "module_dropout": "0"})
    assert args == LoraArgs(conv_dim=8, conv_alpha=0.5, rank_dropout=0.1, module_dropout=0.0)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError) as error:
        lora_args({"conv_dmi": "4"})
    assert error.value.problems[0].fix == 'did you mean "conv_dim"?'


def test_all_problems_come_together():
    with pytest.raises(UserError) as error:
        lora_args({"conv_dim": "x", "rank_dropout": "1.5", "module_dropout": "-1", "colour": "red"})
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ({"conv_dim": "0"}, "1 or more"),
        ({"conv_dim": "4.0"}, "whole number"),
        ({"conv_dim": "4", "conv_alpha": "-1"}, "or more"),
        ({"conv_alpha": "1"}, "without conv_dim"),
        ({"dropout": "1"}, "below 1"),
        ({"dropout": "nan"}, "below 1"),
    ],
)
def test_values_out_of_range_are_refused(args, what):
    with pytest.raises(UserError) as error:
        lora_args(args)
    assert what in error.value.problems[0].what


def test_dropout_given_twice_must_agree():
    assert neuron_dropout(LoraArgs(), None) == 0
    assert neuron_dropout(LoraArgs(), 0.25) == 0.25
    assert neuron_dropout(LoraArgs(dropout=0.5), 0.5) == 0.5
    with pytest.raises(UserError):
        neuron_dropout(LoraArgs(dropout=0.5), 0.25)


def test_checking_needs_no_torch():
    code = "import sys, networks._args; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
