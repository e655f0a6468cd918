"""Benchmarks of compresskit, through its public names only: `python -m benchmarks run SUITE`, `report`, `list`.

A suite is a TOML file in `suites/`, a kind of experiment a file in `experiments/`, a result a committed JSON file
in `results/<suite>/`. Each experiment runs in a process of its own, so that its peak memory is its own. No module
here imports torch before an experiment runs: a process starts with the peak of the one that it was started from.
"""
