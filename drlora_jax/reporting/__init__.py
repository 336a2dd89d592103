"""The report of runs: read their logs, draw them, write one self-contained HTML page."""
