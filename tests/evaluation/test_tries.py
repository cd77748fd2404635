import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest

from ns.evaluation.tries import NUMBER, RECORD, TRIES, GateTry, number_try
from ns.storage import LocalStore


def make_try(number: int, heldout: str = "h" * 64) -> GateTry:
    return GateTry(heldout=heldout, teacher="t", student=str(number))


def test_number_try_counts_pairs_per_heldout_images(tmp_path):
    root = LocalStore(tmp_path)
    assert [number_try(root, make_try(number)) for number in (0, 1, 0, 2, 1)] == [1, 2, 1, 3, 2]
    assert number_try(root, make_try(0, heldout="i" * 64)) == 1
    assert number_try(root, GateTry(heldout="h" * 64, teacher="u", student="0")) == 4
    # The digests are in the record, for people.
    records = [GateTry.load_file(root, key) for key in root.list(f"{TRIES}/") if key.endswith(RECORD)]
    assert sorted((record.teacher, record.student) for record in records) == [
        ("t", "0"), ("t", "0"), ("t", "1"), ("t", "2"), ("u", "0")
    ]  # fmt: skip


class _KilledStore(LocalStore):
    """Fails at the n-th write."""

    writes = 0

    def at(self, key_or_uri):
        store = _KilledStore(self.root / key_or_uri)
        store.writes = self.writes
        return store

    def create(self, key, data):
        self.writes -= 1
        if self.writes < 0:
            raise KeyboardInterrupt
        return super().create(key, data)


@pytest.mark.parametrize("writes", [0, 1])
def test_number_try_after_a_kill(tmp_path, writes):
    root, killed = LocalStore(tmp_path), _KilledStore(tmp_path)
    killed.writes = writes
    with pytest.raises(KeyboardInterrupt):
        number_try(killed, make_try(0))
    assert number_try(root, make_try(1)) == 1 + writes
    # The try that was killed is counted once, however often it is made.
    assert number_try(root, make_try(0)) == 2
    assert number_try(root, make_try(2)) == 3


def test_number_try_after_a_number_was_lost(tmp_path):
    root = LocalStore(tmp_path)
    assert [number_try(root, make_try(number)) for number in (0, 1)] == [1, 2]
    (lost,) = (key for key in root.list(f"{TRIES}/") if key.endswith(NUMBER) and b"1" in root.get(key))
    root.put(lost, b"")
    # It counts as the last of those that are there: no level is used twice that was too lenient.
    assert [number_try(root, make_try(number)) for number in (0, 1, 0)] == [2, 2, 2]


def _count(arguments):
    path, numbers = arguments
    return [number_try(LocalStore(path), make_try(number)) for number in numbers]


def test_number_try_of_clients_at_once(tmp_path):
    """Four processes make the same 12 tries, and 12 of their own each. Sorted, the j-th number is at least j, so that the levels of all
    tries sum to no more than that of one; and nobody gets another number for the same try."""
    shared = list(range(12))
    jobs = [(tmp_path, [*shared, *range(100 * client, 100 * client + 12)]) for client in range(1, 5)]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_count, jobs)
    assert all(result[:12] == results[0][:12] for result in results)
    numbers = sorted(results[0][:12] + [number for result in results for number in result[12:]])
    assert len(numbers) == 60
    assert all(number >= place for place, number in enumerate(numbers, 1))
    assert numbers[-1] == 60
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(_count, jobs))
    assert again == results
    assert sum(key.endswith(NUMBER) for key in LocalStore(tmp_path).list(f"{TRIES}/")) == 60


def test_number_try_while_another_client_writes_the_same_record(tmp_path, monkeypatch):
    """S3 answers with 409 while the other's put is under way: nothing was written, and nothing is listed yet."""
    root, create = LocalStore(tmp_path), LocalStore.create
    assert number_try(root, make_try(0)) == 1
    monkeypatch.setattr(LocalStore, "create", lambda store, key, data: key.endswith(NUMBER) and create(store, key, data))
    assert number_try(root, make_try(1)) == 2
