"""What tests and benchmarks share: the tolerance rule, and counters of work and memory."""
