"""``python -m pallas_kernels.tuning``."""

from pallas_kernels.tuning.main import main

main()
