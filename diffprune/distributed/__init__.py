"""The only home of Ray: cells over workers, training over workers, jobs on a cluster."""
