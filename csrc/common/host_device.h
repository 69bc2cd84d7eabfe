// Functions of common/ that a CUDA kernel may call, too.
#pragma once

#ifndef GEMMA2_HOST_DEVICE
#ifdef __CUDACC__
#define GEMMA2_HOST_DEVICE __host__ __device__
#else
#define GEMMA2_HOST_DEVICE
#endif
#endif
