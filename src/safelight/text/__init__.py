"""Strings to token ids and weights."""
