"""Where and how networks run: device and dtype, attention, captured graphs, kernels, memory."""
