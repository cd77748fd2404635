"""From folders, tables, tars and archives to datasets.
It may import the rest of `data`, `config`, `storage` and `core`."""
