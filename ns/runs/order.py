"""The order of a root's runs, and of the students that its gates accepted: by numbers, since the clocks of machines differ.

store/order/runs/000000012-NAME          taken when a run begins
store/order/accepted/000000003-STUDENT   taken when a gate first accepts a student
"""

import re
from typing import Literal
from urllib.parse import quote, unquote

from ns.storage import Store

ORDER_PREFIX = "store/order/"
OrderedKind = Literal["runs", "accepted"]


def take_number(root: Store, kind: OrderedKind, name: str) -> None:
    """Gives a name the next number, unless it has one. Two that come at the same instant may get the same number; their names decide."""
    numbers = read_numbers(root, kind)
    if name not in numbers:
        number = max((number for number, _ in numbers.values()), default=0) + 1
        root.put(f"{ORDER_PREFIX}{kind}/{number:09d}-{quote(name, safe='')}", b"")


def read_numbers(root: Store, kind: OrderedKind) -> dict[str, tuple[int, str]]:
    """Name → its place in the order, to be compared. What was there before there were numbers has none: take it for the earliest."""
    numbers: dict[str, tuple[int, str]] = {}
    prefix = f"{ORDER_PREFIX}{kind}/"
    for key in root.list(prefix):
        if match := re.fullmatch(r"(\d{1,18})-(.+)", key.removeprefix(prefix)):
            name = unquote(match[2])
            # Of two numbers of one name, as two clients may give it, the first counts: keys come in order.
            numbers.setdefault(name, (int(match[1]), name))
    return numbers
