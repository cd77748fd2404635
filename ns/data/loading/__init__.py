"""From shards to batches: reading, order, decoding, and the processes that do it.
It may import the rest of `data`, `config`, `storage` and `core`."""
