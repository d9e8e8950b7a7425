"""GPU kernels: tensors in, tensors out, no autograd. Importing this package imports neither Triton nor a driver."""
