"""Each operation beside its peers: ``python -m pallas_kernels.benchmarks.<op>``."""
