"""Adapters on a frozen base: attach, switch off, save in PEFT's format (adapter.py, files.py), merge by hand (merge.py)."""
