"""How runs are made: one run, many in parallel, on this machine or on a cluster."""
