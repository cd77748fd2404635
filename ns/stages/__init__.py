"""The stages of the pipeline, each safe to kill and to run again; components call these and nothing else.
It may import all of `ns` but `cli`, `planning` and `promotion`."""
