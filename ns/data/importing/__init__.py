"""Makes datasets of folders, tables, tars and archives."""
