"""The benchmark: named workloads, every result checked against float64 before its speed is shown, rivals timed in turns in one process."""
