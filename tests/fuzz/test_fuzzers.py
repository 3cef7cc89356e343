"""A few hundred cases of each fuzzer; minutes of them are a command away (fuzzing.py says how)."""

import importlib
import random
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("fuzz_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_kind_no_case_of_a_fuzzer_escapes(name):
    module = importlib.import_module(name)
    for number in range(module.NUM_QUICK_CASES):
        try:
            module.check(random.Random(number))
        except Exception as error:
            error.add_note(f"python tests/fuzz/{name}.py --only {number}")
            raise
