"""Adapters on a frozen base: attach and switch off (adapter.py), save and load (files.py), merge by hand (merge.py)."""
