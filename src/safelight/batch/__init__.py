"""A file of requests into a folder of pictures, which can be killed anywhere and run again.

`table` reads the file, `rows` understands a row, `window` keeps the engine full, `keeper` writes
what it makes and `ledger` remembers it; `runner` is the story. `onray` makes the same on many
machines.
"""
