"""Images: datasets and their shards, import, reading, augmentation, duplicates and leaks.
It may import `config`, `storage` and `core`; its `importing`, `loading` and `augment` may import the rest of it."""
