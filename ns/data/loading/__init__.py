"""Makes batches of shards: reading, order, decoding, and worker processes."""
