"""What is needed of a device: the CPU, CUDA, any accelerator of torch."""
