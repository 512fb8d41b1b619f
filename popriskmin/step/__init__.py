"""One step of PRM on lists of tensors: the loop that states the mathematics, foreach, and the fused kernels."""
