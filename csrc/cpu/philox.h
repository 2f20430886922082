// Random numbers by their place: Philox4x32 (Salmon et al. 2011), of seven rounds, with which it passes BigCrush.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace fastdistill {
inline namespace CPU_CAPABILITY {

// The least number that dropout keeps.
inline uint32_t least_kept(double p) {
  return static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0));
}

// Four numbers of 32 bits for each of N counters (low + n, high), n from 0 on.
template <int N>
std::array<std::array<uint32_t, N>, 4> philox(uint64_t seed, uint64_t low, uint64_t high) {
  std::array<std::array<uint32_t, N>, 4> c;
  for (int n = 0; n < N; ++n) {
    c[0][n] = static_cast<uint32_t>(low + n);
    c[1][n] = static_cast<uint32_t>((low + n) >> 32);
    c[2][n] = static_cast<uint32_t>(high);
    c[3][n] = static_cast<uint32_t>(high >> 32);
  }
  auto first = static_cast<uint32_t>(seed), second = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round, first += 0x9E3779B9u, second += 0xBB67AE85u)
    for (int n = 0; n < N; ++n) {
      const uint64_t a = uint64_t{0xD2511F53u} * c[0][n], b = uint64_t{0xCD9E8D57u} * c[2][n];
      c[0][n] = static_cast<uint32_t>(b >> 32) ^ c[1][n] ^ first;
      c[1][n] = static_cast<uint32_t>(b);
      c[2][n] = static_cast<uint32_t>(a >> 32) ^ c[3][n] ^ second;
      c[3][n] = static_cast<uint32_t>(a);
    }
  return c;
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
