"""Images: datasets and their shards, import, reading, augmentation, duplicates and leaks. May import `config`, `storage` and `core`."""
