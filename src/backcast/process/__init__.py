"""The frame of every process: its log, its signals, its probes, and how it outlasts an outage."""
