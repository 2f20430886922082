// Logits of any type, loaded and stored one by one or eight at a time.
#pragma once

#include "kd_row.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastdistill {
namespace {

constexpr int kPacket = 8;

// Which elements of a row a thread takes together: kPacket neighbours, or every step-th.
struct Packet {
  int first, step, end;
  __device__ int at(int i) const {
    return first + i * step;
  }
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T, typename A>
__device__ T narrow(A x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

// Calls body with a null pointer of the C++ type; a float problem has no double logits.
template <typename A, typename Body>
__device__ void with_type(Type type, const Body& body) {
  if (type == Type::kFloat)
    body(static_cast<float*>(nullptr));
  else if (type == Type::kBFloat16)
    body(static_cast<__nv_bfloat16*>(nullptr));
  else if (type == Type::kHalf)
    body(static_cast<__half*>(nullptr));
  else if constexpr (std::is_same_v<A, double>)
    body(static_cast<double*>(nullptr));
}

__device__ inline int bytes_of(Type type) {
  return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
}

__device__ inline const void* row_of(const void* logits, Type type, int64_t row, int64_t stride) {
  return static_cast<const char*>(logits) + row * stride * bytes_of(type);
}
__device__ inline void* row_of(void* logits, Type type, int64_t row, int64_t stride) {
  return static_cast<char*>(logits) + row * stride * bytes_of(type);
}

template <typename A>
__device__ A load_one(const void* row, Type type, int at) {
  A x = 0;
  with_type<A>(type, [&]<typename T>(T*) { x = widen(static_cast<const T*>(row)[at]); });
  return x;
}

template <int kSize, typename A, typename At>
__device__ void load_each(const void* row, Type type, A (&x)[kSize], int end, A padding, const At& at) {
  with_type<A>(type, [&]<typename T>(T*) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      x[i] = at(i) < end ? static_cast<A>(widen(static_cast<const T*>(row)[at(i)])) : padding;
  });
}

template <int kSize, typename A, typename At>
__device__ void store_each(void* row, Type type, const A (&x)[kSize], int end, const At& at) {
  with_type<A>(type, [&]<typename T>(T*) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (at(i) < end)
        static_cast<T*>(row)[at(i)] = narrow<T>(x[i]);
  });
}

template <typename T>
struct alignas(sizeof(T) * kPacket < 16 ? sizeof(T) * kPacket : 16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename A>
__device__ void load_packet(const void* row, Type type, const Packet& packet, A padding, A (&x)[kPacket]) {
  if (packet.step == 1 && packet.first + kPacket <= packet.end)
    with_type<A>(type, [&]<typename T>(T*) {
#pragma unroll
      for (int i = 0; i < kPacket; i += Pack<T>::kSize) {
        const auto pack = *reinterpret_cast<const Pack<T>*>(static_cast<const T*>(row) + packet.first + i);
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k)
          x[i + k] = widen(pack.values[k]);
      }
    });
  else
    load_each<kPacket>(row, type, x, packet.end, padding, [&](int i) { return packet.at(i); });
}

template <typename A>
__device__ void store_packet(void* row, Type type, const Packet& packet, const A (&x)[kPacket]) {
  if (packet.step == 1 && packet.first + kPacket <= packet.end)
    with_type<A>(type, [&]<typename T>(T*) {
#pragma unroll
      for (int i = 0; i < kPacket; i += Pack<T>::kSize) {
        Pack<T> pack;
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k)
          pack.values[k] = narrow<T>(x[i + k]);
        *reinterpret_cast<Pack<T>*>(static_cast<T*>(row) + packet.first + i) = pack;
      }
    });
  else
    store_each<kPacket>(row, type, x, packet.end, [&](int i) { return packet.at(i); });
}

} // namespace
} // namespace fastdistill
