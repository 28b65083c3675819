"""GPU kernels in Triton. Importing this package imports neither triton nor torch, and touches no device."""
