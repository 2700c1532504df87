"""Untrusted programs, held and judged."""
