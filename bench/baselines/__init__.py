"""Competitors: what users have today, written here at its best; only benchmarks and their tests import it."""
