"""A simulated mesh of production nodes: clock, network, disks and executors from one seed; faults; laws."""
