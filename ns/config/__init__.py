"""The experiment: one validated object, its presets, how it is read, and the messages about what is wrong with it.
It may import `storage` and `core`."""
