"""Runs as Ray jobs, over the cluster's HTTP interface.

runs.py       submit, list, status, logs, stop, and a run's own commands there
dashboard.py  the calls that a cluster's dashboard answers
pack.py       what a job needs beside its run file
publish.py    how a job shows its status.json
"""
