"""Tries on the same held-out images: each pair of a teacher and a student that was compared on them is one.

store/tries/HELDOUT/PAIR/try.json       the pair; written before it is counted
store/tries/HELDOUT/PAIR/number.json    its number, which it keeps
"""

from ns.core.digest import digest_json, shorten_digest
from ns.storage import Store
from ns.storage.documents import JsonDocument, encode_json

TRIES = "store/tries"
RECORD, NUMBER = "try.json", "number.json"


class GateTry(JsonDocument):
    """A student that was compared with a teacher."""

    heldout: str
    """Digest of the held-out images that decided."""
    teacher: str
    student: str
    """Digests of the models."""


class TryNumber(JsonDocument):
    number: int
    """Tries on the same images up to this one, itself included; tries at the same time may have the same number."""


def number_try(root: Store, gate_try: GateTry) -> int:
    """The number of a try on its held-out images, from 1. The same try has the same number again.

    Each try is recorded before tries are counted. So the j-th that is recorded has a number of at least j, however many clients count at
    the same time, and wherever they are killed.
    """
    store = root.at(f"{TRIES}/{shorten_digest(gate_try.heldout)}")
    pair = shorten_digest(digest_json(gate_try.model_dump()))
    number_key = f"{pair}/{NUMBER}"
    recorded = TryNumber.find_file(store, number_key)
    if recorded is None:
        store.create(f"{pair}/{RECORD}", encode_json(gate_try.model_dump()))
        # The own record counts also if another client is writing it this instant, and it is listed only then.
        counted = TryNumber(number=len({f"{pair}/{RECORD}", *(key for key in store.list() if key.endswith(f"/{RECORD}"))}))
        # The first of several clients decides. What is there and cannot be read, is made again.
        if not store.create(number_key, encode_json(counted.model_dump())) and not TryNumber.find_file(store, number_key):
            counted.save_file(store, number_key)
        recorded = TryNumber.load_file(store, number_key)
    return recorded.number
