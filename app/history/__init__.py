"""Histories: recorded by app.record, finished from the stores, judged."""
