"""Reports on runs: reads their logs, draws them, and writes one self-contained HTML page."""
