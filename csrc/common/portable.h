#pragma once

// HF_INLINE: small functions that the host also calls. HF_BODY: what runs inside a kernel.
#ifdef __CUDACC__
#define HF_INLINE __host__ __device__ __forceinline__
#define HF_BODY __device__ __forceinline__
#define HF_UNROLL _Pragma("unroll")
#else
#define HF_INLINE inline __attribute__((always_inline))
#define HF_BODY HF_INLINE
#define HF_UNROLL _Pragma("GCC unroll 8")
#endif
