"""The experiment: one validated object, its presets, and the messages about what is wrong with it.
It may import `storage` and `core`."""
