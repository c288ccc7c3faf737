"""Data sets and prompts."""
