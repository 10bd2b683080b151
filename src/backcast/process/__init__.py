"""The frame of every process: its log, signals, probes and retries."""
