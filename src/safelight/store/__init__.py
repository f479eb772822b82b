"""Bytes to objects and back: weights, folders, single files, hub ids, pictures."""
