import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.core.errors import DataError
from ns.data.class_names import find_case_variants, match_indices, match_names, normalize_name, sort_class_names


@pytest.mark.parametrize(
    "text", ["Café", unicodedata.normalize("NFD", "Café"), " Café\t", "\ufeffCafé", "Café\r\n", "\xa0Café"]
)
def test_normalize_name_gives_one_identity(text):
    assert normalize_name(text) == "Café"


@given(st.text())
def test_normalize_name_is_idempotent(text):
    assert normalize_name(normalize_name(text)) == normalize_name(text)


@given(st.permutations([*map(str, range(25)), "b", "a", "B"]))
def test_numeric_class_names_have_their_own_number_as_index(names):
    assert sort_class_names(names) == [*map(str, range(25)), "B", "a", "b"]


def test_match_names_prefers_equal_case():
    classes = ("a", "A", "Dog", "caf\u00e9")
    matched, unknown = match_names(["A", "a", "DOG", "caf\u00e9", "emu", "CAF\u00c9"], classes)
    assert matched == {"A": 1, "a": 0, "DOG": 2, "caf\u00e9": 3, "CAF\u00c9": 3}
    assert unknown == ["emu"]
    assert match_names(["B"], ("b", "B "))[0] == {"B": 1}
    assert find_case_variants(["cat", "Dog", "dog"]) == ["Dog", "dog"]


def test_match_indices_takes_the_reading_that_fits():
    one_to_ten = [str(number) for number in range(1, 11)]
    assert match_indices("s", [0, 1, 9], one_to_ten) == {0: 0, 1: 1, 9: 9}
    assert match_indices("s", [1, 2, 10], one_to_ten) == {1: 0, 2: 1, 10: 9}
    assert match_indices("s", [1, 2], [str(number) for number in range(10)]) == {1: 1, 2: 2}
    assert match_indices("s", [1, 0], ["cat", "dog"]) == {0: 0, 1: 1}


@pytest.mark.parametrize(
    ("indices", "classes", "reason"),
    [
        ([2], ["cat", "dog"], r"class index 2: there are 2 labeled classes \(cat, dog\)"),
        ([0, 10], [str(number) for number in range(1, 11)], "class index 10: there are 10 labeled classes"),
        ([1, 2], ["1", "2", "3"], "class index 1: may be the class '2', at position 1 from 0 on, or the class '1'"),
    ],
)
def test_match_indices_refuses_what_may_be_wrong(indices, classes, reason):
    with pytest.raises(DataError, match=reason):
        match_indices("s", indices, classes)
