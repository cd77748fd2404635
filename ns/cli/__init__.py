"""The command line `ns`: a tree of commands, one file a group, with the tables that they print.
It may import all of `ns`, and starts pipelines by imports within functions."""
