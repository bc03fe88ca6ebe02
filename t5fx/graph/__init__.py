"""Graphs as the pass reads them: one name for each operator, values instead of writes."""
