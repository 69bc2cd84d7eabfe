"""Our kernels inside other libraries: each module is imported only by those whom it serves."""
