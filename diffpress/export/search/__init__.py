"""What a search needs of engines: its trials' networks and latencies, the bundles of the front, and `recommend`."""
