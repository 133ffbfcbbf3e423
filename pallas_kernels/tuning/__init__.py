"""Settings of the kernels, found on the device at hand and kept in records."""
