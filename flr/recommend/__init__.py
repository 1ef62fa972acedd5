"""Recommendations: from names to queries, from queries to answers and their explanation."""
