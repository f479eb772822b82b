"""Safelight and its peers side by side: ``python -m benchmarks.compare``.

`cases` says what is measured and what it costs, `weights` makes the models that all sides read,
`worker` is one side in a process of its own (`torch_sides`, `exported`, `cpp`), `driver` lets
the sides take turns, `report` makes the table and the gate, `plots` the pictures of the docs.
"""
